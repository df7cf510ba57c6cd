"""ESPnet's searches with the weights of our models (espnet 202511, in an environment of local/make_espnet_env.sh).

ESPnet's ids are blank 0, unknown 1, tokens, sos/eos the last one; <mask> comes behind it, in the masked decoder alone.
Ours are blank 0, sos/eos 1, unknown 2, tokens, <mask> the last one.
"""

import dataclasses
import logging
from types import SimpleNamespace

import torch
from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.scorers.ctc import CTCPrefixScorer
from espnet2.asr.ctc import CTC
from espnet2.asr.decoder.mlm_decoder import MLMDecoder
from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
from espnet2.asr.maskctc_model import MaskCTCInference

from icefall_kd.decode.base import Hypothesis

logging.getLogger().setLevel(logging.WARNING)  # ESPnet logs every pass


def our_ids(vocab_size: int) -> torch.Tensor:
    """Return our id of each of ESPnet's ids, of a table of V tokens with <mask>."""
    return torch.tensor([0, 2, *range(3, vocab_size - 1), 1, vocab_size - 1])


def _copy(to: torch.nn.Module, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    with torch.no_grad():
        to.weight.copy_(weight)
        if bias is not None:
            to.bias.copy_(bias)


def _linear(layer: torch.nn.Module) -> torch.nn.Linear:
    """Return a layer, or what it wraps."""
    return getattr(layer, "linear", layer)


def make_ctc(model) -> CTC:
    """Return ESPnet's CTC head, which does not know <mask>."""
    head, ids = _linear(model.ctc_output), our_ids(model.vocab_size)[:-1]
    ctc = CTC(len(ids), head.in_features)
    _copy(ctc.ctc_lo, head.weight[ids], head.bias[ids])
    return ctc.to(head.weight).eval()


def make_decoder(model):
    """Return ESPnet's decoder, masked or autoregressive as ours is."""
    ours, ids = model.decoder, our_ids(model.vocab_size)
    ids = ids[:-1] if ours.causal else ids
    layer, output = ours.layers[0], _linear(ours.output)
    decoder = (TransformerDecoder if ours.causal else MLMDecoder)(
        model.vocab_size - 1, ours.dim, layer.num_heads, layer.expand.out_features, len(ours.layers)
    )
    _copy(decoder.embed[0], ours.embedding.weight[ids])
    _copy(decoder.output_layer, output.weight[ids], output.bias[ids])
    _copy(decoder.after_norm, ours.norm.weight, ours.norm.bias)
    for theirs, layer in zip(decoder.decoders, ours.layers, strict=True):
        kv = layer.cross_kv
        cross = torch.cat([layer.cross_q.weight, kv.weight]), torch.cat([layer.cross_q.bias, kv.bias])
        for attention, (weight, bias), out in (
            (theirs.self_attn, (layer.self_qkv.weight, layer.self_qkv.bias), layer.self_out),
            (theirs.src_attn, cross, layer.cross_out),
        ):
            linears = (attention.linear_q, attention.linear_k, attention.linear_v)
            for to, w, b in zip(linears, weight.chunk(3), bias.chunk(3), strict=True):
                _copy(to, w, b)
            _copy(attention.linear_out, out.weight, out.bias)
        _copy(theirs.feed_forward.w_1, layer.expand.weight, layer.expand.bias)
        _copy(theirs.feed_forward.w_2, layer.contract.weight, layer.contract.bias)
        norms = (layer.self_norm, layer.cross_norm, layer.feedforward_norm)
        for to, norm in zip((theirs.norm1, theirs.norm2, theirs.norm3), norms, strict=True):
            _copy(to, norm.weight, norm.bias)
    return decoder.to(output.weight).eval()


class EspnetMaskCtc:
    """ESPnet's Mask-CTC inference as a search of ours, one utterance at a time as there.

    Args:
        model: CtcAttentionModel with a masked decoder.
        passes, mask_threshold: as of ours.
    """

    def __init__(self, model, passes: int = 10, mask_threshold: float = 0.99) -> None:
        self.ids = our_ids(model.vocab_size).tolist()
        self.ctc = make_ctc(model)
        parts = SimpleNamespace(
            ctc=self.ctc,
            decoder=make_decoder(model),
            mask_token=model.vocab_size - 1,
            token_list=["<blank>", "<unk>", *map(str, self.ids[2:])],
        )
        self.inference = MaskCTCInference(parts, passes, mask_threshold).eval()

    @torch.no_grad()
    def decode(self, encoder_out: torch.Tensor, encoder_out_lens: torch.Tensor) -> list[list[Hypothesis]]:
        """Return one hypothesis an utterance; ESPnet gives no score."""
        found = []
        for x, length in zip(encoder_out, encoder_out_lens.tolist(), strict=True):
            y = self.inference(x[:length]).yseq.tolist()[1:-1]
            found.append([Hypothesis([self.ids[i] for i in y], 0.0)])
        return found


class EspnetBeam:
    """ESPnet's batched joint CTC/attention beam search (its batch are hypotheses) as a search of ours.

    Args:
        model: CtcAttentionModel with an autoregressive decoder.
        beam_size, ctc_weight: as of ours.
    """

    def __init__(self, model, beam_size: int = 10, ctc_weight: float = 0.3) -> None:
        self.ids = our_ids(model.vocab_size).tolist()
        self.ctc, self.decoder = make_ctc(model), make_decoder(model)
        self.end = model.vocab_size - 2
        self.search = BatchBeamSearch(
            {"decoder": self.decoder, "ctc": CTCPrefixScorer(self.ctc, self.end)},
            {"decoder": 1 - ctc_weight, "ctc": ctc_weight},
            beam_size,
            self.end + 1,
            self.end,
            self.end,
            [str(i) for i in self.ids[:-1]],
            pre_beam_score_key="full",
        ).eval()

    @torch.no_grad()
    def decode(self, encoder_out: torch.Tensor, encoder_out_lens: torch.Tensor) -> list[list[Hypothesis]]:
        """Return the n-best list of each utterance."""
        found = []
        for x, length in zip(encoder_out, encoder_out_lens.tolist(), strict=True):
            nbest = self.search(x[:length])
            found.append([Hypothesis([self.ids[i] for i in h.yseq.tolist()[1:-1]], float(h.score)) for h in nbest])
        return found


class _Planted:
    """Plants a script in ESPnet's models as benchmarks/nar_rtf.py does in ours."""

    def __init__(self, search, planted: type) -> None:
        self.search = search
        search.ctc.ctc_lo = planted(search.ctc.ctc_lo)
        self.layers = [search.ctc.ctc_lo]
        if isinstance(search, EspnetBeam):
            search.decoder.output_layer = planted(search.decoder.output_layer)
            self.layers.append(search.decoder.output_layer)

    def say(self, script, frames: int, device: torch.device) -> None:
        theirs = dataclasses.replace(script, tokens=[token - 1 for token in script.tokens])
        self.search.ctc.ctc_lo.say(theirs.ctc(frames, device, self.search.ctc.ctc_lo.linear.out_features))
        if isinstance(self.search, EspnetBeam):
            self.search.decoder.output_layer.say(theirs.attention(self.search.end, device))

    def decode(self, encoder_out: torch.Tensor, encoder_out_lens: torch.Tensor) -> list[list[Hypothesis]]:
        found = []
        for i in range(len(encoder_out)):  # ESPnet takes one utterance at a time: each has the script from its begin
            for layer in self.layers:
                layer.call = 0
            found += self.search.decode(encoder_out[i : i + 1], encoder_out_lens[i : i + 1])
        return found


def espnet_searches(teacher, student, planted: type) -> dict[str, tuple]:
    """Return (model whose encoder is used, search) by name, for benchmarks/nar_rtf.py."""
    return {
        "ESPnet AR beam 10": (teacher, _Planted(EspnetBeam(teacher), planted)),
        "ESPnet NAR greedy, K 10": (student, _Planted(EspnetMaskCtc(student), planted)),
    }
