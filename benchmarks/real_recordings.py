#!/usr/bin/env python3
"""Run the recipes on small sets of real recordings, one result file a run; finished runs are skipped.

    benchmarks/real_recordings.py --data-root DIR                       everything that is still missing
    benchmarks/real_recordings.py --data-root DIR --beds barista --systems none,mvq --seeds 1
    benchmarks/real_recordings.py --compare true                        pooled paired bootstrap of what is there

DIR holds barista/{train,dev} (FLAC and *.trans.txt), fsdd/train (single digits at 8 kHz), data_aishell (Mandarin
words in AISHELL-1's layout) and LibriSpeech/{train-clean-100,test-other} (a slice; its training transcripts are a
recogniser's, so that bed shows labels and distillation alone).  Every number is one of a small bed, chosen and
reported on dev.  The table of all result files goes into RESULTS.md.
"""

import json
import logging
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from icefall_kd.bootstrap import confidence_interval
from icefall_kd.cli import parse_config
from icefall_kd.errors import ConfigError, KdError, run_main
from icefall_kd.labels.store import LabelStore
from icefall_kd.results import compare as paired_bootstrap_of
from icefall_kd.results import find_results, search_name, stack_utterances
from icefall_kd.results_table import markdown_table, replace_block
from icefall_kd.runtime.env import environment
from icefall_kd.runtime.files import read_json, write_json, write_text
from icefall_kd.runtime.log import setup_logging
from icefall_kd.scoring import RATE_NAMES

logger = logging.getLogger("real_recordings")
REPO = Path(__file__).resolve().parent.parent
SEARCHES = ("greedy_search", "modified_beam_search")
TEACHER = ["--teacher", "whisper-base", "--num-codebooks", "8", "--quantizer-utts", "250"]
TEACHER += ["--phase1-steps", "1500", "--phase2-steps", "1000"]
# Where a run shall be short: half the steps, half the utterances.
SHORT_QUANTIZER = ["--quantizer-utts", "120", "--phase1-steps", "800", "--phase2-steps", "500"]


@dataclass(frozen=True)
class Bed:
    """A set of recordings and how run_mvq.sh is told to use it."""

    recipe: str
    options: list[str]
    runs: list[tuple[str, int]]
    """(system, seed) of each run."""
    part: str = "dev"
    """Part that is decoded."""
    teacher_options: list[str] = field(default_factory=list)
    """Options of teacher and quantizer that differ from TEACHER."""
    error_rates: bool = True
    """Whether the bed's error rates say anything."""
    shares: str | None = None
    """Bed whose data, labels and conf it uses."""
    chunks: tuple[int, ...] = ()
    """Of streaming students: chunk sizes that are decoded, in frames of 40 ms."""

    @property
    def searches(self) -> list[str]:
        """Return the names of its decodings (results.search_name)."""
        return [f"{s}{chunk}" for chunk in [f", chunks of {40 * c} ms" for c in self.chunks] or [""] for s in SEARCHES]


def both(seeds: list[int]) -> list[tuple[str, int]]:
    """Return the runs of the baseline and of MVQ-KD for each seed."""
    return [(system, seed) for seed in seeds for system in ("none", "mvq")]


BEDS = {
    "barista": Bed(
        "librispeech", ["--corpus", "trans", "--token-kind", "char"], [*both([1, 2, 3]), ("l2", 1)]
    ),
    "barista_streaming": Bed(
        "librispeech",
        ["--corpus", "trans", "--token-kind", "char", "--streaming", "true"],
        both([1, 2, 3]),
        shares="barista",
        chunks=(8, 16),
    ),
    "digits": Bed(
        "librispeech",
        ["--corpus", "trans", "--token-kind", "char"],
        both([1]),
        teacher_options=SHORT_QUANTIZER,
    ),
    "mandarin_words": Bed(
        "aishell",
        [
            *("--corpus", "aishell", "--parts", "train,dev", "--partial", "true", "--token-kind", "pinyin"),
            *("--speed-perturb", "false", "--train-parts", "train", "--valid-parts", "dev", "--test-parts", "dev"),
        ],
        both([1]),
        teacher_options=[*SHORT_QUANTIZER, "--quantizer-utts", "250"],  # words are short
    ),
    "librispeech_slice": Bed(
        "librispeech",
        [
            *("--corpus", "librispeech", "--parts", "train-clean-100,test-other", "--partial", "true"),
            *("--token-kind", "char", "--speed-perturb", "false", "--train-parts", "train-clean-100"),
            *("--valid-parts", "test-other", "--test-parts", "test-other"),
        ],
        [("mvq", 1)],
        part="test-other",
        teacher_options=[*SHORT_QUANTIZER, "--quantizer-utts", "80"],
        error_rates=False,
    ),
}


SOURCES = {"barista": "barista", "mandarin_words": "", "librispeech_slice": "LibriSpeech"}


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
    report: Path | None = REPO / "RESULTS.md"
    """Markdown file whose block of results is renewed; None: the table is only printed."""
    compare: bool = False
    """Only compare what is there."""
    nj: int = 2
    """Processes and threads of preparation, teacher, quantizer and decoding; the training's are in its conf."""
    commit: bool = False
    """Commit each result file to git as it comes."""


class RunFailed(KdError):
    """A command of a run failed; its own message stands above."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def source_dir(bed: str, config: RealConfig) -> Path:
    """Return the corpus folder of a bed; digit strings are made first."""
    if config.data_root is None:
        raise ConfigError("--data-root is missing: the folder that holds the recordings")
    if bed == "digits":
        out = (config.exp_root / "digits-corpus").resolve()
        command = ["local/make_digits.py", "--source", config.data_root / "fsdd", "--out-dir", out]
        run_command([sys.executable, *command, "--num-train", "400", "--num-dev", "2000"])
        return out
    return (config.data_root / SOURCES[bed]).resolve()


def run_command(command: list) -> None:
    words = [str(word) for word in command]
    logger.info("%s", " ".join(words))
    code = subprocess.run(words, cwd=REPO).returncode
    if code:
        raise RunFailed(f"exit code {code} from {' '.join(words)}", code)


def result_file(config: RealConfig, bed: str, system: str, seed: int) -> Path:
    """Return where the result of a run lies."""
    return config.results / f"{bed}_{system}_seed{seed}.json"


def run_one(config: RealConfig, bed: str, system: str, seed: int) -> Path:
    """Run prepare, labels, training and decoding of one system and seed; return its exp_dir."""
    home = BEDS[bed].shares or bed
    exp = (config.exp_root / home).resolve()
    options = [*BEDS[bed].options, "--config", REPO / f"benchmarks/conf/{home}.yaml", *TEACHER]
    options += BEDS[bed].teacher_options
    if BEDS[bed].chunks:
        options += ["--decode-chunks", " ".join(map(str, BEDS[bed].chunks))]
    options += ["--data-dir", exp / "data", "--exp-dir", exp, "--corpus-dir", source_dir(home, config)]
    options += ["--systems", system, "--seeds", seed, "--nj", config.nj]
    run_command(["bash", f"egs/{BEDS[bed].recipe}/run_mvq.sh", *options])
    return exp / f"{system}{'-streaming' if BEDS[bed].chunks else ''}-seed{seed}"


def collect(exp_dir: Path, bed: str, system: str, seed: int) -> dict:
    """Return everything that the result file of a run holds."""
    run = read_json(exp_dir / "config.json")
    decodings = {}
    for result in find_results(exp_dir):
        decodings.setdefault(result["part"], {})[search_name(result)] = result
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


def write_result(path: Path, result: dict) -> None:
    """Write a result file; every list of numbers or names stands on one line, since the counts are by utterance."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    write_text(path, re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\n *", " ", found[0]), text) + "\n")


def versus_file(config: RealConfig, bed: str, system: str, method: str) -> Path:
    """Return where the comparison of a system with none lies, by one search."""
    slug = method.replace(", chunks of ", "_").replace(" ms", "ms")
    return config.results / f"{bed}_{system}_vs_none_{slug}.json"


def finished(config: RealConfig, bed: str, system: str) -> dict[int, dict]:
    """Return the results of a system on a bed, by seed."""
    files = {seed: result_file(config, bed, system, seed) for run, seed in BEDS[bed].runs if run == system}
    return {seed: read_json(file) for seed, file in files.items() if file.exists()}


def decodings(results: dict[int, dict], bed: str, method: str) -> list[dict]:
    """Return the decodings of the bed's part by one search, one a seed."""
    return [result["decodings"][BEDS[bed].part][method] for result in results.values()]


def compare(config: RealConfig) -> None:
    """Compare mvq (and l2) with none on each bed by the paired bootstrap, pooled over the seeds that both have."""
    for bed in config.beds:
        for system in ("mvq", "l2"):
            a, b = finished(config, bed, "none"), finished(config, bed, system)
            seeds = sorted(set(a) & set(b))
            for method in BEDS[bed].searches if seeds else ():
                pairs = [decodings({s: r[s] for s in seeds}, bed, method) for r in (a, b)]
                names = [result_file(config, bed, name, s).name for name in ("none", system) for s in seeds]
                outcome = paired_bootstrap_of(*pairs, names, num_samples=10000)
                values = {"none": str(outcome.a), system: str(outcome.b), "difference": str(outcome.difference)}
                values["probability_of_improvement"] = outcome.probability_of_improvement
                write_json(
                    versus_file(config, bed, system, method), {"seeds": seeds, "samples": 10000, **values},
                )


def table(config: RealConfig) -> str:
    """Return the table of all result files, in Markdown: error rates pooled over seeds, and the paired differences."""
    header = ["bed", "system", "seeds", "search", "error rate", "difference to none", "latency in ms", "RTF"]
    header += ["codebook accuracy", "label bytes an hour", "fastest training in s", "peak GiB"]
    cells = []
    for bed in BEDS:
        for system in ("none", "l2", "mvq"):
            results = finished(config, bed, system)
            for method in BEDS[bed].searches if results else ():
                cells.append(_cells(config, bed, system, method, results))
    return markdown_table(header, cells)


def _cells(config: RealConfig, bed: str, system: str, method: str, results: dict[int, dict]) -> list[str]:
    found = decodings(results, bed, method)
    _, errors, ref_lens = stack_utterances(found, [str(seed) for seed in results])
    rate = confidence_interval(errors.sum(axis=0), len(found) * ref_lens, 10000)
    versus = versus_file(config, bed, system, method)
    difference = read_json(versus) if versus.exists() else {"difference": "-", "seeds": []}
    note = "" if set(difference["seeds"]) in (set(), set(results)) else f" (seeds {difference['seeds']})"
    accuracy = [r["last_step"]["kd_codebook_acc"] for r in results.values() if "kd_codebook_acc" in r["last_step"]]
    labels = next(iter(results.values()))["labels"]
    training = [r["training"] for r in results.values()]
    return [
        bed,
        system,
        ", ".join(map(str, results)),
        method,
        f"{RATE_NAMES[found[0]['unit']]} {rate} %" if BEDS[bed].error_rates else "not reported",
        difference["difference"] + note,
        f"{1000 * found[0]['algorithmic_latency']:.1f}" if found[0].get("algorithmic_latency") else "utterance",
        f"{min(r['rtf'] for r in found):.3f}",  # as with the training below
        f"{100 * mean(accuracy):.1f} %" if accuracy else "-",
        f"{labels['file_bytes_per_hour']:,.0f}" if labels else "-",
        f"{min(t['seconds'] for t in training):,.0f}",  # what else the machine did meanwhile only adds to it
        f"{max(t['peak_memory_gib'] for t in training):.2f}",
    ]


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
            write_result(out, without_machine_paths(collect(exp_dir, bed, system, seed), config))
            if config.commit:
                run_command(["git", "add", out])
                run_command(["git", "commit", "-q", "-m", f"Result: {bed}, {system}, seed {seed}", "--", out])
    compare(config)
    text = table(config)
    print(text)
    if config.report is not None:
        before = config.report.read_text(encoding="utf-8") if config.report.exists() else ""
        write_text(config.report, replace_block(before, "real", text))


if __name__ == "__main__":
    run_main(main)
