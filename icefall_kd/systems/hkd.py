"""From a language model to a CIF recogniser: hierarchical distillation, at the acoustic and the linguistic level.

Han, Chen, Shi, Xu and Xu, "Knowledge Transfer from Pre-trained Language Models to Cif-based Speech Recognizers via
Hierarchical Distillation", Interspeech 2023, arXiv 2301.13003, and its public code (CIF-HieraDist):

    total = ce + quantity + 0.5 ctc + 1.0 acd + 0.01 lrd

all sums over tokens, divided by the number of tokens in the step.  The end of a text is a token everywhere: in the
quantity, in the target of CTC and decoder, and among the language model's states.  What is the paper's, what its code's
and what ours: docs/hkd.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.config import TextKdConfig, TrainConfig
from icefall_kd.config.checks import refuse_options
from icefall_kd.data.batch import Batch
from icefall_kd.decode.cif_beam import CifBeamSearch, CifGreedySearch
from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.errors import ConfigError
from icefall_kd.frames import pooled_seconds
from icefall_kd.losses.contrastive import contrastive_loss
from icefall_kd.losses.ctc import ctc_loss
from icefall_kd.losses.masked_lm import smoothed_cross_entropy
from icefall_kd.losses.text_states import Standardise, TextUnits
from icefall_kd.models.cif import CifOutput, fired_tokens
from icefall_kd.models.cif_model import CifModel
from icefall_kd.models.conformer import log_parameter_counts
from icefall_kd.models.masks import make_pad_mask
from icefall_kd.systems.base import LabelSpec, LossTerm, LossTerms, System, by_row, stored_labels

# Where a fade-in begins: nothing beside the other losses, but at 0 a parameter would get no gradient, which is refused.
_FAINT = 1e-30


def active_text_kd(cfg: TextKdConfig) -> dict[str, float]:
    """Return the scales of the distillation losses that are not 0."""
    return {name: scale for name in cfg.text_kd or () if (scale := getattr(cfg, f"{name}_scale")) > 0}


def add_end(y: Tensor, y_lens: Tensor, end_id: int) -> tuple[Tensor, Tensor]:
    """Return tokens (N, U) with the end behind each text of (N, U - 1), and everywhere behind it, and lengths (N,)."""
    return F.pad(y, (0, 1), value=end_id).masked_fill(make_pad_mask(y_lens, y.shape[1] + 1), end_id), y_lens + 1


class HkdSystem(System):
    """The CIF recogniser with its losses and, in training, a language model's states to learn from."""

    def __init__(
        self,
        config: TrainConfig,
        vocab_size: int,
        kd: dict[str, float] | None = None,
        path: str | None = None,
        teacher_dim: int = 0,
    ) -> None:
        """Build model and losses.

        Args:
            config: all options.
            vocab_size: tokens V.
            kd: scales of the active distillation losses, acd and lrd.
            path: the stored label set of text states.
            teacher_dim: channels of a state.
        """
        super().__init__()
        self.cfg, self.text_cfg, self.smoothing = config.cif, config.text_kd, config.attention.label_smoothing
        self.model = CifModel(config.model, config.attention, config.cif, vocab_size)
        self.kd, self.path = kd or {}, path
        log_parameter_counts(self.model)
        self.heads = nn.ModuleDict({name: nn.Linear(self.model.encoder.dim, teacher_dim) for name in self.kd})
        if self.kd and self.text_cfg.standardise_text_states:
            self.heads["states"] = Standardise(teacher_dim)

    @property
    def label_specs(self) -> list[LabelSpec]:
        """Return the stored text states, with distillation."""
        return [LabelSpec(name="text_states", kind="text_states", path=self.path)] if self.kd else []

    @property
    def alignment_losses(self) -> dict[str, object]:
        """Return what asks for enough frames: CTC with the end of the text, at this encoder's rate.

        Without CTC, too: a token more than frames could fire only by the scaling of training.
        """
        return {
            "transducer": False,
            "ctc": True,
            "end_token": True,
            "num_encoder_frames": self.model.encoder.output_lens,
        }

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return encoder_out (N, T', C) and encoder_out_lens (N,)."""
        out = self.model.encoder(batch.features, batch.x_lens)
        return out.encoder_out, out.encoder_out_lens

    def losses(self, batch: Batch, step: int) -> LossTerms:
        """Return the recogniser's losses of ``batch`` and, in training, those of distillation."""
        encoder_out, lens = self.encode(batch)
        y, y_lens = add_end(batch.y, batch.y_lens, self.model.sos_id)
        tokens = int(y_lens.sum())
        warm = min(max(step, _FAINT) / self.cfg.quantity_warm_step, 1.0) if self.cfg.quantity_warm_step else 1.0
        warm = warm if self.training else 1.0
        # In validation nothing is scaled, as in recognition.
        out = self.model.fire(encoder_out, lens, y_lens if self.training else None)
        width = min(out.c.shape[1], y.shape[1])
        y_in = F.pad(y, (1, 0), value=self.model.sos_id)[:, :width]
        logits, states = self.model.decoder(y_in, out.c[:, :width])
        terms: dict[str, LossTerm] = {}
        metrics: dict[str, tuple] = {}
        self._token_terms(terms, metrics, logits, y, y_lens, out.lens, warm)
        quantity = (out.quantity - y_lens).abs()
        terms["quantity_loss"] = LossTerm(
            quantity.sum(), self.cfg.quantity_scale, tokens, "token", per_utterance=quantity.detach()
        )
        right = fired_tokens(out.quantity.detach()) == y_lens
        metrics["length_acc"] = (right.sum().float(), float(len(right)))
        if self.model.ctc_output is not None:
            ctc = ctc_loss(self.model.ctc_output(encoder_out), y, lens, y_lens)
            terms["ctc_loss"] = LossTerm(
                ctc.sum(), self.cfg.cif_ctc_scale, tokens, "token", per_utterance=ctc.detach()
            )
        if self.training and self.kd:
            self._distil(terms, metrics, batch, y_lens, out, states, warm)
        return LossTerms(terms=terms, frames=tokens, metrics=metrics, unit="token")

    def _token_terms(
        self, terms: dict, metrics: dict, logits: Tensor, y: Tensor, y_lens: Tensor, fired: Tensor, scale: float
    ) -> None:
        """Add the cross-entropy of the tokens; one that did not fire costs what a guess among all tokens does."""
        fired, tokens = torch.minimum(fired, y_lens), int(y_lens.sum())
        valid = ~make_pad_mask(fired, logits.shape[1])
        row, _ = valid.nonzero(as_tuple=True)
        target, picked = y[:, : logits.shape[1]][valid], logits[valid]  # (M,), (M, V)
        loss = smoothed_cross_entropy(picked, target, self.smoothing)
        guess = smoothed_cross_entropy(picked.new_zeros(1, logits.shape[2]), y[:1, 0], self.smoothing)
        missing = (y_lens - fired) * guess
        terms["ce_loss"] = LossTerm(
            loss.sum() + missing.sum(),
            scale,
            tokens,
            "token",
            per_utterance=by_row(loss.detach(), row, len(y)) + missing,
        )
        metrics["token_acc"] = ((picked.argmax(dim=1) == target).sum().float(), float(tokens))

    def _distil(
        self,
        terms: dict,
        metrics: dict,
        batch: Batch,
        y_lens: Tensor,
        out: CifOutput,
        states: Tensor,
        warm: float,
    ) -> None:
        """Add the losses at both levels; an utterance without states, or whose tokens did not all fire, has none."""
        text = batch.labels["text_states"]
        lens = torch.where(out.lens == y_lens, text.lens, 0)
        units = TextUnits(text, lens, batch.y.shape[1] + 1)
        with torch.autocast(states.device.type, enabled=False):
            wanted = self.heads["states"](units.values) if "states" in self.heads else units.values  # (R, D)
            if "acd" in self.kd:
                predicted = self.heads["acd"](units.mean(out.c.float()))
                loss, right = contrastive_loss(
                    predicted, wanted, self.text_cfg.acd_temperature, self.text_cfg.acd_negatives
                )
                terms["acd_loss"] = _kd_term(loss, units, y_lens, warm * self.kd["acd"])
                metrics["acd_acc"] = (right.sum().float(), max(len(units), 1e-9))
            if "lrd" in self.kd:
                loss = (self.heads["lrd"](units.last(states.float())) - wanted).square()
                loss = loss.sum(dim=1) if self.text_cfg.lrd_reduction == "sum" else loss.mean(dim=1)
                terms["lrd_loss"] = _kd_term(loss, units, y_lens, warm * self.kd["lrd"])

    def frame_seconds(self, frame: int) -> float:
        """Return where a frame (0-based) of the encoder output begins, in seconds: 80 ms a frame behind two pools."""
        return pooled_seconds(frame, self.model.encoder.num_pools)

    def decoders(self) -> dict[str, object]:
        """Return the constructors of this model's searches, by the names of --decoding-method."""
        found: dict[str, object] = {
            "cif_greedy_search": lambda config: CifGreedySearch.from_config(self.model, config),
            "cif_beam_search": lambda config: CifBeamSearch.from_config(self.model, config),
        }
        if self.model.ctc_output is not None:  # it writes the end of the text, too
            found["ctc_greedy_search"] = lambda config: CtcGreedySearch(self.model, end_id=self.model.sos_id)
        return found

    def inference_state_dict(self) -> dict[str, Tensor]:
        """Return the parameters without the distillation heads."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("heads.")}


def _kd_term(loss: Tensor, units: TextUnits, y_lens: Tensor, scale: float) -> LossTerm:
    each = by_row(loss.detach(), units.rows, len(y_lens))
    return LossTerm(loss.sum(), scale, max(len(units), 1e-9), "token", per_utterance=each)


# Options of nar's group that this system reads, too.
_DECODER_OPTIONS = (
    "num_decoder_layers", "decoder_heads", "decoder_feedforward_dim", "decoder_dropout", "label_smoothing",
)  # fmt: skip


def build_hkd(config: TrainConfig, vocab_size: int, inference: bool = False) -> HkdSystem:
    """Build the system, with distillation from stored text states if the options say so.

    Raises:
        ConfigError: distillation without its label set, or options of another system.
    """
    if inference:
        return HkdSystem(config, vocab_size)
    refuse_options(config.kd, "mvq", besides=("teacher_labels", "label_dir", "min_coverage"))
    refuse_options(config.recogniser_kd, "nar")
    refuse_options(config.attention, "nar", besides=_DECODER_OPTIONS)
    refuse_options(config.dual, "dualmode")
    refuse_options(config.ssl, "dualmode --objective ssl")
    if config.kd.teacher_labels != "stored":
        raise ConfigError("--teacher-labels online: text states are stored beforehand; leave it out")
    kd = active_text_kd(config.text_kd)
    if not kd:
        return HkdSystem(config, vocab_size)
    paths, dims = stored_labels(config.kd.label_dir, {"text_states": f"--text-kd {','.join(kd)}"})
    return HkdSystem(config, vocab_size, kd, paths["text_states"], dims["text_states"])
