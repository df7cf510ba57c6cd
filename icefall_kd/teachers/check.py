"""Look at a teacher on a few utterances before hours are spent on its labels.

Refused are: non-finite or constant embeddings, frames that the formula does not explain, embeddings that depend on
the batch, and embeddings whose neighbours in time are no closer than frames drawn at random (a wrong layer, wrong
weights or wrong audio).  Told, not judged: norms, dimensions that dominate the squared error, and the error rate of
the teacher's own transcripts where it can decode.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from icefall_kd.config import TeacherConfig
from icefall_kd.data.batch import Batch
from icefall_kd.data.corpora import guess_language
from icefall_kd.data.manifests import iterate_cuts
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.audio import clean_audio
from icefall_kd.labels.keys import speech_track
from icefall_kd.runtime.files import write_json
from icefall_kd.scoring import Score, score
from icefall_kd.teachers import build_teacher
from icefall_kd.teachers.base import Teacher
from icefall_kd.text.normalize import normalize_text
from icefall_kd.text.tokenizer import pinyin_pieces

logger = logging.getLogger(__name__)

CANDIDATES = 2000
"""Cuts at the head of the manifest among which the sample is drawn; unperturbed cuts stand first there."""
FLOAT16_MAX = 65504.0
_OUTLIER_RATIO = 10.0
# Largest difference, relative to the largest value, between alone and in a batch, by precision of the products.
_BATCH_LIMITS = {"cpu": {torch.float32: 1e-5}, "cuda": {torch.float32: 1e-3}}
_LOW_PRECISION_LIMIT = 0.1


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Check a teacher on a few utterances."""

    cuts: Path
    """Cut set (jsonl or jsonl.gz) of the corpus that labels will be made for."""
    out: Path | None = None
    """JSON report; None: only the table is printed."""
    check_utts: int = 8
    """Utterances, drawn with the seed."""
    check_seed: int = 42
    """Seed of the draw."""
    check_decode: bool = True
    """Decode them too where the teacher can."""
    min_neighbour_accuracy: float = 0.7
    """Least fraction of frames whose next frame is closer than a frame drawn at random (0.5: chance)."""
    num_threads: int | None = None
    """torch threads on a CPU; None: torch's own choice."""
    teacher: TeacherConfig = TeacherConfig()

    def __post_init__(self) -> None:
        if self.check_utts < 2:
            raise ConfigError(f"--check-utts is {self.check_utts}; batches are compared, so at least 2")


@dataclass(frozen=True)
class Sample:
    """The utterances of a check."""

    ids: list[str]
    waves: list[Tensor]
    """(S_i,) float32 waveforms at the teacher's rate."""
    texts: list[str | None] = field(default_factory=list)
    """Transcripts, None where there is none."""


@dataclass(frozen=True)
class Check:
    """One measured value beside what is allowed."""

    name: str
    value: float
    limit: str
    passed: bool


def draw_sample(cuts: Path, num_utts: int, seed: int, sampling_rate: int) -> Sample:
    """Draw utterances from the head of a cut set and read their audio.

    Raises:
        DataError: If the set is missing, damaged or holds fewer than two cuts, or audio of the sample cannot be read.
    """
    head = list(islice(iterate_cuts(cuts), CANDIDATES))
    if len(head) < 2:
        raise DataError(f"{cuts} holds {len(head)} cuts; a check compares at least 2")
    chosen = np.random.default_rng(seed).choice(len(head), size=min(num_utts, len(head)), replace=False)
    ids, waves, texts = [], [], []
    for i in sorted(chosen.tolist()):
        cut = speech_track(head[i])  # what extraction reads: without noise that was mixed in
        try:
            waves.append(clean_audio(cut, sampling_rate))
        except DataError as error:
            raise DataError(f"cut {cut.id} of {cuts}: {error}; restore it, or draw others with --check-seed") from error
        ids.append(cut.id)
        texts.append(" ".join(s.text for s in cut.supervisions if s.text) or None)
    return Sample(ids, waves, texts)


def check_teacher(
    teacher: Teacher, sample: Sample, *, min_neighbour_accuracy: float = 0.7, decode: bool = True, seed: int = 42
) -> dict:
    """Measure a teacher on a sample.

    Args:
        teacher: The teacher.
        sample: At least two utterances; those longer than a teacher without windows hears are left out.
        min_neighbour_accuracy: Least fraction of frames whose next frame is closer than a random one.
        decode: Decode where the teacher can.
        seed: Seed of the random frames.
    Returns:
        Plain data: provenance, sample, checks, statistics, decoding; ``passed`` says whether all checks hold.
    Raises:
        DataError: If fewer than two utterances can be heard.
    """
    limit = teacher.max_samples
    fits = [limit is None or len(w) <= limit for w in sample.waves]
    heard = [i for i, w in enumerate(sample.waves) if fits[i] and teacher.num_frames(len(w)) > 0]
    if len(heard) < 2:
        raise DataError(f"the teacher hears {len(heard)} of the utterances {sample.ids[:5]} ...; raise --check-utts")
    ids, waves = [sample.ids[i] for i in heard], [sample.waves[i] for i in heard]
    together = _extract(teacher, waves, ids)
    alone = [_extract(teacher, [w], [i])[0] for w, i in zip(waves, ids, strict=True)]
    due = [teacher.num_frames(len(w)) for w in waves]
    checks = _integrity(together, alone, due)
    statistics: dict = {}
    if all(c.passed for c in checks):
        checks += _quality(together, alone, _batch_limit(teacher), min_neighbour_accuracy, seed)
        statistics = embedding_statistics(torch.cat(together))
    texts = [sample.texts[i] for i in heard] if sample.texts else []
    decoding = _decode(teacher, texts, waves, ids) if decode else None
    return {
        "passed": all(c.passed for c in checks),
        "teacher": teacher.provenance(),
        "utterances": ids,
        "seconds": round(sum(len(w) for w in waves) / teacher.sampling_rate, 3),
        "frames": sum(due),
        "checks": [vars(c) for c in checks],
        "statistics": statistics,
        "decoding": decoding,
    }


def _extract(teacher: Teacher, waves: Sequence[Tensor], ids: Sequence[str]) -> list[Tensor]:
    out = teacher.extract(Batch.from_audio(waves, ids))
    lens = out.lens["embeddings"].tolist()
    return [x[:n].float().cpu() for x, n in zip(out.arrays["embeddings"], lens, strict=True)]


def _integrity(together: Sequence[Tensor], alone: Sequence[Tensor], due: Sequence[int]) -> list[Check]:
    """Check what every further number rests on: frame counts and finite values."""
    unexplained = sum(abs(len(x) - n) + abs(len(y) - n) for x, y, n in zip(together, alone, due, strict=True))
    non_finite = sum(int((~torch.isfinite(x)).sum()) for x in (*together, *alone))
    return [
        _check_max("frames that the formula does not explain", float(unexplained), 0.0),
        _check_max("non-finite values", float(non_finite), 0.0),
    ]


def _quality(
    together: Sequence[Tensor], alone: Sequence[Tensor], batch_limit: float, min_neighbour_accuracy: float, seed: int
) -> list[Check]:
    """Check that embeddings vary, do not depend on the batch and change slowly in time."""
    constant = sum(bool((x.std(dim=0, correction=0) <= 1e-6 * x.abs().max()).all()) for x in together if len(x) > 1)
    difference = max(_relative_difference(x, y) for x, y in zip(together, alone, strict=True))
    accuracy = neighbour_accuracy(together, seed)
    limit = f">= {min_neighbour_accuracy:g}"
    return [
        _check_max("utterances with constant embeddings", float(constant), 0.0),
        _check_max("largest difference alone / in a batch", difference, batch_limit),
        Check("next frame closer than a random one", accuracy, limit, accuracy >= min_neighbour_accuracy),
    ]


def _check_max(name: str, value: float, limit: float) -> Check:
    return Check(name, value, f"<= {limit:g}", value <= limit)


def _relative_difference(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-30))


def _batch_limit(teacher: Teacher) -> float:
    precision = getattr(getattr(teacher, "teacher", teacher), "precision", None)
    if precision is None:
        return _BATCH_LIMITS["cpu"][torch.float32]
    return _BATCH_LIMITS.get(precision.device.type, {}).get(precision.dtype, _LOW_PRECISION_LIMIT)


def neighbour_accuracy(utterances: Sequence[Tensor], seed: int = 42) -> float:
    """Return the fraction of frames whose next frame is closer than a frame drawn from the whole sample.

    Distances are Euclidean after removal of the mean and scaling of every dimension, so that a few large
    dimensions do not decide.  Independent frames give 0.5.

    Args:
        utterances: (T_i, C) float32 embeddings.
        seed: Seed of the draws.
    """
    frames = torch.cat([x.double() for x in utterances])
    frames = (frames - frames.mean(dim=0)) / frames.std(dim=0, correction=0).clamp(min=1e-12)
    starts, offset = [], 0
    for x in utterances:
        starts += range(offset, offset + max(len(x) - 1, 0))
        offset += len(x)
    if not starts:
        return 0.0
    here = torch.tensor(starts)
    generator = torch.Generator().manual_seed(seed)
    # Any frame but this one and its next one.
    shift = torch.randint(2, max(len(frames), 3), (len(here),), generator=generator)
    other = (here + shift) % len(frames)
    near = (frames[here] - frames[here + 1]).norm(dim=1)
    far = (frames[here] - frames[other]).norm(dim=1)
    return float((near < far).double().mean())


def embedding_statistics(frames: Tensor) -> dict:
    """Return norms, variance and the dimensions that dominate, of (T, C) embeddings.

    ``outlier_dims`` have a root mean square above ten times the median one; ``top_dim_share`` is the part of the
    variance in the largest dimension: what a quantizer's squared error would mostly be about.
    """
    frames = frames.double()
    norms, variance = frames.norm(dim=1), frames.var(dim=0, correction=0)
    rms = frames.square().mean(dim=0).sqrt()
    outliers = (rms > _OUTLIER_RATIO * rms.median()).nonzero().flatten()
    order = rms[outliers].argsort(descending=True)
    return {
        "norm_mean": float(norms.mean()),
        "norm_min": float(norms.min()),
        "norm_max": float(norms.max()),
        "largest_value": float(frames.abs().max()),
        "fits_float16": bool(frames.abs().max() < FLOAT16_MAX),
        "variance_per_dim": float(variance.mean()),
        "constant_dims": int((variance <= 1e-12 * variance.max()).sum()),
        "outlier_dims": outliers[order][:20].tolist(),
        "num_outlier_dims": len(outliers),
        "top_dim_share": float(variance.max() / variance.sum().clamp(min=1e-300)),
    }


def _decode(teacher: Teacher, texts: Sequence[str | None], waves: Sequence[Tensor], ids: Sequence[str]) -> dict | None:
    inner = getattr(teacher, "teacher", teacher)
    limit = inner.max_samples
    language = guess_language(texts)
    refs = [normalize_text(text or "", language) for text in texts]
    rows = [i for i, ref in enumerate(refs) if ref and (limit is None or len(waves[i]) <= limit)]
    transcribe = getattr(inner, "transcribe", None)
    hypotheses = transcribe([waves[i] for i in rows]) if transcribe and rows else None
    if hypotheses is None:
        return None
    refs, ids = [refs[i] for i in rows], [ids[i] for i in rows]
    hyps = [normalize_text(text, language) for text in hypotheses]
    decoding = _rate(score(refs, hyps, ids, unit="char" if language == "zh" else "word"))
    if language == "zh":
        decoding["pinyin"] = _pinyin_rate(refs, hyps, ids)
    pairs = zip(ids, refs, hyps, strict=True)
    return {**decoding, "utterances": [{"id": i, "ref": ref, "hyp": hyp} for i, ref, hyp in pairs]}


def _pinyin_rate(refs: Sequence[str], hyps: Sequence[str], ids: Sequence[str]) -> dict | None:
    """Count errors in toned pinyin, where homophones and traditional characters are right; None without pypinyin."""
    try:
        refs, hyps = ([pinyin_pieces(text) for text in texts] for texts in (refs, hyps))
    except ConfigError as error:
        logger.warning("no error rate in pinyin: %s", error)
        return None
    return _rate(score(refs, hyps, ids, unit="token"))


def _rate(result: Score) -> dict:
    return {
        "name": result.name,
        "error_rate": round(result.error_rate, 2),
        "errors": result.num_errors,
        "units": result.num_ref,
    }


def format_report(report: dict) -> str:
    """Return the table that check_teacher prints."""
    teacher = report["teacher"]
    lines = [
        f"teacher {teacher.get('teacher')} ({teacher.get('family')}), layer {teacher.get('layer')}, "
        f"{teacher.get('dim')} dimensions, {teacher.get('device')} {teacher.get('dtype')}",
        f"{len(report['utterances'])} utterances, {report['seconds']} s, {report['frames']} frames",
        "",
        f"{'check':<42}{'value':>12}  {'allowed':<12}",
    ]
    for check in report["checks"]:
        verdict = "ok" if check["passed"] else "FAILED"
        lines.append(f"{check['name']:<42}{check['value']:>12.4g}  {check['limit']:<12}{verdict}")
    for name, value in report["statistics"].items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"{name:<42}{shown:>12}")
    decoding = report["decoding"]
    for unit, rate in (("", decoding), (" in pinyin", (decoding or {}).get("pinyin"))):
        if rate is not None:
            name = f"{rate['name']}{unit} of its own transcripts, %"
            lines.append(f"{name:<42}{rate['error_rate']:>12}  ({rate['errors']} / {rate['units']})")
    share = report["statistics"].get("top_dim_share", 0.0)
    if share > 0.5 and teacher.get("normalization") == "none":
        lines += ["", f"one dimension holds {share:.0%} of the variance: consider --normalize-embeddings true"]
    return "\n".join(lines)


def run_check(config: CheckConfig) -> dict:
    """Check the teacher that ``config`` names, and write the report.

    Raises:
        DataError: If a check fails; the report is written all the same.
    """
    teacher = build_teacher(config.teacher)
    sample = draw_sample(config.cuts, config.check_utts, config.check_seed, teacher.sampling_rate)
    report = check_teacher(
        teacher,
        sample,
        min_neighbour_accuracy=config.min_neighbour_accuracy,
        decode=config.check_decode,
        seed=config.check_seed,
    )
    if config.out is not None:
        write_json(config.out, report)
    print(format_report(report))
    failed = [c for c in report["checks"] if not c["passed"]]
    if failed:
        what = "; ".join(f"{c['name']}: {c['value']:g}, allowed {c['limit']}" for c in failed)
        raise DataError(f"teacher {config.teacher.teacher} fails the check on {config.cuts}: {what}")
    return report
