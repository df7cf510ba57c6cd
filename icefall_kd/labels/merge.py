"""Bring shards of one label set, extracted on several machines, into one folder (our design)."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.info import INFO_NAME, LabelSetInfo
from icefall_kd.labels.shard import Shard
from icefall_kd.labels.store import LabelStore, find_shards
from icefall_kd.runtime.files import remove_leftovers, temporary_name, write_json


def merge_label_sets(sources: Sequence[str | Path], target: str | Path) -> LabelStore:
    """Copy the shards of several folders of the same label set into ``target``, which appears whole or not at all.

    Args:
        sources: folders with ``label_set.json`` and some of the shards each.
        target: folder to make; it must not exist.
    Returns:
        The merged set, verified.
    Raises:
        DataError: sets of different provenance or division (both values are named), two different files for one
            shard, missing or damaged shards.
    """
    sources, target = [Path(s) for s in sources], Path(target)
    if not sources:
        raise ConfigError("merge needs at least one label folder")
    if target.exists():
        raise ConfigError(f"{target} exists already; merge into a new folder, or delete it")
    infos = [LabelSetInfo.load(s) for s in sources]
    for source, info in zip(sources[1:], infos[1:], strict=True):
        if info.fingerprint != infos[0].fingerprint:
            raise DataError(
                f"label sets {sources[0]} and {source} differ: {'; '.join(infos[0].differences(info))}; labels of "
                "different provenance cannot be one set"
            )
    chosen = _choose(sources)
    remove_leftovers(target.parent, target.name)
    temporary = temporary_name(target)
    try:
        temporary.mkdir(parents=True)
        write_json(temporary / INFO_NAME, asdict(infos[0]))
        for file in chosen.values():
            shutil.copyfile(file, temporary / file.name)
            with open(temporary / file.name, "rb") as copied:
                os.fsync(copied.fileno())
        if problems := LabelStore(temporary, partial=True).verify():
            text = "\n".join(problems).replace(str(temporary), "of the merged set")
            raise DataError(f"merging into {target} failed:\n{text}")
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return LabelStore(target)


def _choose(sources: Sequence[Path]) -> dict[tuple[int, int], Path]:
    """Return one file a shard; the same shard in two folders must be the same labels."""
    chosen: dict[tuple[int, int], Path] = {}
    for source in sources:
        for place, file in find_shards(source).items():
            first = chosen.setdefault(place, file)
            divided = next(iter(chosen))
            if place[1] != divided[1]:
                raise DataError(
                    f"{chosen[divided]} is one of {divided[1]} shards and {file} one of {place[1]}; "
                    "extract with one --num-shards"
                )
            sums = [Shard(f).header.checksum for f in (first, file)]
            if sums[0] != sums[1]:
                raise DataError(f"{first} and {file} are the same shard with different labels, checksums {sums}")
    return chosen
