"""Import of the codebook indexes that icefall published (our design; the layout is that of icefall's recipe).

icefall's ``extract_codebook_index.py`` writes one HDF5 file a job, with one uint8 array (T, Q) an utterance, and a
manifest of bare cuts (id, start, duration, channel) whose custom field ``codebook_indexes`` names the arrays.  Of n
samples it keeps ``codes[: n // 320]``.  HuBERT gives floor((n - 400) / 320) + 1 frames, one fewer where n mod 320 < 80;
the array has the last one where another utterance of the batch was longer, made from audio and padding.

Bare cuts name no recording, so the utterances are found through the user's own cuts: by id, or, where lhotse changed
its naming of cuts, by icefall's rule (:func:`utterance_name`) if that leaves no choice.
"""

import contextlib
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lhotse.array import TemporalArray

from icefall_kd.config import ImportConfig
from icefall_kd.data.manifests import iterate_cuts
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import ICEFALL_INDEXES, SSL_CONV
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.labels.keys import (
    CorpusFingerprint,
    as_speed,
    cut_text,
    label_key,
    parse_key,
    speech_track,
    two_texts,
)
from icefall_kd.labels.shard import Shard, key_hash
from icefall_kd.labels.store import LabelStore, ShardWriter, shard_of
from icefall_kd.runtime.files import atomic_write, file_lock, fingerprint, sha256_file
from icefall_kd.runtime.log import Progress

logger = logging.getLogger(__name__)

RATE = 16_000
FORMULAS = {"floor": ICEFALL_INDEXES, "hubert": SSL_CONV}
REPORT_NAME = "import_report.jsonl"
_SPEED = re.compile(r"_sp(\d+(?:\.\d+)?)$")


@dataclass(frozen=True)
class ImportReport:
    """What an import did."""

    path: Path
    utterances: int
    by_rule: int
    """Those found by icefall's rule, their ids being others."""
    without: int
    """Utterances of the user's cuts without labels."""
    surplus: int
    """Utterances of the archives that none of the user's cuts is."""
    hours: float
    finished_before: int
    """Shards that were there already."""

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.utterances} utterances, {self.hours:.3f} h ({self.by_rule} by the rule for renamed "
            f"cuts), {self.without} without labels, {self.surplus} of the archives not asked for (all of these: "
            f"{self.path / REPORT_NAME}); {self.finished_before} shards were finished"
        )


@dataclass(frozen=True)
class _Published:
    """The indexes of one utterance in an archive."""

    id: str
    seconds: float
    file: Path
    name: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class _Wanted:
    """One utterance of the user's cuts."""

    key: str
    id: str
    num_samples: int
    text: str


def utterance_name(cut_id: str) -> str | None:
    """Return the first three '-' fields of a cut's id with its speed, by which icefall finds renamed LibriSpeech cuts.

    "103-1240-0000-7_sp0.9" gives "103-1240-0000_sp9/10"; an id of fewer fields gives None.
    """
    speed = _SPEED.search(cut_id)
    fields = cut_id[: speed.start() if speed else None].split("-")
    suffix = f"_sp{as_speed(speed[1])}" if speed and as_speed(speed[1]) != 1 else ""
    return "-".join(fields[:3]) + suffix if len(fields) >= 3 else None


def import_labels(config: ImportConfig) -> ImportReport:
    """Make a label set of published indexes; finished shards are kept, and the same line again changes nothing.

    Args:
        config: what to import, and what is known of its teacher.
    Raises:
        ConfigError: h5py is not installed.
        DataError: missing or damaged manifests or archives, arrays of several widths, one id for two arrays, fewer
            utterances with labels than ``min_coverage`` (the report file names each with its reason), a folder with
            a set of other options.
    """
    h5py = _h5py()
    published = _read_indexes(config)
    wanted, corpus = _read_cuts(config.cuts)
    pairs, without, by_rule = _match(wanted, published)
    used = {p.id for p in pairs.values()}
    for key in list(pairs):
        if reason := _misfit(config.frames, wanted[key], pairs[key]):
            del pairs[key]
            without[key] = reason
    report = config.label_dir / REPORT_NAME
    surplus = [{"id": i, "reason": "no cut of --cuts is this utterance"} for i in published if i not in used]

    def settle() -> None:
        """Write the report, and stop when too few utterances have labels."""
        _write_report(report, _rejects(wanted, without), surplus)
        _check_coverage(config, wanted, without, report)

    settle()
    store = LabelStore.create(config.label_dir, _set_info(config, published.values(), corpus))
    finished = 0
    with file_lock(config.label_dir / ".import.lock"), contextlib.ExitStack() as stack:
        archives = _Archives(h5py, stack)
        progress = Progress(len(pairs), "utterances", name="import")
        for k in range(config.num_shards):
            writer = store.writer(k, config.num_shards)
            keys = sorted(key for key in wanted if shard_of(key_hash(key), config.num_shards) == k)
            inputs = fingerprint([(key, pairs[key].id) if key in pairs else key for key in keys])
            if writer.is_finished(inputs):
                finished += 1
                without |= {r["key"]: r["reason"] for r in Shard(writer.path).header.rejects}
                progress.total -= sum(key in pairs for key in keys)
                continue
            for key in keys:
                if key in pairs:
                    reason = _add(writer, wanted[key], archives.read(pairs[key]), pairs[key], config.codebook_size)
                    without |= {key: reason} if reason else {}
                    progress.update()
            # Arrays that turn out to be damaged count as well, before a shard without them is written.
            settle()
            writer.finish(inputs, _rejects(wanted, {key: without[key] for key in keys if key in without}))
    settle()
    store = LabelStore(config.label_dir)
    hours = store.storage_report()["hours"]
    return ImportReport(config.label_dir, len(store), by_rule, len(without), len(surplus), hours, finished)


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise ConfigError("icefall's archives are HDF5 files, and h5py is not installed: pip install h5py") from None
    return h5py


def _read_indexes(config: ImportConfig) -> dict[str, _Published]:
    """Read the published manifests: the arrays of all utterances by the ids of their cuts."""
    found: dict[str, _Published] = {}
    files: dict[tuple[str, Path], Path] = {}
    for manifest in config.indexes:
        for cut in iterate_cuts(manifest):
            array = (getattr(cut, "custom", None) or {}).get("codebook_indexes")
            if not isinstance(array, TemporalArray) or array.array.storage_type != "numpy_hdf5" or array.ndim != 2:
                raise DataError(
                    f"{manifest}: cut {cut.id} has no codebook_indexes (T, Q) in an HDF5 archive, but {array!r}; give "
                    "--indexes the with_codebook_indexes manifests that icefall's extraction wrote"
                )
            if (array.temporal_dim, round(array.frame_shift * RATE), array.start) != (0, 320, 0):
                raise DataError(
                    f"{manifest}: indexes of cut {cut.id} have temporal_dim {array.temporal_dim}, frame_shift "
                    f"{array.frame_shift} s and start {array.start} s; only 0, 0.02 s and 0 are known"
                )
            place = array.array.storage_path, manifest.parent
            if place not in files:
                files[place] = _archive_file(*place, config.h5_dir)
            new = _Published(cut.id, cut.duration, files[place], array.array.storage_key, tuple(array.shape))
            first = found.setdefault(cut.id, new)
            if first != new:
                raise DataError(
                    f"cut {cut.id} has two arrays: {first.name} {first.shape} in {first.file} and {new.name} "
                    f"{new.shape} in {new.file}; name one manifest of them in --indexes"
                )
            width = config.num_codebooks or next(iter(found.values())).shape[1]
            if new.shape[1] != width:
                raise DataError(
                    f"{manifest}: cut {cut.id} has {new.shape[1]} codebooks, "
                    f"{'--num-codebooks is' if config.num_codebooks else 'the cuts before have'} {width}"
                )
    return found


def _archive_file(stored: str, beside: Path, h5_dir: Path | None) -> Path:
    """Return where an archive is: the path in the manifest is that of the machine that made it."""
    name = Path(stored).name
    tried = [h5_dir / name] if h5_dir is not None else [Path(stored), beside / name]
    for path in tried:
        if path.is_file():
            return path.resolve()
    raise DataError(f"there is no archive {' nor '.join(map(str, tried))}; name the folder of {name} with --h5-dir")


def _read_cuts(paths: Sequence[Path]) -> tuple[dict[str, _Wanted], str]:
    """Read the user's cuts once: the utterances by label key, and the fingerprint of the corpus."""
    corpus, wanted = CorpusFingerprint(), {}
    for path in paths:
        for cut in iterate_cuts(Path(path)):
            key, speech = label_key(cut), speech_track(cut)
            corpus.add(key, cut)
            samples = round(speech.num_samples * RATE / speech.sampling_rate)
            first = wanted.setdefault(key, _Wanted(key, speech.id, samples, cut_text(speech)))
            if first.text != cut_text(speech):
                raise two_texts(key, (first.id, first.text), (speech.id, cut_text(speech)), path)
    return wanted, corpus.hexdigest()


def _match(
    wanted: dict[str, _Wanted], published: dict[str, _Published]
) -> tuple[dict[str, _Published], dict[str, str], int]:
    """Return the array of each key, why others have none, and how many were found by the rule alone."""
    ids = Counter(w.id for w in wanted.values())
    theirs, ours = defaultdict(list), defaultdict(list)
    for cut_id in published:
        theirs[utterance_name(cut_id)].append(cut_id)
    for w in wanted.values():
        ours[_our_name(w, theirs)].append(w.id)
    pairs, without, by_rule = {}, {}, 0
    for key, w in wanted.items():
        name = _our_name(w, theirs)
        if w.id in published and ids[w.id] == 1:
            pairs[key] = published[w.id]
        elif ids[w.id] > 1:
            without[key] = f"{ids[w.id]} utterances of --cuts have this id; give cuts of their own ids"
        elif name is None:
            without[key] = "the archives have no such utterance"
        elif len(theirs[name]) > 1 or len(ours[name]) > 1:
            without[key] = f"{name} is no single utterance: archives {theirs[name][:3]}, --cuts {ours[name][:3]}"
        else:
            pairs[key] = published[theirs[name][0]]
            by_rule += 1
    return pairs, without, by_rule


def _our_name(wanted: _Wanted, theirs: dict[str | None, list[str]]) -> str | None:
    """Return the name of a cut in the archives, from its id or from the recording and speed that its key states."""
    key = parse_key(wanted.key)
    by_key = utterance_name(key.recording_id)
    speed = f"_sp{key.speed}" if key.speed != 1 else ""
    names = [utterance_name(wanted.id), by_key and by_key + speed]
    return next((n for n in names if n is not None and n in theirs), None)


def _misfit(frames: str, wanted: _Wanted, found: _Published) -> str | None:
    """Return why an array cannot be the labels of an utterance, None when it can."""
    samples, length = wanted.num_samples, found.shape[0]
    # Versions of lhotse round the length of a speed copy differently, by a sample.
    if abs(round(found.seconds * RATE) - samples) > 1:
        return f"{samples} samples at 16 kHz, the archive's cut {found.id} lasts {found.seconds} s: other audio"
    floor, hubert = (FORMULAS[name].num_frames(samples) for name in ("floor", "hubert"))
    if length not in ((floor,) if frames == "floor" else (floor, hubert)):
        hint = "; it was the longest of its batch, --frames hubert keeps it" if length == hubert else ""
        return f"{length} frames in the archive, {samples} samples at 16 kHz give {floor}{hint}"
    return None if FORMULAS[frames].num_frames(samples) else f"{samples} samples at 16 kHz give no frame"


def _rejects(wanted: dict[str, _Wanted], without: dict[str, str]) -> list[dict]:
    return [{"key": key, "id": wanted[key].id, "reason": without[key]} for key in sorted(without)]


def _write_report(path: Path, rejects: Iterable[dict], surplus: Iterable[dict]) -> None:
    with atomic_write(path, "w") as stream:
        stream.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in (*rejects, *surplus))


def _check_coverage(config: ImportConfig, wanted: dict, without: dict[str, str], report: Path) -> None:
    have = len(wanted) - len(without)
    if have and have >= config.min_coverage * len(wanted):
        return
    rows = [f"{r['id']}: {r['reason']}" for r in _rejects(wanted, without)[:5]]
    raise DataError(
        f"the archives have labels for {have} of {len(wanted)} utterances, --min-coverage is {config.min_coverage}; "
        f"without labels are {'; '.join(rows)} (all: {report}). Name all manifests in --indexes, or lower "
        "--min-coverage"
    )


def _set_info(config: ImportConfig, published: Iterable[_Published], corpus: str) -> LabelSetInfo:
    """Return the provenance: what the options state, the rest is unknown; the files are known by their content."""
    published = list(published)
    files = sorted({*(p.file for p in published), *config.indexes})
    return LabelSetInfo(
        kind="codebook_indexes",
        dtype="uint8",
        width=published[0].shape[1],
        dim=config.dim,
        teacher=config.teacher,
        teacher_sha256=config.teacher_sha256,
        layer=config.layer,
        layer_convention=config.layer_convention,
        normalization=config.normalization,
        frame_formula=FORMULAS[config.frames].to_dict(),
        sampling_rate=RATE,
        num_codebooks=published[0].shape[1],
        codebook_size=config.codebook_size,
        quantizer_sha256=config.quantizer_sha256,
        long_utterances="unknown",
        device="unknown",
        teacher_dtype="unknown",
        corpus_fingerprint=corpus,
        extra={"imported": "icefall codebook indexes", "files": sorted(sha256_file(f) for f in files)},
        origin={"files": [f.name for f in files]},
    )


class _Archives:
    """The HDF5 files, each opened once and closed with ``stack``."""

    def __init__(self, h5py: Any, stack: contextlib.ExitStack) -> None:
        self.h5py, self.stack = h5py, stack
        self.files: dict[Path, Any] = {}

    def read(self, published: _Published) -> np.ndarray | str:
        """Return an utterance's array, or why it cannot be read; a DataError when the whole file cannot."""
        if published.file not in self.files:
            try:
                self.files[published.file] = self.stack.enter_context(self.h5py.File(published.file, "r"))
            except OSError as error:
                raise DataError(f"archive {published.file} is damaged ({error}); download it again") from error
        try:
            return self.files[published.file][published.name][()]
        except (KeyError, OSError) as error:
            return f"{published.file.name} has no readable array {published.name} ({error})"


def _add(
    writer: ShardWriter, wanted: _Wanted, codes: np.ndarray | str, published: _Published, codebook_size: int
) -> str | None:
    """Add an utterance to its shard, or return why not."""
    if isinstance(codes, str):
        return codes
    if codes.shape != published.shape:
        return f"the array is {codes.shape}, its manifest says {published.shape}"
    if not np.issubdtype(codes.dtype, np.integer):
        return f"the array is of type {codes.dtype}; indexes are integers"
    if codes.min() < 0 or codes.max() >= codebook_size:
        return f"indexes run from {codes.min()} to {codes.max()}, --codebook-size is {codebook_size}"
    frames = writer.store.info.formula.num_frames(wanted.num_samples)
    writer.add(wanted.key, codes[:frames].astype(np.uint8), wanted.num_samples)
    return None
