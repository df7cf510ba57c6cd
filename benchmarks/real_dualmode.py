#!/usr/bin/env python3
"""Run run_dualmode.sh on small sets of real recordings, one result file a training; finished ones are skipped.

    benchmarks/real_dualmode.py --data-root DIR --seeds 1                       all systems, one seed of each bed
    benchmarks/real_dualmode.py --data-root DIR --seeds 2,3 --systems a3,a5,b3,c2
    benchmarks/real_dualmode.py --compare true                                  comparisons and table of what is there

DIR is that of real_recordings.py.  Each arm of pre-training runs once, on the audio of the training parts of the
digits, of barista and of the LibriSpeech slice; all seeds of both beds start from it.  Every number is one of a small
bed, reported on dev.  The tables of all result files go into RESULTS.md.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import chains
from real_recordings import BEDS as MVQ_BEDS
from real_recordings import REPO, SOURCES, run_command, without_machine_paths

from icefall_kd.cli import parse_config
from icefall_kd.config.checks import at_least
from icefall_kd.errors import ConfigError, run_main
from icefall_kd.results_table import markdown_table
from icefall_kd.runtime.env import environment
from icefall_kd.runtime.files import read_json
from icefall_kd.runtime.log import setup_logging

# Systems of the experiment matrix (docs/dualmode.md) and the arm of pre-training that each starts from.
ARM_OF = {"a3": None, "a5": None, "b3": "full", "c2": "dual", "b1": "full", "b4": "streaming", "a1": None}
SSL_SYSTEM = {"full": "b1", "streaming": "b4", "dual": "c2"}
SSL_SEED = 42
CHUNKS = (8, 16)
FULL, *STREAMS = ("full", *(f"streaming, {40 * chunk} ms" for chunk in CHUNKS))
# What is compared: the second is hoped to be better, or not worse.
IN_FULL = [("a1", "a5"), ("a1", "b1"), ("a5", "b3"), ("a5", "c2"), ("b1", "b3"), ("b1", "c2"), ("b3", "c2")]
IN_STREAMS = [("a3", "a5"), ("a3", "b4"), ("a3", "b3"), ("a3", "c2"), ("a5", "b3"), ("a5", "c2"), ("b3", "c2"),
              ("b4", "c2")]  # fmt: skip
# What the abstract of the paper lets one hope for (our reading): C2 beside another system, in some modes.
CRITERIA = [
    ("less than 3 % worse than B1", "b1", [FULL]),
    ("clearly better than A3", "a3", STREAMS),
    ("clearly better than A5", "a5", STREAMS),
    ("not worse than B4", "b4", STREAMS),
]


@dataclass(frozen=True)
class Bed:
    """A set of recordings and how run_dualmode.sh is told to use it."""

    seeds: list[int]
    home: str
    """Folder of its prepared data under exp_root."""
    systems: list[str] = field(default_factory=lambda: list(ARM_OF))


BEDS = {"dualmode_digits": Bed([1, 2, 3], "dualmode_digits"), "dualmode_barista": Bed([1], "barista")}
# Homes of the data whose audio is heard in pre-training: options of their preparation, and the parts.
HEARD = {
    "dualmode_digits": (["--corpus", "trans", "--token-kind", "char"], "train", "dev"),
    "barista": (["--corpus", "trans", "--token-kind", "char"], "train", "dev"),
    "librispeech_slice": (MVQ_BEDS["librispeech_slice"].options, "train-clean-100", None),
}


@dataclass(frozen=True, kw_only=True)
class RealDualmodeConfig:
    """Run run_dualmode.sh on small sets of real recordings."""

    data_root: Path | None = None
    """Folder of the recordings."""
    exp_root: Path = Path("exp/real")
    """Folder of prepared data and experiments."""
    beds: list[str] = field(default_factory=lambda: list(BEDS))
    """Which beds."""
    systems: list[str] = field(default_factory=lambda: list(ARM_OF))
    """Which systems of them."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Which seeds of them."""
    results: Path = REPO / "benchmarks/results/real_dualmode"
    """Folder of the result files."""
    report: Path | None = REPO / "RESULTS.md"
    """Markdown file whose block of results is renewed; None: the table is only printed."""
    compare: bool = False
    """Only compare what is there."""
    jobs: int = 2
    """Trainings at the same time; one takes one core."""
    dualmode_args: str = ""
    """More options of run_dualmode.sh, in one string."""
    commit: bool = False
    """Commit each result file to git as it comes."""

    def __post_init__(self) -> None:
        at_least(self, jobs=1)
        chains.check_choices(self, BEDS)


def corpus_of(home: str, config: RealDualmodeConfig) -> Path:
    """Return a corpus folder; digit strings are made first."""
    if config.data_root is None:
        raise ConfigError("--data-root is missing: the folder that holds the recordings")
    if home == "dualmode_digits":
        out = (config.exp_root / "dualmode_digits-corpus").resolve()
        command = ["local/make_digits.py", "--source", config.data_root / "fsdd", "--out-dir", out]
        run_command([sys.executable, *command, "--num-train", 400, "--num-dev", 1000, "--grammar", "bigram"])
        return out
    return (config.data_root / SOURCES[home]).resolve()


def source_dir(bed: str, config: RealDualmodeConfig) -> Path:
    """Return the corpus folder of a bed."""
    return corpus_of(BEDS[bed].home, config)


def data_dir(home: str, config: RealDualmodeConfig) -> Path:
    """Return where the prepared data of a corpus lies."""
    return (config.exp_root / home).resolve() / "data"


def ssl_dir(config: RealDualmodeConfig) -> Path:
    """Return the folder of all arms of pre-training."""
    return (config.exp_root / "dualmode_ssl").resolve()


def run_line(config: RealDualmodeConfig, home: str, exp: Path, corpus: Path, *options: object) -> list:
    """Return a command line of run_dualmode.sh over the data of a corpus."""
    line = ["bash", "egs/librispeech/run_dualmode.sh", *HEARD[home][0], "--corpus-dir", corpus]
    line += ["--data-dir", data_dir(home, config), "--exp-dir", exp, "--nj", 1]
    return [*line, *config.dualmode_args.split(), *options]


def recipe_line(config: RealDualmodeConfig, bed: str, corpus: Path, *options: object) -> list:
    """Return the command line of run_dualmode.sh for a bed."""
    line = run_line(config, BEDS[bed].home, (config.exp_root / bed).resolve(), corpus)
    line += ["--config", REPO / f"benchmarks/conf/{bed}.yaml", "--ssl-dir", ssl_dir(config)]
    line += ["--decoding-methods", "ctc_greedy_search", "--decode-chunks", " ".join(map(str, CHUNKS))]
    return [*line, *options]


def prepare_line(config: RealDualmodeConfig, bed: str, corpus: Path, *options: object) -> list:
    """Return the command line that makes the data of a bed."""
    return recipe_line(config, bed, corpus, "--systems", "a1", *options)  # which needs no arm that is not there yet


def pretrain(config: RealDualmodeConfig) -> None:
    """Pre-train the arms that the wanted systems need, some at a time, and keep a result file of each."""
    wanted = dict.fromkeys(ARM_OF[s] for s in config.systems if ARM_OF[s] is not None)
    arms = [arm for arm in sorted(wanted) if not arm_file(config, arm).exists()]
    if not arms:
        return
    corpora = {home: corpus_of(home, config) for home in HEARD}
    for home, corpus in corpora.items():
        run_command(run_line(config, home, ssl_dir(config), corpus, "--stop-stage", 0))
    with ThreadPoolExecutor(config.jobs) as pool:
        for done in [pool.submit(pretrain_arm, config, arm, corpora["dualmode_digits"]) for arm in arms]:
            done.result()


def pretrain_arm(config: RealDualmodeConfig, arm: str, corpus: Path) -> None:
    """Pre-train one arm on the audio of all training parts."""
    parts = {"train": [], "valid": []}
    for home, (_, train, valid) in HEARD.items():
        parts["train"].append(data_dir(home, config) / f"fbank/cuts_{train}.jsonl.gz")
        parts["valid"] += [data_dir(home, config) / f"fbank/cuts_{valid}.jsonl.gz"] if valid else []
    heard, checked = (",".join(map(str, files)) for files in parts.values())
    options = ["--systems", SSL_SYSTEM[arm], "--ssl-seed", SSL_SEED, "--ssl-parts", heard, "--ssl-valid-parts", checked]
    conf = REPO / "benchmarks/conf/dualmode_ssl.yaml"
    options += ["--config", conf, "--ssl-config", conf, "--stage", 1, "--stop-stage", 1]
    run_command(run_line(config, "dualmode_digits", ssl_dir(config), corpus, *options))
    result = without_machine_paths(collect_arm(ssl_dir(config) / f"ssl-{arm}", arm), config)
    chains.keep(arm_file(config, arm), result, config.commit)


def arm_file(config: RealDualmodeConfig, arm: str) -> Path:
    """Return where the result of an arm of pre-training lies."""
    return config.results / f"dualmode_ssl_{arm}.json"


def collect_arm(exp_dir: Path, arm: str) -> dict:
    """Return what the result file of an arm holds: options, cost, and its figures of health by epoch."""
    lines = (exp_dir / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    shown = ("contrastive_loss", "acc", "code_perplexity", "churn", "sparsity")

    def figures(record: dict) -> dict:
        some = {**record, **record.get("figures", {})}
        return {k: v for k, v in some.items() if k.endswith(shown) or k in ("step", "epoch")}

    summary = read_json(exp_dir / "train_summary.json")
    names = ("finished", "epochs", "steps", "seconds", "audio_hours", "audio_hours_per_hour", "peak_memory_gib")
    return {
        "bed": "dualmode_ssl",
        "system": f"ssl-{arm}",
        "seed": SSL_SEED,
        "training": {name: summary[name] for name in (*names, "parameters", "device")},
        "options": read_json(exp_dir / "config.json")["config"],
        "first": figures(next(r for r in records if r["kind"] == "train")),
        "last": figures([r for r in records if r["kind"] == "train"][-1]),
        "validations": [figures(r) for r in records if r["kind"] == "valid"],
        "environment": environment(),
    }


def run_chain(config: RealDualmodeConfig, bed: str, seed: int, corpus: Path) -> None:
    """Train and decode what is missing of a seed."""
    for system in BEDS[bed].systems:
        out = chains.result_file(config, bed, system, seed)
        if out.exists() or system not in config.systems:
            continue
        options = ["--stage", 2, "--stop-stage", 3, "--systems", system, "--seeds", seed]
        run_command(recipe_line(config, bed, corpus, *options))
        exp_dir = (config.exp_root / bed).resolve() / f"{system}-seed{seed}"
        result = without_machine_paths(chains.collect(exp_dir, bed, system, seed, decoding_name), config)
        chains.keep(out, result, config.commit)


def decoding_name(result: dict) -> str:
    """Return the mode of a decoding, with its chunk, and its weights where those are not the mode's own."""
    mode, chunk = result["encoder_mode"], result.get("chunk_size", -1)
    return mode + (f", {40 * chunk} ms" if mode == "streaming" else "")


def pairs_of(bed: str) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Return what is compared, as ((system, mode), (system, mode)): the second is hoped to be better, or not worse."""
    pairs = [((a, FULL), (b, FULL)) for a, b in IN_FULL]
    return pairs + [((a, stream), (b, stream)) for stream in STREAMS for a, b in IN_STREAMS]


def compare(config: RealDualmodeConfig, bed: str) -> list[dict]:
    """Compare systems of a bed in each mode by the paired bootstrap, pooled over the seeds that both have."""
    return chains.compare(config, bed, BEDS[bed], pairs_of(bed))


def table(config: RealDualmodeConfig) -> str:
    """Return the table of all result files, in Markdown: error rates pooled over seeds, and the paired differences."""
    header = ["bed", "system", "pre-training", "seeds", "mode", "weights", "parameters", "non-zero", "MB float32"]
    header += ["latency in ms", "error rate", "of each seed", "against A3 (streams), B1 (full)", "RTF"]
    header += ["fastest training in s"]
    cells = []
    for bed in BEDS:
        compared = chains.compared(config, bed)
        for system in sorted(BEDS[bed].systems):
            results = chains.finished(config, bed, BEDS[bed].seeds, system)
            for mode in (FULL, *STREAMS):
                if results and all(mode in r["decodings"] for r in results.values()):
                    cells.append(_cells(bed, system, mode, results, compared))
    return markdown_table(header, cells)


def _cells(bed: str, system: str, mode: str, results: dict[int, dict], compared: dict) -> list[str]:
    found = [result["decodings"][mode] for result in results.values()]
    some = found[0]
    base = "b1" if mode == FULL else "a3"
    helped = compared.get(((base, mode), (system, mode)), {})
    note = f" (seeds {helped['seeds']})" if helped and len(helped["seeds"]) < len(results) else ""
    return [
        bed,
        system.upper(),
        ARM_OF[system] or "-",
        ", ".join(map(str, results)),
        mode.split(",")[0],
        "sparse" if some["sparse"] else "dense",
        f"{some['parameters']:,}",
        f"{some['nonzeros']:,}",
        f"{some['model_bytes'] / 1e6:.2f}",
        f"{1000 * some['algorithmic_latency']:.1f}" if some.get("algorithmic_latency") else "utterance",
        chains.rate_text(found),
        ", ".join(f"{r['error_rate']:.1f}" for r in found),
        helped.get("difference", "-") + note,
        f"{min(r['rtf'] for r in found):.4f}",  # as with the training below
        f"{min(r['training']['seconds'] for r in results.values()):,.0f}",  # what else ran only adds to it
    ]


def arms_table(config: RealDualmodeConfig) -> str:
    """Return the table of the arms of pre-training: how healthy they were, by validation where nothing else is said."""
    header = ["pre-training", "steps", "first loss", "loss", "accuracy", "perplexity of codes", "last churn", "seconds"]
    cells = []
    for arm in ("full", "streaming", "dual"):
        if not arm_file(config, arm).exists():
            continue
        result = read_json(arm_file(config, arm))
        modes = ["full", "streaming"] if arm == "dual" else [arm]
        end, last = result["validations"][-1], result["last"]

        def of_modes(record: dict, name: str, form: str, modes: list[str] = modes) -> str:
            return " / ".join(format(record[f"{mode}_{name}"], form) for mode in modes)

        cells.append([
            " / ".join(modes),
            f"{result['training']['steps']:,}",
            of_modes(result["first"], "contrastive_loss", ".3f"),
            of_modes(end, "contrastive_loss", ".3f"),
            of_modes(end, "acc", ".1%"),
            f"{end['code_perplexity']:.0f}",
            f"{last['churn']:.1%}" if "churn" in last else "-",
            f"{result['training']['seconds']:,.0f}",
        ])  # fmt: skip
    return markdown_table(header, cells)


def criteria_table(config: RealDualmodeConfig) -> str:
    """Return the table of what is hoped for of C2, and whether it is so."""
    header = ["bed", "C2 is hoped to be", "mode", "seeds", "the other", "C2", "difference", "relative"]
    header += ["of each seed", "met"]
    cells = []
    for bed in BEDS:
        compared = chains.compared(config, bed)
        for hope, other, modes in CRITERIA:
            for mode in modes:
                found = compared.get(((other, mode), ("c2", mode)))
                if found is not None:
                    seeds = found["seeds"]
                    rates = [chains.finished(config, bed, seeds, system) for system in (other, "c2")]
                    before, after = ([r[s]["decodings"][mode]["error_rate"] for s in seeds] for r in rates)
                    each = [b - a for a, b in zip(before, after, strict=True)]
                    figures = [found[name] for name in ("before", "after", "difference", "relative")]
                    figures.append(", ".join(f"{d:+.1f}" for d in each))
                    cells.append([bed, hope, mode, ", ".join(map(str, seeds)), *figures, is_met(hope, found, each)])
    return markdown_table(header, cells)


def is_met(hope: str, found: dict, each: list[float]) -> str:
    """Return whether a comparison is what is hoped for: by its value, or where it says "clearly" with certainty.

    Args:
        hope: of CRITERIA.
        found: of chains.compare.
        each: points of difference with each seed; the interval of the pooled ones knows nothing of other seeds.
    """
    if "clearly" in hope:
        return "yes" if float(found["difference"].split(",")[1].rstrip("]")) < 0 and max(each) < 0 else "no"
    allowed = 3.0 if "3 %" in hope else 0.0
    return "yes" if float(found["relative"].rstrip(" %")) <= allowed else "no"


def main() -> None:
    """Run what is missing, then compare."""
    setup_logging()
    config = parse_config(RealDualmodeConfig, description=__doc__)
    if not config.compare:
        pretrain(config)
        chains.run_missing(config, BEDS, source_dir, prepare_line, run_chain)
    for bed in config.beds:
        compare(config, bed)
    tables = [arms_table(config), table(config), criteria_table(config)]
    chains.publish("\n\n".join(tables), config.report, "real_dualmode")


if __name__ == "__main__":
    run_main(main)
