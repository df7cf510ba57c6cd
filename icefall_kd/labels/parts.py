"""A shard on its way: made in parts, of which a kill costs one at most, and put together at the end (our design)."""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from icefall_kd.errors import DataError
from icefall_kd.labels.shard import LabelEntry, Shard, write_shard
from icefall_kd.labels.store import LabelStore, ShardWriter
from icefall_kd.runtime.files import atomic_write, file_lock, remove_leftovers

logger = logging.getLogger(__name__)


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
    file_bytes: int
    """Bytes of the shard's file."""


class PartedShard:
    """A shard of a label set and the parts that it is made of.

    Args:
        store: the set.
        shard: from 0, of ``num_shards``.
        max_reject_ratio: share of its utterances that may be rejected.
    """

    def __init__(self, store: LabelStore, shard: int, num_shards: int, max_reject_ratio: float) -> None:
        self.store, self.shard, self.num_shards, self.max_reject_ratio = store, shard, num_shards, max_reject_ratio
        self.writer: ShardWriter = store.writer(shard, num_shards)
        name = f"shard-{shard:05d}-of-{num_shards:05d}"
        self.work = store.path / ".parts" / name
        self._rejects_file = store.path / "rejects" / f"{name}.jsonl"
        self._parts: list[Path] = []
        self._part_writer = self.writer
        self._rejects: list[dict] = []

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from this shard, and remove what killed ones left."""
        self.work.mkdir(parents=True, exist_ok=True)
        with file_lock(self.work / ".lock"):
            remove_leftovers(self.store.path, self.writer.path.name)
            yield

    def is_finished(self, inputs: str) -> bool:
        """Return whether the shard is there, made of ``inputs``."""
        finished = self.writer.is_finished(inputs)
        if finished:
            logger.info("%s is finished already", self.writer.path)
        return finished

    def begin_part(self, number: int, inputs: str) -> bool:
        """Return whether a part has yet to be made."""
        self._parts.append(self.work / f"part-{number:05d}.safetensors")
        self._part_writer, self._rejects = self.store.writer(self.shard, self.num_shards), []
        return not self.writer.is_finished(inputs, self._parts[-1])

    def reject(self, key: str, utterance: str, reason: str) -> None:
        """Note an utterance that has no labels."""
        logger.warning("rejected %s (%s) of %s: %s", utterance, key, self.store.path, reason)
        self._rejects.append({"key": key, "id": utterance, "reason": reason})

    def add(self, key: str, values: np.ndarray, num_samples: int) -> None:
        """Add an utterance to the part."""
        self._part_writer.add(key, values, num_samples)

    def end_part(self, inputs: str) -> None:
        """Write the part."""
        writer, info = self._part_writer, self.store.info
        write_shard(self._parts[-1], writer.entries, writer.header(inputs, self._rejects), info.dtype, info.width)

    def finish(self, inputs: str, num_items: int) -> DataError | None:
        """Put the parts together into the shard; return the error if too many utterances were rejected.

        It is not raised, so that other label sets, too, forget the parts that the next run is to try again.
        """
        parts = [Shard(p) for p in self._parts]
        for part in parts:
            part.verify()
        rejects = sorted((r for part in parts for r in part.header.rejects), key=lambda r: r["key"])
        with atomic_write(self._rejects_file, "w") as stream:
            stream.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rejects)
        if len(rejects) > self.max_reject_ratio * num_items:
            for part in parts:
                if part.header.rejects:
                    part.path.unlink()  # tried again by the next run
            return DataError(
                f"{len(rejects)} of {num_items} utterances were rejected, more than --max-reject-ratio "
                f"{self.max_reject_ratio}; first: {rejects[0]['id']}: {rejects[0]['reason']} (all: "
                f"{self._rejects_file})"
            )
        self.writer.entries = [LabelEntry(e.key, e.values, e.num_samples) for part in parts for e in part.entries()]
        self.writer.finish(inputs, rejects)
        return None

    def clean(self) -> None:
        """Remove the parts of a finished shard."""
        shutil.rmtree(self.work, ignore_errors=True)

    def report(self, skipped: bool, began: float) -> ExtractReport:
        """Return what the extraction that ``began`` (monotonic seconds) did."""
        shard = Shard(self.writer.path)
        hours = shard.num_samples / self.store.info.sampling_rate / 3600
        seconds, rejected, path = time.monotonic() - began, len(shard.header.rejects), self.writer.path
        return ExtractReport(path, skipped, shard.num_utterances, rejected, hours, seconds, shard.file_bytes)
