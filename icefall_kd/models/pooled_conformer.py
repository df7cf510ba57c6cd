"""The Conformer of the CIF recogniser: one convolution in front, max pools between layers, 80 ms a frame."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.config import ModelConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import pooled_len
from icefall_kd.models.attention import RelativePositions
from icefall_kd.models.conformer import ConformerLayer, EncoderOutput, EncoderShape, maybe_bypass
from icefall_kd.models.dropout import Dropout
from icefall_kd.models.masks import make_attention_mask, make_pad_mask
from icefall_kd.models.subsampling import LOG_MEL_MEAN, LOG_MEL_STD


def default_pool_layers(num_layers: int) -> list[int]:
    """Return the layers after a third and two thirds of ``num_layers``: 5 and 10 of 15."""
    first = max(round(num_layers / 3), 1)
    return [first, max(round(2 * num_layers / 3), first + 1)]


class ConvFront(nn.Module):
    """Log-mel frames of 10 ms to vectors of 20 ms: one 3x3 convolution of stride 2, not padded, ReLU, two projections.

    The layers and the factor between the projections are the public code's (fairseq); the fixed shift and scale of the
    input in place of its normalisation of each utterance are those of models/subsampling.py.
    """

    def __init__(self, feature_dim: int, dim: int, channels: int, dropout: float) -> None:
        super().__init__()
        if feature_dim < 3:
            raise ConfigError(f"--feature-dim is {feature_dim}; the front end needs at least 3 bins")
        self.conv = nn.Conv2d(1, channels, kernel_size=3, stride=2)
        self.out = nn.Linear(channels * pooled_len(feature_dim, 0), dim)  # the bins shrink like the frames do
        self.projection = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, T, F) to (N, T', C), T' = frames.pooled_len(T, 0); no valid frame sees beyond its utterance."""
        x = ((features - LOG_MEL_MEAN) * (1.0 / LOG_MEL_STD)).unsqueeze(1)  # (N, 1, T, F)
        x = F.relu(self.conv(x.to(memory_format=torch.channels_last)), inplace=True)
        x = self.out(x.permute(0, 2, 3, 1).flatten(2))  # (N, C', T', F') -> (N, T', F' * C')
        return self.dropout(self.projection(x * math.sqrt(x.shape[2])))


class PooledConformer(nn.Module):
    """Conformer layers with the frame rate halved behind some of them (Han et al. 2023).

    Layers, sizes and biases are those of the public code.  Ours: LayerNorm in the convolution module in place of
    BatchNorm, whose statistics see padding; and a last frame without a partner is pooled alone instead of being
    dropped for the longest utterance of a batch.
    """

    def __init__(self, cfg: ModelConfig, front_channels: int = 128, pool_layers: list[int] | None = None) -> None:
        """Make the encoder.

        Args:
            cfg: layers, sizes, dropout.
            front_channels: of the convolution.
            pool_layers: 1-based layers behind which pairs of frames are pooled; None: :func:`default_pool_layers`.
        Raises:
            ConfigError: a layer that does not exist or is named twice, or a streaming encoder.
        """
        super().__init__()
        if cfg.streaming:
            raise ConfigError("--streaming true is not of --system hkd, whose encoder sees whole utterances")
        self.shape = EncoderShape.from_config(cfg)
        layers = self.shape.num_layers
        self.pool_layers = default_pool_layers(layers) if pool_layers is None else list(pool_layers)
        for layer in self.pool_layers:
            if not 1 <= layer <= layers or self.pool_layers.count(layer) > 1:
                raise ConfigError(
                    f"--pool-layers is {self.pool_layers}; name different layers of the encoder's 1 to {layers}"
                )
        self.layer_dropout = cfg.layer_dropout
        self.front = ConvFront(cfg.feature_dim, self.shape.dim, front_channels, cfg.dropout)
        self.positions = RelativePositions(self.shape.dim)
        self.layers = nn.ModuleList(
            ConformerLayer(self.shape, cfg.dropout, fairseq_biases=True) for _ in range(layers)
        )

    @property
    def dim(self) -> int:
        """Return C of the encoder output."""
        return self.shape.dim

    @property
    def num_layers(self) -> int:
        """Return the number of layers."""
        return self.shape.num_layers

    @property
    def num_pools(self) -> int:
        """Return how often the frame rate is halved behind the convolution."""
        return len(self.pool_layers)

    def output_lens(self, x_lens):
        """Return T' for T input frames, an int or an integer tensor."""
        return pooled_len(x_lens, self.num_pools)

    def forward(self, features: Tensor, x_lens: Tensor) -> EncoderOutput:
        """Encode a batch; an utterance's valid frames do not depend on the others or on padding.

        Args:
            features: (N, T, F) log-mel frames.
            x_lens: (N,) valid frames T.
        Returns:
            encoder_out (N, T', C), encoder_out_lens (N,), no taps.
        Raises:
            DataError: when T is too short for one output frame.
        """
        if features.shape[1] < 3:
            raise DataError(
                f"a batch of {features.shape[1]} frames gives no encoder frame; utterances need at least 3 frames"
            )
        x, lens = self.front(features), pooled_len(x_lens, 0)
        pad_mask, positions = make_pad_mask(lens, x.shape[1]), self.positions(x)
        for number, layer in enumerate(self.layers, start=1):
            y, _ = layer(x, positions, make_attention_mask(pad_mask), pad_mask.unsqueeze(-1))
            x = maybe_bypass(x, y, self.layer_dropout if self.training else 0.0)
            if number in self.pool_layers:
                x, lens = pool_pairs(x, pad_mask), (lens + 1) // 2
                pad_mask, positions = make_pad_mask(lens, x.shape[1]), self.positions(x)
        return EncoderOutput(x, lens, {})


def pool_pairs(x: Tensor, pad_mask: Tensor) -> Tensor:
    """Return the maximum of every pair of valid frames; a valid frame beside a padded one, or alone, stands for both.

    Args:
        x: (N, T, C).
        pad_mask: (N, T) bool, True at padding.
    Returns:
        (N, ceil(T / 2), C), 0 where both are padding.
    """
    lowest = torch.finfo(x.dtype).min
    x = x.masked_fill(pad_mask.unsqueeze(-1), lowest)
    pooled = torch.maximum(x[:, 0::2], F.pad(x, (0, 0, 0, 1), value=lowest)[:, 1::2])
    return pooled.masked_fill(pad_mask[:, 0::2].unsqueeze(-1), 0.0)
