"""One shard of a label set: a safetensors file of a few long arrays, memory-mapped for reading (our design).

One tensor an utterance would break the header limit of the format, so all labels of a shard lie in one array
``values`` with ``offsets``; utterances are sorted by ``key_hashes``.  The file is written by hand rather than
by the safetensors library because its arrays may be larger than memory and the bytes must be reproducible.
"""

import hashlib
import itertools
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from icefall_kd.errors import DataError
from icefall_kd.labels.keys import key_hash
from icefall_kd.runtime.files import atomic_path

DTYPES = {"uint8": "U8", "int16": "I16", "int32": "I32", "float16": "F16", "float32": "F32"}
_META = "icefall_kd"
_NO_CHECKSUM = "0" * 64
_MAX_HEADER = 16 * 2**20
_CHUNK = 16 * 2**20


@dataclass(frozen=True)
class LabelEntry:
    """The labels of one utterance on their way into a shard."""

    key: str
    """Label key."""
    values: np.ndarray
    """(T_l, Q) codes or (T_l, C) embeddings."""
    num_samples: int
    """Samples at the teacher's rate from which they were made."""


@dataclass(frozen=True)
class ShardHeader:
    """What the metadata of a shard says."""

    fingerprint: str
    """Fingerprint of the label set."""
    shard: int
    num_shards: int
    kind: str
    inputs: str = ""
    """Fingerprint of the utterances that were asked for (found or rejected)."""
    rejects: list[dict] = field(default_factory=list)
    """Utterances without labels, as {"key", "id", "reason"}."""
    checksum: str = _NO_CHECKSUM
    """SHA-256 of everything behind the header."""


def write_shard(path: Path, entries: Sequence[LabelEntry], header: ShardHeader, dtype: str, width: int) -> None:
    """Write a shard: temporary name, read back and checked, then renamed; equal entries give equal bytes.

    Args:
        path: the shard's file.
        entries: the utterances in any order; their ``values`` may be memory-mapped.
        header: identity of the shard; its checksum is filled in here.
        dtype, width: type and second dimension of all values.
    Raises:
        DataError: two utterances share a key, or values of another type or width.
    """
    entries = sorted(entries, key=lambda e: key_hash(e.key))
    for a, b in itertools.pairwise(entries):
        if a.key == b.key:
            raise DataError(f"{path}: label key {a.key!r} occurs twice; keep one of its cuts")
    for e in entries:
        if e.values.dtype != dtype or e.values.ndim != 2 or e.values.shape[1] != width:
            raise DataError(
                f"{path}: labels of {e.key!r} are {e.values.dtype} {e.values.shape}, the set holds {dtype} (T, {width})"
            )
    keys = [e.key.encode() for e in entries]
    num_frames = [len(e.values) for e in entries]
    small = {
        "offsets": np.concatenate([[0], np.cumsum(num_frames)]).astype("<i8"),
        "key_offsets": np.concatenate([[0], np.cumsum([len(k) for k in keys])]).astype("<i8"),
        "num_samples": np.array([e.num_samples for e in entries], dtype="<i8"),
    }
    tail = {
        "key_hashes": np.frombuffer(b"".join(key_hash(e.key) for e in entries), np.uint8).reshape(-1, 16),
        "keys": np.frombuffer(b"".join(keys), np.uint8),
    }
    spec = {name: ("I64", a.shape, a.nbytes) for name, a in small.items()}
    spec["values"] = (DTYPES[dtype], (sum(num_frames), width), sum(num_frames) * width * np.dtype(dtype).itemsize)
    spec |= {name: ("U8", a.shape, a.nbytes) for name, a in tail.items()}
    with atomic_path(path) as tmp:
        with open(tmp, "w+b") as stream:
            stream.write(_header_bytes(spec, header, _NO_CHECKSUM))
            digest = hashlib.sha256()
            for block in _blocks(small, entries, tail):
                digest.update(block)
                stream.write(block)
            stream.seek(0)
            stream.write(_header_bytes(spec, header, digest.hexdigest()))
            stream.flush()
            os.fsync(stream.fileno())
        Shard(tmp).verify()


def _blocks(small: dict, entries: Sequence[LabelEntry], tail: dict) -> Iterator[memoryview]:
    for array in small.values():
        yield memoryview(array.tobytes())
    for entry in entries:
        yield memoryview(np.ascontiguousarray(entry.values).tobytes())
    for array in tail.values():
        yield memoryview(array.tobytes())


def _header_bytes(spec: dict, header: ShardHeader, checksum: str) -> bytes:
    """Return the safetensors header; its length does not depend on the checksum."""
    meta = {**vars(header), "checksum": checksum}
    tensors, position = {}, 0
    for name, (dtype, shape, size) in spec.items():
        offsets = [position, position + size]
        tensors[name] = {"dtype": dtype, "shape": list(map(int, shape)), "data_offsets": offsets}
        position += size
    text = json.dumps({"__metadata__": {_META: json.dumps(meta, sort_keys=True)}, **tensors}, separators=(",", ":"))
    raw = text.encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


class Shard:
    """A shard opened for reading, memory-mapped.

    Opening reads the header alone; a DataError names the file when it is truncated or no shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with _opened(self.path) as stream:
            tensors, self._data_start = self._read_header(stream)
        self._spec = tensors
        self._map: np.ndarray | None = None
        width = self._spec["values"]["shape"][1]
        self.dtype = next(d for d, code in DTYPES.items() if code == self._spec["values"]["dtype"])
        self.width = width
        self.num_utterances = self._spec["num_samples"]["shape"][0]
        self.num_frames = self._spec["values"]["shape"][0]
        self.file_bytes = self.path.stat().st_size
        self.value_bytes = self.num_frames * width * np.dtype(self.dtype).itemsize

    def _read_header(self, stream: IO[bytes]) -> tuple[dict[str, Any], int]:
        size = os.fstat(stream.fileno()).st_size
        first = stream.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER + size, size - 8):
            raise self._damaged(f"its header claims {length} bytes of {size}")
        try:
            tensors = json.loads(stream.read(length))
            self.header = ShardHeader(**json.loads(tensors.pop("__metadata__")[_META]))
            if not isinstance(self.header.shard, int) or not isinstance(self.header.checksum, str):
                raise ValueError("wrong types in its metadata")
            self._check_layout(tensors)
            end = max(t["data_offsets"][1] for t in tensors.values())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise self._damaged(f"its header is unreadable ({type(error).__name__}: {error})") from error
        if size != 8 + length + end:
            raise self._damaged(f"it has {size} bytes, its header says {8 + length + end}")
        return tensors, 8 + length

    def _check_layout(self, tensors: dict) -> None:
        """Raise a ValueError unless every array is there with a consistent type, shape and place."""
        n = tensors["num_samples"]["shape"][0]
        expected = {"offsets": ("I64", [n + 1]), "key_offsets": ("I64", [n + 1]), "num_samples": ("I64", [n])}
        frames, width = tensors["values"]["shape"]
        expected["values"] = (tensors["values"]["dtype"], [frames, width])
        expected |= {"key_hashes": ("U8", [n, 16]), "keys": ("U8", [tensors["keys"]["shape"][0]])}
        if tensors["values"]["dtype"] not in DTYPES.values():
            raise ValueError(f"values of type {tensors['values']['dtype']}")
        sizes = {"I64": 8, "U8": 1, "I16": 2, "F16": 2, "I32": 4, "F32": 4}
        position = 0
        for name, (dtype, shape) in expected.items():
            size = int(np.prod(shape, dtype=np.int64)) * sizes[dtype]
            if tensors[name] != {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}:
                raise ValueError(f"array {name!r} is described as {tensors[name]}")
            position += size

    def _damaged(self, what: str) -> DataError:
        return DataError(f"label shard {self.path} is damaged: {what}; delete it and extract this shard again")

    def _open(self) -> None:
        """Map the file; the few long arrays become views of it."""
        self._map = np.memmap(self.path, dtype=np.uint8, mode="r")
        kinds = {"I64": "<i8", "U8": "u1", "I16": "<i2", "F16": "<f2", "I32": "<i4", "F32": "<f4"}
        arrays = {}
        raw = np.asarray(self._map)
        for name, t in self._spec.items():
            start, end = (self._data_start + x for x in t["data_offsets"])
            arrays[name] = raw[start:end].view(kinds[t["dtype"]]).reshape(t["shape"])
        self._values, self._offsets = arrays["values"], arrays["offsets"]
        self._hashes, self._arrays = arrays["key_hashes"], arrays
        # The first 8 bytes as native integers: a binary search over them finds a key.
        self._prefixes = np.ascontiguousarray(self._hashes[:, :8]).view(">u8").ravel().astype(np.uint64)

    def find(self, hashed: bytes) -> int:
        """Return the position of a key by its hash, -1 when absent."""
        if self._map is None:
            self._open()
        prefix = np.uint64(int.from_bytes(hashed[:8], "big"))
        i = int(self._prefixes.searchsorted(prefix))
        while i < self.num_utterances and self._prefixes[i] == prefix:
            if self._hashes[i].tobytes() == hashed:
                return i
            i += 1
        return -1

    def values(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return a copy of frames ``start:stop`` of the utterance at position ``i``, (T_l, Q) or (T_l, C)."""
        if self._map is None:
            self._open()
        begin, end = self._offsets[i], self._offsets[i + 1]
        if start or stop is not None:
            return self._values[begin:end][start:stop].copy()
        return self._values[begin:end].copy()

    def view(self, i: int) -> np.ndarray:
        """Return the mapped labels of the utterance at position ``i`` without copying."""
        if self._map is None:
            self._open()
        return self._values[self._offsets[i] : self._offsets[i + 1]]

    def num_frames_of(self, i: int) -> int:
        """Return the frames of the utterance at position ``i``."""
        if self._map is None:
            self._open()
        return int(self._offsets[i + 1] - self._offsets[i])

    def num_samples_of(self, i: int) -> int:
        """Return the samples of the utterance at position ``i``."""
        if self._map is None:
            self._open()
        return int(self._arrays["num_samples"][i])

    @property
    def num_samples(self) -> int:
        """Samples of audio of all utterances."""
        if self._map is None:
            self._open()
        return int(self._arrays["num_samples"].sum())

    def keys(self) -> Iterator[str]:
        """Yield the keys in the order of their hashes."""
        if self._map is None:
            self._open()
        blob, offsets = self._arrays["keys"].tobytes(), self._arrays["key_offsets"].tolist()
        for begin, end in itertools.pairwise(offsets):
            yield blob[begin:end].decode()

    def hashes(self) -> np.ndarray:
        """Return the sorted key hashes, (n, 16) uint8."""
        if self._map is None:
            self._open()
        return self._hashes

    def entries(self) -> Iterator[LabelEntry]:
        """Yield all utterances, their values mapped and not copied."""
        for i, key in enumerate(self.keys()):
            yield LabelEntry(key, self.view(i), self.num_samples_of(i))

    def verify(self) -> None:
        """Read everything; a DataError names this file when the checksum or the order of keys is wrong."""
        digest = hashlib.sha256()
        with _opened(self.path) as stream:
            stream.seek(self._data_start)
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != self.header.checksum:
            raise self._damaged(f"its checksum is {digest.hexdigest()}, its header says {self.header.checksum}")
        previous = b""
        for key, hashed in zip(self.keys(), self.hashes(), strict=True):
            current = hashed.tobytes()
            if current != key_hash(key) or current <= previous:
                raise self._damaged(f"key {key!r} is out of place")
            previous = current


def _opened(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise DataError(f"label shard {path} does not exist; extract it") from None
