"""What every system with a transducer, a CTC head or both has: the model, its losses and its searches."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from icefall_kd.config import TrainConfig
from icefall_kd.data.batch import Batch
from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.decode.k2_graph import CtcGraphSearch, FastBeamSearch
from icefall_kd.decode.lexicon_beam import LexiconBeamSearch
from icefall_kd.decode.streaming import encode_chunks
from icefall_kd.decode.transducer import GreedySearch, ModifiedBeamSearch
from icefall_kd.losses.ctc import ctc_loss
from icefall_kd.losses.rnnt import PrunedTransducer, pruned_transducer
from icefall_kd.models.transducer import TransducerModel
from icefall_kd.systems.base import LossTerm, System


@dataclass(frozen=True)
class Recognition:
    """The losses of an encoder output, and what they were made of; parts that are not trained are None."""

    terms: dict[str, LossTerm]
    """simple_loss, pruned_loss and ctc_loss."""
    transducer: PrunedTransducer | None
    ctc_logits: Tensor | None
    """(N, T', V)."""


def warmup_scales(step: int, warm_step: int, simple_scale: float) -> tuple[float, float]:
    """Return the scales of the simple and the pruned loss at ``step`` (the Zipformer recipe's ramp)."""
    x = min(step / warm_step, 1.0) if warm_step > 0 else 1.0
    return 1.0 - x * (1.0 - simple_scale), 0.1 + 0.9 * x


class TransducerSystem(System):
    """A TransducerModel with the losses of ``config.asr``; ``encoder``: None, a Conformer."""

    def __init__(self, config: TrainConfig, vocab_size: int, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.asr = config.asr
        losses = {"transducer": config.asr.transducer_scale > 0, "ctc": config.asr.ctc_scale > 0}
        self.model = TransducerModel(config.model, vocab_size, **losses, encoder=encoder)

    @property
    def alignment_losses(self) -> dict[str, bool]:
        """Return which losses are active."""
        return {"transducer": self.asr.transducer_scale > 0, "ctc": self.asr.ctc_scale > 0}

    def heard(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what the encoder's front end hears, and how much of it is valid (N,)."""
        return batch.features, batch.x_lens

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return encoder_out (N, T', C) and encoder_out_lens (N,)."""
        out = self.model.encoder(*self.heard(batch))
        return out.encoder_out, out.encoder_out_lens

    def encode_chunks(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield encoder_out (N, C, C') and encoder_out_lens (N,) of each chunk of the encoder's ``chunks``."""
        return encode_chunks(self.model.encoder, *self.heard(batch), self.model.encoder.chunks)

    def recognise(self, batch: Batch, encoder_out: Tensor, lens: Tensor, step: int) -> Recognition:
        """Return the simple, the pruned and the CTC loss of encoder_out (N, T', C) with lengths (N,)."""
        terms: dict[str, LossTerm] = {}
        transducer = ctc_logits = None
        frames = int(lens.sum())
        if self.asr.transducer_scale > 0:
            transducer = self._transducer(batch, encoder_out, lens)
            scales = warmup_scales(step, self.asr.rnnt_warm_step, self.asr.simple_loss_scale)
            losses = {"simple_loss": transducer.simple, "pruned_loss": transducer.pruned}
            for (name, loss), scale in zip(losses.items(), scales, strict=True):
                terms[name] = LossTerm(
                    loss.sum(), scale * self.asr.transducer_scale, frames, per_utterance=loss.detach()
                )
        if self.asr.ctc_scale > 0:
            ctc_logits = self.model.ctc_output(encoder_out)
            ctc = ctc_loss(ctc_logits, batch.y, lens, batch.y_lens)
            terms["ctc_loss"] = LossTerm(ctc.sum(), self.asr.ctc_scale, frames, per_utterance=ctc.detach())
        return Recognition(terms, transducer, ctc_logits)

    def _transducer(self, batch: Batch, encoder_out: Tensor, lens: Tensor) -> PrunedTransducer:
        decoder_out = self.model.decoder(self.model.decoder.add_sos(batch.y))  # (N, U + 1, C)
        return pruned_transducer(
            encoder_out,
            decoder_out,
            self.model.joiner,
            self.model.simple_am_proj,
            self.model.simple_lm_proj,
            batch.y,
            lens,
            batch.y_lens,
            prune_range=self.asr.prune_range,
            lm_scale=self.asr.lm_scale,
            am_scale=self.asr.am_scale,
            backend=self.asr.rnnt_backend,
        )

    def decoders(self) -> dict[str, object]:
        """Return the constructors of this model's searches, by the names of --decoding-method."""
        found: dict[str, object] = {}
        if self.model.joiner is not None:
            found["greedy_search"] = lambda config: GreedySearch.from_config(self.model, config)
            found["modified_beam_search"] = lambda config: ModifiedBeamSearch.from_config(self.model, config)
            for name in ("fast_beam_search", "fast_beam_search_nbest"):
                found[name] = found[f"{name}_LG"] = lambda config: FastBeamSearch.from_config(self.model, config)
        if self.model.ctc_output is not None:
            found["ctc_greedy_search"] = lambda config: CtcGreedySearch(self.model)
            for name in ("ctc_decoding", "ctc_decoding_HLG", "ctc_decoding_nbest_HLG"):
                found[name] = lambda config: CtcGraphSearch.from_config(self.model, config)
            found["ctc_lexicon_beam"] = lambda config: LexiconBeamSearch.from_config(self.model, config)
        return found
