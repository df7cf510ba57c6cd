"""Extraction of teacher labels, shard by shard (our design): resumable, idempotent, with the same bytes each time.

Which shard an utterance belongs to follows from its key; within a shard, utterances are ordered by duration and
cut into parts.  A part is written when it is done and is not done again after a kill.  Batches never cross a
part, so that a resumed run computes exactly what an uninterrupted one does.

Several layers of a teacher, or several things that a recogniser knows, go to a label set each, from one pass of the
teacher over the audio.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lhotse.cut import MonoCut
from torch import Tensor

from icefall_kd.config import ExtractConfig
from icefall_kd.data.batch import Batch
from icefall_kd.data.filters import cut_into_pieces
from icefall_kd.data.manifests import iterate_cuts
from icefall_kd.data.transcripts import pad_tokens, transcript
from icefall_kd.errors import DataError
from icefall_kd.labels.audio import clean_audio
from icefall_kd.labels.formats import RowMaker, load_quantizer, row_maker, set_info
from icefall_kd.labels.info import RECOGNISER_ROWS
from icefall_kd.labels.keys import CorpusFingerprint, cut_text, label_key, speech_track, two_texts
from icefall_kd.labels.parts import ExtractReport, PartedShard
from icefall_kd.labels.shard import key_hash
from icefall_kd.labels.store import LabelStore, shard_of
from icefall_kd.quantization.clusters import Clusters
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.runtime.files import fingerprint
from icefall_kd.runtime.log import Progress
from icefall_kd.teachers import build_teacher
from icefall_kd.teachers.base import Teacher, TeacherOutput, tap
from icefall_kd.teachers.windows import WindowedTeacher

logger = logging.getLogger(__name__)


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


def extract_labels(
    config: ExtractConfig, teacher: Teacher | None = None, quantizer: Quantizer | Clusters | None = None
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
    return extract_layers([config], teacher, [quantizer])[0]


def extract_layers(
    configs: Sequence[ExtractConfig],
    teacher: Teacher | None = None,
    quantizers: Sequence[Quantizer | Clusters | None] | None = None,
) -> list[ExtractReport]:
    """Extract one shard of several label sets, each of a layer or output of one teacher, which runs once a batch.

    Args:
        configs: what to extract; they differ in layer, label_dir, quantizer and kind alone.
        teacher: built from the configurations when not given; its layer is the last of them.
        quantizers: one for each configuration, built from it where None.
    Raises:
        DataError: as :func:`extract_labels`.
        ConfigError: the teacher gives one layer only, has no such layer, or is no recogniser.
    """
    began, first = time.monotonic(), configs[0]
    teacher = teacher if teacher is not None else _teacher_of(configs)
    if teacher.max_samples is not None and first.teacher.long_utterances == "window":
        teacher = WindowedTeacher(teacher)
    layers = [config.teacher.layer for config in configs]
    arrays = tap(teacher, layers) if len(set(layers)) > 1 else ["embeddings"] * len(configs)
    arrays = [c.kind if c.kind in RECOGNISER_ROWS else array for c, array in zip(configs, arrays, strict=True)]
    items, corpus = _plan(first, teacher.sampling_rate)
    inputs = fingerprint([i.key for i in items])
    targets = [
        _Target.create(config, teacher, quantizer, corpus, array)
        for config, quantizer, array in zip(configs, quantizers or [None] * len(configs), arrays, strict=True)
    ]
    with contextlib.ExitStack() as locks:
        # In one order, so that two runs cannot block each other.
        for target in sorted(targets, key=lambda t: t.shard.work):
            locks.enter_context(target.shard.locked())
        todo = [target for target in targets if not target.shard.is_finished(inputs)]
        if todo:
            _Extraction(first, teacher, todo).run(items)
        errors = [error for target in todo if (error := target.shard.finish(inputs, len(items))) is not None]
        if errors:
            raise errors[0]
    for target in targets:
        target.shard.clean()
    return [target.shard.report(target not in todo, began) for target in targets]


def _teacher_of(configs: Sequence[ExtractConfig]) -> Teacher:
    first, kinds = configs[0], [config.kind for config in configs]
    if known := [kind for kind in kinds if kind in RECOGNISER_ROWS]:
        from icefall_kd.teachers.recogniser import RecogniserTeacher

        return RecogniserTeacher.for_extraction(first, known)
    layers = [config.teacher.layer for config in configs]
    return build_teacher(replace(first.teacher, layer=-1 if -1 in layers else max(layers)))


def _plan(config: ExtractConfig, sampling_rate: int) -> tuple[list[_Item], str]:
    """Read the cuts once: the utterances of this shard by duration, and the fingerprint of the whole corpus."""
    corpus, items = CorpusFingerprint(), {}
    for path in config.cuts:
        cuts = iterate_cuts(Path(path))
        for cut in cuts if config.pieces is None else cut_into_pieces(cuts, config.pieces):
            key = label_key(cut)
            corpus.add(key, cut)
            if shard_of(key_hash(key), config.num_shards) == config.shard:
                speech = speech_track(cut)
                samples = round(speech.num_samples * sampling_rate / speech.sampling_rate)
                first = items.setdefault(key, _Item(key, speech, samples)).cut
                if cut_text(first) != cut_text(speech):
                    raise two_texts(key, (first.id, cut_text(first)), (speech.id, cut_text(speech)), path)
    return sorted(items.values(), key=lambda i: (i.num_samples, i.key)), corpus.hexdigest()


@dataclass(eq=False)
class _Target:
    """The shard of one label set, and the array of the teacher that it is made from."""

    array: str
    rows: RowMaker
    """Makes what is stored of it."""
    shard: PartedShard

    @classmethod
    def create(
        cls, config: ExtractConfig, teacher: Teacher, quantizer: Quantizer | Clusters | None, corpus: str, array: str
    ) -> "_Target":
        quantizer = quantizer if quantizer is not None else load_quantizer(config)
        layer = int(array.removeprefix("layer")) if array.startswith("layer") else None
        store = LabelStore.create(config.label_dir, set_info(config, teacher, quantizer, corpus, layer))
        shard = PartedShard(store, config.shard, config.num_shards, config.max_reject_ratio)
        return cls(array, row_maker(config, quantizer, store.info.dtype), shard)

    def reject(self, item: _Item, reason: str) -> None:
        """Note an utterance that has no labels."""
        self.shard.reject(item.key, item.cut.id, reason)

    def add(self, group: Sequence[_Loaded], arrays: Sequence[Tensor], finite: Sequence[bool]) -> int:
        """Label a batch from its arrays [(T_l, C)], where the teacher's numbers are finite; return the bytes."""
        kept: list[tuple[_Loaded, Tensor]] = []
        for x, values, sound in zip(group, arrays, finite, strict=True):
            if sound:
                kept.append((x, values))
            else:
                self.reject(x.item, "the teacher's embeddings are not finite")
        labels = self.rows([values for _, values in kept]) if kept else []
        for (x, _), values in zip(kept, labels, strict=True):
            self.shard.add(x.item.key, values, len(x.wave))
        return sum(values.nbytes for values in labels)


class _Extraction:
    """The work on one shard: audio through the teacher, once, to all label sets that need it."""

    def __init__(self, config: ExtractConfig, teacher: Teacher, targets: Sequence[_Target]) -> None:
        self.config, self.teacher, self.targets = config, teacher, targets
        self.samples_done = self.bytes_done = 0

    def run(self, items: Sequence[_Item]) -> None:
        """Write all parts of the shards that are not there yet."""
        size = self.config.part_utterances
        groups = [items[i : i + size] for i in range(0, len(items), size)]
        progress = Progress(len(items), "utterances", name=f"shard {self.config.shard} of {self.config.num_shards}")
        with ThreadPoolExecutor(self.config.load_workers) as pool:
            for number, group in enumerate(groups):
                inputs = fingerprint([self.config.extract_max_duration, [i.key for i in group]])
                targets = [t for t in self.targets if t.shard.begin_part(number, inputs)]
                if not targets:
                    progress.total -= len(group)
                    continue
                for loaded in self._load_ahead(group, pool):
                    self._label_batch(loaded, targets)
                    self._report(progress, len(loaded))
                for target in targets:
                    target.shard.end_part(inputs)

    def _report(self, progress: Progress, num_items: int) -> None:
        hours = self.samples_done / self.teacher.sampling_rate / 3600
        progress.update(
            num_items,
            hours_per_hour=hours / max(progress.elapsed / 3600, 1e-9),
            bytes_per_hour=self.bytes_done / max(hours, 1e-9),
        )

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
    def _label_batch(self, loaded: Sequence[_Loaded], targets: Sequence[_Target]) -> None:
        for x in loaded:
            if x.wave is None:
                for target in targets:
                    target.reject(x.item, x.reason)
        group = [x for x in loaded if x.wave is not None]
        if not group:
            return
        batch = self._batch(group)
        output = self.teacher.extract(batch)
        frames = [self.teacher.num_frames(len(x.wave)) for x in group]
        due = {"frame": frames, "token": None if batch.y_lens is None else batch.y_lens.tolist()}
        for target in targets:
            arrays = self._checked(output, target.array, group, due.get(target.shard.store.info.row))
            # A recogniser's rows are numbers whatever its encoder gave.
            judged = output.arrays["embeddings"] if target.array in RECOGNISER_ROWS else arrays
            self.bytes_done += target.add(group, arrays, [bool(torch.isfinite(a).all()) for a in judged])
        self.samples_done += sum(len(x.wave) for x in group)

    def _batch(self, group: Sequence[_Loaded]) -> Batch:
        """Return the audio and, for a teacher with a tokenizer, what is said as it is in training."""
        batch = Batch.from_audio([x.wave for x in group], [x.item.cut.id for x in group])
        tokenizer = getattr(self.teacher, "tokenizer", None)
        if tokenizer is None:
            return batch
        texts = [transcript(x.item.cut) for x in group]
        y, y_lens = pad_tokens(tokenizer, texts)
        return replace(batch, texts=texts, y=y, y_lens=y_lens)

    def _checked(
        self, output: TeacherOutput, array: str, group: Sequence[_Loaded], due: Sequence[int] | None
    ) -> list[Tensor]:
        """Return the valid rows of each utterance; where their numbers are known before, they must be those."""
        lens = output.lens[array].tolist()
        for x, found, expected in zip(group, lens, lens if due is None else due, strict=True):
            if found != expected:
                raise DataError(
                    f"teacher gave {found} frames for {x.item.cut.id} ({len(x.wave)} samples), its num_frames says "
                    f"{expected}; extract() and num_frames() of the teacher must agree"
                )
        return [e[:t] for e, t in zip(output.arrays[array], lens, strict=True)]
