#!/usr/bin/env python3
"""Run run_hkd.sh on small sets of recordings, one result file a training; finished ones are skipped.

    benchmarks/real_hkd.py --data-root DIR --beds hkd_barista                   everything that is still missing
    benchmarks/real_hkd.py --data-root DIR --plm-zh FOLDER                      with the Mandarin beds
    benchmarks/real_hkd.py --compare true                                       comparisons and table of what is there

DIR is that of real_recordings.py: barista/{train,dev}, data_aishell (Mandarin words, with characters: a quarter of
dev's never occur in train, so this bed shows that the pipeline runs, and no more).  The sentences of hkd_mandarin_demo
are synthesised.  Every number is one of a small bed, reported on dev.  The table of all result files goes into
RESULTS.md.
"""

from dataclasses import dataclass, field
from pathlib import Path

import chains
from real_recordings import REPO, SOURCES, run_command, without_machine_paths

from icefall_kd.cli import parse_config
from icefall_kd.config.checks import at_least
from icefall_kd.errors import ConfigError, run_main
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.results_table import markdown_table
from icefall_kd.runtime.files import read_json
from icefall_kd.runtime.log import setup_logging
from icefall_kd.teachers.locate import NAMED_MODELS

SYSTEMS = ["cif", "acd", "lrd", "both"]
SEARCHES = ["cif_greedy_search", "cif_beam_search"]
_MANDARIN_WORDS = ["--corpus", "aishell", "--parts", "train,dev", "--partial", "true", "--speed-perturb", "false"]
_MANDARIN_WORDS += ["--train-parts", "train", "--valid-parts", "dev", "--test-parts", "dev", "--token-kind", "char"]


@dataclass(frozen=True)
class Bed:
    """A set of recordings and how run_hkd.sh is told to use it."""

    recipe: str
    options: list[str]
    home: str
    """Folder of its prepared data under exp_root."""
    plm: str
    """Option of this driver that names the language model."""
    seeds: list[int]
    systems: list[str] = field(default_factory=lambda: SYSTEMS)
    note: str = ""
    """What its error rates are worth, where that is not plain."""


BEDS = {
    # Pieces of the language model: 69 words, nearly all of them a piece, 0.27 tokens a frame of 80 ms.
    "hkd_barista": Bed(
        "librispeech", ["--corpus", "trans", "--token-kind", "plm"], "barista", "plm_en", [1, 2, 3]
    ),
    "hkd_mandarin_demo": Bed(
        "aishell", ["--corpus", "demo", "--test-parts", "dev"], "mandarin_demo", "plm_zh", [1], note="synthesised"
    ),
    "hkd_mandarin_words": Bed(
        "aishell", _MANDARIN_WORDS, "mandarin_words", "plm_zh", [1], ["cif", "both"], "pipeline check"
    ),
}


@dataclass(frozen=True, kw_only=True)
class RealHkdConfig:
    """Run run_hkd.sh on small sets of recordings."""

    data_root: Path | None = None
    """Folder of the recordings."""
    exp_root: Path = Path("exp/real")
    """Folder of prepared data and experiments."""
    beds: list[str] = field(default_factory=lambda: list(BEDS))
    """Which beds."""
    systems: list[str] = field(default_factory=lambda: list(SYSTEMS))
    """Which systems of them."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Which seeds of them."""
    plm_en: str = "minilm"
    """English language model: folder, hub id or short name."""
    plm_zh: str | None = None
    """Chinese one whose tokenizer takes characters apart."""
    results: Path = REPO / "benchmarks/results/real_hkd"
    """Folder of the result files."""
    report: Path | None = REPO / "RESULTS.md"
    """Markdown file whose block of results is renewed; None: the table is only printed."""
    compare: bool = False
    """Only compare what is there."""
    jobs: int = 2
    """Beds and seeds at the same time; a training takes one core."""
    hkd_args: str = ""
    """More options of run_hkd.sh, in one string."""
    commit: bool = False
    """Commit each result file to git as it comes."""

    def __post_init__(self) -> None:
        at_least(self, jobs=1)
        chains.check_choices(self, BEDS)
        for name in self.beds if not self.compare else ():
            if getattr(self, BEDS[name].plm) is None:
                option = BEDS[name].plm.replace("_", "-")
                raise ConfigError(f"--{option} is missing: the language model of bed {name}; or leave it out of --beds")


def source_dir(bed: str, config: RealHkdConfig) -> Path | None:
    """Return the corpus folder of a bed; None: the recipe makes it."""
    home = BEDS[bed].home
    if home not in SOURCES:
        return None
    if config.data_root is None:
        raise ConfigError("--data-root is missing: the folder that holds the recordings")
    return (config.data_root / SOURCES[home]).resolve()


def recipe_line(config: RealHkdConfig, bed: str, corpus: Path | None, *options: object) -> list:
    """Return the command line of run_hkd.sh for a bed."""
    home, exp = (config.exp_root / BEDS[bed].home).resolve(), (config.exp_root / bed).resolve()
    plm = getattr(config, BEDS[bed].plm)
    line = ["bash", f"egs/{BEDS[bed].recipe}/run_hkd.sh", *BEDS[bed].options]
    line += ["--corpus-dir", corpus] if corpus is not None else []
    folder = Path(plm).resolve() if plm not in NAMED_MODELS and Path(plm).is_dir() else plm
    line += ["--plm", folder, "--skip-stages", "4"]
    line += ["--config", REPO / f"benchmarks/conf/{bed}.yaml", "--data-dir", home / "data", "--exp-dir", exp]
    return [*line, "--nj", 1, "--num-shards", 1, *config.hkd_args.split(), *options]


def run_chain(config: RealHkdConfig, bed: str, seed: int, corpus: Path | None) -> None:
    """Train and decode what is missing of a seed."""
    for system in BEDS[bed].systems:
        out = chains.result_file(config, bed, system, seed)
        if out.exists() or system not in config.systems:
            continue
        run_command(recipe_line(config, bed, corpus, "--stage", 2, "--systems", system, "--seeds", seed))
        exp_dir = (config.exp_root / bed).resolve() / f"{system}-seed{seed}"
        result = chains.collect(exp_dir, bed, system, seed)
        result["text_coverage"] = read_json(exp_dir / "train_summary.json").get("text_coverage")
        result["plm"] = [Path(LabelSetInfo.load(folder).teacher).name for folder in result["options"]["label_dir"]]
        chains.keep(out, without_machine_paths(result, config), config.commit)


def prepare_line(config: RealHkdConfig, bed: str, corpus: Path | None, *_: object) -> list:
    """Return the command line that makes data and text states, once for the chains of a bed, which share them."""
    return recipe_line(config, bed, corpus, "--stop-stage", 1)


def pairs_of(bed: str) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Return what is compared, as ((system, search), (system, search)): the second is hoped to be better."""
    systems = BEDS[bed].systems
    helped = [("cif", s) for s in systems if s != "cif"] + [(s, "both") for s in ("acd", "lrd") if s in systems]
    pairs = [((a, search), (b, search)) for a, b in helped for search in SEARCHES]
    return [*pairs, *(((system, SEARCHES[0]), (system, SEARCHES[1])) for system in systems)]


def compare(config: RealHkdConfig, bed: str) -> list[dict]:
    """Compare systems and searches of a bed by the paired bootstrap, pooled over the seeds that both have."""
    return chains.compare(config, bed, BEDS[bed], pairs_of(bed))


def table(config: RealHkdConfig) -> str:
    """Return the table of all result files, in Markdown: error rates pooled over seeds, and the paired differences."""
    header = ["bed", "system", "language model", "seeds", "search", "error rate", "against CIF", "relative"]
    header += ["label bytes an hour", "coverage", "fastest training in s"]
    cells = []
    for bed in BEDS:
        compared = chains.compared(config, bed)
        for system in BEDS[bed].systems:
            results = chains.finished(config, bed, BEDS[bed].seeds, system)
            for search in SEARCHES:
                if results and all(search in r["decodings"] for r in results.values()):
                    cells.append(_cells(bed, system, search, results, compared))
    return markdown_table(header, cells)


def _cells(bed: str, system: str, search: str, results: dict[int, dict], compared: dict) -> list[str]:
    some = next(iter(results.values()))
    helped = compared.get((("cif", search), (system, search)), {})
    labels = sum(s["file_bytes_per_hour"] for s in some["labels"])
    covered = some["text_coverage"]
    return [
        bed + (f" ({BEDS[bed].note})" if BEDS[bed].note else ""),
        {"cif": "CIF", "acd": "CIF + ACD", "lrd": "CIF + LRD", "both": "CIF + ACD + LRD"}[system],
        ", ".join(some["plm"]) or "-",
        ", ".join(map(str, results)),
        search,
        chains.rate_text([result["decodings"][search] for result in results.values()]),
        helped.get("difference", "-"),
        helped.get("relative", "-"),
        f"{labels:,.0f}" if labels else "-",
        f"{100 * covered['aligned'] / covered['utterances']:.1f} %" if covered else "-",
        f"{min(r['training']['seconds'] for r in results.values()):,.0f}",  # what else ran meanwhile only adds to it
    ]


def main() -> None:
    """Run what is missing, then compare."""
    setup_logging()
    config = parse_config(RealHkdConfig, description=__doc__)
    if not config.compare:
        chains.run_missing(config, BEDS, source_dir, prepare_line, run_chain)
    for bed in config.beds:
        compare(config, bed)
    chains.publish(table(config), config.report, "real_hkd")


if __name__ == "__main__":
    run_main(main)
