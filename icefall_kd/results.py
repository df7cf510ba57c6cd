"""Tables of results, made from what exp_dirs hold: nothing in them is typed by hand.

An exp_dir holds config.json and train_summary.json of the training, and under each decoding method the
results-<part>-<suffix>.json of decode.py.  Trainings that differ in their seed alone become one row.
No torch here: a table is printed again in a second.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from icefall_kd.bootstrap import Interval, PairedResult, confidence_interval, paired_bootstrap
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.info import INFO_NAME, RECOGNISER_ROWS, TEXT_KIND, LabelSetInfo
from icefall_kd.labels.shard import Shard
from icefall_kd.results_names import distils, hkd_losses, system_name
from icefall_kd.runtime.files import read_json, read_record, write_json

# Options in which repetitions of one experiment may differ.
_NOT_THE_EXPERIMENT = ("seed", "exp_dir", "device", "num_threads", "num_workers", "log_interval", "oom_scan")
# Paths of what a repetition takes from the teacher of its own seed.
_OF_THE_SEED = ("init_from", "label_dir", "teacher")
_STORAGE_FILE = "label_storage.json"


@dataclass(frozen=True)
class LabelStorage:
    """What a label set takes on the disk."""

    kind: str
    """LabelSetInfo.kind."""
    width: int
    """Values a row."""
    dim: int
    """LabelSetInfo.plain_floats: channels of the teacher's embeddings, classes of its posteriors; 0: no such form."""
    frames: int
    """Rows: frames, tokens, or numbers of lists."""
    hours: float
    """Hours of audio, speed copies counted."""
    file_bytes: int
    """Bytes of all shards, their indexes included."""
    teacher: str = ""
    """Of text_states: what the user called the language model."""
    random: bool = False
    """Whether its weights are random."""

    @property
    def bytes_per_hour(self) -> float:
        """Return bytes on disk an hour of audio."""
        return self.file_bytes / self.hours

    @property
    def ratio(self) -> float:
        """Return bytes on disk over the bytes of the same rows in plain float32."""
        return self.file_bytes / (4.0 * self.frames * self.dim)


@dataclass(frozen=True)
class Run:
    """One training with its decodings."""

    exp_dir: Path
    config: dict
    """Resolved options of the training, flat."""
    seed: int
    command: list[str]
    commit: str
    summary: dict
    """train_summary.json."""
    labels: list[LabelStorage]
    results: list[dict]
    """The results-*.json files."""
    start: dict = field(default_factory=dict)
    """Options of the training that --init-from names, flat; empty: there is none, or it is no more."""


@dataclass
class Row:
    """One line of a table: a system under one decoding, pooled over seeds."""

    system: str
    decoding: str
    """Suffix of the result files: checkpoint, averaging and search."""
    runs: list[Run]
    """Those of the trainings that have this decoding."""
    results: dict[str, list[dict]] = field(default_factory=dict)
    """Results of each part, one a run that has it."""

    def rate(self, part: str) -> Interval | None:
        """Return the error rate of a part over all seeds with its interval; None: not decoded or no reference."""
        found = self.results.get(part)
        if not found:
            return None
        if len(found) == 1 and found[0]["interval"]:
            return Interval(found[0]["error_rate"], *found[0]["interval"])
        _, errors, ref_lens = stack_utterances(found, [part] * len(found))
        samples = found[0]["bootstrap"]["samples"] or 1000
        return confidence_interval(errors.sum(axis=0), len(found) * ref_lens, samples)

    @property
    def search(self) -> str:
        """Return the name of the search, with the chunk where there is one; "-" before any decoding."""
        return next((search_name(r) for results in self.results.values() for r in results), "-")

    @property
    def how(self) -> tuple[str, str, str]:
        """Return search, averaging and options of the search: what two systems that are compared must share."""
        method = next((r["decoding_method"] for results in self.results.values() for r in results), "-")
        parameters, _, options = self.decoding.rpartition(method)
        averaged = re.search(r"avg-\d+", parameters)
        return self.search, averaged[0] if averaged else "", options

    @property
    def parameters(self) -> int | None:
        """Return the parameters of the decoded model, or of the trained one before any decoding."""
        decoded = [r["parameters"] for results in self.results.values() for r in results if "parameters" in r]
        return decoded[0] if decoded else self.runs[0].summary.get("parameters")

    @property
    def rtf(self) -> float | None:
        """Return the smallest real-time factor of its decodings: what else a machine did only adds to it."""
        return min((r["rtf"] for results in self.results.values() for r in results if r.get("rtf")), default=None)

    def masked_share(self, part: str) -> float | None:
        """Return the share of a part's tokens that a mask-predicting search masked, mean over seeds."""
        shares = [r["masked_share"] for r in self.results.get(part, []) if r.get("masked_share") is not None]
        return sum(shares) / len(shares) if shares else None

    @property
    def seconds(self) -> float | None:
        """Return the mean seconds of a training."""
        seconds = [run.summary["seconds"] for run in self.runs if run.summary.get("seconds") is not None]
        return sum(seconds) / len(seconds) if seconds else None

    def text_coverage(self) -> str:
        """Return the share of training utterances whose text met a language model's states, for people."""
        found = self.runs[0].summary.get("text_coverage") if hkd_losses(self.runs[0].config) else None
        return f"{100 * found['aligned'] / found['utterances']:.1f} %" if found else "-"

    def label_texts(self) -> tuple[str, str, str]:
        """Return label kind, bytes an hour and the ratio to float32 embeddings, for people."""
        config, labels = self.runs[0].config, self.runs[0].labels
        if not distils(config):
            return "none", "0", "0"
        if config.get("teacher_labels") == "online":
            return "online", "0", "0"
        if not labels:
            return "not found", "?", "?"
        kinds = " + ".join(_kind_text(s) for s in labels)
        total = sum(s.bytes_per_hour for s in labels)
        # A ratio of the whole: where a list has no plain form, there is none.
        floats = sum(4.0 * s.frames * s.dim / s.hours for s in labels) if all(s.dim for s in labels) else 0
        return kinds, f"{total:,.0f}", f"{100 * total / floats:.3g} %" if floats else "?"


def _kind_text(storage: LabelStorage) -> str:
    if storage.kind == TEXT_KIND:
        return f"{storage.dim} channels a piece"
    if storage.kind in RECOGNISER_ROWS:
        return storage.kind.replace("_", " ").replace("nbest", "n-best")
    if storage.kind == "clusters":
        return "clusters"
    return f"{storage.width} {'codebooks' if storage.kind == 'codebook_indexes' else storage.kind}"


def read_run(exp_dir: Path, decoding_method: str | None = None, suffix: str | None = None) -> Run:
    """Read an exp_dir.

    Args:
        exp_dir: folder of a training.
        decoding_method: only results of this search.
        suffix: only results with this suffix.
    Raises:
        DataError: there is no config.json, or a file in the folder is damaged.
    """
    exp_dir = Path(exp_dir)
    saved = read_json(exp_dir / "config.json")
    summary_file = exp_dir / "train_summary.json"
    git = saved.get("environment", {}).get("git") or {}
    return Run(
        exp_dir=exp_dir,
        config=saved["config"],
        seed=saved["seed"],
        command=saved["command"],
        commit=git.get("commit", "unknown")[:10] + (" (changed)" if git.get("dirty") else ""),
        summary=read_json(summary_file) if summary_file.exists() else {},
        labels=_labels_of(exp_dir, saved["config"]),
        results=find_results(exp_dir, decoding_method=decoding_method, suffix=suffix),
        start=_start_of(exp_dir, saved["config"]),
    )


def search_name(result: dict) -> str:
    """Return the name of a result's search, with the chunk where there is one."""
    chunk = result.get("chunk_size", -1)
    return result["decoding_method"] + (f", chunks of {40 * chunk} ms" if chunk > 0 else "")


def find_results(
    path: Path, part: str | None = None, decoding_method: str | None = None, suffix: str | None = None
) -> list[dict]:
    """Return the results of an exp_dir (or of one results-*.json) that meet all given conditions."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*/results-*.json"))
    wanted = {"part": part, "decoding_method": decoding_method, "suffix": suffix}
    found = [read_json(file) for file in files]
    return [r for r in found if all(value in (None, r.get(name)) for name, value in wanted.items())]


def part_name(part: str) -> str:
    """Return the name under which a part's results are recorded, be it given as a name or a path."""
    return Path(part).name.removesuffix(".gz").removesuffix(".jsonl").removeprefix("cuts_")


def parts_by_name(parts: Sequence[str]) -> dict[str, str]:
    """Return the values of --test-parts by the names under which their results are recorded.

    Raises:
        ConfigError: two parts have one name, so that the results of one would replace those of the other.
    """
    found: dict[str, str] = {}
    for part in parts:
        if (other := found.setdefault(part_name(part), part)) != part:
            raise ConfigError(
                f"--test-parts {other} and {part} would both be recorded as {part_name(part)}; rename one of them, or "
                "decode them into exp_dirs of their own"
            )
    return found


def measure_labels(label_dir: Path) -> LabelStorage:
    """Return what a label set takes on disk, from the headers of its shards.

    Raises:
        DataError: no label set, or no shards.
    """
    info = LabelSetInfo.load(Path(label_dir))
    shards = sorted(Path(label_dir).glob("shard-*.safetensors"))
    if not shards:
        raise DataError(f"label set {label_dir} has no shards yet; run the extraction")
    opened = [Shard(path) for path in shards]
    return LabelStorage(
        kind=info.kind,
        width=info.width,
        dim=info.plain_floats,
        frames=sum(shard.num_frames for shard in opened),
        hours=sum(shard.num_samples for shard in opened) / info.sampling_rate / 3600.0,
        file_bytes=sum(path.stat().st_size for path in shards),
        teacher=Path(info.teacher).name if info.kind == TEXT_KIND else "",
        random=info.kind == TEXT_KIND and str(info.origin.get("source", "")).startswith("random weights"),
    )


def find_folder(exp_dir: Path, folder: str, holds: str) -> Path | None:
    """Return where a folder lies that an option of a training names, None where it is no more.

    Args:
        exp_dir: of the training.
        folder: relative to the folder where train.py was called, an ancestor of the exp_dir, or absolute.
        holds: pattern of a file in it.
    """
    places = (place / folder for place in (Path(), *exp_dir.resolve().parents))
    return next((place for place in places if place.is_dir() and any(place.glob(holds))), None)


def _start_of(exp_dir: Path, config: dict) -> dict:
    start = config.get("init_from")
    folder = find_folder(exp_dir, start, "config.json") if start else None
    return read_record(folder / "config.json", config=dict)["config"] if folder else {}


def _labels_of(exp_dir: Path, config: dict) -> list[LabelStorage]:
    """Return the storage of the run's label sets, kept in the exp_dir so that it outlives the sets."""
    if not distils(config) or config.get("teacher_labels") == "online":
        return []
    found = [find_folder(exp_dir, folder, INFO_NAME) for folder in config.get("label_dir", [])]
    kept = exp_dir / _STORAGE_FILE
    before = read_json(kept) if kept.exists() else []
    if not found or None in found:
        return [LabelStorage(**entry) for entry in before]
    labels = [measure_labels(d) for d in found]
    if (now := [asdict(s) for s in labels]) != before:
        write_json(kept, now)
    return labels


def stack_utterances(results: Sequence[dict], names: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Bring decodings of one part together, utterance by utterance.

    Args:
        results: contents of results-*.json.
        names: what to call each in messages.
    Returns:
        Ids, errors (decodings, utterances) and reference lengths (utterances,).
    Raises:
        DataError: unit, ids or references differ; names the first five utterances.
    """
    first, first_name = results[0]["utterances"], names[0]
    for result, name in zip(results[1:], names[1:], strict=True):
        other = result["utterances"]
        if result["unit"] != results[0]["unit"]:
            raise DataError(
                f"{first_name} counts in {results[0]['unit']}s, {name} in {result['unit']}s; score one again"
            )
        only = sorted(set(first["ids"]) ^ set(other["ids"]))
        if only:
            raise DataError(f"{first_name} and {name} differ in {len(only)} utterances, the first are {only[:5]}")
        pairs = zip(first["ids"], first["ref_hash"], first["ref_len"], other["ref_hash"], other["ref_len"], strict=True)
        changed = [i for i, *values in pairs if values[:2] != values[2:]]
        if changed:
            raise DataError(
                f"{first_name} and {name} have other references for {len(changed)} utterances, "
                f"the first are {changed[:5]}"
            )
    errors = [np.array([r["utterances"][kind] for kind in ("ins", "del", "sub")]).sum(axis=0) for r in results]
    return first["ids"], np.stack(errors), np.array(first["ref_len"])


def compare(
    a: Sequence[dict], b: Sequence[dict], names: Sequence[str], num_samples: int = 10000, seed: int = 0
) -> PairedResult:
    """Compare two systems on one part by the paired bootstrap, pooled over their seeds.

    Args:
        a: results of the first system, one a seed.
        b: results of the second system.
        names: what to call the results of ``a`` and then of ``b`` in messages.
        num_samples: bootstrap draws.
        seed: of the draws.
    """
    _, errors, ref_lens = stack_utterances([*a, *b], names)
    return paired_bootstrap(errors[: len(a)], errors[len(a) :], ref_lens, num_samples, seed)


def build_rows(runs: Sequence[Run]) -> list[Row]:
    """Group runs that differ in seed alone, and their results by decoding, in the order of ``runs``."""
    groups: dict[str, list[Run]] = {}
    seeds_of: dict[str, set[int]] = {}
    for run in runs:
        seeds_of.setdefault(_experiment(run), set()).add(run.seed)
    for run in runs:
        shared = len(seeds_of[_experiment(run)]) > 1  # one teacher for several seeds
        groups.setdefault(_experiment(run) if shared else _experiment(run, "seedN"), []).append(run)
    by_group = []
    for group in groups.values():
        seeds = [run.seed for run in group]
        if len(set(seeds)) < len(seeds):
            folders = ", ".join(str(run.exp_dir) for run in group)
            raise ConfigError(f"{folders} are the same experiment with seeds {seeds}: give each seed once")
        by_group.append(_rows_of(group))
    _name_sizes([rows for group, rows in zip(groups.values(), by_group, strict=True) if _is_nar(group[0])])
    names = [rows[0].system for rows in by_group]
    for group, rows, name in zip(groups.values(), by_group, names, strict=True):
        if names.count(name) > 1:
            for row in rows:
                row.system += f" ({group[0].exp_dir.name})"
    return [row for rows in by_group for row in rows]


def _experiment(run: Run, seed: str | None = None) -> str:
    """Return the options that make an experiment; with ``seed``, that is what paths of the run's seed say instead."""
    same = {k: v for k, v in run.config.items() if k not in _NOT_THE_EXPERIMENT}
    for option in _OF_THE_SEED if seed else ():
        if option in same:
            same[option] = json.dumps(same[option]).replace(f"seed{run.seed}", seed)
    return json.dumps(same, sort_keys=True)


def _is_nar(run: Run) -> bool:
    return run.config.get("system") == "nar"


def _name_sizes(by_group: list[list[Row]]) -> None:
    """Call those small that have less than half the parameters of the largest."""
    largest = max((rows[0].parameters or 0 for rows in by_group), default=0)
    for rows in by_group:
        if (rows[0].parameters or 0) < largest / 2:
            for row in rows:
                row.system = f"small {row.system}"


def _rows_of(group: list[Run]) -> list[Row]:
    name = system_name(group[0].config, group[0].labels, group[0].start)
    by_decoding: dict[str, Row] = {}
    for run in group:
        for suffix in dict.fromkeys(result["suffix"] for result in run.results):
            by_decoding.setdefault(suffix, Row(name, suffix, [])).runs.append(run)
        for result in run.results:
            by_decoding[result["suffix"]].results.setdefault(result["part"], []).append(result)
    rest = [run for run in group if not run.results]
    return [*by_decoding.values(), *([Row(name, "not decoded", rest)] if rest else [])]


def part_order(rows: Sequence[Row]) -> list[str]:
    """Return all parts of the rows, development sets first."""
    parts = {part for row in rows for part in row.results}
    return sorted(parts, key=lambda p: (not p.startswith("dev"), p))
