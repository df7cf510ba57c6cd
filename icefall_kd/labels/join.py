"""The join of a corpus with a label set: sorted key hashes, shard by shard (our design).

Keys are spilled to temporary files as they come, 24 bytes of hash and number besides their text, divided by the shard
of the label set that they belong to.  Each shard is then opened, compared with its sorted hashes and closed again, so
that memory holds one shard and its share of the keys, whatever the size of the corpus: there is no table of all keys.
"""

import contextlib
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO, Protocol

import numpy as np

from icefall_kd.labels.shard import Shard, hash_words

_AT_ONCE = 1 << 16
# Files that the keys are divided among; a file may hold those of several shards.
_DIVISIONS = 64
# Bytes that a file keeps in memory before it is one on the disk.
_IN_MEMORY = 1 << 20
_RECORD = np.dtype([("word", "<u8"), ("shard_word", "<u8"), ("number", "<u8")])


@dataclass(frozen=True)
class JoinReport:
    """How the keys of a corpus meet the keys of a label set."""

    matched: int
    missing: int
    extra: int
    first_missing: tuple[str, ...] = ()

    @property
    def coverage(self) -> float:
        """Fraction of the wanted keys that have labels."""
        total = self.matched + self.missing
        return self.matched / total if total else 0.0

    def __str__(self) -> str:
        text = f"{self.matched} matched, {self.missing} missing, {self.extra} extra (coverage {self.coverage:.4%})"
        return text + (f"; first missing: {', '.join(self.first_missing)}" if self.first_missing else "")


class Shards(Protocol):
    """What a join needs of a label set."""

    num_shards: int

    def open_shard(self, k: int) -> Shard:
        """Return shard ``k``, checked against its set, which nobody keeps open."""


class KeyJoin:
    """A join in progress: keys are added, in one pass, and then reported on.

    Args:
        shards: the label set.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self._added = 0
        self._names = _spill()
        self._files = [_spill() for _ in range(min(shards.num_shards, _DIVISIONS))]

    def add(self, keys: Sequence[str]) -> None:
        """Take in some keys; repeated ones will count once."""
        records = np.empty(len(keys), _RECORD)
        words = hash_words(keys)
        records["word"], records["shard_word"] = words[:, 0], words[:, 1]
        records["number"] = np.arange(self._added, self._added + len(keys), dtype=np.uint64)
        self._added += len(keys)
        divisions = words[:, 1] % np.uint64(self.shards.num_shards) % np.uint64(len(self._files))
        for i, file in enumerate(self._files):
            file.write(records[divisions == i].tobytes())
        # No key has a line break within a shard, but a cut may; one that escapes them is as long on one line.
        self._names.write(b"".join(key.encode().replace(b"\n", b"\0") + b"\n" for key in keys))

    def report(self) -> JoinReport:
        """Compare what was added with the set, which ends the join: its temporary files are gone."""
        with contextlib.ExitStack() as stack:
            for file in (self._names, *self._files):
                stack.enter_context(file)
            return self._compare()

    def _compare(self) -> JoinReport:
        matched = missing = total = 0
        first: list[int] = []
        num_shards, divisions = self.shards.num_shards, len(self._files)
        for i, file in enumerate(self._files):
            file.seek(0)
            records = np.frombuffer(file.read(), _RECORD)
            owners = records["shard_word"] % np.uint64(num_shards)
            for k in range(i, num_shards, divisions):
                shard = self.shards.open_shard(k)
                total += shard.num_utterances
                wanted = _once(records[owners == k])
                absent = shard.find_all(wanted["word"]) < 0
                matched += len(wanted) - int(absent.sum())
                missing += int(absent.sum())
                # Of a few, those that were added first.
                first = sorted([*first, *np.sort(wanted["number"][absent])[:5].tolist()])[:5]
        return JoinReport(matched, missing, total - matched, self._named(first))

    def _named(self, numbers: Sequence[int]) -> tuple[str, ...]:
        """Return the keys that were added under these numbers, which ascend."""
        self._names.seek(0)
        found, at = [], 0
        for number in numbers:
            line = next(islice(self._names, number - at, None))
            found.append(line[:-1].replace(b"\0", b"\n").decode())
            at = number + 1
        return tuple(found)


def join(shards: Shards, keys: Iterable[str]) -> JoinReport:
    """Compare keys, in one pass, with those of a label set; nothing is rewritten."""
    joined, keys = KeyJoin(shards), iter(keys)
    while some := list(islice(keys, _AT_ONCE)):
        joined.add(some)
    return joined.report()


def _spill() -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)


def _once(records: np.ndarray) -> np.ndarray:
    """Return records sorted by their 16 bytes of hash, of equal ones the first that was added."""
    ordered = records[np.lexsort((records["number"], records["shard_word"], records["word"]))]
    same = np.zeros(len(ordered), bool)
    same[1:] = (ordered["word"][1:] == ordered["word"][:-1]) & (
        ordered["shard_word"][1:] == ordered["shard_word"][:-1]
    )
    return ordered[~same]
