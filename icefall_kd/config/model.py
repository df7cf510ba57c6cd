"""Options of the models."""

from dataclasses import dataclass, field
from typing import Literal

from icefall_kd.config.checks import at_least
from icefall_kd.errors import ConfigError

# Named encoder sizes: layers, dim, heads, feed-forward dim, convolution kernel.
ENCODER_SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (6, 144, 4, 576, 15),
    "small": (12, 144, 4, 576, 31),
    "medium": (12, 256, 4, 1024, 31),
    "large": (12, 512, 8, 2048, 31),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The student: Conformer encoder, stateless decoder, joiner, optional CTC head."""

    encoder: Literal["conformer", "hubert"] = "conformer"
    """--system mvq: hubert, the encoder of --structure and --front-end instead (whole utterances, frames of 20 ms),
    which --init-from a pre-trained or distilled HuBERT model initialises; other systems have one kind."""
    encoder_size: Literal["tiny", "small", "medium", "large"] = "medium"
    """Named size; the overrides below replace single numbers of it."""
    num_encoder_layers: int | None = None
    """Override of the number of layers."""
    encoder_dim: int | None = None
    """Override of the model dimension."""
    num_heads: int | None = None
    """Override of the attention heads."""
    feedforward_dim: int | None = None
    """Override of the feed-forward dimension."""
    cnn_kernel: int | None = None
    """Override of the convolution kernel (odd)."""
    feature_dim: int = 80
    """Mel bins of the input."""
    subsampling_channels: tuple[int, int, int] = (8, 32, 128)
    """Channels of the three subsampling convolutions; fewer make a tiny model faster."""
    dropout: float = 0.1
    """Dropout of the encoder."""
    layer_dropout: float = 0.0
    """Probability that a layer is bypassed in training."""
    decoder_dim: int = 256
    """Dimension of the stateless decoder."""
    joiner_dim: int = 256
    """Dimension of the joiner."""
    context_size: int = 2
    """Tokens of context of the stateless decoder."""
    streaming: bool = False
    """A student that hears chunk by chunk; each training batch draws a chunk size and a left context from these:"""
    chunk_size: list[int] = field(default_factory=lambda: [16, 8, 32, -1])
    """Chunk sizes in encoder frames of 40 ms, -1: the whole utterance.  The first serves validation and, unless
    decode.py is told otherwise, decoding."""
    left_context_frames: list[int] = field(default_factory=lambda: [64, 32, 128, -1])
    """Encoder frames before its chunk that a frame sees, -1: all; the first as above."""
    convolution: Literal["causal", "chunk"] = "causal"
    """Of a streaming student: causal (no later frame), or chunk (later frames of the same chunk, Li et al. 2023)."""

    right_context: int = 0
    """Encoder frames behind its chunk that a frame of a streaming student sees, whatever the chunk size."""
    right_context_kind: Literal["copy", "mask"] = "copy"
    """copy: each chunk has copies of these frames, so that layers do not look further ahead; mask: layers add up."""

    def __post_init__(self) -> None:
        at_least(self, right_context=0)
        if self.right_context and not self.streaming:
            raise ConfigError(
                f"--right-context {self.right_context} without --streaming true: a student of whole utterances sees all"
            )
        for name in ("chunk_size", "left_context_frames"):
            values = getattr(self, name)
            if not values or any(value < 1 and value != -1 for value in values):
                raise ConfigError(f"--{name.replace('_', '-')} is {values}; give frames of 40 ms, -1 for no limit")
