"""The three graphs of an exported transducer, as modules that a tracer can follow.

Names, order and shapes of inputs and outputs are those that sherpa-onnx asks of an offline transducer and of its
streaming Conformer transducer; every format uses them.  Both projections of the joiner stand in the graphs of encoder
and decoder, so that each frame and each context is projected once.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.data.batch import LOG_EPS
from icefall_kd.frames import chunk_num_frames
from icefall_kd.models.streaming import Chunks, StreamingState
from icefall_kd.models.transducer import TransducerModel

# Frames without which the subsampling has no output: so many of silence are appended, beyond every length.
SHORTEST = 7


@dataclass(frozen=True)
class Graph:
    """A module and how it is called."""

    name: str
    """encoder, decoder or joiner; also the name of its file."""
    module: nn.Module
    """In evaluation mode, on the CPU."""
    inputs: dict[str, dict[int, str]]
    """The axes of any length of each input, in order."""
    outputs: dict[str, dict[int, str]]
    """The same of each output."""
    example: tuple[Tensor, ...]
    """Arguments to trace with."""
    metadata: dict[str, str | int] = field(default_factory=dict)
    """What sherpa-onnx reads from the file."""


class OfflineEncoder(nn.Module):
    """Encoder and its projection, of whole utterances."""

    def __init__(self, model: TransducerModel) -> None:
        super().__init__()
        self.encoder, self.projection = model.encoder, model.joiner.encoder_proj

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, T, F) log-mel frames, of which (N,) are valid, to (N, T', J) and (N,) valid frames of 40 ms."""
        x = F.pad(x, (0, 0, 0, SHORTEST), value=LOG_EPS)
        out = self.encoder(x, x_lens)
        return self.projection(out.encoder_out), out.encoder_out_lens


class StreamingEncoder(nn.Module):
    """Encoder and its projection, of one chunk of each stream.

    A client hears silence behind the end of an utterance, so every frame of a chunk is valid.
    """

    def __init__(self, model: TransducerModel) -> None:
        super().__init__()
        self.encoder, self.projection = model.encoder, model.joiner.encoder_proj

    def forward(
        self, x: Tensor, cached_attn: Tensor, cached_conv: Tensor, processed_lens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode a chunk; see :class:`icefall_kd.models.streaming.StreamingState` for the caches.

        Args:
            x: (N, 4C + 5, F) log-mel frames.
            cached_attn: (layers, left, N, C').
            cached_conv: (layers, K, N, C').
            processed_lens: (N,) log-mel frames (not encoder frames: sherpa-onnx counts those) before the chunk.
        Returns:
            (N, C, J), and both caches for the next chunk.
        """
        state = StreamingState(cached_attn, cached_conv, torch.div(processed_lens, 4, rounding_mode="floor"))
        x_lens = torch.full_like(processed_lens, x.shape[1])
        out, _, state = self.encoder.forward_chunk(x, x_lens, state)
        return self.projection(out), state.cached_attn, state.cached_conv


class DecoderGraph(nn.Module):
    """Stateless decoder and its projection, of one context an utterance."""

    def __init__(self, model: TransducerModel) -> None:
        super().__init__()
        self.decoder, self.projection = model.decoder, model.joiner.decoder_proj

    def forward(self, y: Tensor) -> Tensor:
        """Map (N, context_size) tokens, -1 for none, to (N, J)."""
        return self.projection(self.decoder(y, need_pad=False).squeeze(1))


class JoinerGraph(nn.Module):
    """What the joiner does after the projections."""

    def __init__(self, model: TransducerModel) -> None:
        super().__init__()
        self.joiner = model.joiner

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        """Map (N, J) and (N, J) to logits (N, V)."""
        return self.joiner(encoder_out, decoder_out, project_input=False)


def log_mel_noise(num_utterances: int, num_frames: int, feature_dim: int) -> Tensor:
    """Return random features (N, T, F) of the level and spread of log-mel energies of speech."""
    return torch.randn(num_utterances, num_frames, feature_dim) * 4.0 - 6.0


def offline_graphs(model: TransducerModel, feature_dim: int) -> list[Graph]:
    """Return the graphs of a model that hears whole utterances."""
    encoder = Graph(
        "encoder",
        OfflineEncoder(model).eval(),
        {"x": {0: "N", 1: "T"}, "x_lens": {0: "N"}},
        {"encoder_out": {0: "N", 1: "T_out"}, "encoder_out_lens": {0: "N"}},
        (log_mel_noise(2, 103, feature_dim), torch.tensor([103, 71])),
        {"model_type": "conformer", "version": 1},
    )
    return [encoder, *label_graphs(model)]


def streaming_graphs(model: TransducerModel, feature_dim: int, chunks: Chunks) -> list[Graph]:
    """Return the graphs of a model that hears chunk by chunk."""
    window = chunk_num_frames(chunks.chunk_size)
    attn, conv, _ = model.encoder.init_states(2, chunks)
    processed = torch.tensor([8 * chunks.chunk_size, 0])
    states = {"cached_attn": {2: "N"}, "cached_conv": {2: "N"}}
    encoder = Graph(
        "encoder",
        StreamingEncoder(model).eval(),
        {"x": {0: "N"}, **states, "processed_lens": {0: "N"}},
        {"encoder_out": {0: "N"}, **{f"new_{name}": axes for name, axes in states.items()}},
        (log_mel_noise(2, window, feature_dim), torch.randn_like(attn), torch.randn_like(conv), processed),
        {
            "model_type": "conformer",
            "version": 1,
            "num_encoder_layers": model.encoder.num_layers,
            "T": window,
            "decode_chunk_len": 4 * chunks.chunk_size,
            "left_context": chunks.left_context_frames,
            "encoder_dim": model.encoder.dim,
            "pad_length": window - 4 * chunks.chunk_size,
            "cnn_module_kernel": conv.shape[1] + 1,
        },
    )
    return [encoder, *label_graphs(model)]


def label_graphs(model: TransducerModel) -> list[Graph]:
    """Return decoder and joiner."""
    context, joiner_dim = model.decoder.context_size, model.joiner.output_linear.in_features
    decoder = Graph(
        "decoder",
        DecoderGraph(model).eval(),
        {"y": {0: "N"}},
        {"decoder_out": {0: "N"}},
        (torch.zeros(2, context, dtype=torch.int64),),
        {"vocab_size": model.vocab_size, "context_size": context},
    )
    joiner = Graph(
        "joiner",
        JoinerGraph(model).eval(),
        {"encoder_out": {0: "N"}, "decoder_out": {0: "N"}},
        {"logit": {0: "N"}},
        (torch.randn(2, joiner_dim), torch.randn(2, joiner_dim)),
        {"joiner_dim": joiner_dim},
    )
    return [decoder, joiner]
