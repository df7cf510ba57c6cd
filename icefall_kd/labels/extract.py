"""Extraction of teacher labels, shard by shard (our design): resumable, idempotent, with the same bytes each time.

Which shard an utterance belongs to follows from its key; within a shard, utterances are ordered by duration and
cut into parts.  A part is written when it is done and is not done again after a kill.  Batches never cross a
part, so that a resumed run computes exactly what an uninterrupted one does.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lhotse.cut import MonoCut
from torch import Tensor

from icefall_kd.config import ExtractConfig
from icefall_kd.data.batch import Batch
from icefall_kd.data.manifests import iterate_cuts
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.audio import clean_audio
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.labels.keys import CorpusFingerprint, key_hash, label_key, speech_track
from icefall_kd.labels.shard import LabelEntry, Shard, write_shard
from icefall_kd.labels.store import LabelStore, ShardWriter, find_shards, shard_of
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.runtime.files import atomic_write, file_lock, fingerprint, remove_leftovers
from icefall_kd.runtime.log import Progress
from icefall_kd.teachers import build_teacher
from icefall_kd.teachers.base import Teacher, TeacherOutput
from icefall_kd.teachers.windows import WindowedTeacher

logger = logging.getLogger(__name__)

_FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class ExtractReport:
    """What one extraction did."""

    path: Path
    """The shard's file."""
    skipped: bool
    """The shard was finished before."""
    utterances: int
    rejected: int
    hours: float
    seconds: float


@dataclass(frozen=True)
class _Item:
    key: str
    cut: MonoCut
    num_samples: int


@dataclass(frozen=True)
class _Loaded:
    item: _Item
    wave: Tensor | None
    reason: str = ""


def set_info(config: ExtractConfig, teacher: Teacher, quantizer: Quantizer | None, corpus: str) -> LabelSetInfo:
    """Return the provenance of the label set that ``config`` describes.

    Raises:
        ConfigError: the quantizer is for embeddings of another size.
        DataError: the quantizer was trained on another teacher, layer or normalisation.
    """
    stated = dict(teacher.provenance())
    codes = config.kind == "codebook_indexes"
    if codes and quantizer.dim != teacher.dim:
        raise ConfigError(f"the quantizer is for embeddings of {quantizer.dim}, the teacher's have {teacher.dim}")
    if codes:
        quantizer.check_teacher(teacher.provenance())
    taken = {
        "teacher_sha256": stated.pop("weights_sha256"),
        "layer": stated.pop("layer"),
        "layer_convention": stated.pop("layer_convention"),
        "normalization": stated.pop("normalization"),
        "teacher_dtype": stated.pop("dtype"),
        "device": stated.pop("device"),
    }
    stated.pop("frame_formula", None)
    origin = {name: stated.pop(name) for name in ("source", "versions") if name in stated}
    return LabelSetInfo(
        kind=config.kind,
        dtype="uint8" if codes else config.embeddings_dtype,
        width=quantizer.num_codebooks if codes else teacher.dim,
        dim=teacher.dim,
        teacher=str(stated.pop("teacher", stated.get("family", type(teacher).__name__))),
        frame_formula=teacher.frame_formula.to_dict(),
        sampling_rate=teacher.sampling_rate,
        num_codebooks=quantizer.num_codebooks if codes else None,
        codebook_size=quantizer.codebook_size if codes else None,
        quantizer_sha256=quantizer.sha256 if codes else None,
        refine_iters=config.refine_iters if codes else None,
        long_utterances=stated.pop("long_utterances", "unlimited" if teacher.max_samples is None else "reject"),
        corpus_fingerprint=corpus,
        extra={k: v for k, v in stated.items() if k != "dim"},
        origin=origin,
        **taken,
    )


def extract_labels(
    config: ExtractConfig, teacher: Teacher | None = None, quantizer: Quantizer | None = None
) -> ExtractReport:
    """Extract one shard of a label set; finished shards and finished parts of this one are kept.

    Args:
        config: what to extract.
        teacher, quantizer: built from ``config`` when not given.
    Raises:
        DataError: the folder holds a set with other options or another number of shards, no or unreadable cuts,
            two utterances with one label key, a teacher whose frame counts are not its formula's, more rejected
            utterances than allowed.
    """
    began = time.monotonic()
    teacher = teacher if teacher is not None else build_teacher(config.teacher)
    if teacher.max_samples is not None and config.teacher.long_utterances == "window":
        teacher = WindowedTeacher(teacher)
    if quantizer is None and config.quantizer is not None:
        quantizer = Quantizer.load(config.quantizer)
    items, corpus = _plan(config, teacher.sampling_rate)
    store = LabelStore.create(config.label_dir, set_info(config, teacher, quantizer, corpus))
    writer = store.writer(config.shard, config.num_shards)
    if others := {n for _, n in find_shards(store.path)} - {config.num_shards}:
        raise DataError(
            f"label set {store.path} has shards of {max(others)}, --num-shards is {config.num_shards}; keep to one "
            "division, give another --label-dir, or delete this one"
        )
    inputs = fingerprint([i.key for i in items])
    work = _work_folder(config)
    work.mkdir(parents=True, exist_ok=True)
    with file_lock(work / ".lock"):
        remove_leftovers(store.path, writer.path.name)
        finished = _finished(writer, inputs)
        if finished:
            logger.info("%s is finished already", writer.path)
        else:
            job = _Extraction(config, teacher, quantizer, store, work)
            job.run(items)
            job.finish(writer, inputs, len(items))
    shutil.rmtree(work, ignore_errors=True)
    return _report(writer.path, finished, began, teacher.sampling_rate)


def _work_folder(config: ExtractConfig) -> Path:
    return config.label_dir / ".parts" / f"shard-{config.shard:05d}-of-{config.num_shards:05d}"


def _rejects_file(config: ExtractConfig) -> Path:
    return config.label_dir / "rejects" / f"shard-{config.shard:05d}-of-{config.num_shards:05d}.jsonl"


def _plan(config: ExtractConfig, sampling_rate: int) -> tuple[list[_Item], str]:
    """Read the cuts once: the utterances of this shard by duration, and the fingerprint of the whole corpus."""
    corpus, items = CorpusFingerprint(), {}
    for path in config.cuts:
        for cut in iterate_cuts(Path(path)):
            key = label_key(cut)
            corpus.add(key, cut)
            if shard_of(key_hash(key), config.num_shards) == config.shard:
                speech = speech_track(cut)
                samples = round(speech.num_samples * sampling_rate / speech.sampling_rate)
                first = items.setdefault(key, _Item(key, speech, samples))
                if _text(first.cut) != _text(speech):
                    raise DataError(
                        f"cuts {first.cut.id} and {speech.id} ({path}) have one label key {key!r}, and texts "
                        f"{_text(first.cut)!r} and {_text(speech)!r}: ids of recordings repeat between corpora; make a "
                        "label set for each corpus"
                    )
    return sorted(items.values(), key=lambda i: (i.num_samples, i.key)), corpus.hexdigest()


def _text(cut: MonoCut) -> str:
    return " ".join(s.text or "" for s in cut.supervisions)


def _finished(writer: ShardWriter, inputs: str) -> bool:
    """Check by its header alone whether a shard is there and is the wanted one."""
    if not writer.path.exists():
        return False
    try:
        header = Shard(writer.path).header
    except DataError as error:
        logger.warning("%s; it is extracted again", error)
        return False
    return (header.fingerprint, header.inputs) == (writer.store.info.fingerprint, inputs)


def _report(path: Path, skipped: bool, began: float, sampling_rate: int) -> ExtractReport:
    shard = Shard(path)
    hours = shard.num_samples / sampling_rate / 3600
    return ExtractReport(
        path, skipped, shard.num_utterances, len(shard.header.rejects), hours, time.monotonic() - began
    )


class _Extraction:
    """The work on one shard."""

    def __init__(
        self, config: ExtractConfig, teacher: Teacher, quantizer: Quantizer | None, store: LabelStore, work: Path
    ) -> None:
        self.config, self.teacher, self.store, self.work = config, teacher, store, work
        self.quantizer = quantizer.eval() if config.kind == "codebook_indexes" else None
        self.parts: list[Path] = []
        self.samples_done = self.bytes_done = 0

    def run(self, items: Sequence[_Item]) -> None:
        """Write all parts of the shard that are not there yet."""
        size = self.config.part_utterances
        groups = [items[i : i + size] for i in range(0, len(items), size)]
        progress = Progress(len(items), "utterances", name=f"shard {self.config.shard} of {self.config.num_shards}")
        with ThreadPoolExecutor(self.config.load_workers) as pool:
            for number, group in enumerate(groups):
                path = self.work / f"part-{number:05d}.safetensors"
                self.parts.append(path)
                inputs = fingerprint([self.config.extract_max_duration, [i.key for i in group]])
                if path.exists() and self._same(path, inputs):
                    progress.total -= len(group)
                    continue
                self._write_part(path, group, inputs, pool, progress)

    def _same(self, path: Path, inputs: str) -> bool:
        try:
            header = Shard(path).header
        except DataError as error:
            logger.warning("%s; this part is extracted again", error)
            return False
        return (header.fingerprint, header.inputs) == (self.store.info.fingerprint, inputs)

    def _write_part(
        self, path: Path, items: Sequence[_Item], inputs: str, pool: ThreadPoolExecutor, progress: Progress
    ) -> None:
        writer = self.store.writer(self.config.shard, self.config.num_shards)
        rejects: list[dict] = []
        for loaded in self._load_ahead(items, pool):
            for item, values, num_samples, reason in self._label_batch(loaded):
                if values is None:
                    logger.warning("rejected %s (%s): %s", item.cut.id, item.key, reason)
                    rejects.append({"key": item.key, "id": item.cut.id, "reason": reason})
                else:
                    writer.add(item.key, values, num_samples)
                    self.samples_done += num_samples
                    self.bytes_done += values.nbytes
            hours = self.samples_done / self.teacher.sampling_rate / 3600
            progress.update(
                len(loaded),
                hours_per_hour=hours / max(progress.elapsed / 3600, 1e-9),
                bytes_per_hour=self.bytes_done / max(hours, 1e-9),
            )
        info = self.store.info
        write_shard(path, writer.entries, writer.header(inputs, rejects), info.dtype, info.width)

    def _load_ahead(self, items: Sequence[_Item], pool: ThreadPoolExecutor) -> Iterator[list[_Loaded]]:
        """Yield batches of loaded audio; the next one is being read meanwhile."""
        limit = self.config.extract_max_duration * self.teacher.sampling_rate
        batches: list[list[_Item]] = [[]]
        for item in items:
            # Items come by duration, so the newcomer is the longest of its batch.
            if batches[-1] and (len(batches[-1]) + 1) * item.num_samples > limit:
                batches.append([])
            batches[-1].append(item)
        pending = [pool.submit(self._load, i) for i in batches[0]]
        for following in [*batches[1:], []]:
            ahead = [pool.submit(self._load, i) for i in following]
            yield [future.result() for future in pending]
            pending = ahead

    def _load(self, item: _Item) -> _Loaded:
        """Read the clean audio of one utterance at the teacher's rate, or say why not."""
        teacher = self.teacher
        try:
            wave = clean_audio(item.cut, teacher.sampling_rate)
        except DataError as error:
            return _Loaded(item, None, str(error))
        if teacher.num_frames(len(wave)) == 0:
            return _Loaded(item, None, f"{len(wave)} samples give no frame of the teacher")
        if teacher.max_samples is not None and len(wave) > teacher.max_samples:
            return _Loaded(item, None, f"{len(wave)} samples, the teacher hears at most {teacher.max_samples}")
        return _Loaded(item, wave)

    @torch.no_grad()
    def _label_batch(self, loaded: Sequence[_Loaded]) -> Iterator[tuple[_Item, np.ndarray | None, int, str]]:
        """Yield (item, labels or None, samples, reason of a rejection) of one batch."""
        yield from ((x.item, None, 0, x.reason) for x in loaded if x.wave is None)
        group = [x for x in loaded if x.wave is not None]
        if not group:
            return
        batch = Batch.from_audio([x.wave for x in group], [x.item.cut.id for x in group])
        output = self.teacher.extract(batch)
        embeddings = self._checked(output, group)
        finite = [bool(torch.isfinite(e).all()) for e in embeddings]
        kept = [e for e, ok in zip(embeddings, finite, strict=True) if ok]
        labels = iter(self._values(kept) if kept else [])
        for x, ok in zip(group, finite, strict=True):
            if ok:
                yield x.item, next(labels), len(x.wave), ""
            else:
                yield x.item, None, len(x.wave), "the teacher's embeddings are not finite"

    def _checked(self, output: TeacherOutput, group: Sequence[_Loaded]) -> list[Tensor]:
        """Return the valid embeddings of each utterance; their number must be the formula's."""
        lens = output.lens["embeddings"].tolist()
        for x, found in zip(group, lens, strict=True):
            expected = self.teacher.num_frames(len(x.wave))
            if found != expected:
                raise DataError(
                    f"teacher gave {found} frames for {x.item.cut.id} ({len(x.wave)} samples), its num_frames says "
                    f"{expected}; extract() and num_frames() of the teacher must agree"
                )
        return [e[:t] for e, t in zip(output.arrays["embeddings"], lens, strict=True)]

    def _values(self, embeddings: Sequence[Tensor]) -> list[np.ndarray]:
        """Turn embeddings [(T_l, C)] into what is stored."""
        lens = [len(e) for e in embeddings]
        joined = torch.cat(list(embeddings))
        if self.quantizer is not None:
            self.quantizer.to(joined.device)
            flat = self.quantizer.encode(joined, refine_iters=self.config.refine_iters).cpu().numpy()
        else:
            if self.config.embeddings_dtype == "float16" and float(joined.abs().max()) > _FLOAT16_MAX:
                raise DataError(
                    f"an embedding reaches {float(joined.abs().max()):.4g}, float16 holds {_FLOAT16_MAX}; "
                    "choose --embeddings-dtype float32 or --normalize-embeddings true"
                )
            flat = joined.cpu().numpy().astype(self.config.embeddings_dtype)
        return np.split(flat, np.cumsum(lens)[:-1])

    def finish(self, writer: ShardWriter, inputs: str, num_items: int) -> None:
        """Put the parts together into the shard, unless too many utterances were rejected."""
        parts = [Shard(p) for p in self.parts]
        for part in parts:
            part.verify()
        rejects = sorted((r for part in parts for r in part.header.rejects), key=lambda r: r["key"])
        file = _rejects_file(self.config)
        with atomic_write(file, "w") as stream:
            stream.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rejects)
        if len(rejects) > self.config.max_reject_ratio * num_items:
            for part in parts:
                if part.header.rejects:
                    part.path.unlink()  # tried again by the next run
            raise DataError(
                f"{len(rejects)} of {num_items} utterances were rejected, more than --max-reject-ratio "
                f"{self.config.max_reject_ratio}; first: {rejects[0]['id']}: {rejects[0]['reason']} (all: {file})"
            )
        writer.entries = [LabelEntry(e.key, e.values, e.num_samples) for part in parts for e in part.entries()]
        writer.finish(inputs, rejects)
