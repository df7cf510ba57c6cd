#!/usr/bin/env python3
"""Run run_nar.sh on small sets of real recordings, one result file a training; finished ones are skipped.

    benchmarks/real_nar.py --data-root DIR                              everything that is still missing
    benchmarks/real_nar.py --data-root DIR --beds nar_digits --systems teacher,scratch --seeds 1
    benchmarks/real_nar.py --compare true                               comparisons and table of what is there

DIR is that of real_recordings.py: barista/{train,dev}, fsdd (joined into strings with a bigram grammar, so that
context says something about a digit), data_aishell (Mandarin words, pinyin tokens).  Every number is one of a small
bed, reported on dev.  The table of all result files goes into RESULTS.md.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import chains
from real_recordings import BEDS as MVQ_BEDS
from real_recordings import REPO, SOURCES, run_command, without_machine_paths

from icefall_kd.cli import parse_config
from icefall_kd.config.checks import at_least
from icefall_kd.errors import ConfigError, run_main
from icefall_kd.results import search_name
from icefall_kd.results_table import markdown_table
from icefall_kd.runtime.files import read_json
from icefall_kd.runtime.log import setup_logging

SAME_SIZE = ["scratch", "transfer", "transfer-frame", "transfer-sequence", "transfer-both"]
SMALL = ["small", "small-frame", "small-sequence", "small-both"]
SHORT_LIST = ["teacher", "scratch", "transfer", "transfer-both", "small", "small-both"]
# mask-threshold of run_nar.sh, and the best of 0.5, 0.7 and 0.9 on dev, by trials with three of the digits' students.
DEFAULT_THRESHOLD, TUNED_THRESHOLD = 0.99, 0.7
TUNED = f", threshold {TUNED_THRESHOLD}"
MASKED = ["mask_predict", "nar_beam_search"]
# A student's searches, each with the one that it goes on from.
BEFORE = {
    "ctc_greedy_search": None,
    "mask_predict": "ctc_greedy_search",
    "nar_beam_search": "mask_predict",
    f"mask_predict{TUNED}": "ctc_greedy_search",
    f"nar_beam_search{TUNED}": f"mask_predict{TUNED}",
}
SEARCHES = list(BEFORE)
TEACHER_SEARCHES = ["ctc_greedy_search", "joint_beam_search"]


@dataclass(frozen=True)
class Bed:
    """A set of recordings and how run_nar.sh is told to use it."""

    recipe: str
    options: list[str]
    seeds: list[int]
    systems: list[str]
    home: str
    """Folder of its prepared data under exp_root."""


BEDS = {
    "nar_digits": Bed(
        "librispeech",
        ["--corpus", "trans", "--token-kind", "char"],
        [1, 2, 3],
        ["teacher", *SAME_SIZE, *SMALL],
        "nar_digits",
    ),
    "nar_barista": Bed("librispeech", MVQ_BEDS["barista"].options, [1], SHORT_LIST, "barista"),
    "nar_mandarin_words": Bed("aishell", MVQ_BEDS["mandarin_words"].options, [1], SHORT_LIST, "mandarin_words"),
}


@dataclass(frozen=True, kw_only=True)
class RealNarConfig:
    """Run run_nar.sh on small sets of real recordings."""

    data_root: Path | None = None
    """Folder of the recordings."""
    exp_root: Path = Path("exp/real")
    """Folder of prepared data and experiments."""
    beds: list[str] = field(default_factory=lambda: list(BEDS))
    """Which beds."""
    systems: list[str] = field(default_factory=lambda: ["teacher", *SAME_SIZE, *SMALL])
    """Which systems of them."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Which seeds of them."""
    results: Path = REPO / "benchmarks/results/real_nar"
    """Folder of the result files."""
    report: Path | None = REPO / "RESULTS.md"
    """Markdown file whose block of results is renewed; None: the table is only printed."""
    compare: bool = False
    """Only compare what is there."""
    jobs: int = 2
    """Beds and seeds at the same time; a training takes one core."""
    nar_args: str = ""
    """More options of run_nar.sh, in one string."""
    commit: bool = False
    """Commit each result file to git as it comes."""

    def __post_init__(self) -> None:
        at_least(self, jobs=1)
        chains.check_choices(self, BEDS)


def source_dir(bed: str, config: RealNarConfig) -> Path:
    """Return the corpus folder of a bed; digit strings are made first."""
    if config.data_root is None:
        raise ConfigError("--data-root is missing: the folder that holds the recordings")
    if bed == "nar_digits":
        out = (config.exp_root / "nar_digits-corpus").resolve()
        command = ["local/make_digits.py", "--source", config.data_root / "fsdd", "--out-dir", out]
        run_command([sys.executable, *command, "--num-train", 400, "--num-dev", 1000, "--grammar", "bigram"])
        return out
    return (config.data_root / SOURCES[BEDS[bed].home]).resolve()


def recipe_line(config: RealNarConfig, bed: str, corpus: Path, *options: object) -> list:
    """Return the command line of run_nar.sh for a bed."""
    home, exp = (config.exp_root / BEDS[bed].home).resolve(), (config.exp_root / bed).resolve()
    line = ["bash", f"egs/{BEDS[bed].recipe}/run_nar.sh", *BEDS[bed].options, "--corpus-dir", corpus]
    line += ["--config", REPO / f"benchmarks/conf/{bed}.yaml", "--data-dir", home / "data", "--exp-dir", exp]
    return [*line, "--nj", 1, "--num-shards", 1, *config.nar_args.split(), *options]


def run_chain(config: RealNarConfig, bed: str, seed: int, corpus: Path) -> None:
    """Train and decode what is missing of a seed, one system after the other: they share the teacher."""
    for system in BEDS[bed].systems:
        out = chains.result_file(config, bed, system, seed)
        if system not in config.systems or is_finished(out, system):
            continue
        which = ["--systems", system, "--seeds", seed]
        run_command(recipe_line(config, bed, corpus, "--stage", 1, *which))
        if system != "teacher":
            tuned = ["--mask-threshold", TUNED_THRESHOLD, "--decoding-methods", " ".join(MASKED)]
            run_command(recipe_line(config, bed, corpus, "--stage", 4, "--stop-stage", 4, *which, *tuned))
        exp_dir = (config.exp_root / bed).resolve() / f"{system}-seed{seed}"
        result = without_machine_paths(chains.collect(exp_dir, bed, system, seed, decoding_name), config)
        chains.keep(out, result, config.commit)


def is_finished(out: Path, system: str) -> bool:
    """Return whether a result file is there with every search."""
    searches = TEACHER_SEARCHES if system == "teacher" else SEARCHES
    return out.exists() and set(searches) <= set(read_json(out)["decodings"])


def decoding_name(result: dict) -> str:
    """Return the search of a decoding, with its threshold where that is not the recipe's."""
    threshold = result["config"]["mask_threshold"] if result["decoding_method"] in MASKED else DEFAULT_THRESHOLD
    return search_name(result) + (f", threshold {threshold}" if threshold != DEFAULT_THRESHOLD else "")


def pairs_of(bed: str) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Return what is compared, as ((system, search), (system, search)): the second is hoped to be better."""
    students = [s for s in BEDS[bed].systems if s != "teacher"]
    helped = [(("small" if s.startswith("small") else "scratch"), s) for s in students if s not in ("scratch", "small")]
    pairs = [((a, search), (b, search)) for a, b in helped for search in SEARCHES]
    steps = [(earlier, later) for later, earlier in BEFORE.items() if earlier is not None]
    pairs += [((system, earlier), (system, later)) for earlier, later in steps for system in students]
    beams = ["nar_beam_search", f"nar_beam_search{TUNED}"]
    return [*pairs, *((("teacher", "joint_beam_search"), (s, beam)) for s in students for beam in beams)]


def compare(config: RealNarConfig, bed: str) -> list[dict]:
    """Compare systems and searches of a bed by the paired bootstrap, pooled over the seeds that both have."""
    return chains.compare(config, bed, BEDS[bed], pairs_of(bed))


def table(config: RealNarConfig) -> str:
    """Return the table of all result files, in Markdown: error rates pooled over seeds, and the paired differences."""
    header = ["bed", "system", "seeds", "search", "parameters", "error rate", "against scratch or small", "relative"]
    header += ["against the search before", "masked", "RTF", "label bytes an hour", "fastest training in s"]
    cells = []
    for bed in BEDS:
        compared = chains.compared(config, bed)
        for system in BEDS[bed].systems:
            results = chains.finished(config, bed, BEDS[bed].seeds, system)
            for search in TEACHER_SEARCHES if system == "teacher" else SEARCHES:
                if results and all(search in r["decodings"] for r in results.values()):
                    cells.append(_cells(bed, system, search, results, compared))
    return markdown_table(header, cells)


def _cells(bed: str, system: str, search: str, results: dict[int, dict], compared: dict) -> list[str]:
    found = [result["decodings"][search] for result in results.values()]
    base = "small" if system.startswith("small") else "scratch"
    before = BEFORE.get(search)
    helped = compared.get(((base, search), (system, search)), {})
    searched = compared.get(((system, before), (system, search)), {})
    shares = [r["masked_share"] for r in found if r.get("masked_share") is not None]
    training = [r["training"] for r in results.values()]
    labels = sum(s["file_bytes_per_hour"] for s in next(iter(results.values()))["labels"])
    return [
        bed,
        system,
        ", ".join(map(str, results)),
        search,
        f"{found[0]['parameters']:,}",
        chains.rate_text(found),
        helped.get("difference", "-"),
        helped.get("relative", "-"),
        searched.get("difference", "-"),
        f"{100 * sum(shares) / len(shares):.1f} %" if shares else "-",
        f"{min(r['rtf'] for r in found):.4f}",  # as with the training below
        f"{labels:,.0f}" if labels else "-",
        f"{min(t['seconds'] for t in training):,.0f}",  # what else the machine did meanwhile only adds to it
    ]


def main() -> None:
    """Run what is missing, then compare."""
    setup_logging()
    config = parse_config(RealNarConfig, description=__doc__)
    if not config.compare:
        chains.run_missing(config, BEDS, source_dir, recipe_line, run_chain, is_finished)
    for bed in config.beds:
        compare(config, bed)
    chains.publish(table(config), config.report, "real_nar")


if __name__ == "__main__":
    run_main(main)
