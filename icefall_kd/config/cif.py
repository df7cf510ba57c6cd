"""Options of the CIF recogniser and of its distillation from a language model."""

from dataclasses import dataclass
from typing import Literal

from icefall_kd.config.checks import at_least
from icefall_kd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CifConfig:
    """The CIF recogniser (--system hkd) and its losses."""

    front_channels: int = 128
    """Channels of the one convolution in front of the encoder."""
    pool_layers: list[int] | None = None
    """Encoder layers behind each of which a max pool halves the frame rate, on top of the convolution's half.  None:
    after a third and two thirds of the layers (80 ms a frame); one pool serves texts with more than a token every two
    such frames."""
    cif_kernel: int = 3
    """Frames of the convolution that predicts the weights (odd)."""
    cif_dropout: float = 0.2
    """Dropout between that convolution and its output layer."""
    cif_initial_rate: float = 0.27
    """Tokens a frame that an untrained model expects: the output layer's bias starts there."""
    quantity_scale: float = 1.0
    """Weight of the quantity loss, a token."""
    quantity_warm_step: int = 0
    """Steps over which what looks at fired tokens (cross-entropy, distillation) fades in, after CTC and quantity."""
    cif_ctc_scale: float = 0.5
    """Weight of the CTC loss, a token; 0 builds no CTC head."""
    max_cif_factor: float | None = None
    """Largest factor that scales the weights to the length of the text in training, which explodes on silence; an
    utterance that it leaves too short loses its last tokens for that step.  None: none, every length is exact."""

    def __post_init__(self) -> None:
        at_least(self, front_channels=1, cif_kernel=1, quantity_scale=0, quantity_warm_step=0, cif_ctc_scale=0)
        at_least(self, max_cif_factor=1)
        if self.cif_kernel % 2 == 0:
            raise ConfigError(f"--cif-kernel is {self.cif_kernel}; it must be odd")
        if not 0 <= self.cif_dropout < 1:
            raise ConfigError(f"--cif-dropout is {self.cif_dropout}; it must lie in [0, 1)")
        if not 0 < self.cif_initial_rate < 1:
            raise ConfigError(f"--cif-initial-rate is {self.cif_initial_rate}; it must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TextKdConfig:
    """Distillation from a language model's states of the reference text (--system hkd)."""

    text_kd: list[Literal["acd", "lrd"]] | None = None
    """acd: contrastive, of fired tokens (acoustic level); lrd: regression, of decoder states (linguistic level)."""
    acd_scale: float = 1.0
    """Weight of the contrastive loss, a token."""
    acd_temperature: float = 0.02
    """Temperature of its cosines; 0.05 to 0.1 where a batch has less than 200 tokens."""
    acd_negatives: int | None = 700
    """Negatives of each token, drawn from its batch; of a batch without so many, 80 %.  None: all of the batch."""
    lrd_scale: float = 0.01
    """Weight of the squared error, a token."""
    lrd_reduction: Literal["sum", "mean"] = "sum"
    """Over the channels of a state."""
    text_alignment: Literal["token", "word"] = "token"
    """What a state belongs to: a token, or a word (the fired tokens of which are averaged)."""
    standardise_text_states: bool = False
    """Shift and scale every channel of the states to mean 0 and variance 1 over the training: states of some models are
    large, or all alike."""

    def __post_init__(self) -> None:
        at_least(self, acd_scale=0, lrd_scale=0, acd_negatives=1)
        if not self.acd_temperature > 0:
            raise ConfigError(f"--acd-temperature is {self.acd_temperature}; it must be above 0")
        if len(set(self.text_kd or ())) != len(self.text_kd or ()):
            raise ConfigError(f"--text-kd is {','.join(self.text_kd)}; name each loss once")
