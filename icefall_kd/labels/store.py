"""The label store: teacher labels on disk, found by what the audio is (our design).

A label set is a folder with ``label_set.json`` (where the labels come from) and shards (labels/shard.py).
A key's shard follows from its hash, so that opening a set reads headers only and a reader maps only the
shards that it touches.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from lhotse.cut import Cut

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.info import INFO_NAME, LabelSetInfo
from icefall_kd.labels.join import JoinReport, join
from icefall_kd.labels.keys import parse_key
from icefall_kd.labels.recogniser import content_problem
from icefall_kd.labels.shard import LabelEntry, Shard, ShardHeader, key_hash, write_shard
from icefall_kd.labels.text_states import rows_problem
from icefall_kd.runtime.files import file_lock, write_json

logger = logging.getLogger(__name__)

_SHARD_NAME = re.compile(r"shard-(\d{5})-of-(\d{5})\.safetensors")


def shard_name(shard: int, num_shards: int) -> str:
    """Return the file name of shard ``shard`` (0-based) of ``num_shards``."""
    return f"shard-{shard:05d}-of-{num_shards:05d}.safetensors"


def shard_of(hashed: bytes, num_shards: int) -> int:
    """Return the shard that a key belongs to, a function of its hash alone."""
    return int.from_bytes(hashed[8:], "big") % num_shards


def find_shards(path: Path) -> dict[tuple[int, int], Path]:
    """Return the shard files of a folder by (shard, num_shards), in order."""
    found = {}
    for file in sorted(Path(path).glob("shard-*.safetensors")):
        if match := _SHARD_NAME.fullmatch(file.name):
            found[int(match[1]), int(match[2])] = file
    return found


def row_problem(info: LabelSetInfo, values: np.ndarray, num_samples: int) -> str | None:
    """Return what is wrong with an utterance's rows, or None.

    Rows that are frames are as many as the teacher's formula gives for the audio.  Of other rows the audio tells
    nothing but that there is some; what a recogniser's rows say must make sense whatever they are.

    Args:
        info: provenance of the set.
        values: (rows, width) as stored.
        num_samples: samples at the teacher's rate.
    """
    if info.row == "piece":
        return rows_problem(values)
    frames = info.formula.num_frames(num_samples)
    if info.row == "frame" and len(values) != frames:
        return f"{len(values)} frames, the teacher's formula gives {frames} for its {num_samples} samples"
    if info.row != "frame" and frames == 0:
        return f"labels of {num_samples} samples, which give no frame of the teacher"
    return content_problem(info, values)


class LabelStore:
    """A label set opened for reading (and, by shards, for writing).

    Opening reads ``label_set.json`` and compares it with ``expect``; shards are opened at their first use, in
    each process anew.  A store may be pickled to a worker.

    Args:
        path: folder of the set.
        expect: properties that the set must have, for instance {"teacher_sha256": ..., "layer": 4}.
        partial: do not insist on all shards being there.
    Raises:
        DataError: another provenance (both values are named), missing shards.
    """

    def __init__(self, path: str | Path, expect: dict | None = None, partial: bool = False) -> None:
        self.path = Path(path)
        self.info = LabelSetInfo.load(self.path)
        self.info.check(expect or {}, str(self.path))
        self._fingerprint = self.info.fingerprint
        self._files: list[Path] = []
        self._reset()
        if not partial:
            self._files = self._complete_files()

    @classmethod
    def create(cls, path: str | Path, info: LabelSetInfo) -> "LabelStore":
        """Make the folder of a set, or open it when it was made with the same options.

        Raises:
            DataError: the folder holds a set with other options; the message names them with both values.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with file_lock(path / ".lock"):
            if (path / INFO_NAME).exists():
                there = LabelSetInfo.load(path)
                if differences := there.differences(info):
                    raise DataError(
                        f"label set {path} was made with other options: {'; '.join(differences)} (there, and wanted "
                        "now); give another --label-dir, or delete this one"
                    )
            else:
                write_json(path / INFO_NAME, asdict(info))
        return cls(path, partial=True)

    def _complete_files(self) -> list[Path]:
        found = find_shards(self.path)
        counts = sorted({n for _, n in found})
        if len(counts) > 1:
            raise DataError(f"label set {self.path} mixes shards of {counts[0]} and of {counts[1]}; keep one of them")
        if not counts:
            raise DataError(f"label set {self.path} has no shards yet; run the extraction")
        absent = [str(k) for k in range(counts[0]) if (k, counts[0]) not in found]
        if absent:
            raise DataError(
                f"label set {self.path} lacks shard {', '.join(absent[:10])} of {counts[0]}; run the extraction of "
                "each with --shard"
            )
        return list(found.values())

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._shards: dict[int, Shard] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shards": {}, "_pid": -1}

    @property
    def num_shards(self) -> int:
        """Number of shards of the set."""
        if not self._files:
            self._files = self._complete_files()
        return len(self._files)

    def shard(self, k: int) -> Shard:
        """Return shard ``k``, opened at its first use in this process and checked against the set."""
        if self._pid != os.getpid():
            self._reset()
        if k not in self._shards:
            self._shards[k] = self.open_shard(k)
        return self._shards[k]

    def open_shard(self, k: int) -> Shard:
        """Return shard ``k``, checked against the set, which the store does not keep open."""
        self._files = self._files or self._complete_files()
        opened = Shard(self._files[k])
        self._check_shard(opened)
        return opened

    def _check_shard(self, shard: Shard) -> None:
        header = shard.header
        pairs = {
            "set fingerprint": (header.fingerprint, self._fingerprint),
            "kind": (header.kind, self.info.kind),
            "dtype": (shard.dtype, self.info.dtype),
            "width": (shard.width, self.info.width),
            "place": (shard_name(header.shard, header.num_shards), shard.path.name),
        }
        for name, (found, wanted) in pairs.items():
            if found != wanted:
                raise DataError(
                    f"label shard {shard.path} does not belong to its set: {name} is {found!r}, expected {wanted!r}; "
                    "delete it and extract this shard again"
                )

    def close(self, besides: int) -> None:
        """Close all shards but one; the next use opens them again."""
        self._shards = {k: shard for k, shard in self._shards.items() if k == besides}

    def of(self, cuts: Sequence[Cut]) -> "LabelStore":
        """Return what holds the labels of some cuts: the store does (those of a Shar come along with the cuts)."""
        return self

    def _locate(self, key: str) -> tuple[Shard, int]:
        hashed = key_hash(key)
        shard = self.shard(shard_of(hashed, self.num_shards))
        return shard, shard.find(hashed)

    def _require(self, key: str) -> tuple[Shard, int]:
        shard, i = self._locate(key)
        if i < 0:
            raise DataError(f"label set {self.path} has no labels for {key!r}; join the set with the cuts to see why")
        return shard, i

    def get(
        self, key: str, start: int = 0, stop: int | None = None, *, missing_ok: bool = False
    ) -> np.ndarray | None:
        """Return frames ``start:stop`` of an utterance, (T_l, Q) or (T_l, C).

        Raises:
            DataError: it is absent; with ``missing_ok`` the answer is None.
        """
        shard, i = self._locate(key) if missing_ok else self._require(key)
        return shard.values(i, start, stop) if i >= 0 else None

    def __contains__(self, key: str) -> bool:
        return self._locate(key)[1] >= 0

    def num_frames(self, key: str) -> int:
        """Return the number of teacher frames of an utterance."""
        shard, i = self._require(key)
        return shard.num_frames_of(i)

    def num_samples(self, key: str) -> int:
        """Return the number of samples, at the teacher's rate, that an utterance's labels were made from."""
        shard, i = self._require(key)
        return shard.num_samples_of(i)

    def __len__(self) -> int:
        return sum(self.shard(k).num_utterances for k in range(self.num_shards))

    def keys(self) -> Iterator[str]:
        """Yield all keys, shard by shard, in order."""
        for k in range(self.num_shards):
            yield from self.shard(k).keys()

    def join(self, keys: Iterable[str], min_coverage: float = 1.0) -> JoinReport:
        """Compare the keys of a corpus with those of the set; nothing is rewritten.

        Args:
            keys: label keys of the cuts, one pass; repeated keys count once.
            min_coverage: least fraction that must have labels.
        Raises:
            DataError: below ``min_coverage``; the message is the report with the first five missing keys.
        """
        report = join(self, keys)
        self.require(report, min_coverage)
        return report

    def require(self, report: JoinReport, min_coverage: float) -> None:
        """Raise the DataError of :meth:`join` for a report on a coverage below ``min_coverage``."""
        asked, first = report.matched + report.missing, report.first_missing
        if not asked or report.matched < min_coverage * asked:
            raise DataError(
                f"label set {self.path} does not cover the cuts: {report}; --min-coverage is {min_coverage}. "
                f"{self._nearest(first[0]) if first else 'There are no cuts'}. Extract labels of these cuts"
            )

    def _nearest(self, key: str) -> str:
        """Say what the set has instead of a missing key: the span at another speed, or another span."""
        if self.info.key_kind == "text":
            return "Keys name normalised texts: the set may be of another corpus, or of texts normalised otherwise"
        wanted, other = parse_key(key), None
        for found in map(parse_key, self.keys()):
            if found.recording_id == wanted.recording_id:
                if (found.start, found.num_samples) == (wanted.start, wanted.num_samples):
                    return f"The set has the first of them at speed {found.speed}, wanted is {wanted.speed}"
                other = other or found
        if other is not None:
            return f"Of the first one's recording the set has {str(other)!r}, wanted is {key!r}"
        return f"The set has nothing of recording {wanted.recording_id!r}: it may be of another corpus"

    def verify(self) -> list[str]:
        """Read every byte and return one line for each problem: damaged, foreign, missing shards, doubled keys."""
        problems = []
        try:
            files = self._complete_files()
        except DataError as error:
            problems.append(str(error))
            files = list(find_shards(self.path).values())
        owners: dict[bytes, str] = {}
        for file in files:
            try:
                shard = Shard(file)
                self._check_shard(shard)
                shard.verify()
                problems += self._content_problems(shard, owners)
            except DataError as error:
                problems.append(str(error))
        return problems

    def _content_problems(self, shard: Shard, owners: dict[bytes, str]) -> Iterator[str]:
        name = shard.path.name
        for i, key in enumerate(shard.keys()):
            hashed = key_hash(key)
            if hashed in owners:
                yield f"key {key!r} is in {owners[hashed]} and in {name}; delete one and extract that shard again"
            owners[hashed] = name
            if shard_of(hashed, shard.header.num_shards) != shard.header.shard:
                yield f"label shard {shard.path}: key {key!r} belongs to another shard"
            if problem := row_problem(self.info, shard.view(i), shard.num_samples_of(i)):
                yield f"label shard {shard.path}: {key!r} has {problem}"

    def writer(self, shard: int, num_shards: int) -> "ShardWriter":
        """Return the writer of shard ``shard`` (0-based) of ``num_shards``."""
        return ShardWriter(self, shard, num_shards)

    def storage_report(self) -> dict[str, float]:
        """Return what the set costs on disk.

        Returns:
            utterances, frames, hours, value_bytes, container_bytes (headers, keys, offsets), overhead (container /
            value bytes), bytes_per_hour (values), file_bytes_per_hour, and, where labels have a plain form in float32
            (embeddings, posteriors of all classes), ratio_to_float32: its bytes / value bytes.
        """
        shards = [self.shard(k) for k in range(self.num_shards)]
        frames, values = sum(s.num_frames for s in shards), sum(s.value_bytes for s in shards)
        total = sum(s.file_bytes for s in shards) + (self.path / INFO_NAME).stat().st_size
        hours = sum(s.num_samples for s in shards) / self.info.sampling_rate / 3600
        plain = self.info.plain_floats
        return {
            "utterances": len(self),
            "frames": frames,
            "hours": hours,
            "value_bytes": values,
            "container_bytes": total - values,
            "overhead": (total - values) / max(values, 1),
            "bytes_per_hour": values / hours if hours else 0.0,
            "file_bytes_per_hour": total / hours if hours else 0.0,
            **({"ratio_to_float32": 4 * plain * frames / max(values, 1)} if plain else {}),
        }


class ShardWriter:
    """Collects the labels of one shard and writes its file at once."""

    def __init__(self, store: LabelStore, shard: int, num_shards: int) -> None:
        if not 0 <= shard < num_shards or num_shards > 99999:
            raise ConfigError(f"--shard is {shard} of --num-shards {num_shards}; it must be in 0 ... {num_shards - 1}")
        self.store, self.shard, self.num_shards = store, shard, num_shards
        self.path = store.path / shard_name(shard, num_shards)
        self.entries: list[LabelEntry] = []
        if others := {n for _, n in find_shards(store.path)} - {num_shards}:
            raise DataError(
                f"label set {store.path} has shards of {max(others)}, --num-shards is {num_shards}; keep to one "
                "division, give another --label-dir, or delete this one"
            )

    def is_finished(self, inputs: str, path: Path | None = None) -> bool:
        """Check by its header alone whether the shard, or a part of it at ``path``, is of this set and ``inputs``."""
        path = path or self.path
        if not path.exists():
            return False
        try:
            header = Shard(path).header
        except DataError as error:
            logger.warning("%s; it is made again", error)
            return False
        return (header.fingerprint, header.inputs) == (self.store.info.fingerprint, inputs)

    def add(self, key: str, values: np.ndarray, num_samples: int) -> None:
        """Add an utterance; a DataError when its rows cannot be (:func:`row_problem`), or it is of another shard."""
        if problem := row_problem(self.store.info, values, num_samples):
            raise DataError(f"{key!r} has {problem}")
        if shard_of(key_hash(key), self.num_shards) != self.shard:
            raise DataError(f"{key!r} belongs to shard {shard_of(key_hash(key), self.num_shards)}, not to {self.shard}")
        self.entries.append(LabelEntry(key, values, num_samples))

    def header(self, inputs: str = "", rejects: Sequence[dict] = ()) -> ShardHeader:
        """Return the header of this writer's file."""
        info = self.store.info
        return ShardHeader(info.fingerprint, self.shard, self.num_shards, info.kind, inputs, list(rejects))

    def finish(self, inputs: str = "", rejects: Sequence[dict] = ()) -> Path:
        """Write the shard and return its path."""
        info = self.store.info
        write_shard(self.path, self.entries, self.header(inputs, rejects), info.dtype, info.width)
        return self.path
