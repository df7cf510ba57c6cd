"""Extraction of a language model's states of the texts of cut sets, shard by shard (our design).

As in labels/extract.py: the shard of a text follows from its key; within a shard, texts are ordered by length and cut
into parts, and batches never cross a part, so that a resumed run computes what an uninterrupted one does.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from icefall_kd.config import ExtractTextConfig
from icefall_kd.data.manifests import iterate_cuts
from icefall_kd.data.transcripts import transcript
from icefall_kd.errors import DataError
from icefall_kd.labels.info import TEXT_KIND, LabelSetInfo
from icefall_kd.labels.keys import text_key
from icefall_kd.labels.parts import ExtractReport, PartedShard
from icefall_kd.labels.shard import key_hash
from icefall_kd.labels.store import LabelStore, shard_of
from icefall_kd.labels.text_states import LEAD, pack_states
from icefall_kd.runtime.files import fingerprint
from icefall_kd.runtime.log import Progress
from icefall_kd.teachers.language_model import LanguageModelTeacher, ReadText

_SAMPLING_RATE = 16000
# Samples of a text are stored as 32 bits: 74 hours.
_MOST_SAMPLES = (1 << 32) - 1


@dataclass
class _Item:
    key: str
    text: str
    cut_id: str
    """The first cut with this text."""
    num_samples: int = 0
    """Of all cuts with this text."""


def extract_text_states(config: ExtractTextConfig, teacher: LanguageModelTeacher | None = None) -> ExtractReport:
    """Extract one shard of a set of text_states; finished shards and finished parts of this one are kept.

    Args:
        config: what to extract.
        teacher: built from ``config`` when not given.
    Raises:
        ConfigError: the language model cannot be found, or is none.
        DataError: the folder holds a set with other options or another number of shards, no or unreadable cuts, more
            rejected texts than allowed.
    """
    began = time.monotonic()
    teacher = teacher if teacher is not None else LanguageModelTeacher.load(config.language_model)
    items, corpus = _plan(config)
    inputs = fingerprint([item.key for item in items])
    store = LabelStore.create(config.label_dir, _set_info(teacher, corpus))
    shard = PartedShard(store, config.shard, config.num_shards, config.max_reject_ratio)
    with shard.locked():
        skipped = shard.is_finished(inputs)
        if not skipped:
            _make_parts(config, teacher, shard, items)
            if (error := shard.finish(inputs, len(items))) is not None:
                raise error
    shard.clean()
    return shard.report(skipped, began)


def _plan(config: ExtractTextConfig) -> tuple[list[_Item], str]:
    """Read the cuts once: the texts of this shard by length, and the fingerprint of all texts."""
    keys: set[str] = set()
    items: dict[str, _Item] = {}
    for path in config.cuts:
        for cut in iterate_cuts(Path(path)):
            text = transcript(cut)
            keys.add(key := text_key(text))
            if shard_of(key_hash(key), config.num_shards) == config.shard:
                item = items.setdefault(key, _Item(key, text, cut.id))
                item.num_samples = min(item.num_samples + round(cut.duration * _SAMPLING_RATE), _MOST_SAMPLES)
    if not keys:
        raise DataError(f"there are no cuts in {', '.join(map(str, config.cuts))}")
    return sorted(items.values(), key=lambda item: (len(item.text), item.key)), fingerprint(sorted(keys))


def _set_info(teacher: LanguageModelTeacher, corpus: str) -> LabelSetInfo:
    stated = teacher.provenance()
    return LabelSetInfo(
        kind=TEXT_KIND,
        key_kind="text",
        dtype="uint16",
        width=LEAD + teacher.dim,
        dim=teacher.dim,
        teacher=stated["teacher"],
        teacher_sha256=stated["weights_sha256"],
        layer=stated["layer"],
        layer_convention=stated["layer_convention"],
        normalization=stated["normalization"],
        frame_formula={},
        sampling_rate=_SAMPLING_RATE,
        long_utterances="reject",
        device=stated["device"],
        teacher_dtype=stated["dtype"],
        corpus_fingerprint=corpus,
        extra={name: stated[name] for name in ("model_type", "causal", "tokenizer")},
        origin={name: stated[name] for name in ("source", "versions")},
    )


def _make_parts(
    config: ExtractTextConfig, teacher: LanguageModelTeacher, shard: PartedShard, items: Sequence[_Item]
) -> None:
    progress = Progress(len(items), "texts", name=f"shard {config.shard} of {config.num_shards}")
    for number, first in enumerate(range(0, len(items), config.part_texts)):
        group = items[first : first + config.part_texts]
        inputs = fingerprint([config.batch_pieces, [item.key for item in group]])
        if not shard.begin_part(number, inputs):
            progress.total -= len(group)
            continue
        read = []
        for item, text in zip(group, teacher.read([item.text for item in group]), strict=True):
            if isinstance(text, str):
                shard.reject(item.key, item.cut_id, text)
                progress.update()
            else:
                read.append((item, text))
        for batch in _batches(read, config.batch_pieces):
            for (item, text), states in zip(batch, teacher.states([text for _, text in batch]), strict=True):
                shard.add(item.key, pack_states(text.spans, text.unknown, states), item.num_samples)
            progress.update(len(batch))
        shard.end_part(inputs)


def _batches(read: Sequence[tuple[_Item, ReadText]], batch_pieces: int) -> Iterator[list[tuple[_Item, ReadText]]]:
    """Yield texts of about one number of pieces together."""
    batch: list[tuple[_Item, ReadText]] = []
    for pair in sorted(read, key=lambda pair: len(pair[1].ids)):
        if batch and (len(batch) + 1) * len(pair[1].ids) > batch_pieces:
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch
