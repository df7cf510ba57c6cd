"""The Conformer encoder and its named sizes."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.config import ENCODER_SIZES, ModelConfig
from icefall_kd.errors import ConfigError
from icefall_kd.frames import conv2d_subsampled_len
from icefall_kd.models.attention import RelativePositions, RelativeSelfAttention
from icefall_kd.models.dropout import Dropout
from icefall_kd.models.masks import make_attention_mask, make_pad_mask
from icefall_kd.models.subsampling import Conv2dSubsampling

# What a bypassed layer still contributes: the residual keeps every parameter's gradient alive.
BYPASS_SCALE = 0.1


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """The numbers of an encoder after the overrides of a named size."""

    num_layers: int
    """Conformer layers."""
    dim: int
    """Model dimension C."""
    num_heads: int
    """Attention heads."""
    feedforward_dim: int
    """Hidden dimension of both feed-forward modules."""
    cnn_kernel: int
    """Frames of the depthwise convolution (odd)."""

    @classmethod
    def from_config(cls, cfg: ModelConfig) -> "EncoderShape":
        """Return the shape that a configuration names.

        Raises:
            ConfigError: for an even kernel, a dimension that the heads do not divide, or a number below 1.
        """
        layers, dim, heads, feedforward, kernel = ENCODER_SIZES[cfg.encoder_size]
        given = {
            "num_layers": (cfg.num_encoder_layers, layers),
            "dim": (cfg.encoder_dim, dim),
            "num_heads": (cfg.num_heads, heads),
            "feedforward_dim": (cfg.feedforward_dim, feedforward),
            "cnn_kernel": (cfg.cnn_kernel, kernel),
        }
        shape = cls(**{name: default if value is None else value for name, (value, default) in given.items()})
        for name, value in dataclasses.asdict(shape).items():
            if value < 1:
                raise ConfigError(f"the encoder's {name} is {value}; it must be at least 1")
        if shape.cnn_kernel % 2 == 0:
            raise ConfigError(f"--cnn-kernel is {shape.cnn_kernel}; it must be odd")
        if shape.dim % (2 * shape.num_heads):
            raise ConfigError(f"--encoder-dim {shape.dim} is not an even multiple of --num-heads {shape.num_heads}")
        return shape


@dataclass(frozen=True)
class EncoderOutput:
    """What an encoder returns."""

    encoder_out: Tensor
    """(N, T', C) output of the last layer; frames beyond the lengths hold nothing of use."""
    encoder_out_lens: Tensor
    """(N,) valid frames of 40 ms."""
    taps: dict[int, Tensor]
    """(N, T', C) outputs of the layers asked for, by 1-based layer."""


class FeedForward(nn.Module):
    """LayerNorm, expansion, Swish, contraction (Gulati et al. 2020, section 2.3).

    Dropout of the hidden units holds for all frames of an utterance: nearly free, where one decision
    an element of the widest tensor is not.
    """

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, hidden_dim)
        self.contract = nn.Linear(hidden_dim, dim)
        self.hidden_dropout = Dropout(dropout, shared_over_time=True)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, C) to (N, T, C), frame by frame."""
        x = self.hidden_dropout(F.silu(self.expand(self.norm(x))))
        return self.dropout(self.contract(x))


class ConvolutionModule(nn.Module):
    """Gated depthwise convolution over time (Gulati et al. 2020, section 2.2).

    LayerNorm stands where the paper has BatchNorm: statistics over a padded batch would make an
    utterance depend on its neighbours, and a stream has no batch.
    """

    def __init__(self, dim: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.inner_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """Convolve over the valid frames.

        Args:
            x: (N, T, C).
            padding: (N, T, 1) bool, True at padding, which enters the convolution as zero.
        Returns:
            (N, T, C).
        """
        x = F.glu(self.gate(self.norm(x)), dim=-1).masked_fill(padding, 0.0)
        # A 2-D convolution of height one over (N, C, 1, T): the permuted view is channels-last memory, for
        # which CPUs have a depthwise kernel that is an order of magnitude faster than conv1d's.
        x = x.transpose(1, 2).unsqueeze(2)  # (N, T, C) -> (N, C, 1, T)
        conv = self.depthwise
        x = F.conv2d(x, conv.weight.unsqueeze(2), conv.bias, padding=(0, conv.padding[0]), groups=conv.groups)
        x = x.squeeze(2).transpose(1, 2)  # (N, C, 1, T) -> (N, T, C)
        return self.dropout(self.out(F.silu(self.inner_norm(x))))


class ConformerLayer(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, LayerNorm (Gulati et al. 2020, eq. 1)."""

    def __init__(self, shape: EncoderShape, dropout: float) -> None:
        super().__init__()
        self.feed_forward1 = FeedForward(shape.dim, shape.feedforward_dim, dropout)
        self.attention_norm = nn.LayerNorm(shape.dim)
        self.attention = RelativeSelfAttention(shape.dim, shape.num_heads)
        self.convolution = ConvolutionModule(shape.dim, shape.cnn_kernel, dropout)
        self.feed_forward2 = FeedForward(shape.dim, shape.feedforward_dim, dropout)
        self.norm = nn.LayerNorm(shape.dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, attention_mask: Tensor, padding: Tensor) -> Tensor:
        """Map (N, T, C) to (N, T, C); see the modules for the masks."""
        x = torch.add(x, self.feed_forward1(x), alpha=0.5)
        x = x + self.dropout(self.attention(self.attention_norm(x), positions, attention_mask))
        x = x + self.convolution(x, padding)
        x = torch.add(x, self.feed_forward2(x), alpha=0.5)
        return self.norm(x)


class Conformer(nn.Module):
    """Conformer with relative positions, at 25 Hz, with taps at middle layers.

    The layout is the paper's (Gulati et al. 2020) with LayerNorm in the convolution module.  The
    "reworked" Conformer of icefall's recipes has the same modules and sizes, but BasicNorm, DoubleSwish,
    activation balancers and learned scales of every weight; this one uses LayerNorm before each module and
    at the end of each layer, so that taps are normalised too, and Swish, which is one fused kernel.
    The optional layer dropout bypasses a whole layer with the recipe's weight of 0.1.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.shape = EncoderShape.from_config(cfg)
        self.layer_dropout = cfg.layer_dropout
        self.subsampling = Conv2dSubsampling(
            cfg.feature_dim, self.shape.dim, tuple(cfg.subsampling_channels), dropout=cfg.dropout
        )
        self.positions = RelativePositions(self.shape.dim)
        self.layers = nn.ModuleList(ConformerLayer(self.shape, cfg.dropout) for _ in range(self.shape.num_layers))

    @property
    def dim(self) -> int:
        """Return C of the encoder output."""
        return self.shape.dim

    @property
    def num_layers(self) -> int:
        """Return the number of layers."""
        return self.shape.num_layers

    @staticmethod
    def output_lens(x_lens):
        """Return T' for T input frames, an int or an integer tensor."""
        return conv2d_subsampled_len(x_lens)

    def forward(self, features: Tensor, x_lens: Tensor, taps: Sequence[int] = ()) -> EncoderOutput:
        """Encode a batch; an utterance's valid frames do not depend on the others or on padding.

        Args:
            features: (N, T, F) log-mel frames.
            x_lens: (N,) valid frames T.
            taps: 1-based layers whose outputs are returned.
        Returns:
            encoder_out (N, T', C), encoder_out_lens (N,), taps.
        Raises:
            ConfigError: for a tap that is no layer.
            DataError: when T is too short for one output frame.
        """
        self.check_taps(taps)
        x, lens = self.subsampling(features, x_lens)
        pad_mask = make_pad_mask(lens, x.shape[1])
        attention_mask, padding = make_attention_mask(pad_mask), pad_mask.unsqueeze(-1)
        positions = self.positions(x)
        tapped = {}
        for number, layer in enumerate(self.layers, start=1):
            y = layer(x, positions, attention_mask, padding)
            x = self._maybe_bypass(x, y)
            if number in taps:
                tapped[number] = x
        return EncoderOutput(x, lens, tapped)

    def check_taps(self, taps: Sequence[int]) -> None:
        """Raise a ConfigError for a tap that is not one of the layers 1..num_layers."""
        for tap in taps:
            if not 1 <= tap <= self.num_layers:
                raise ConfigError(f"layer {tap} does not exist: the encoder has layers 1 to {self.num_layers}")

    def _maybe_bypass(self, x: Tensor, y: Tensor) -> Tensor:
        """Replace a layer's output y by a little of it on top of its input, with probability layer_dropout."""
        if self.training and self.layer_dropout > 0 and torch.rand(()).item() < self.layer_dropout:
            return torch.lerp(x, y, BYPASS_SCALE)
        return y


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters of every direct child, and of all as "total"."""
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    counts = {name: count for name, count in counts.items() if count}
    return counts | {"total": sum(p.numel() for p in model.parameters())}


def log_parameter_counts(model: nn.Module) -> int:
    """Log one line with the parameters of every part and return the total."""
    counts = parameter_counts(model)
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if name != "total")
    logging.getLogger(__name__).info("parameters: %s; total %s", parts, f"{counts['total']:,}")
    return counts["total"]
