"""MVQ-KD: a transducer student that also predicts its teacher's codebook indexes.

Guo et al., "Predicting Multi-Codebook Vector Quantization Indexes for Knowledge Distillation",
arXiv 2211.00508.  The student's middle layer (a choice of the authors' recipe in icefall, as are the joined
frames) predicts, for every frame, the multi-codebook indexes of the teacher frames that it spans; ``--kd l1``
and ``l2`` regress the teacher's embeddings instead (the paper compares with both), and ``--kd none`` is the
baseline.  All of it is dropped at inference.

    total = simple_scale * simple + pruned_scale * pruned + ctc_scale * ctc + sum_i kd_scale_i * kd_i

Every term is a sum over the batch, so that the recipe's published scales keep their meaning.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from icefall_kd.config import ENCODER_SIZES, KdConfig, TrainConfig
from icefall_kd.config.checks import refuse_options
from icefall_kd.data.batch import IGNORE, Batch, Labels
from icefall_kd.errors import ConfigError
from icefall_kd.frames import FrameFormula
from icefall_kd.labels.align import (
    STUDENT_HOP,
    check_online_lengths,
    delay_frames,
    join_embeddings,
    join_frames,
    label_ratio,
)
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.losses.codebook import CodebookLoss
from icefall_kd.losses.frame_kd import FrameKdLoss
from icefall_kd.models.conformer import log_parameter_counts
from icefall_kd.models.hubert import HubertEncoder
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.systems.asr import TransducerSystem
from icefall_kd.systems.base import LabelSpec, LossTerm, LossTerms
from icefall_kd.systems.hubert_encoder import frames_of, hop_of, make_encoder, refuse_missing_cmvn, seconds_of
from icefall_kd.teachers import build_teacher
from icefall_kd.teachers.base import Teacher


@dataclass(frozen=True)
class LabelSource:
    """What a label set offers, stored (with its path) or made online."""

    path: str | None
    kind: str
    """"codebook_indexes" or "embeddings"."""
    formula: FrameFormula
    """The teacher's frames."""
    width: int
    """Codebooks Q, or embedding channels C, of one teacher frame."""
    codebook_size: int = 256


@dataclass(frozen=True)
class KdTarget:
    """One distillation target: which labels, predicted at which layer, at which scale."""

    name: str
    layer: int
    """Student layer, 1-based."""
    scale: float
    ratio: int
    """Teacher frames a student frame."""
    source: LabelSource


def kd_targets(
    kd: KdConfig, num_layers: int, sources: list[LabelSource], student_hop: int = STUDENT_HOP
) -> list[KdTarget]:
    """Combine label sets with their layers and scales; ConfigError when their numbers do not fit.

    Args:
        kd: the options; one layer or scale serves all label sets.
        num_layers: layers of the student's encoder.
        sources: the label sets, stored or made online.
        student_hop: samples between two frames of that encoder.
    """
    if not sources:
        raise ConfigError(f"--kd {kd.kd} needs --label-dir (or --teacher-labels online)")
    want = "codebook_indexes" if kd.kd == "mvq" else "embeddings"
    targets = []
    for i, source in enumerate(sources):
        if source.kind != want:
            raise ConfigError(f"--kd {kd.kd} needs labels of kind {want}, but {source.path} holds {source.kind}")
        layer = _pick(kd.kd_layer, i, len(sources), "--kd-layer") or max(num_layers // 2, 1)
        scale = _pick(kd.kd_scale, i, len(sources), "--kd-scale")
        if not scale > 0:
            raise ConfigError(f"--kd-scale is {scale}; it must be positive (--kd none trains without distillation)")
        if not 1 <= layer <= num_layers:
            raise ConfigError(f"--kd-layer {layer}: the student has layers 1 to {num_layers}")
        targets.append(
            KdTarget(
                name=f"kd{i}" if len(sources) > 1 else "kd",
                layer=layer,
                scale=scale,
                ratio=label_ratio(source.formula, student_hop=student_hop),
                source=source,
            )
        )
    return targets


def _pick(values: list, index: int, count: int, flag: str):
    if len(values) not in (1, count):
        raise ConfigError(f"{flag} has {len(values)} values for {count} label sets; give one, or one for each")
    return values[index if len(values) > 1 else 0]


class OnlineTeacher:
    """Make the labels of a batch from its clean audio, as extraction does; holds no trained parameters."""

    def __init__(self, teacher: Teacher, quantizer: Quantizer | None, refine_iters: int) -> None:
        self.teacher, self.quantizer, self.refine_iters = teacher, quantizer, refine_iters

    @torch.no_grad()
    def labels(self, batch: Batch) -> Labels:
        """Return codes (N, T_l, Q) padded with -100, or embeddings (N, T_l, C) padded with 0.

        Raises:
            DataError: the frames of teacher, audio and features of an utterance do not explain each other.
        """
        # As in extraction: the student's autocast is not the teacher's, which has a precision of its own.
        with torch.autocast(batch.audio.device.type, enabled=False):
            output = self.teacher.extract(batch)
        embeddings, lens = output.arrays["embeddings"].float(), output.lens["embeddings"]
        check_online_lengths(batch, lens, self.teacher.frame_formula)
        if self.quantizer is None:
            return Labels(embeddings, lens)
        self.quantizer.to(embeddings.device)
        valid = torch.arange(embeddings.size(1), device=lens.device) < lens[:, None]
        codes = torch.full((*embeddings.shape[:2], self.quantizer.num_codebooks), -100, device=embeddings.device)
        codes[valid] = self.quantizer.encode(embeddings[valid], refine_iters=self.refine_iters).long()
        return Labels(codes, lens)


class MvqSystem(TransducerSystem):
    """The student with its ASR losses and, in training, its distillation heads."""

    def __init__(
        self,
        config: TrainConfig,
        vocab_size: int,
        targets: list[KdTarget] = (),
        online: OnlineTeacher | None = None,
        encoder: HubertEncoder | None = None,
    ) -> None:
        super().__init__(config, vocab_size, encoder)
        self.kd, self.teacher_layer = config.kd, config.teacher.layer
        self.targets = list(targets)
        self.online = online
        log_parameter_counts(self.model)
        dim = self.model.encoder.dim
        self.heads = nn.ModuleDict()
        for t in self.targets:
            width = t.ratio * t.source.width
            if t.source.kind == "codebook_indexes":
                joint = config.kd.codebook_head == "joint"
                self.heads[t.name] = CodebookLoss(dim, width, t.source.codebook_size, joint=joint)
            else:
                self.heads[t.name] = FrameKdLoss(dim, t.source.width, t.ratio, config.kd.kd)

    @property
    def label_specs(self) -> list[LabelSpec]:
        """Return the stored label sets of the active distillation terms."""
        if self.online is not None:
            return []
        # A quantizer or layer that is named although labels are stored must be the one that they were made with.
        expect: dict = {"layer": self.teacher_layer} if self.teacher_layer > 0 else {}
        if self.kd.kd == "mvq" and self.kd.quantizer is not None:
            expect["quantizer_sha256"] = _quantizer(self.kd.quantizer).sha256
        return [
            LabelSpec(name=t.name, kind=t.source.kind, path=t.source.path, expect=expect) for t in self.targets
        ]

    @property
    def needs_audio(self) -> bool:
        """Return whether a teacher makes the labels in training, or the student hears samples."""
        return self.online is not None or self.hears_samples

    @property
    def hears_samples(self) -> bool:
        """Return whether the encoder is HuBERT's."""
        return isinstance(self.model.encoder, HubertEncoder)

    @property
    def alignment_losses(self) -> dict[str, object]:
        """Return which losses are active, and how many frames an utterance has."""
        frames = {"num_encoder_frames": frames_of(self.model.encoder)} if self.hears_samples else {}
        return super().alignment_losses | frames

    def heard(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what the encoder's front end hears, and how much of it is valid (N,)."""
        return (batch.audio, batch.audio_lens) if self.hears_samples else super().heard(batch)

    def frame_seconds(self, frame: int) -> float:
        """Return where a frame (0-based) of the encoder output begins, in seconds."""
        return seconds_of(self.model.encoder, frame) if self.hears_samples else super().frame_seconds(frame)

    def after_step(self, step: int) -> dict[str, float]:
        """Refuse log-mel statistics of a HuBERT encoder that never came."""
        if step == 0 and self.hears_samples:
            refuse_missing_cmvn(self.model.encoder)
        return {}

    def losses(self, batch: Batch, step: int) -> LossTerms:
        """Return simple, pruned, ctc and, in training, distillation losses of ``batch``."""
        taps = tuple(t.layer for t in self.targets) if self.training else ()
        out = self.model.encoder(*self.heard(batch), taps=taps)
        frames = int(out.encoder_out_lens.sum())
        terms = self.recognise(batch, out.encoder_out, out.encoder_out_lens, step).terms
        metrics: dict[str, tuple] = {}
        for target in self.targets if self.training else ():
            self._kd_terms(terms, metrics, target, batch, out)
        return LossTerms(terms=terms, frames=frames, metrics=metrics)

    def _kd_terms(self, terms: dict, metrics: dict, target: KdTarget, batch: Batch, out) -> None:
        labels = self.online.labels(batch) if self.online is not None else batch.labels[target.name]
        lens = out.encoder_out_lens
        tap = out.taps[target.layer][:, : int(lens.max())]  # a batch may be padded beyond its longest utterance
        if target.source.kind == "embeddings":
            joined, valid = (
                delay_frames(x, lens, self.kd.kd_delay, 0) for x in join_embeddings(labels, lens, target.ratio)
            )
            loss = self.heads[target.name](tap, joined, valid)
            terms[f"{target.name}_{self.kd.kd}_loss"] = LossTerm(
                loss.value, target.scale, loss.num_frames, per_utterance=loss.per_utterance
            )
            return
        codes = join_frames(labels, lens, target.ratio)  # (N, T', ratio * Q)
        codes = delay_frames(codes, lens, self.kd.kd_delay, IGNORE)
        loss = self.heads[target.name](tap, codes)
        terms[f"{target.name}_codebook_loss"] = LossTerm(
            loss.value, target.scale, loss.num_frames, per_utterance=loss.per_utterance
        )
        metrics[f"{target.name}_codebook_acc"] = (loss.correct.sum(), float(loss.counts.sum()))
        # The bound of every codebook's cross-entropy is ln K: a head that sits there has learned nothing.
        bound = math.log(target.source.codebook_size)
        for m, count in enumerate(loss.counts.tolist()):
            metrics[f"{target.name}_ce{m:02d}"] = (loss.per_target[m], count, bound)

    def inference_state_dict(self) -> dict[str, Tensor]:
        """Return the parameters without the distillation heads."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("heads.")}


def build_mvq(config: TrainConfig, vocab_size: int, inference: bool = False) -> MvqSystem:
    """Build the system with stored or online labels, as ``config.kd`` says; a ConfigError for options of nar."""
    is_hubert = config.model.encoder == "hubert"
    if is_hubert and config.model.streaming:
        raise ConfigError("--encoder hubert with --streaming true: it sees whole utterances; leave one out")
    if inference:
        return MvqSystem(config, vocab_size, encoder=make_encoder(config, new=False) if is_hubert else None)
    refuse_options(config.recogniser_kd, "nar")
    for group in (config.cif, config.text_kd):
        refuse_options(group, "hkd")
    refuse_options(config.dual, "dualmode")
    besides = ("front_end", "extractor_norm", "extractor_channels", "feature_grad_scale") if is_hubert else ()
    refuse_options(config.ssl, "dualmode --objective ssl", besides)
    encoder = make_encoder(config, new=config.loop.init_from is None, training=True) if is_hubert else None
    if config.kd.kd == "none":
        return MvqSystem(config, vocab_size, encoder=encoder)
    num_layers, hop = config.model.num_encoder_layers or ENCODER_SIZES[config.model.encoder_size][0], STUDENT_HOP
    if encoder is not None:
        num_layers, hop = encoder.num_layers, hop_of(encoder)
    if config.kd.teacher_labels == "stored":
        sources = [stored_source(path) for path in config.kd.label_dir]
        return MvqSystem(config, vocab_size, kd_targets(config.kd, num_layers, sources, hop), encoder=encoder)
    if config.kd.kd == "mvq" and config.kd.quantizer is None:
        raise ConfigError("--kd mvq --teacher-labels online needs --quantizer FILE (local/train_quantizer.py)")
    # The student must start as it does with stored labels, whatever loading a teacher draws.
    with torch.random.fork_rng(devices=[]):
        teacher = build_teacher(config.teacher)
    quantizer = _quantizer(config.kd.quantizer, teacher.dim) if config.kd.kd == "mvq" else None
    if quantizer is not None:
        quantizer.check_teacher(teacher.provenance())
    source = LabelSource(
        path=None,
        kind="embeddings" if quantizer is None else "codebook_indexes",
        formula=teacher.frame_formula,
        width=teacher.dim if quantizer is None else quantizer.num_codebooks,
        codebook_size=256 if quantizer is None else quantizer.codebook_size,
    )
    online = OnlineTeacher(teacher, quantizer, config.kd.online_refine_iters)
    return MvqSystem(config, vocab_size, kd_targets(config.kd, num_layers, [source], hop), online, encoder)


def _quantizer(path: Path, dim: int | None = None) -> Quantizer:
    # Loading initialises parameters first, and the student's must not depend on that.
    with torch.random.fork_rng(devices=[]):
        return Quantizer.load(path, dim)


def stored_source(path: Path) -> LabelSource:
    """Read what a stored label set holds."""
    info = LabelSetInfo.load(path)
    is_codes = info.kind == "codebook_indexes"
    return LabelSource(
        path=str(path),
        kind=info.kind,
        formula=info.formula,
        width=info.num_codebooks if is_codes else info.dim,
        codebook_size=info.codebook_size or 256,
    )
