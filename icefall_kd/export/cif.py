"""The two graphs of an exported CIF recogniser: encoder with integrate-and-fire, and one step of its decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.data.batch import LOG_EPS
from icefall_kd.export.graphs import SHORTEST, Graph, log_mel_noise
from icefall_kd.models.attention_decoder import TokenCache
from icefall_kd.models.cif import integrate_and_fire, token_frames
from icefall_kd.models.cif_model import CifModel


class CifEncoder(nn.Module):
    """Encoder and integrate-and-fire, of whole utterances."""

    def __init__(self, model: CifModel, tail_threshold: float) -> None:
        super().__init__()
        self.model, self.tail_threshold = model, tail_threshold

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (N, T, F) log-mel frames, of which (N,) are valid.

        Returns:
            One vector a token (N, T', C), 0 behind the last: there are never more tokens than frames; tokens of each
            utterance (N,), the end of the text included; the frame (N, T') that each token took most of.
        """
        out = self.model.encoder(F.pad(x, (0, 0, 0, SHORTEST), value=LOG_EPS), x_lens)
        alpha = self.model.cif.alpha(out.encoder_out, out.encoder_out_lens)
        fired = integrate_and_fire(
            out.encoder_out, alpha, tail_threshold=self.tail_threshold, num_tokens=alpha.shape[1]
        )
        return fired.c, fired.lens, token_frames(fired.weights)


class DecoderStep(nn.Module):
    """The next token of sequences, from what their earlier tokens left behind."""

    def __init__(self, model: CifModel) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self, y: Tensor, c_before: Tensor, c: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Go on by one token.

        Args:
            y: (N,) the token before, sos at first.
            c_before: (N, C) the vector of the token before, 0 at first.
            c: (N, C) the vector of the token that is wanted.
            keys, values: (layers, N, heads, U, D) of earlier tokens, U = 0 at first.
        Returns:
            logits (N, V), and keys and values with U + 1 tokens.
        """
        cache = TokenCache(list(keys.unbind(0)), list(values.unbind(0)))
        logits = self.decoder.step(y, c_before, c, cache)
        return logits, torch.stack(cache.keys), torch.stack(cache.values)


def cif_graphs(model: CifModel, feature_dim: int, tail_threshold: float) -> list[Graph]:
    """Return the graphs of a CIF recogniser."""
    token_axes = {"c": {0: "N", 1: "T_out"}, "c_lens": {0: "N"}, "frames": {0: "N", 1: "T_out"}}
    encoder = Graph(
        "encoder",
        CifEncoder(model, tail_threshold).eval(),
        {"x": {0: "N", 1: "T"}, "x_lens": {0: "N"}},
        token_axes,
        (log_mel_noise(2, 203, feature_dim), torch.tensor([203, 131])),
    )
    past, new = ({f"{name}keys": {1: "N", 3: axis}, f"{name}values": {1: "N", 3: axis}}
                 for name, axis in (("", "U"), ("new_", "U_new")))  # fmt: skip
    step = Graph(
        "decoder_step",
        DecoderStep(model).eval(),
        {"y": {0: "N"}, "c_before": {0: "N"}, "c": {0: "N"}, **past},
        {"logits": {0: "N"}, **new},
        step_input(model, 2, 3),
    )
    return [encoder, step]


def step_input(model: CifModel, n: int, u: int) -> tuple[Tensor, ...]:
    """Return random input of :class:`DecoderStep` for ``n`` sequences of ``u`` tokens."""
    decoder = model.decoder
    past = (len(decoder.layers), n, decoder.num_heads, u, decoder.dim // decoder.num_heads)
    y = torch.randint(0, decoder.vocab_size, (n,))
    return y, torch.randn(n, decoder.dim), torch.randn(n, decoder.dim), torch.randn(past), torch.randn(past)
