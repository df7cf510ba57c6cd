"""Cut sets on disk: the same cuts always give the same bytes, written atomically."""

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from lhotse.cut import Cut

from icefall_kd.data.manifest_rows import cut_of
from icefall_kd.errors import DataError
from icefall_kd.runtime.files import atomic_write, read_lines

PREFIX, SUFFIX = "cuts_", ".jsonl.gz"


def cuts_file(folder: Path, part: str) -> Path:
    """Return the path of a part's cuts in ``folder``."""
    return folder / f"{PREFIX}{part}{SUFFIX}"


def part_of(path: Path) -> str:
    """Return the part that a path of :func:`cuts_file` names."""
    return path.name.removeprefix(PREFIX).removesuffix(SUFFIX)


def write_cuts(path: Path, cuts: Iterable[Cut]) -> int:
    """Write cuts as jsonl.gz without a time stamp; return their number."""
    return write_jsonl(path, (cut.to_dict() for cut in cuts))


def write_jsonl(path: Path, rows: Iterable[dict]) -> int:
    """Write one JSON object a line, compressed when the name ends in .gz; return the number of lines."""
    count = 0
    with atomic_write(path) as raw:
        compressed = path.name.endswith(".gz")
        stream = gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6) if compressed else raw
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
        if compressed:
            stream.close()
    return count


def iterate_cuts(path: Path) -> Iterator[Cut]:
    """Yield the cuts of a file one after the other; every row is checked first (data/manifest_rows.py).

    Raises:
        DataError: the file is missing, damaged, or empty, or a row would have a command run.
    """
    if not path.is_file():
        raise DataError(f"there is no cut set {path}; run the stage that writes it")
    number = 0
    try:
        for number, line in enumerate(read_lines(path), 1):
            try:
                cut = cut_of(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise DataError(f"line {number}: {error}") from error
            yield cut
    except DataError as error:
        raise DataError(
            f"the cut set {path} is damaged or unsafe ({error}); run the stage that writes it again"
        ) from error
    if number == 0:
        raise DataError(f"{path} holds no cuts; run the stage that writes it again")


def read_cuts(path: Path) -> list[Cut]:
    """Read a cut set into memory; raises as :func:`iterate_cuts`."""
    return list(iterate_cuts(path))
