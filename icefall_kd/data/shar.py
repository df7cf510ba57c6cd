"""Lhotse Shar folders: cuts, features or audio, and teacher labels, to be read from end to end (our design).

A folder holds

* ``shar.json``: what the shards hold, of which cuts, and the fingerprints of the label sets;
* ``labels/<field>/label_set.json``: where the labels of a field come from;
* ``shards/``: Lhotse's own files and nothing else, so that ``CutSet.from_shar(in_dir=...)`` reads them, too;
* ``rows/``: a file a shard, written when the shard is whole: cuts, seconds, bytes and checksums;
* ``shards.jsonl``: all rows, written when the last shard is whole.

An array of labels lies in the field of its label set; ``cut.custom["label_samples"]`` says of how many samples it was
made, and the stamp of a cut (labels/keys.py) names the audio, wherever the cut lies in its recording now.
"""

import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import numpy as np
from lhotse.cut import Cut
from lhotse.shar.readers.tar import TarIterator

from icefall_kd.data.manifests import iterate_cuts
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.labels.join import JoinReport
from icefall_kd.labels.keys import key_of
from icefall_kd.runtime.files import fingerprint, read_json, read_lines, reading, sha256_file

INFO_NAME, ROWS_NAME = "shar.json", "shards.jsonl"
FORMAT_VERSION = 1
SAMPLES = "label_samples"
# What comes out of reading files that are cut off, or hold other bytes than were written.
_DAMAGE = (
    OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError, zlib.error,
    tarfile.TarError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SharInfo:
    """What a folder holds; the content of ``shar.json``."""

    num_shards: int
    data: list[str]
    """"features", "recording", or both."""
    labels: dict[str, str]
    """Fingerprint of each label set by the name of its field."""
    codec: str
    """How features are written: "lilcom" or "numpy"."""
    pieces: float | None
    """Utterances were cut into pieces of at most so many seconds; None: they were not."""
    inputs: str
    """Fingerprint of the cut sets."""
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all of it."""
        return fingerprint(asdict(self))

    @property
    def fields(self) -> list[str]:
        """Names of what a shard holds beside its cuts."""
        return [*self.data, *self.labels]

    @classmethod
    def load(cls, path: Path) -> "SharInfo":
        """Read ``shar.json`` of a folder; a DataError names what is wrong with it."""
        file = Path(path) / INFO_NAME
        content = read_json(file)
        if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
            raise DataError(f"{file} is of another format version than {FORMAT_VERSION}; export again")
        with reading(str(file), "export into another folder"):
            info = _typed(cls, content)
            if info.num_shards < 1 or not set(info.data) <= {"features", "recording"}:
                raise ValueError(f"{info.num_shards} shards of {info.data}")
            _ = info.fingerprint  # of numbers that are finite
        return info


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """What is known of one whole shard."""

    shard: int
    of: str
    """Fingerprint of the SharInfo."""
    cuts: int
    seconds: float
    longest: float
    """Seconds of the longest cut."""
    most_text: int
    """Characters of the longest transcript."""
    labelled: dict[str, int]
    """Cuts that have labels, by field."""
    files: dict[str, dict]
    """{"name", "bytes", "sha256"} of the file of the cuts ("cuts") and of each field."""


def _typed(cls: type[Any], content: Any) -> Any:
    """Return a dataclass of values that a file held; a TypeError or ValueError unless each is of its type."""
    item = cls(**content)
    for name, kind in get_type_hints(cls).items():
        value, kind = getattr(item, name), get_origin(kind) if get_origin(kind) in (dict, list) else kind
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise TypeError(f"{name} is {str(value)[:80]!r}")
    return item


def row_file(path: Path, shard: int) -> Path:
    """Return where the row of a shard lies in the folder ``path``."""
    return Path(path) / "rows" / f"{shard:06d}.json"


def load_row(path: Path, shard: int, info: SharInfo) -> ShardRow | None:
    """Return the row of a shard whose files are all there with the right sizes; None: it has to be written."""
    file = row_file(path, shard)
    if not file.exists():
        return None
    row = _as_row(read_json(file), file, info)
    return row if row.of == info.fingerprint and not size_problems(path, row) else None


def _as_row(content: object, where: Path, info: SharInfo) -> ShardRow:
    with reading(str(where), "delete it and run the export again"):
        row = _typed(ShardRow, content)
        if row.cuts < 1:
            raise ValueError(f"shard {row.shard} has {row.cuts} cuts")
        for file in row.files.values():
            if {name: type(value) for name, value in file.items()} != {"name": str, "bytes": int, "sha256": str}:
                raise TypeError(f"a file of shard {row.shard} is {file}")
            if Path(file["name"]).name != file["name"]:
                raise ValueError(f"a file of shard {row.shard} is called {file['name']!r}")
        if row.of == info.fingerprint and {"cuts", *info.fields} != set(row.files):
            raise ValueError(f"shard {row.shard} has the files {sorted(row.files)}")
        if row.of == info.fingerprint and set(info.labels) != set(row.labelled):
            raise ValueError(f"shard {row.shard} says of {sorted(row.labelled)} how many are labelled")
    return row


def size_problems(path: Path, row: ShardRow) -> list[str]:
    """Name the files of a shard that are missing, or of another size than was written."""
    problems = []
    for file in row.files.values():
        found = Path(path) / "shards" / file["name"]
        size = found.stat().st_size if found.is_file() else None
        if size != file["bytes"]:
            said = "is missing" if size is None else f"has {size} bytes, {file['bytes']} were written"
            problems.append(f"{found} {said}; run the export again with the same options")
    return problems


class Shar:
    """A whole Shar, opened for reading.

    Args:
        path: its folder.
    Raises:
        DataError: it is no Shar of this project, its export has not ended, or its shards are of another one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / INFO_NAME).is_file():
            raise DataError(f"--shar-dir {self.path} holds no {INFO_NAME}; write it with local/export_shar.py")
        self.info = SharInfo.load(self.path)
        file = self.path / ROWS_NAME
        if not file.is_file():
            absent = [k for k in range(self.info.num_shards) if not row_file(self.path, k).exists()]
            raise DataError(
                f"--shar-dir {self.path}: its export has not ended ({len(absent)} of {self.info.num_shards} shards are "
                "to come); run local/export_shar.py again with the same options"
            )
        try:
            self.rows = [_as_row(json.loads(line), file, self.info) for line in read_lines(file)]
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{file} is damaged ({error}); delete it and run the export again") from error
        if [row.shard for row in self.rows] != list(range(self.info.num_shards)):
            raise DataError(f"{file} has {len(self.rows)} rows of {self.info.num_shards}; delete it and export again")
        for row in self.rows:
            if row.of != self.info.fingerprint:
                raise DataError(
                    f"{file}: shard {row.shard} is of the Shar {row.of[:16]}, {INFO_NAME} describes "
                    f"{self.info.fingerprint[:16]}: shards of two exports are mixed; export into a new folder"
                )
        self.labels = {field: self._label_set(field, wanted) for field, wanted in self.info.labels.items()}

    def _label_set(self, field: str, wanted: str) -> LabelSetInfo:
        info = LabelSetInfo.load(self.path / "labels" / field)
        if info.fingerprint != wanted:
            raise DataError(
                f"{self.path / 'labels' / field} is the label set {info.fingerprint[:16]}, {INFO_NAME} says "
                f"{wanted[:16]}: one of them was altered; restore it, or export again"
            )
        return info

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is in it, by the checksums of its files."""
        sums = [sorted((name, file["sha256"]) for name, file in row.files.items()) for row in self.rows]
        return fingerprint([asdict(self.info), sums])

    @property
    def num_cuts(self) -> int:
        """Cuts of all shards."""
        return sum(row.cuts for row in self.rows)

    @property
    def seconds(self) -> float:
        """Seconds of audio of all cuts."""
        return sum(row.seconds for row in self.rows)

    def require(self, data: Sequence[str], why: str) -> None:
        """Raise a ConfigError unless shards hold all of ``data``, which ``why`` needs."""
        for name in data:
            if name not in self.info.data:
                raise ConfigError(
                    f"--shar-dir {self.path} holds {' and '.join(self.info.data)}, {why} needs {name}; export it with "
                    f"local/export_shar.py --store {'both' if self.info.data else name}"
                )

    def field_of(self, path: str | Path) -> str:
        """Return the field of the label set in the folder ``path``, of which ``label_set.json`` alone is read."""
        info = LabelSetInfo.load(Path(path))
        for field, there in self.labels.items():
            if there.fingerprint == info.fingerprint:
                return field
        alike = [
            f"{field}: {'; '.join(x.differences(info))}" for field, x in self.labels.items() if x.kind == info.kind
        ]
        said = f"of this kind it holds {' | '.join(alike)} (there, and wanted)" if alike else f"it holds {self._held()}"
        raise DataError(
            f"--shar-dir {self.path} has no labels of the set {path} ({info.kind}, {info.fingerprint[:16]}): {said}; "
            "export the cuts with this --label-dir, or train with the labels that were exported"
        )

    def _held(self) -> str:
        return ", ".join(f"{x.kind} as {field}" for field, x in self.labels.items()) or "no labels"

    def coverage(self, field: str) -> JoinReport:
        """Return how many cuts have labels of a field."""
        matched = sum(row.labelled[field] for row in self.rows)
        return JoinReport(matched, self.num_cuts - matched, 0)

    def read(self, shard: int, fields: Sequence[str]) -> Iterator[Cut]:
        """Yield the cuts of a shard in order, with the data of ``fields`` in memory.

        Raises:
            DataError: a file is missing or damaged, or ends early.
        """
        row = self.rows[shard]
        wanted = {name: row.files[name] for name in ("cuts", *fields)}
        if problems := size_problems(self.path, ShardRow(**{**asdict(row), "files": wanted})):
            raise DataError("; ".join(problems))
        paths = {name: self.path / "shards" / file["name"] for name, file in wanted.items()}
        count, cuts = 0, _filled(paths)
        while True:
            try:
                cut = next(cuts, None)
            except _DAMAGE as error:
                raise DataError(
                    f"shard {shard} of {self.path} is damaged behind cut {count} ({type(error).__name__}: {error}); "
                    "find the file with local/verify_shar.py, delete it and run the export again"
                ) from error
            if cut is None:
                break
            count += 1
            yield cut
        if count != row.cuts:
            raise DataError(
                f"shard {shard} of {self.path} ends after {count} of {row.cuts} cuts; find the file with "
                "local/verify_shar.py, delete it and run the export again"
            )

    def verify(self) -> list[str]:
        """Read every byte and return one line for each problem."""
        problems = []
        for row in self.rows:
            found = size_problems(self.path, row)
            problems += found
            for file in [] if found else row.files.values():
                path = self.path / "shards" / file["name"]
                if (found_sum := sha256_file(path)) != file["sha256"]:
                    problems.append(
                        f"{path} is damaged: its checksum is {found_sum}, {file['sha256']} was written; delete it and "
                        "run the export again with the same options"
                    )
        return problems


def _filled(paths: dict[str, Path]) -> Iterator[Cut]:
    """Yield the cuts of a shard with what its tar files hold of them.

    Lhotse's own reader believes the rows of the cuts, and what has no data in a tar file it would read from where its
    row says: by a command, or with pickle.
    """
    fields = [name for name in paths if name != "cuts"]
    for cut, *found in zip(iterate_cuts(paths["cuts"]), *(TarIterator(paths[name]) for name in fields), strict=False):
        for name, (manifest, member) in zip(fields, found, strict=True):
            if manifest is None:
                continue  # the cut has none
            if str(member.parent / member.stem) != cut.id:
                raise ValueError(f"cut {cut.id} meets {member} of {paths[name].name}")
            setattr(cut, name, manifest)
        yield cut


class StreamedLabels:
    """A label set of a Shar, in the place of a LabelStore: labels come along with the cuts.

    Args:
        shar: where they are.
        field: theirs.
    """

    def __init__(self, shar: Shar, field: str) -> None:
        self.info, self.path, self.field = shar.labels[field], shar.path / "labels" / field, field

    def of(self, cuts: Sequence[Cut]) -> "CarriedLabels":
        """Return the labels of some cuts that :meth:`Shar.read` gave."""
        rows, samples = {}, {}
        for cut in cuts:
            if cut.has_custom(self.field):
                key = key_of(cut, self.info.key_kind)
                rows[key], samples[key] = labels_of(cut, self.field), cut.custom[SAMPLES][self.field]
        return CarriedLabels(self.info, self.path, rows, samples)


def labels_of(cut: Cut, field: str) -> np.ndarray:
    """Return the labels (T_l, Q) or (T_l, C) that a cut carries; a DataError when they cannot be read."""
    try:
        return cut.load_custom(field)
    except _DAMAGE as error:
        raise DataError(
            f"cut {cut.id}: its {field} cannot be read ({type(error).__name__}: {error}); find the damaged shard with "
            "local/verify_shar.py, delete it and run the export again"
        ) from error


@dataclass(frozen=True)
class CarriedLabels:
    """The labels of a batch, with what readers ask a LabelStore for."""

    info: LabelSetInfo
    path: Path
    rows: dict[str, np.ndarray]
    """Labels by key."""
    samples: dict[str, int]
    """Samples that they were made of."""

    def get(self, key: str, *, missing_ok: bool = False) -> np.ndarray | None:
        """Return the labels of a key; a DataError (with ``missing_ok`` None) when it has none."""
        if key not in self.rows and not missing_ok:
            raise DataError(f"{self.path} has no labels for {key!r} in this batch")
        return self.rows.get(key)

    def num_samples(self, key: str) -> int:
        """Return the samples, at the teacher's rate, that the labels of a key were made of."""
        return self.samples[key]
