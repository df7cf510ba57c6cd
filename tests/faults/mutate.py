"""Damage to the content of files, drawn from a generator: to bytes, to plain data, and to what wraps plain data."""

import copy
import gzip
import io
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Values that take the place of others in JSON.
VALUES = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 10**30, -(2**63), 0.5, -2.5, 1e300, float("nan"), float("inf")),
    *("", "x", "../../x", "0" * 300, [], [[]], [None], {}, {"a": 1}),
)
_SIZES = (0, 1, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    """Return a range of at least a byte, mostly short, mostly near the beginning or the end, where headers are."""
    size = len(data)
    length = min(size, rng.choice((1, 2, 4, 8, 16, 64, 256, max(size // 4, 1))))
    where = rng.random()
    last = size - length
    if where < 0.4:
        start = min(last, int(rng.expovariate(1 / 200)))
    elif where < 0.6:
        start = max(0, last - int(rng.expovariate(1 / 200)))
    else:
        start = rng.randint(0, last)
    return start, start + length


def _flip(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    content, bits = bytearray(data), []
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        place, bit = _span(data, rng)[0], rng.randrange(8)
        content[place] ^= 1 << bit
        bits.append(f"{place}.{bit}")
    return bytes(content), f"bits {' '.join(bits)} flipped"


def _truncate(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    size = rng.choice((rng.randrange(len(data)), len(data) - 1, len(data) // 2, min(7, len(data) - 1), 0))
    return data[:size], f"cut off at {size}"


def _insert(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    place, more = _span(data, rng)[0], rng.randbytes(rng.choice((1, 8, 100)))
    return data[:place] + more + data[place:], f"{len(more)} bytes inserted at {place}"


def _delete(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    a, b = _span(data, rng)
    return data[:a] + data[b:], f"{a}:{b} deleted"


def _duplicate(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    a, b = _span(data, rng)
    return data[:b] + data[a:], f"{a}:{b} doubled"


def _zeros(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    a, b = _span(data, rng)
    return data[:a] + bytes(b - a) + data[b:], f"{a}:{b} zeroed"


def _size(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    value, width = rng.choice(_SIZES), rng.choice((1, 2, 4, 8))
    place = rng.choice((0, _span(data, rng)[0]))
    raw = struct.pack("<Q", value)[:width]
    return data[:place] + raw + data[place + width :], f"{raw.hex()} written at {place}"


def _overwrite(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    a, b = _span(data, rng)
    return data[:a] + rng.randbytes(b - a) + data[b:], f"{a}:{b} overwritten with noise"


def _noise(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    return rng.randbytes(rng.choice((1, 16, 1000))), "all noise"


_OPERATIONS = (_flip, _flip, _flip, _truncate, _insert, _delete, _duplicate, _zeros, _size, _size, _overwrite, _noise)


def mutate_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return damaged bytes, and what was done to them."""
    told = []
    for _ in range(rng.choice((1, 1, 2))):
        if data:
            data, what = rng.choice(_OPERATIONS)(data, rng)
            told.append(what)
    return data, ", ".join(told)


def _places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    if place:
        yield place
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inside:
        yield from _places(item, (*place, name))


def _value(rng: random.Random) -> Any:
    """Return one of VALUES; a copy, since what took the place of another may be damaged in turn."""
    return copy.deepcopy(rng.choice(VALUES))


def mutate_plain(value: Any, rng: random.Random) -> tuple[Any, str]:
    """Return plain data (perhaps with tensors in it) with a value replaced, removed, renamed or doubled."""
    value, told = copy.deepcopy(value), []
    for _ in range(rng.choice((1, 1, 2))):
        places = list(_places(value))
        if not places:
            return _value(rng), "replaced as a whole"
        place = rng.choice(places)
        inner = value
        for name in place[:-1]:
            inner = inner[name]
        name, what = place[-1], rng.choice(("replace", "replace", "replace", "remove", "rename", "double", "swap"))
        if what == "replace":
            inner[name] = _value(rng) if not isinstance(inner[name], Tensor) else _other_tensor(inner[name], rng)
        elif what == "remove":
            del inner[name]
        elif what == "rename" and isinstance(inner, dict):
            inner[f"{name}x"] = inner.pop(name)
        elif what == "double" and isinstance(inner, list):
            inner.append(copy.deepcopy(inner[name]))
        else:
            other = rng.choice([p for p in places if p[:-1] == place[:-1]])[-1]
            inner[name], inner[other] = inner[other], inner[name]
            what = f"swap with {other}"
        told.append(f"{what} {'.'.join(map(str, place))}")
    return value, ", ".join(told)


def _other_tensor(tensor: Tensor, rng: random.Random) -> Any:
    others = [tensor.flatten(), tensor[None], tensor.to(torch.int32), tensor.new_zeros(0), tensor * float("nan"), None]
    return rng.choice([*others, 3, "x", [], tensor.repeat(2, *[1] * max(tensor.ndim - 1, 0))])


def _plain(value: Any) -> bytes:
    return json.dumps(value).encode()


def mutate_json(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Damage the value that a JSON file holds."""
    value, told = mutate_plain(json.loads(data), rng)
    return _plain(value), told


def mutate_lines(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Damage a line of a gzipped file of JSON lines, or its text, and compress it again."""
    lines = gzip.decompress(data).splitlines(keepends=True)
    number = rng.randrange(len(lines))
    if rng.random() < 0.7:
        lines[number], told = mutate_json(lines[number], rng)
        lines[number] += b"\n"
    else:
        lines[number], told = mutate_bytes(lines[number], rng)
    return gzip.compress(b"".join(lines), 1), f"line {number + 1}: {told}"


def mutate_safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Damage the header of a safetensors file, or the JSON in its metadata; its length is made to fit."""
    length = struct.unpack("<Q", data[:8])[0]
    header, payload = json.loads(data[8 : 8 + length]), data[8 + length :]
    meta = header.get("__metadata__", {})
    nested = [name for name, text in meta.items() if text.startswith("{")]
    if nested and rng.random() < 0.5:
        name = rng.choice(nested)
        value, told = mutate_plain(json.loads(meta[name]), rng)
        meta[name], told = json.dumps(value), f"metadata {name}: {told}"
    else:
        header, told = mutate_plain(header, rng)
    raw = _plain(header)
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + payload, told


def mutate_saved(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Damage what torch saved, and save it again: sound as an archive, wrong in what it holds."""
    value, told = mutate_plain(torch.load(io.BytesIO(data), weights_only=True), rng)
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue(), told


LAYERS: dict[str, Callable[[bytes, random.Random], tuple[bytes, str]]] = {
    "bytes": mutate_bytes,
    "json": mutate_json,
    "lines": mutate_lines,
    "safetensors": mutate_safetensors,
    "saved": mutate_saved,
}
