"""One shard of a label set: a safetensors file of a few long arrays, memory-mapped for reading (our design).

One tensor an utterance would break the header limit of the format, so all labels of a shard lie in one array
``values``, utterance after utterance in the order of their keys; ``num_frames`` says how many rows each has.
Beside it an utterance costs 16 bytes (half of its key's hash, frames, samples) and what its key does not share with
the key before: 32 bytes in all for LibriSpeech.  The file is written by hand rather than by the safetensors library
because its arrays may be larger than memory and the bytes must be reproducible (so no compressor, whose output
depends on its version).
"""

import hashlib
import itertools
import json
import math
import os
import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, get_origin, get_type_hints

import numpy as np

from icefall_kd.errors import DataError
from icefall_kd.runtime.files import atomic_path

DTYPES = {"uint8": "U8", "uint16": "U16", "int16": "I16", "int32": "I32", "float16": "F16", "float32": "F32"}
_TYPES = {**{code: np.dtype(d).newbyteorder("<") for d, code in DTYPES.items()}, "U32": "<u4", "U64": "<u8"}
_META = "icefall_kd"
_NO_CHECKSUM = "0" * 64
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
        DataError: two utterances share a key, values of another type or width, a key with a line break.
    """
    entries = sorted(entries, key=lambda e: e.key)
    for a, b in itertools.pairwise(entries):
        if a.key == b.key:
            raise DataError(f"{path}: label key {a.key!r} occurs twice; keep one of its cuts")
    for e in entries:
        if e.values.dtype != dtype or e.values.ndim != 2 or e.values.shape[1] != width:
            raise DataError(
                f"{path}: labels of {e.key!r} are {e.values.dtype} {e.values.shape}, the set holds {dtype} (T, {width})"
            )
        if "\n" in e.key:
            raise DataError(f"{path}: label key {e.key!r} has a line break; rename its recording")
    keys = [e.key.encode() for e in entries]
    num_frames = [len(e.values) for e in entries]
    hashes = hash_words(e.key for e in entries)[:, 0]
    if len(np.unique(hashes)) < len(keys):
        raise DataError(f"{path}: two label keys have one hash; rename a recording, or change --num-shards")
    before = {
        "key_hashes": hashes.astype("<u8"),
        "num_frames": np.array(num_frames, "<u4"),
        "num_samples": np.array([e.num_samples for e in entries], "<u4"),
    }
    after = dict(zip(("key_shared", "key_rest"), _front_code(keys), strict=True))
    spec = _layout(DTYPES[dtype], len(keys), sum(num_frames), width, len(after["key_rest"]))
    with atomic_path(path) as tmp:
        with open(tmp, "w+b") as stream:
            stream.write(_header_bytes(spec, header, _NO_CHECKSUM))
            digest = hashlib.sha256()
            for block in _blocks(before, entries, after):
                digest.update(block)
                stream.write(block)
            stream.seek(0)
            stream.write(_header_bytes(spec, header, digest.hexdigest()))
            stream.flush()
            os.fsync(stream.fileno())
        Shard(tmp).verify()


def key_hash(key: str) -> bytes:
    """Return the 16 bytes (BLAKE2b) under which the store finds ``key``."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def hash_words(keys: Iterable[str]) -> np.ndarray:
    """Return the hashes of keys as (n, 2) uint64: a shard finds a key by the first word, the second chooses the shard.

    Two keys of one shard with one first word are refused when it is written.  That an absent key passes for one of a
    million keys that are there has a probability of 5e-14.
    """
    return np.frombuffer(b"".join(map(key_hash, keys)), ">u8").reshape(-1, 2).astype(np.uint64)


def _front_code(keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return, of sorted keys, how many bytes each shares with the one before (n,), and the rests, a line each."""
    shared = [0] * min(len(keys), 1)
    for a, b in itertools.pairwise(keys):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        shared.append(min(same, 255))
    rest = b"".join(key[n:] + b"\n" for key, n in zip(keys, shared, strict=True))
    return np.array(shared, np.uint8), np.frombuffer(rest, np.uint8)


def _blocks(before: dict, entries: Sequence[LabelEntry], after: dict) -> Iterator[memoryview]:
    for array in before.values():
        yield memoryview(array.tobytes())
    for entry in entries:
        yield memoryview(np.ascontiguousarray(entry.values).tobytes())
    for array in after.values():
        yield memoryview(array.tobytes())


def _layout(code: str, num_utterances: int, num_frames: int, width: int, key_bytes: int) -> dict[str, dict]:
    """Return the safetensors description of every array of a shard whose values are of type ``code``, in order."""
    n, tensors, position = num_utterances, {}, 0
    arrays = {
        "key_hashes": ("U64", [n]), "num_frames": ("U32", [n]), "num_samples": ("U32", [n]),
        "values": (code, [num_frames, width]), "key_shared": ("U8", [n]), "key_rest": ("U8", [key_bytes]),
    }  # fmt: skip
    for name, (kind, shape) in arrays.items():
        end = position + math.prod(shape) * np.dtype(_TYPES[kind]).itemsize
        tensors[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, end]}
        position = end
    return tensors


def _header_bytes(tensors: dict, header: ShardHeader, checksum: str) -> bytes:
    """Return the safetensors header; its length does not depend on the checksum."""
    meta = json.dumps({**vars(header), "checksum": checksum}, sort_keys=True)
    raw = json.dumps({"__metadata__": {_META: meta}, **tensors}, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


class Shard:
    """A shard opened for reading, memory-mapped.

    Opening reads the header alone; a DataError names the file when it is truncated or no shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with _opened_file(self.path) as stream:
            tensors, self._data_start = self._read_header(stream)
        self._spec = tensors
        self._arrays: dict[str, np.ndarray] | None = None
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
        if not 2 <= length <= size - 8:
            raise self._damaged(f"its header claims {length} bytes of {size}")
        try:
            tensors = json.loads(stream.read(length))
            self.header = ShardHeader(**json.loads(tensors.pop("__metadata__")[_META]))
            for name, kind in get_type_hints(ShardHeader).items():
                if not isinstance(getattr(self.header, name), get_origin(kind) or kind):
                    raise ValueError(f"its {name} is {str(getattr(self.header, name))[:80]!r}")
            self._check_layout(tensors)
            end = max(t["data_offsets"][1] for t in tensors.values())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise self._damaged(f"its header is unreadable ({type(error).__name__}: {error})") from error
        if size != 8 + length + end:
            raise self._damaged(f"it has {size} bytes, its header says {8 + length + end}")
        return tensors, 8 + length

    def _check_layout(self, tensors: dict) -> None:
        """Raise a ValueError unless every array is there with a consistent type, shape and place."""
        values = tensors["values"]
        if values["dtype"] not in DTYPES.values():
            raise ValueError(f"values of type {values['dtype']}")
        (n,), (key_bytes,) = tensors["num_samples"]["shape"], tensors["key_rest"]["shape"]
        for size in (n, key_bytes, *values["shape"]):
            if type(size) is not int or size < 0:  # 8.0 equals 8, and True 1
                raise ValueError(f"a size of {size!r}")
        for name, wanted in _layout(values["dtype"], n, *values["shape"], key_bytes).items():
            if tensors[name] != wanted:
                raise ValueError(f"array {name!r} is described as {tensors[name]}")

    def _damaged(self, what: str) -> DataError:
        return DataError(f"label shard {self.path} is damaged: {what}; delete it and extract this shard again")

    def _open(self) -> None:
        """Map the file: the labels stay on the disk, 24 bytes an utterance are made in memory to find them."""
        raw, arrays = np.asarray(np.memmap(self.path, dtype=np.uint8, mode="r")), {}
        for name, t in self._spec.items():
            start, end = (self._data_start + x for x in t["data_offsets"])
            arrays[name] = raw[start:end].view(_TYPES[t["dtype"]]).reshape(t["shape"])
        offsets = np.concatenate([[0], np.cumsum(arrays["num_frames"], dtype=np.int64)])
        if offsets[-1] != self.num_frames:
            raise self._damaged(f"its utterances have {offsets[-1]} frames, it holds {self.num_frames}")
        order = np.argsort(arrays["key_hashes"], kind="stable")
        self._sorted_hashes = arrays["key_hashes"][order].astype(np.uint64)
        self._positions, self._values, self._arrays = order, arrays["values"], arrays
        # One read asks for single numbers, which a memoryview gives several times faster than an array.
        self._hash_view, self._order, self._offsets = map(memoryview, (self._sorted_hashes, order, offsets))

    def _opened(self) -> dict[str, np.ndarray]:
        if self._arrays is None:
            self._open()
        return self._arrays

    def find(self, hashed: bytes) -> int:
        """Return the position of a key by its hash, -1 when absent."""
        self._opened()
        wanted = int.from_bytes(hashed[:8], "big")
        i = bisect_left(self._hash_view, wanted)
        return self._order[i] if i < self.num_utterances and self._hash_view[i] == wanted else -1

    def find_all(self, words: np.ndarray) -> np.ndarray:
        """Return the positions (n,) of keys by their first hash words (n,) uint64 (:func:`hash_words`), -1: absent."""
        self._opened()
        if self.num_utterances == 0:
            return np.full(len(words), -1)
        i = np.minimum(self._sorted_hashes.searchsorted(words), self.num_utterances - 1)
        return np.where(self._sorted_hashes[i] == words, self._positions[i], -1)

    def values(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return a copy of frames ``start:stop`` of the utterance at position ``i``, (T_l, Q) or (T_l, C)."""
        labels = self.view(i)
        return labels[start:stop].copy() if start or stop is not None else labels.copy()

    def view(self, i: int) -> np.ndarray:
        """Return the mapped labels of the utterance at position ``i`` without copying."""
        self._opened()
        return self._values[self._offsets[i] : self._offsets[i + 1]]

    def num_frames_of(self, i: int) -> int:
        """Return the frames of the utterance at position ``i``."""
        return int(self._opened()["num_frames"][i])

    def num_samples_of(self, i: int) -> int:
        """Return the samples of the utterance at position ``i``."""
        return int(self._opened()["num_samples"][i])

    @property
    def num_samples(self) -> int:
        """Samples of audio of all utterances."""
        return int(self._opened()["num_samples"].sum(dtype=np.int64))

    def keys(self) -> Iterator[str]:
        """Yield the keys in order."""
        arrays, key = self._opened(), b""
        rests = arrays["key_rest"].tobytes().split(b"\n")[:-1]
        if len(rests) != self.num_utterances:
            raise self._damaged(f"it has {len(rests)} keys of {self.num_utterances} utterances")
        for shared, rest in zip(arrays["key_shared"].tolist(), rests, strict=True):
            key = key[:shared] + rest
            try:
                text = key.decode()
            except UnicodeDecodeError as error:
                raise self._damaged(f"key {key!r} is no text") from error
            yield text

    def entries(self) -> Iterator[LabelEntry]:
        """Yield all utterances, their values mapped and not copied."""
        for i, key in enumerate(self.keys()):
            yield LabelEntry(key, self.view(i), self.num_samples_of(i))

    def verify(self) -> None:
        """Read everything; a DataError names this file when the checksum or the order of keys is wrong."""
        digest = hashlib.sha256()
        with _opened_file(self.path) as stream:
            stream.seek(self._data_start)
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != self.header.checksum:
            raise self._damaged(f"its checksum is {digest.hexdigest()}, its header says {self.header.checksum}")
        previous = ""
        for key, word in zip(self.keys(), self._opened()["key_hashes"].tolist(), strict=True):
            if word != int.from_bytes(key_hash(key)[:8], "big") or key <= previous:
                raise self._damaged(f"key {key!r} is out of place")
            previous = key


def _opened_file(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise DataError(f"label shard {path} does not exist; extract it") from None
