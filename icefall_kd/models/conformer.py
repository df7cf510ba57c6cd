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
from icefall_kd.frames import chunk_look_ahead
from icefall_kd.models.attention import RelativePositions, RelativeSelfAttention
from icefall_kd.models.convolution import ConvolutionModule
from icefall_kd.models.dropout import Dropout
from icefall_kd.models.masks import chunk_mask, make_attention_mask, make_pad_mask
from icefall_kd.models.right_context import Copies
from icefall_kd.models.streaming import Chunks, StreamingState, default_chunks, draw_chunks
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


class ConformerLayer(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, LayerNorm (Gulati et al. 2020, eq. 1).

    ``fairseq_biases``: the biases of fairseq's Conformer, that is, none in the convolution module and two of the query.
    """

    def __init__(
        self, shape: EncoderShape, dropout: float, convolution: str = "full", fairseq_biases: bool = False
    ) -> None:
        super().__init__()
        self.feed_forward1 = FeedForward(shape.dim, shape.feedforward_dim, dropout)
        self.attention_norm = nn.LayerNorm(shape.dim)
        self.attention = RelativeSelfAttention(shape.dim, shape.num_heads, fairseq_biases)
        self.convolution = ConvolutionModule(shape.dim, shape.cnn_kernel, dropout, convolution, not fairseq_biases)
        self.feed_forward2 = FeedForward(shape.dim, shape.feedforward_dim, dropout)
        self.norm = nn.LayerNorm(shape.dim)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        attention_mask: Tensor,
        padding: Tensor,
        chunk_size: int = -1,
        caches: tuple[Tensor, Tensor] | None = None,
        copies: Copies | None = None,
        ahead: int = 0,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Map (N, T, C) to (N, T, C); see the modules for masks and chunks.

        Args:
            caches: of x that is one chunk: (N, left, C) inputs of attention and (N, K, C) of the convolution before
                it; None: x is a whole utterance.
            copies: x is a whole utterance and the copies of frames behind its chunks.
            ahead: frames at the end of such a chunk that the caches leave out, since they come again.
        Returns:
            (N, T, C), and the caches of the next chunk.
        """
        attn_cache, conv_cache = caches if caches is not None else (None, None)
        x = torch.add(x, self.feed_forward1(x), alpha=0.5)
        seen, left = self.attention_norm(x), 0
        if attn_cache is not None:
            left = attn_cache.shape[1]
            seen = torch.cat([attn_cache, seen], dim=1)
            end = seen.shape[1] - ahead
            attn_cache = seen[:, end - left : end]
        columns = None if copies is None else copies.columns
        x = x + self.dropout(self.attention(seen, positions, attention_mask, left, columns))
        y, conv_cache = self.convolution(x, padding, chunk_size, conv_cache, copies, ahead)
        x = x + y
        x = torch.add(x, self.feed_forward2(x), alpha=0.5)
        return self.norm(x), None if caches is None else (attn_cache, conv_cache)


class Conformer(nn.Module):
    """Conformer with relative positions, at 25 Hz, with taps at middle layers.

    The layout is the paper's (Gulati et al. 2020) with LayerNorm in the convolution module.  The
    "reworked" Conformer of icefall's recipes has the same modules and sizes, but BasicNorm, DoubleSwish,
    activation balancers and learned scales of every weight; this one uses LayerNorm before each module and
    at the end of each layer, so that taps are normalised too, and Swish, which is one fused kernel.
    The optional layer dropout bypasses a whole layer with the recipe's weight of 0.1.

    With ``cfg.streaming`` a frame sees its chunk and a limited left context: those of ``self.chunks``, in training
    those drawn anew for every batch.  :meth:`forward_chunk` goes through a stream chunk by chunk and gives what
    :meth:`forward` gives under the mask.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.shape = EncoderShape.from_config(cfg)
        self.layer_dropout = cfg.layer_dropout
        self.chunks: Chunks = default_chunks(cfg)
        self.pinned: Chunks | None = None
        """What is seen in training and outside, whatever the options say (models/dual.py); None: that is not fixed."""
        self.subsampling = Conv2dSubsampling(
            cfg.feature_dim, self.shape.dim, tuple(cfg.subsampling_channels), cfg.dropout, cfg.streaming
        )
        self.positions = RelativePositions(self.shape.dim)
        kind = cfg.convolution if cfg.streaming else "full"
        layers = (ConformerLayer(self.shape, cfg.dropout, kind) for _ in range(self.shape.num_layers))
        self.layers = nn.ModuleList(layers)

    @property
    def dim(self) -> int:
        """Return C of the encoder output."""
        return self.shape.dim

    @property
    def num_layers(self) -> int:
        """Return the number of layers."""
        return self.shape.num_layers

    def output_lens(self, x_lens):
        """Return T' for T input frames (or samples, with the waveform front end), an int or an integer tensor."""
        return self.subsampling.output_lens(x_lens)

    def latency(self, chunks: Chunks) -> float | None:
        """Return the seconds that the first frame of a chunk waits, computation left out; None for whole utterances."""
        if chunks.chunk_size < 1:
            return None
        return self.subsampling.latency(chunks.chunk_size, self.look_ahead(chunks))

    def window(self, chunks: Chunks) -> tuple[int, int]:
        """Return the input frames (or samples) of a chunk with all that it waits for, and those to the next chunk."""
        front, size = self.subsampling, chunks.chunk_size
        return front.window(size + self.look_ahead(chunks)), front.hop * size

    def forward(self, features: Tensor, x_lens: Tensor, taps: Sequence[int] = ()) -> EncoderOutput:
        """Encode a batch; an utterance's valid frames do not depend on the others or on padding.

        Args:
            features: (N, T, F) log-mel frames, or what else the front end hears (models/waveform.py).
            x_lens: (N,) valid frames T.
            taps: 1-based layers whose outputs are returned.
        Returns:
            encoder_out (N, T', C), encoder_out_lens (N,), taps.
        Raises:
            ConfigError: for a tap that is no layer.
            DataError: when T is too short for one output frame.
        """
        self.check_taps(taps)
        chunks = self.chunks_of_batch()  # drawn first: the draw and the front end's dropout share a generator
        x, lens = self.embed(features, x_lens)
        return self.forward_embedded(x, lens, taps, chunks)

    def chunks_of_batch(self) -> Chunks:
        """Return what a batch is encoded with: ``pinned``, or drawn anew in training and ``self.chunks`` otherwise."""
        if self.pinned is not None:
            return self.pinned
        return draw_chunks(self.cfg) if self.training else self.chunks

    def embed(self, features: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Run the front end alone: log-mel frames (N, T, F) to the layers' input (N, T', C), and its lengths (N,).

        Raises:
            DataError: when T is too short for one output frame.
        """
        return self.subsampling(features, x_lens)

    def forward_embedded(
        self, x: Tensor, lens: Tensor, taps: Sequence[int] = (), chunks: Chunks | None = None
    ) -> EncoderOutput:
        """Encode what the front end gave, or what was put in its place (masked frames of self-supervised training).

        Args:
            x: (N, T', C) of :meth:`embed`.
            lens: (N,) valid frames T'.
            taps: 1-based layers whose outputs are returned.
            chunks: how far a frame sees; None: :meth:`chunks_of_batch`.
        Returns:
            As :meth:`forward`.
        Raises:
            ConfigError: for a tap that is no layer.
        """
        self.check_taps(taps)
        chunks = self.chunks_of_batch() if chunks is None else chunks
        num_frames, positions, allowed, copies = x.shape[1], self.positions(x), None, None
        pad_mask = make_pad_mask(lens, num_frames)
        if chunks.chunk_size > 0 and self.cfg.right_context and self.cfg.right_context_kind == "copy":
            copies = Copies(num_frames, chunks, self.cfg.right_context, x.device)
            x, pad_mask, allowed = x[:, copies.source], copies.padding(lens), copies.allowed()
        elif chunks.chunk_size > 0:
            frames = torch.arange(num_frames, device=x.device)
            allowed = chunk_mask(frames, frames, *chunks, self.cfg.right_context)
        attention_mask, padding = make_attention_mask(pad_mask, allowed), pad_mask.unsqueeze(-1)
        tapped = {}
        for number, layer in enumerate(self.layers, start=1):
            y, _ = layer(x, positions, attention_mask, padding, chunks.chunk_size, copies=copies)
            x = maybe_bypass(x, y, self.layer_dropout if self.training else 0.0)
            if number in taps:
                tapped[number] = x if copies is None else x[:, :num_frames]
        return EncoderOutput(x if copies is None else x[:, :num_frames], lens, tapped)

    def look_ahead(self, chunks: Chunks) -> int:
        """Return the encoder frames behind a chunk that its output depends on; 0 for whole utterances."""
        kind, layers = self.cfg.right_context_kind, len(self.layers)
        return chunk_look_ahead(chunks.chunk_size, self.cfg.right_context, layers if kind == "mask" else 1)

    def init_states(self, batch_size: int, chunks: Chunks, device: torch.device | str = "cpu") -> StreamingState:
        """Return the state of N streams that have not begun; the caches have the size of ``chunks``."""
        layers, kernel, dtype = len(self.layers), self.layers[0].convolution.left, self.layers[0].norm.weight.dtype
        return StreamingState(
            torch.zeros(layers, chunks.left_context_frames, batch_size, self.dim, dtype=dtype, device=device),
            torch.zeros(layers, kernel, batch_size, self.dim, dtype=dtype, device=device),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def forward_chunk(
        self, features: Tensor, x_lens: Tensor, states: StreamingState, chunk_size: int | None = None
    ) -> tuple[Tensor, Tensor, StreamingState]:
        """Encode the next chunk of N streams, of a streaming encoder.

        Args:
            features: (N, 4 (C + A) + 5, F) log-mel frames from the chunk's first on, A of :meth:`look_ahead`, of which
                the last 4 A + 5 come again as the first of the next chunk; or samples, as many as :meth:`window` says.
            x_lens: (N,) those of them that belong to the utterance: less at its end, 0 behind it.
            states: of :meth:`init_states` or of the chunk before.
            chunk_size: C; None: A is 0, and C what these frames give.
        Returns:
            encoder_out (N, C, C'), encoder_out_lens (N,) valid frames of it, and the states of the next chunk.
        Raises:
            ConfigError: C is not given, or not that of ``features``, for an encoder with right context.
        """
        cached_attn, cached_conv, processed_lens = states
        x = self.subsampling.forward_chunk(features, x_lens)
        window, left = x.shape[1], cached_attn.shape[1]
        size, ahead = self._size_and_ahead(window, chunk_size)
        lens = self.output_lens(x_lens)
        pad_mask = make_pad_mask(lens, window)
        begin = processed_lens.unsqueeze(1)
        queries = begin + torch.arange(window, device=x.device)
        keys = begin + torch.arange(-left, window, device=x.device)
        together = size
        if ahead and self.cfg.right_context_kind == "copy":  # what lies ahead is part of the chunk
            queries, together = begin.expand_as(queries), window
        behind = torch.cat([pad_mask.new_zeros(pad_mask.shape[0], left), pad_mask], dim=1)
        allowed = chunk_mask(queries, keys, size, left, self.cfg.right_context)
        attention_mask = make_attention_mask(behind, allowed)
        positions, padding = self.positions(x, left), pad_mask.unsqueeze(-1)
        attn, conv = [], []
        for i, layer in enumerate(self.layers):
            caches = cached_attn[i].transpose(0, 1), cached_conv[i].transpose(0, 1)  # (L, N, C) -> (N, L, C)
            x, caches = layer(x, positions, attention_mask, padding, together, caches, ahead=ahead)
            attn.append(caches[0].transpose(0, 1))
            conv.append(caches[1].transpose(0, 1))
        states = StreamingState(torch.stack(attn), torch.stack(conv), processed_lens + size)
        return (x[:, :size], lens.clamp(max=size), states) if ahead else (x, lens, states)

    def _size_and_ahead(self, window: int, chunk_size: int | None) -> tuple[int, int]:
        """Return the frames C of a chunk and those behind it, of ``window`` frames given."""
        if not self.cfg.right_context:
            return window, 0
        ahead = 0 if chunk_size is None else self.look_ahead(Chunks(chunk_size, -1))
        if chunk_size is None or window != chunk_size + ahead:
            raise ConfigError(
                f"a chunk of {chunk_size} frames with --right-context {self.cfg.right_context} needs {ahead} frames "
                f"behind it, {window} frames were given in all"
            )
        return chunk_size, ahead

    def check_taps(self, taps: Sequence[int]) -> None:
        """Raise a ConfigError for a tap that is not one of the layers 1..num_layers."""
        for tap in taps:
            if not 1 <= tap <= self.num_layers:
                raise ConfigError(f"layer {tap} does not exist: the encoder has layers 1 to {self.num_layers}")


def maybe_bypass(x: Tensor, y: Tensor, probability: float) -> Tensor:
    """Replace a layer's output y by a little of it on top of its input x, with a probability."""
    if probability > 0 and torch.rand(()).item() < probability:
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
