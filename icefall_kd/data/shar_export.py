"""Writing cuts and their labels as a Shar (data/shar.py), shard by shard (our design).

Which shard a cut belongs to, and its place there, follow from the hash of its label key, so that shards are random
samples of the corpus and a stream needs no large buffer to mix speakers.  A first pass divides the cut sets among
files, one a shard, and joins the keys with the label sets; it keeps neither cuts nor keys in memory.  Then each shard
is written to a temporary folder, read back, compared and moved; its row comes last.  Equal inputs give equal bytes, a
killed export goes on where it was, and the jobs of an array share the shards.
"""

import gzip
import io
import itertools
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from lhotse import CutSet
from lhotse.array import Array
from lhotse.audio import AudioSource
from lhotse.cut import Cut, MonoCut
from lhotse.shar import SharWriter
from lhotse.utils import fastcopy

from icefall_kd.config import SharConfig
from icefall_kd.data.filters import check_cuts, cut_into_pieces
from icefall_kd.data.manifests import iterate_cuts, write_jsonl
from icefall_kd.data.shar import (
    INFO_NAME,
    ROWS_NAME,
    SAMPLES,
    Shar,
    ShardRow,
    SharInfo,
    labels_of,
    load_row,
    row_file,
)
from icefall_kd.errors import DataError
from icefall_kd.labels.info import INFO_NAME as LABELS_NAME
from icefall_kd.labels.join import JoinReport, KeyJoin
from icefall_kd.labels.keys import cut_text, key_of, label_key, stamp_as, two_texts
from icefall_kd.labels.shard import key_hash
from icefall_kd.labels.store import LabelStore, shard_of
from icefall_kd.runtime.files import (
    atomic_folder,
    atomic_path,
    file_lock,
    fingerprint,
    read_json,
    read_lines,
    remove_leftovers,
    sha256_file,
    write_json,
)
from icefall_kd.runtime.log import Progress

logger = logging.getLogger(__name__)

# What the first pass holds before it writes.
_CUTS_AT_ONCE, _BYTES_AT_ONCE = 1 << 14, 1 << 26


@dataclass(frozen=True)
class SharReport:
    """What one export did."""

    path: Path
    written: int
    """Shards that this run wrote."""
    finished: int
    """Shards that are whole."""
    num_shards: int


def export_shar(config: SharConfig) -> SharReport:
    """Write a Shar, or what is left of it to write, or one job's shards of it.

    Raises:
        DataError: the folder holds another Shar, cuts without what is to be written, less labels than --min-coverage,
            labels of other audio, a shard that would be empty, or one that reads back differently.
    """
    path = Path(config.shar_dir)
    stores = _stores(config.label_dir)
    data = ["features", "recording"] if config.store == "both" else [config.store]
    info = SharInfo(
        num_shards=config.num_shards,
        data=data,
        labels={field: store.info.fingerprint for field, store in stores.items()},
        codec=config.feature_codec,
        pieces=config.pieces,
        inputs=fingerprint([sha256_file(file) for file in config.cuts]),
    )
    _create(path, info, stores)
    todo = [k for k in range(config.job, info.num_shards, config.num_jobs) if load_row(path, k, info) is None]
    if todo:
        (path / ROWS_NAME).unlink(missing_ok=True)  # a shard of it was damaged
        _divide(path, info, config, stores)
    progress = Progress(len(todo), "shards", name=f"export to {path}")
    # One after the other those whose labels lie in one shard of the label set, where the numbers of shards divide.
    apart = {field: info.num_shards % store.num_shards == 0 for field, store in stores.items()}
    counts = [store.num_shards for field, store in stores.items() if apart[field]]
    for k in sorted(todo, key=lambda k: ([k % count for count in counts], k)):
        for field in filter(apart.get, stores):
            stores[field].close(k % stores[field].num_shards)
        with file_lock(path / ".parts" / f"{k:06d}.lock"):
            if load_row(path, k, info) is None:  # another job may have been faster
                _write_shard(path, k, info, stores)
        progress.update(1)
    finished = _finish(path, info)
    return SharReport(path, len(todo), finished, info.num_shards)


def _stores(folders: Sequence[Path]) -> dict[str, LabelStore]:
    """Return the label sets by the name of their fields: their kind, numbered where there are several."""
    stores: dict[str, LabelStore] = {}
    for folder in folders:
        store = LabelStore(folder)
        kind = store.info.kind
        names = (f"{kind}_{i}" if i > 1 else kind for i in itertools.count(1))
        stores[next(name for name in names if name not in stores)] = store
    prints = [store.info.fingerprint for store in stores.values()]
    if len(set(prints)) < len(prints):
        raise DataError(f"--label-dir names one label set twice: {', '.join(map(str, folders))}")
    return stores


def _create(path: Path, info: SharInfo, stores: dict[str, LabelStore]) -> None:
    """Make the folder, or refuse one of another Shar."""
    (path / "shards").mkdir(parents=True, exist_ok=True)
    with file_lock(path / ".lock"):
        if (path / INFO_NAME).exists():
            there, wanted = asdict(SharInfo.load(path)), asdict(info)
            if changed := [f"{k} is {there[k]!r} and {wanted[k]!r}" for k in wanted if there[k] != wanted[k]]:
                raise DataError(
                    f"--shar-dir {path} was made with other options: {'; '.join(changed)} (there, and wanted now; "
                    "inputs are the cut sets, labels the fingerprints of label sets); give another --shar-dir, or "
                    "delete this one"
                )
            return
        for field, store in stores.items():
            write_json(path / "labels" / field / LABELS_NAME, asdict(store.info))
        write_json(path / INFO_NAME, asdict(info))


def _divide(path: Path, info: SharInfo, config: SharConfig, stores: dict[str, LabelStore]) -> None:
    """Write ``.parts/cuts/``: the cuts of each shard; and ``.parts/joins.json``; a DataError below --min-coverage."""
    work = path / ".parts"
    work.mkdir(exist_ok=True)
    with file_lock(path / ".divide.lock"):
        if not (work / "joins.json").exists():
            remove_leftovers(work, "cuts")
            with atomic_folder(work / "cuts", "000000.jsonl.gz") as folder:
                joins = _divided(folder, info, config, stores)
            write_json(work / "joins.json", {field: asdict(report) for field, report in joins.items()})
    for field, values in read_json(work / "joins.json").items():
        report = JoinReport(**{**values, "first_missing": tuple(values["first_missing"])})
        logger.info("labels %s: %s", field, report)
        stores[field].require(report, config.min_coverage)


def _divided(
    folder: Path, info: SharInfo, config: SharConfig, stores: dict[str, LabelStore]
) -> dict[str, JoinReport]:
    joins = {field: KeyJoin(store) for field, store in stores.items()}
    features = "precomputed" if "features" in info.data else "on_the_fly"
    counts = [0] * info.num_shards
    blocks: dict[int, bytearray] = defaultdict(bytearray)

    def flush() -> None:
        for k, block in blocks.items():
            with open(folder / f"{k:06d}.jsonl.gz", "ab") as stream:
                stream.write(gzip.compress(bytes(block), compresslevel=1, mtime=0))
        blocks.clear()

    cuts, held = _cuts(config), 0
    while some := list(itertools.islice(cuts, _CUTS_AT_ONCE)):
        check_cuts(some, features, "--cuts")
        if config.store == "both":
            check_cuts(some, "on_the_fly", "--cuts")
        for cut in some:
            if not isinstance(cut, MonoCut):
                raise DataError(f"--cuts: cut {cut.id} is a {type(cut).__name__}; a Shar is written of MonoCuts")
            k = shard_of(key_hash(label_key(cut)), info.num_shards)
            line = json.dumps(cut.to_dict(), ensure_ascii=False).encode() + b"\n"
            blocks[k] += line
            counts[k] += 1
            held += len(line)
        for field, store in stores.items():
            joins[field].add([key_of(cut, store.info.key_kind) for cut in some])
        if held >= _BYTES_AT_ONCE:
            flush()
            held = 0
    flush()
    if empty := counts.count(0):
        raise DataError(
            f"{empty} of {info.num_shards} shards would have none of the {sum(counts)} cuts; take a smaller "
            "--num-shards"
        )
    return {field: joined.report() for field, joined in joins.items()}


def _cuts(config: SharConfig) -> Iterator[Cut]:
    for file in config.cuts:
        if config.pieces is None:
            yield from iterate_cuts(Path(file))
        else:
            for cut in iterate_cuts(Path(file)):
                yield from cut_into_pieces([cut], config.pieces)


def _write_shard(path: Path, shard: int, info: SharInfo, stores: dict[str, LabelStore]) -> None:
    """Write a shard into a temporary folder, read it back, move its files and write its row."""
    keyed = sorted(
        ((label_key(cut), cut) for cut in _part(path, shard)), key=lambda x: (key_hash(x[0]), x[0], x[1].id)
    )
    for (key, cut), (other, after) in itertools.pairwise(keyed):
        if key == other and cut_text(cut) != cut_text(after):
            raise two_texts(key, (cut.id, cut_text(cut)), (after.id, cut_text(after)), "--cuts")
    ready = [_carrying(cut, key, info, stores) for key, cut in keyed]
    number = f"{shard:06d}"
    work = path / ".parts" / "shards" / number
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    codecs = {field: {"features": info.codec, "recording": "flac"}.get(field, "numpy") for field in info.fields}
    with SharWriter(
        work, fields=codecs, shard_size=len(ready), warn_unused_fields=False, shard_offset=shard
    ) as writer:
        for cut in ready:
            writer.write(cut)
    files = {"cuts": work / f"cuts.{number}.jsonl.gz", **{f: work / f"{f}.{number}.tar" for f in info.fields}}
    # Lhotse's gzip holds the time and the name: equal inputs are to give equal bytes.
    lines = [json.loads(line) for line in read_lines(files["cuts"])]
    write_jsonl(files["cuts"], lines)
    _compare(files, ready, [key for key, _ in keyed], info, f"{path}: shard {shard}")
    row = ShardRow(
        shard=shard,
        of=info.fingerprint,
        cuts=len(ready),
        seconds=sum(cut.duration for cut in ready),
        longest=max(cut.duration for cut in ready),
        most_text=max(len(cut_text(cut)) for cut in ready),
        labelled={field: sum(cut.has_custom(field) for cut in ready) for field in info.labels},
        files={
            name: {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256_file(file)}
            for name, file in files.items()
        },
    )
    for file in files.values():
        with atomic_path(path / "shards" / file.name) as target:
            file.rename(target)
    write_json(row_file(path, shard), asdict(row))
    shutil.rmtree(work)


def _part(path: Path, shard: int) -> Iterator[Cut]:
    return iterate_cuts(path / ".parts" / "cuts" / f"{shard:06d}.jsonl.gz")


def _carrying(cut: MonoCut, key: str, info: SharInfo, stores: dict[str, LabelStore]) -> MonoCut:
    """Return a cut with its labels, what else is written, and a stamp that keeps its label key."""
    custom = {name: value for name, value in (cut.custom or {}).items() if name not in (SAMPLES, *info.labels)}
    samples = {}
    for field, store in stores.items():
        wanted = key_of(cut, store.info.key_kind)
        rows = store.get(wanted, missing_ok=True)
        if rows is not None:
            custom[field], samples[field] = _in_memory(rows), store.num_samples(wanted)
    if samples:
        custom[SAMPLES] = samples
    changes = {} if "features" in info.data else {"features": None}
    if "recording" not in info.data:
        # It is still the audio that the key names, but not where it is read from.
        source = AudioSource(type="shar", channels=[0], source="")
        changes["recording"] = fastcopy(
            cut.recording,
            sources=[source],
            transforms=None,
            channel_ids=[0],
            duration=cut.duration,
            num_samples=cut.num_samples,
        )
        changes["channel"] = 0
    return stamp_as(fastcopy(cut, custom=custom, **changes), key, source=cut)


def _in_memory(rows: np.ndarray) -> Array:
    stream = io.BytesIO()
    np.save(stream, rows, allow_pickle=False)
    return Array(storage_type="memory_npy", storage_path="", storage_key=stream.getvalue(), shape=list(rows.shape))


def _compare(files: dict[str, Path], ready: Sequence[Cut], keys: Sequence[str], info: SharInfo, where: str) -> None:
    """Read a shard back: the same cuts with the same keys, labels and frames; a DataError names the first other one."""
    read = CutSet.from_shar(fields={name: [file] for name, file in files.items()})
    for cut, key, found in itertools.zip_longest(ready, keys, read):
        if cut is None or found is None or (cut.id, key) != (found.id, label_key(found)):
            raise DataError(
                f"{where}: {cut and cut.id} ({key}) reads back as {found and found.id} "
                f"({found and label_key(found)}); report it with this cut"
            )
        for field in info.labels:
            a, b = (labels_of(x, field) if x.has_custom(field) else None for x in (cut, found))
            if (a is None) != (b is None) or (a is not None and (a.dtype != b.dtype or not np.array_equal(a, b))):
                raise DataError(f"{where}: labels {field} of {cut.id} read back differently; is the disk sound?")
        if "features" in info.data and found.load_features().shape != (cut.num_frames, cut.num_features):
            raise DataError(
                f"{where}: features of {cut.id} are {found.load_features().shape}, its cut says "
                f"{(cut.num_frames, cut.num_features)}; run the feature stage again with --force"
            )
        if "recording" in info.data and found.load_audio().shape[1] != cut.num_samples:
            raise DataError(f"{where}: audio of {cut.id} has not its {cut.num_samples} samples; prepare it again")


def _finish(path: Path, info: SharInfo) -> int:
    """Write all rows into one file when they are all there; return how many are."""
    with file_lock(path / ".lock"):
        finished = len(list((path / "rows").glob("*.json")))  # jobs are many, and all but the last one leave here
        if finished < info.num_shards or (path / ROWS_NAME).exists():
            return finished
        rows = [row for k in range(info.num_shards) if (row := load_row(path, k, info)) is not None]
        if len(rows) == info.num_shards:
            write_jsonl(path / ROWS_NAME, (asdict(row) for row in rows))
            Shar(path)  # it opens
            shutil.rmtree(path / ".parts", ignore_errors=True)
    return len(rows)
