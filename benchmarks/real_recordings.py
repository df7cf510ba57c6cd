#!/usr/bin/env python3
"""Run the recipes on small sets of real recordings, one result file a run; finished runs are skipped.

    benchmarks/real_recordings.py --data-root DIR                       everything that is still missing
    benchmarks/real_recordings.py --data-root DIR --beds barista --systems none,mvq --seeds 1
    benchmarks/real_recordings.py --compare true                        pooled paired bootstrap of what is there

DIR holds barista/{train,dev} (FLAC and *.trans.txt), fsdd/train (single digits at 8 kHz) and data_aishell
(Mandarin words in AISHELL-1's layout).  Every number is one of a small bed, chosen and reported on dev.
"""

import json
import logging
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from icefall_kd.cli import parse_config
from icefall_kd.errors import ConfigError, run_main
from icefall_kd.labels.store import LabelStore
from icefall_kd.results import find_results
from icefall_kd.runtime.env import environment
from icefall_kd.runtime.files import read_json, write_json
from icefall_kd.runtime.log import setup_logging

logger = logging.getLogger("real_recordings")
REPO = Path(__file__).resolve().parent.parent
TEACHER = ["--teacher", "whisper-base", "--num-codebooks", "8", "--phase1-steps", "1500", "--phase2-steps", "1000"]


@dataclass(frozen=True)
class Bed:
    """A set of recordings and how run_mvq.sh is told to use it."""

    recipe: str
    options: list[str]
    runs: list[tuple[str, int]]
    """(system, seed) of each run."""


def both(seeds: list[int]) -> list[tuple[str, int]]:
    """Return the runs of the baseline and of MVQ-KD for each seed."""
    return [(system, seed) for seed in seeds for system in ("none", "mvq")]


BEDS = {
    "barista": Bed(
        "librispeech", ["--corpus", "trans", "--token-kind", "char"], [*both([1, 2, 3]), ("l2", 1)]
    ),
    "digits": Bed("librispeech", ["--corpus", "trans", "--token-kind", "char"], both([1])),
    "mandarin_words": Bed(
        "aishell",
        [
            *("--corpus", "aishell", "--parts", "train,dev", "--partial", "true", "--token-kind", "pinyin"),
            *("--speed-perturb", "false", "--train-parts", "train", "--valid-parts", "dev", "--test-parts", "dev"),
        ],
        both([1]),
    ),
}


@dataclass(frozen=True, kw_only=True)
class RealConfig:
    """Run the recipes on small sets of real recordings."""

    data_root: Path | None = None
    """Folder of the recordings."""
    exp_root: Path = Path("exp/real")
    """Folder of prepared data and experiments."""
    beds: list[str] = field(default_factory=lambda: list(BEDS))
    """Which beds."""
    systems: list[str] = field(default_factory=lambda: ["none", "mvq", "l2"])
    """Which systems of them."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Which seeds of them."""
    results: Path = REPO / "benchmarks/results/real"
    """Folder of the result files."""
    compare: bool = False
    """Only compare what is there."""
    commit: bool = False
    """Commit each result file to git as it comes."""


def source_dir(bed: str, config: RealConfig) -> Path:
    """Return the corpus folder of a bed; digit strings are made first."""
    if config.data_root is None:
        raise ConfigError("--data-root is missing: the folder that holds barista, fsdd and data_aishell")
    if bed == "digits":
        out = (config.exp_root / "digits-corpus").resolve()
        command = ["local/make_digits.py", "--source", config.data_root / "fsdd", "--out-dir", out]
        _run([sys.executable, *command, "--num-train", "900", "--num-dev", "2000"])
        return out
    return (config.data_root / ("barista" if bed == "barista" else "")).resolve()


def _run(command: list) -> None:
    words = [str(word) for word in command]
    logger.info("%s", " ".join(words))
    subprocess.run(words, cwd=REPO, check=True)


def result_file(config: RealConfig, bed: str, system: str, seed: int) -> Path:
    """Return where the result of a run lies."""
    return config.results / f"{bed}_{system}_seed{seed}.json"


def run_one(config: RealConfig, bed: str, system: str, seed: int) -> Path:
    """Run prepare, labels, training and decoding of one system and seed; return its exp_dir."""
    exp = (config.exp_root / bed).resolve()
    options = [*BEDS[bed].options, "--config", REPO / f"benchmarks/conf/{bed}.yaml", *TEACHER]
    options += ["--data-dir", exp / "data", "--exp-dir", exp, "--corpus-dir", source_dir(bed, config)]
    _run(["bash", f"egs/{BEDS[bed].recipe}/run_mvq.sh", *options, "--systems", system, "--seeds", str(seed)])
    return exp / f"{system}-seed{seed}"


def collect(exp_dir: Path, bed: str, system: str, seed: int) -> dict:
    """Return everything that the result file of a run holds."""
    run = read_json(exp_dir / "config.json")
    decodings = {}
    for result in find_results(exp_dir):
        decodings.setdefault(result["part"], {})[result["decoding_method"]] = result
    lines = (exp_dir / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    train = [r for r in map(json.loads, lines) if r["kind"] == "train"]
    kd = {name: value for name, value in train[-1].items() if name.startswith("kd")}
    labels = None
    for path in run["config"]["label_dir"]:
        store = LabelStore(path)
        labels = {"fingerprint": store.info.fingerprint, **store.storage_report()}
    keep = ("finished", "epochs", "steps", "seconds", "audio_hours", "audio_hours_per_hour", "peak_memory_gib")
    summary = read_json(exp_dir / "train_summary.json")
    return {
        "bed": bed,
        "system": system,
        "seed": seed,
        "training": {name: summary[name] for name in (*keep, "parameters", "device")},
        "last_step": kd,
        "labels": labels,
        "decodings": decodings,
        "environment": environment(),
    }


def without_machine_paths(result: dict, config: RealConfig) -> dict:
    """Return ``result`` with this machine's folders replaced by their roles: the file is committed."""
    text = json.dumps(result)
    roots = {config.exp_root: "EXP_ROOT", config.data_root: "DATA_ROOT", REPO: "REPO"}
    for folder, role in roots.items():
        if folder is not None:
            text = text.replace(str(Path(folder).resolve()), role)
    return json.loads(text)


def compare(config: RealConfig) -> None:
    """Compare mvq (and l2) with none on each bed, pooled over the seeds that both have."""
    for bed in config.beds:
        for system in ("mvq", "l2"):
            pairs = [
                (result_file(config, bed, "none", seed), result_file(config, bed, system, seed))
                for seed in (1, 2, 3)
                if result_file(config, bed, "none", seed).exists() and result_file(config, bed, system, seed).exists()
            ]
            if not pairs:
                continue
            for method in ("greedy_search", "modified_beam_search"):
                _compare_pairs(config, bed, system, method, pairs)


def _compare_pairs(config: RealConfig, bed: str, system: str, method: str, pairs: list[tuple[Path, Path]]) -> None:
    """Write the paired bootstrap of one search, from the utterance counts that the result files hold."""
    from icefall_kd.results import compare as paired

    loaded = [[read_json(path)["decodings"]["dev"][method] for path in pair] for pair in pairs]
    a, b = [x[0] for x in loaded], [x[1] for x in loaded]
    outcome = paired(a, b, [str(p.name) for pair in pairs for p in pair], 10000, 0)
    print(f"{bed}, {method}, {len(pairs)} seeds")
    print(f"  none {outcome.a}, {system} {outcome.b}, difference {outcome.difference}")
    values = {"a": str(outcome.a), "b": str(outcome.b), "difference": str(outcome.difference)}
    values["probability_of_improvement"] = outcome.probability_of_improvement
    write_json(config.results / f"{bed}_{system}_vs_none_{method}.json", {"seeds": len(pairs), **values})


def main() -> None:
    """Run what is missing, then compare."""
    setup_logging()
    config = parse_config(RealConfig, description=__doc__)
    for bed in config.beds if not config.compare else ():
        for system, seed in BEDS[bed].runs:
            out = result_file(config, bed, system, seed)
            if out.exists() or system not in config.systems or seed not in config.seeds:
                continue
            exp_dir = run_one(config, bed, system, seed)
            write_json(out, without_machine_paths(collect(exp_dir, bed, system, seed), config))
            if config.commit:
                _run(["git", "add", out])
                _run(["git", "commit", "-q", "-m", f"Result: {bed}, {system}, seed {seed}", "--", out])
    compare(config)


if __name__ == "__main__":
    run_main(main)
