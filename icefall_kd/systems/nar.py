"""From an autoregressive recogniser to a fast Mask-CTC student: transfer, distillation, and the losses of both.

Gong, Zhou and Qian, "Knowledge Transfer and Distillation from Autoregressive to Non-Autoregressive Speech
Recognition", Interspeech 2022, arXiv 2207.10600.  The paper distils at frame level and at sequence level; its equations
and weights are not public, those here are our reading (docs/nar.md).  Mask-CTC is that of Higuchi et al. 2020.

``--attention-decoder ar`` is the teacher (joint CTC/attention, Watanabe et al. 2017), ``mlm`` the student:

    total = a * ctc + (1 - a) * decoder + s_F (ctc_kd + token_kd + encoder_kd) + s_S (nbest_ctc + nbest_token)

The first two are sums over utterances.  Frame-level terms of the CTC head and the encoder are means over frames times
the number of reference tokens, so that every scale weighs nats a token against nats a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.config import RecogniserKdConfig, TrainConfig
from icefall_kd.config.checks import refuse_options
from icefall_kd.data.batch import Batch, Labels, NBest, TopK
from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.decode.ctc_prefix import CtcPrefixBeamSearch
from icefall_kd.decode.joint_beam import JointBeamSearch
from icefall_kd.decode.mask_ctc import MaskPredict
from icefall_kd.decode.nar_beam import NarBeamSearch
from icefall_kd.errors import ConfigError
from icefall_kd.frames import FBANK_CONV2D
from icefall_kd.losses.ctc import ctc_loss
from icefall_kd.losses.masked_lm import draw_masks, smoothed_cross_entropy
from icefall_kd.losses.posterior_kd import nbest_weights, posterior_kd
from icefall_kd.models.attention_decoder import DecoderMemory
from icefall_kd.models.conformer import log_parameter_counts
from icefall_kd.models.ctc_attention import CtcAttentionModel
from icefall_kd.models.masks import make_pad_mask
from icefall_kd.systems.base import LabelSpec, LossTerm, LossTerms, System, by_row, stored_labels

# Which labels each distillation term reads.
KD_LABELS = {
    "ctc_kd": "ctc_posteriors",
    "token_kd": "token_posteriors",
    "nbest_ctc": "nbest",
    "nbest_token": "nbest",
    "encoder_kd": "embeddings",
}

# Where a warm-up begins: nothing beside the other losses, but at 0 a projection would get no gradient, which is refused
# in the first step, and the scan of the memory would leave the distillation's backward pass out.
_FAINT = 1e-30


def active_kd(kd: RecogniserKdConfig) -> dict[str, float]:
    """Return the scales of the distillation terms that are not 0."""
    scales = {name: getattr(kd, f"{name}_scale") for name in KD_LABELS}
    return {name: scale for name, scale in scales.items() if scale > 0}


class NarSystem(System):
    """Encoder, CTC head and attention decoder with their losses and, in training, the distillation terms."""

    def __init__(
        self,
        config: TrainConfig,
        vocab_size: int,
        kd: dict[str, float] | None = None,
        paths: dict[str, str] | None = None,
        online=None,
        teacher_dim: int = 0,
    ) -> None:
        """Build model and losses.

        Args:
            config: all options.
            vocab_size: tokens V.
            kd: scales of the active distillation terms.
            paths: stored label set of each kind.
            online: a RecogniserTeacher that makes the labels in training; None: they are stored.
            teacher_dim: channels of the teacher's encoder output, for encoder_kd.
        """
        super().__init__()
        self.attention, self.cfg = config.attention, config.recogniser_kd
        self.model = CtcAttentionModel(config.model, config.attention, vocab_size)
        self.kd, self.paths, self.online = kd or {}, paths or {}, online
        log_parameter_counts(self.model)
        self.heads = nn.ModuleDict()
        if "encoder_kd" in self.kd:
            self.heads["encoder"] = nn.Linear(self.model.encoder.dim, teacher_dim)

    @property
    def label_specs(self) -> list[LabelSpec]:
        """Return the stored label sets of the active distillation terms."""
        frames = {"frame_formula": FBANK_CONV2D}  # a teacher's frame is a student's
        return [LabelSpec(name=kind, kind=kind, path=path, expect=frames) for kind, path in self.paths.items()]

    @property
    def needs_audio(self) -> bool:
        """Return whether a teacher makes the labels in training."""
        return self.online is not None

    @property
    def online_sources(self) -> dict[str, str]:
        """Return the hash of the weights of the teacher that makes labels in training: its exp_dir may go on."""
        return {} if self.online is None else {"online_teacher": self.online.provenance()["weights_sha256"]}

    @property
    def alignment_losses(self) -> dict[str, bool]:
        """Return which losses are active."""
        return {"transducer": False, "ctc": True}

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return encoder_out (N, T', C) and encoder_out_lens (N,)."""
        out = self.model.encoder(batch.features, batch.x_lens)
        return out.encoder_out, out.encoder_out_lens

    def losses(self, batch: Batch, step: int) -> LossTerms:
        """Return ctc and decoder losses of ``batch`` and, in training, the distillation terms."""
        encoder_out, lens = self.encode(batch)
        frames = int(lens.sum())
        terms: dict[str, LossTerm] = {}
        metrics: dict[str, tuple] = {}
        ctc_logits = self.model.ctc_output(encoder_out)
        ctc, weight = ctc_loss(ctc_logits, batch.y, lens, batch.y_lens), self.attention.ctc_weight
        terms["ctc_loss"] = LossTerm(ctc.sum(), weight, frames, per_utterance=ctc.detach())
        memory = self.model.decoder.memory(encoder_out, lens)
        if self.model.decoder.causal:
            self._ar_terms(terms, metrics, batch, memory)
            return LossTerms(terms=terms, frames=frames, metrics=metrics)
        masks, logits = self._mlm_terms(terms, metrics, batch, memory)  # of mask_draws rows an utterance
        if self.training and self.kd:
            labels = self._labels(batch)
            warm = min(max(step, _FAINT) / self.cfg.kd_warm_step, 1.0) if self.cfg.kd_warm_step else 1.0
            scales = {name: warm * scale for name, scale in self.kd.items()}
            tokens = float(batch.y_lens.sum())
            if "ctc_kd" in scales:
                scale = tokens * scales["ctc_kd"]
                terms["ctc_kd_loss"] = self._ctc_kd(ctc_logits, lens, labels["ctc_posteriors"], scale)
            if "encoder_kd" in scales:
                scale = tokens * scales["encoder_kd"]
                terms["encoder_kd_loss"] = self._encoder_kd(encoder_out, lens, labels["embeddings"], scale)
            if "token_kd" in scales:
                terms["token_kd_loss"] = self._token_kd(logits, masks, labels["token_posteriors"], scales["token_kd"])
            self._nbest_terms(terms, scales, labels.get("nbest"), ctc_logits, lens, memory)
        return LossTerms(terms=terms, frames=frames, metrics=metrics)

    def _labels(self, batch: Batch) -> dict[str, Labels | TopK | NBest]:
        if self.online is None:
            return batch.labels
        return self.online.labels(batch, sorted({KD_LABELS[name] for name in self.kd}))

    def _ar_terms(self, terms: dict, metrics: dict, batch: Batch, memory: DecoderMemory) -> None:
        """Add the loss of the next token of each prefix, the end included."""
        sos = self.model.sos_id
        y_in, y_lens = F.pad(batch.y, (1, 0), value=sos), batch.y_lens + 1
        position = torch.arange(y_in.shape[1], device=y_in.device)
        target = F.pad(batch.y, (0, 1), value=sos).masked_fill(position == batch.y_lens.unsqueeze(1), sos)
        valid = position < y_lens.unsqueeze(1)
        logits = self.model.decoder(y_in, y_lens, memory)
        self._decoder_term(terms, metrics, "att", logits, target, valid)

    def _mlm_terms(self, terms: dict, metrics: dict, batch: Batch, memory: DecoderMemory) -> tuple[Tensor, Tensor]:
        """Add the loss of masked tokens; return which they are (R, U) and all logits (R, U, V), R = N * mask_draws."""
        y, y_lens = (x.repeat_interleave(self.attention.mask_draws, dim=0) for x in (batch.y, batch.y_lens))
        masks = self._draw(y_lens, y.shape[1])
        logits = self.model.decoder(y.masked_fill(masks, self.model.mask_id), y_lens, memory)
        self._decoder_term(terms, metrics, "mlm", logits, y, masks, self.attention.mask_draws)
        return masks, logits

    def _draw(self, y_lens: Tensor, max_len: int) -> Tensor:
        if self.training:
            return draw_masks(y_lens, max_len, self.attention.mask_sampling)
        with torch.random.fork_rng(devices=[] if y_lens.device.type == "cpu" else [y_lens.device]):
            torch.manual_seed(0)  # validation losses of two epochs are of the same masks
            return draw_masks(y_lens, max_len, self.attention.mask_sampling)

    def _decoder_term(
        self, terms: dict, metrics: dict, name: str, logits: Tensor, target: Tensor, where: Tensor, draws: int = 1
    ) -> None:
        row, _ = where.nonzero(as_tuple=True)
        logits, target = logits[where], target[where]  # (M, V), (M,)
        loss = smoothed_cross_entropy(logits, target, self.attention.label_smoothing) / draws
        terms[f"{name}_loss"] = LossTerm(
            loss.sum(),
            1 - self.attention.ctc_weight,
            max(len(target), 1) / draws,
            unit="token",
            per_utterance=by_row(loss.detach(), row // draws, len(where) // draws),
        )
        metrics[f"{name}_acc"] = ((logits.argmax(dim=1) == target).sum().float(), float(len(target)))

    def _ctc_kd(self, logits: Tensor, lens: Tensor, labels: TopK, scale: float) -> LossTerm:
        """Frame level: KL of the CTC posteriors; frames where the teacher is sure of the blank count less."""
        row, frame = _valid(labels.lens, lens, min(labels.ids.shape[1], logits.shape[1]))
        ids, probs, rest = (x[row, frame] for x in (labels.ids, labels.probs, labels.rest))
        loss = posterior_kd(logits[row, frame], ids, probs, rest, self.cfg.kd_temperature)
        if self.cfg.kd_blank_weight != 1:
            blank = (probs * (ids == self.model.blank_id)).sum(dim=1)
            weight = torch.where(blank > self.cfg.kd_blank_threshold, self.cfg.kd_blank_weight, 1.0)
        else:
            weight = torch.ones_like(loss)
        loss, count = loss * weight, max(float(weight.sum()), 1e-9)
        return LossTerm(loss.sum(), scale / count, count, per_utterance=by_row(loss.detach(), row, len(lens)))

    def _encoder_kd(self, encoder_out: Tensor, lens: Tensor, labels: Labels, scale: float) -> LossTerm:
        """Distance of a projection of the encoder output from the teacher's, mean over channels."""
        row, frame = _valid(labels.lens, lens, min(labels.values.shape[1], encoder_out.shape[1]))
        with torch.autocast(encoder_out.device.type, enabled=False):
            predicted = self.heads["encoder"](encoder_out[row, frame].float())
            wanted = labels.values[row, frame].float()
            if self.cfg.encoder_kd == "cosine":
                loss = 1 - F.cosine_similarity(predicted, wanted, dim=1)
            else:
                loss = F.mse_loss(predicted, wanted, reduction="none").mean(dim=1)
        count = max(len(loss), 1)
        return LossTerm(loss.sum(), scale / count, count, per_utterance=by_row(loss.detach(), row, len(lens)))

    def _token_kd(self, logits: Tensor, masks: Tensor, labels: TopK, scale: float) -> LossTerm:
        """Token level: KL to the teacher's decoder at masked tokens, over the classes that a text can have."""
        draws = self.attention.mask_draws
        labelled = ~make_pad_mask(labels.lens, masks.shape[1]).repeat_interleave(draws, dim=0)
        row, token = (masks & labelled).nonzero(as_tuple=True)
        ids, probs, rest = (x[row // draws, token] for x in (labels.ids, labels.probs, labels.rest))
        loss = posterior_kd(self._text_logits(logits[row, token]), ids, probs, rest, self.cfg.kd_temperature) / draws
        each = by_row(loss.detach(), row // draws, len(masks) // draws)
        return LossTerm(loss.sum(), scale, max(len(loss), 1) / draws, "token", per_utterance=each)

    def _text_logits(self, logits: Tensor) -> Tensor:
        """Return logits (M, V) without blank, sos/eos and mask, which no teacher's token posterior has either."""
        specials = torch.tensor([self.model.blank_id, self.model.sos_id, self.model.mask_id], device=logits.device)
        return logits.float().index_fill(1, specials, -torch.inf)

    def _nbest_terms(
        self,
        terms: dict,
        scales: dict[str, float],
        labels: NBest | None,
        ctc_logits: Tensor,
        encoder_lens: Tensor,
        memory: DecoderMemory,
    ) -> None:
        """Sequence level: both branches' losses on the teacher's hypotheses, weighted by its scores."""
        if labels is None or not {"nbest_ctc", "nbest_token"} & set(scales):
            return
        y, lens, scores = (x[:, : self.cfg.kd_nbest] for x in (labels.tokens, labels.lens, labels.scores))
        scores = scores.masked_fill(lens + _repeats(y, lens) > encoder_lens.unsqueeze(1), -torch.inf)
        weights = nbest_weights(scores, self.cfg.nbest_temperature)  # (N, B)
        n, b = weights.shape
        y, lens = y.flatten(0, 1), lens.flatten()
        count = max(float((weights.flatten() * lens).sum()), 1e-9)
        if "nbest_ctc" in scales:
            used = weights.flatten().nonzero().squeeze(1)
            loss = weights.new_zeros(n * b)
            if len(used):
                of = used // b
                ctc = ctc_loss(ctc_logits[of], y[used], encoder_lens[of], lens[used])
                loss = loss.index_put((used,), ctc * weights.flatten()[used])
            loss = loss.view(n, b).sum(dim=1)
            terms["nbest_ctc_loss"] = LossTerm(
                loss.sum(), scales["nbest_ctc"], count, "token", per_utterance=loss.detach()
            )
        if "nbest_token" in scales:
            masks = self._draw(lens, y.shape[1]) & (weights.flatten() > 0).unsqueeze(1)
            logits = self.model.decoder(y.masked_fill(masks, self.model.mask_id), lens, memory)
            row, _ = masks.nonzero(as_tuple=True)
            weight = weights.flatten()[row]
            loss = smoothed_cross_entropy(logits[masks], y[masks], 0.0) * weight
            terms["nbest_token_loss"] = LossTerm(
                loss.sum(),
                scales["nbest_token"],
                max(float(weight.sum()), 1e-9),
                "token",
                per_utterance=by_row(loss.detach(), row // b, n),
            )

    def decoders(self) -> dict[str, object]:
        """Return the constructors of this model's searches, by the names of --decoding-method."""
        found: dict[str, object] = {"ctc_greedy_search": lambda config: CtcGreedySearch(self.model)}
        found["ctc_prefix_beam_search"] = lambda config: CtcPrefixBeamSearch.from_config(self.model, config)
        if self.model.decoder.causal:
            found["joint_beam_search"] = lambda config: JointBeamSearch.from_config(self.model, config)
        else:
            found["mask_predict"] = lambda config: MaskPredict.from_config(self.model, config)
            found["nar_beam_search"] = lambda config: NarBeamSearch.from_config(self.model, config)
        return found

    def inference_state_dict(self) -> dict[str, Tensor]:
        """Return the parameters without the distillation heads."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("heads.")}


def _valid(label_lens: Tensor, lens: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
    """Return utterances and frames that have labels and are the student's."""
    return (~make_pad_mask(torch.minimum(label_lens, lens), max_len)).nonzero(as_tuple=True)


def _repeats(y: Tensor, lens: Tensor) -> Tensor:
    """Return how often a token equals the one before it, of sequences (N, B, U): CTC needs a blank there."""
    same = (y[..., 1:] == y[..., :-1]) & ~make_pad_mask(lens, y.shape[2])[..., 1:]
    return same.sum(dim=-1)


def build_nar(config: TrainConfig, vocab_size: int, inference: bool = False) -> NarSystem:
    """Build teacher or student, with stored or online labels, as the options say.

    Raises:
        ConfigError: distillation into an autoregressive decoder, labels that are missing, or options of mvq.
    """
    if inference:
        return NarSystem(config, vocab_size)
    for group in (config.cif, config.text_kd):
        refuse_options(group, "hkd")
    refuse_options(config.dual, "dualmode")
    refuse_options(config.ssl, "dualmode --objective ssl")
    refuse_options(config.kd, "mvq", besides=("teacher_labels", "label_dir", "min_coverage"))
    kd = active_kd(config.recogniser_kd)
    if not kd:
        return NarSystem(config, vocab_size)
    if config.attention.attention_decoder == "ar":
        raise ConfigError(f"{', '.join(kd)}: distillation needs --attention-decoder mlm, the student")
    kinds = sorted({KD_LABELS[name] for name in kd})
    if config.kd.teacher_labels == "online":
        from icefall_kd.teachers.recogniser import RecogniserTeacher

        # The student must start as it does with stored labels, whatever loading a teacher draws.
        with torch.random.fork_rng(devices=[]):
            online = RecogniserTeacher.for_training(config)
        return NarSystem(config, vocab_size, kd, online=online, teacher_dim=online.dim)
    scales = {k: [f"--{n.replace('_', '-')}-scale" for n, kind in KD_LABELS.items() if kind == k] for k in kinds}
    paths, dims = stored_labels(config.kd.label_dir, {kind: ", ".join(names) for kind, names in scales.items()})
    return NarSystem(config, vocab_size, kd, paths, teacher_dim=dims.get("embeddings", 0))
