"""From cuts and a teacher to a quantizer file: sample utterances, collect their frames, train, report."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from lhotse.cut import MonoCut
from torch import Tensor

from icefall_kd.config import QuantizerConfig, TeacherConfig
from icefall_kd.data.batch import Batch
from icefall_kd.data.manifests import iterate_cuts
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.audio import clean_audio
from icefall_kd.labels.keys import label_key, parse_key, speech_track
from icefall_kd.quantization.clusters import Clusters
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.quantization.report import quantizer_report
from icefall_kd.quantization.sampling import Candidate, candidate, sample_hash, sample_utterances
from icefall_kd.quantization.trainer import TRAINING_VERSION, QuantizerTrainer, to_float16
from icefall_kd.runtime.env import environment, pick_device
from icefall_kd.runtime.files import fingerprint, read_json, remove_leftovers, write_json, write_text
from icefall_kd.runtime.log import Progress
from icefall_kd.runtime.tensors import read_tensors, write_tensors
from icefall_kd.teachers import build_teacher
from icefall_kd.teachers.base import Teacher, tap
from icefall_kd.teachers.windows import WindowedTeacher

logger = logging.getLogger(__name__)

# Frames over which index entropies are measured: their bias at K = 256 is then about 0.01 nats.
ENTROPY_FRAMES = 10000


@dataclass(frozen=True, kw_only=True)
class TrainQuantizerConfig:
    """Train a quantizer on a teacher's embeddings of some utterances, and report on it."""

    cuts: list[Path]
    """Cut sets that labels will be made for (cuts_*.jsonl.gz), several as a,b; perturbed copies are not drawn."""
    out: Path
    """The quantizer file (.safetensors); report and list of utterances are written beside it."""
    teacher_max_duration: float = 100.0
    """Seconds of padded audio a batch of the teacher."""
    save_every: int = 500
    """Steps between two writes of the training's state."""
    keep_frames: bool = False
    """Keep the collected embeddings beside the quantizer, for another quantizer of the same sample."""
    num_threads: int | None = None
    """torch threads on a CPU; None: torch's own choice."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    def __post_init__(self) -> None:
        if not self.cuts:
            raise ConfigError("--cuts names no cut set")
        if self.out.suffix != ".safetensors":
            raise ConfigError(f"--out is {self.out}; its name must end in .safetensors")
        if self.teacher_max_duration <= 0 or self.save_every < 1:
            raise ConfigError("--teacher-max-duration and --save-every must be positive")


@dataclass(frozen=True)
class Sample:
    """The training sample of a quantizer."""

    cuts: dict[str, MonoCut]
    """The drawn utterances by label key, in the order of the draw."""
    corpus_hours: float
    """Hours of all cuts, perturbed copies included."""

    @property
    def sha256(self) -> str:
        """Return the hash of the list of keys."""
        return sample_hash(self.cuts)


@dataclass(frozen=True)
class Frames:
    """The embeddings of a sample."""

    values: Tensor
    """(F, C) float16."""
    hours_per_hour: float
    """Hours of audio that the teacher processed in an hour."""


def draw_sample(paths: Sequence[Path], count: int, seed: int) -> Sample:
    """Draw ``count`` training utterances of a quantizer from cut sets (see :func:`sample_utterances`).

    The cut sets are read twice, since of all cuts only what the draw needs is held: key and duration.
    """
    pool: dict[str, Candidate] = {}
    seconds = 0.0
    for path in paths:
        if not Path(path).exists():
            raise ConfigError(f"--cuts {path} does not exist; run prepare.sh, or name the cut sets as a,b")
        for key, speech, perturbed in _keyed(path):
            seconds += speech.duration
            if not perturbed:
                pool.setdefault(key, Candidate(key, speech.duration))
    keys = sample_utterances(pool.values(), count, seed)
    del pool
    found: dict[str, MonoCut | None] = dict.fromkeys(keys)
    for path in paths:
        for key, speech, perturbed in _keyed(path):
            if not perturbed and key in found and found[key] is None:
                found[key] = speech
    if gone := [key for key, speech in found.items() if speech is None]:
        raise DataError(
            f"--cuts {','.join(map(str, paths))} changed while they were read: {len(gone)} of {len(keys)} utterances "
            f"that were drawn are gone, as {gone[0]!r}; run the same command again when nothing writes them"
        )
    return Sample(found, seconds / 3600)


def _keyed(path: Path) -> Iterator[tuple[str, MonoCut, bool]]:
    """Yield label key and speech of every cut, and whether it is a perturbed copy."""
    for cut in iterate_cuts(Path(path)):
        key, speech = label_key(cut), speech_track(cut)
        yield key, speech, candidate(speech).perturbed or parse_key(key).speed != 1


def _load(cut: MonoCut, teacher: Teacher) -> Tensor | DataError | None:
    """Return the waveform (S,) at the teacher's rate, why it cannot be read, or None where the teacher is no use."""
    try:
        wave = clean_audio(cut, teacher.sampling_rate)
    except DataError as error:
        logger.error("%s: %s", cut.id, error)
        return error
    if teacher.num_frames(len(wave)) == 0:
        logger.warning("left out of the sample: %s (%d samples: too short)", cut.id, len(wave))
        return None
    if teacher.max_samples is not None and len(wave) > teacher.max_samples:
        logger.warning("left out of the sample: %s (longer than the teacher hears)", cut.id)
        return None
    return wave


def _batches(cuts: Sequence[MonoCut], max_duration: float) -> Iterator[list[MonoCut]]:
    """Yield batches of similar duration, shortest first."""
    batch: list[MonoCut] = []
    for cut in sorted(cuts, key=lambda c: (c.duration, c.id)):
        if batch and (len(batch) + 1) * cut.duration > max_duration:
            yield batch
            batch = []
        batch.append(cut)
    if batch:
        yield batch


@torch.no_grad()
def collect_frames(
    sample: Sample, teacher: Teacher, max_duration: float, most: int | None = None, array: str = "embeddings"
) -> Frames:
    """Return the teacher's embeddings of a sample's utterances at speed 1.

    Args:
        sample: the utterances.
        teacher: gives the embeddings.
        max_duration: seconds of padded audio a batch.
        most: frames that are kept, about, each as likely as any other; None: all.
        array: of the teacher's output (teachers/base.py: tap).
    Raises:
        DataError: a recording cannot be read, none is of the right length, or values do not fit float16.
    """
    parts: list[Tensor] = []
    unread: list[tuple[str, DataError]] = []
    samples, start = 0, time.monotonic()
    total = sum(teacher.num_frames(round(c.duration * teacher.sampling_rate)) for c in sample.cuts.values())
    share, generator = 1.0 if most is None else most / max(total, 1), torch.Generator().manual_seed(0)
    progress = Progress(len(sample.cuts), "utterances", name="embeddings of the sample")
    for cuts in _batches(list(sample.cuts.values()), max_duration):
        loaded = [(cut.id, _load(cut, teacher)) for cut in cuts]
        unread += [(name, error) for name, error in loaded if isinstance(error, DataError)]
        waves = [(name, wave) for name, wave in loaded if isinstance(wave, Tensor)]
        if waves and not unread:
            output = teacher.extract(Batch.from_audio([wave for _, wave in waves], [name for name, _ in waves]))
            embeddings, lens = output.arrays[array].cpu().float(), output.lens[array].tolist()
            for e, length in zip(embeddings, lens, strict=True):
                kept = torch.rand(length, generator=generator) < share if share < 1 else slice(length)
                parts.append(to_float16(e[:length][kept]))
            samples += sum(len(wave) for _, wave in waves)
        progress.update(len(cuts))
    if unread:
        # Without them the result would not be that of the same line on whole recordings, and nothing would tell.
        raise DataError(
            f"{len(unread)} of the {len(sample.cuts)} sampled utterances cannot be read; first: {unread[0][0]}: "
            f"{unread[0][1]}; make the recordings again (prepare.sh finds those that were cut off), or take these "
            "utterances out of the cut sets"
        )
    if not parts:
        raise DataError(f"none of the {len(sample.cuts)} sampled utterances could be used; see the warnings above")
    seconds = max(time.monotonic() - start, 1e-9)
    return Frames(torch.cat(parts), samples / teacher.sampling_rate / seconds)


def cached_frames(path: Path, identity: str, make) -> Frames:
    """Return the frames of ``path`` when it holds those of ``identity``, else make and store them."""
    if path.exists():
        try:
            header, tensors = read_tensors(path)
            if header.get("identity") == identity:
                logger.info("embeddings of an earlier run: %s", path)
                return Frames(tensors["frames"], float(header["hours_per_hour"]))
            logger.info("%s holds other embeddings; they are made again", path)
        except DataError as error:
            logger.warning("%s; the embeddings are made again", error)
    frames = make()
    header = {"identity": identity, "hours_per_hour": repr(frames.hours_per_hour)}
    write_tensors(path, {"frames": frames.values}, header)
    return frames


def train_quantizer(config: TrainQuantizerConfig, teacher: Teacher | None = None) -> dict:
    """Train and write a quantizer, its report (.report.json) and its list of utterances (.utterances.txt).

    A finished quantizer of the same options is kept; a killed run goes on where it was.

    Returns:
        The report.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    first = config.teacher.layer == 0  # no block's output, but the input of block 1: that one is tapped
    if teacher is None:
        teacher = build_teacher(replace(config.teacher, layer=1) if first else config.teacher)
    if teacher.max_samples is not None and config.teacher.long_utterances == "window":
        teacher = WindowedTeacher(teacher)
    sample = draw_sample(config.cuts, config.quantizer.quantizer_utts, config.quantizer.quantizer_seed)
    array = tap(teacher, [0])[0] if first else "embeddings"
    provenance = json.loads(json.dumps({**teacher.provenance(), **({"layer": 0} if first else {})}))
    options = asdict(config.quantizer)
    frames_identity = fingerprint([provenance, sample.sha256, config.teacher_max_duration])
    identity = fingerprint([frames_identity, options, TRAINING_VERSION])
    report_path = config.out.with_suffix(".report.json")
    frames_path, state_path = (config.out.with_suffix(f".{name}.safetensors") for name in ("frames", "state"))
    remove_leftovers(config.out.parent, f"{config.out.stem}.*")
    finished = finished_report(Quantizer.load, config.out, report_path, identity)
    if finished is not None:
        _remove_intermediate(config, frames_path, state_path)  # a kill may have come before the same line below
        return finished
    write_text(config.out.with_suffix(".utterances.txt"), "".join(f"{key}\n" for key in sample.cuts))
    logger.info("%d utterances for the quantizer", len(sample.cuts))
    frames = cached_frames(
        frames_path, frames_identity, lambda: collect_frames(sample, teacher, config.teacher_max_duration, array=array)
    )
    device = pick_device(config.teacher.teacher_device)
    trainer = QuantizerTrainer(frames.values, config.quantizer, state_path, config.save_every, device)
    quantizer = trainer.run().to(device)
    report = _report(quantizer, trainer, teacher, frames, sample)
    metadata = {
        "identity": identity,
        "teacher": provenance,
        "num_utterances": len(sample.cuts),
        "utterances_sha256": sample.sha256,
        "num_frames": len(frames.values),
        "config": options,
        "relative_error": report["relative_error"],
        "packages": environment()["packages"],
    }
    write_json(report_path, report)
    quantizer.save(config.out, metadata)
    _remove_intermediate(config, frames_path, state_path)
    return report


def _remove_intermediate(config: TrainQuantizerConfig, frames_path: Path, state_path: Path) -> None:
    state_path.unlink(missing_ok=True)
    if not config.keep_frames:
        frames_path.unlink(missing_ok=True)


def finished_report(
    load: Callable[[Path], Quantizer | Clusters], path: Path, report_path: Path, identity: str
) -> dict | None:
    """Return the report of a finished quantizer, or clusters, of the same options; None: it is to be made."""
    if not path.exists() or not report_path.exists():
        return None
    try:
        metadata, report = load(path).metadata, read_json(report_path)
    except DataError as error:
        logger.warning("%s; it is made again", error)
        return None
    if metadata.get("identity") != identity:
        logger.info("%s was made with other options or data; it is made again", path)
        return None
    logger.info("%s is finished already", path)
    return report


def _report(quantizer: Quantizer, trainer: QuantizerTrainer, teacher: Teacher, frames: Frames, sample: Sample) -> dict:
    """Return the report: errors on validation frames, entropies on at least ``ENTROPY_FRAMES`` if there are."""
    # A handful of frames leaves no validation part; then the training frames must do.
    valid = trainer.valid_rows if len(trainer.valid_rows) else trainer.train_rows
    more = trainer.train_rows[: max(0, ENTROPY_FRAMES - len(valid))] if len(trainer.valid_rows) else valid[:0]
    return quantizer_report(
        quantizer,
        frames.values[valid].float(),
        frames.values[more].float(),
        frame_rate=teacher.sampling_rate / teacher.frame_formula.hop,
        hours=sample.corpus_hours,
        teacher_speed=frames.hours_per_hour,
    )
