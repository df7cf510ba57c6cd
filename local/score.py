#!/usr/bin/env python3
"""Score recogs files again, in another unit: words into characters, for instance.

    local/score.py --recogs exp/mvq/greedy_search/recogs-test-epoch-30_avg-9.txt --unit char
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from icefall_kd.cli import parse_config
from icefall_kd.errors import ConfigError, run_main
from icefall_kd.runtime.files import read_json, write_json
from icefall_kd.scoring import per_utterance, read_recogs, score, summarize, write_errs, write_summary

# What can be made of units that were written: words hold their characters, characters do not hold words.
_POSSIBLE = {
    "word": ("word", "char", "mixed"),
    "mixed": ("mixed", "char"),
    "char": ("char",),
    "token": ("token",),
}


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score recogs files again, in another unit."""

    recogs: list[Path]
    """recogs-<part>-<suffix>.txt files, ours or icefall's."""
    unit: Literal["word", "char", "mixed", "token"] = "word"
    """Scoring unit; mixed: Chinese characters and whole words of other scripts."""
    from_unit: Literal["word", "char", "mixed", "token"] | None = None
    """Unit of the lists in the files; None: from the results file beside them, else word."""
    bootstrap: int = 1000
    """Bootstrap samples of the confidence interval; 0: none."""
    results: bool = False
    """Write results-*.json too, so that results.py and compare.py see this scoring."""


def rescore(file: Path, config: ScoreConfig) -> None:
    """Score one file, print its line and write errs- and wer-summary- files beside it.

    Raises:
        ConfigError: the unit cannot be made of what the file holds.
    """
    name = file.name.removeprefix("recogs-").removesuffix(".txt")
    record_file = file.with_name(f"results-{name}.json")
    record = read_json(record_file) if record_file.exists() else None
    source = config.from_unit or (record["unit"] if record else "word")
    if config.unit not in _POSSIBLE[source]:
        raise ConfigError(
            f"{file} holds {source} units, of which no {config.unit} units can be made; decode again with "
            f"--unit {config.unit}, or say with --from-unit what the file really holds"
        )
    ids, refs, hyps = read_recogs(file)
    scored = score(refs, hyps, ids, config.unit)
    counts = summarize(scored, config.bootstrap)
    new_name = f"{name}_unit-{config.unit}"
    write_errs(file.with_name(f"errs-{new_name}.txt"), scored)
    write_summary(file.with_name(f"wer-summary-{new_name}.txt"), {name: scored.error_rate})
    if config.results:
        if record is None:
            raise ConfigError(f"--results needs {record_file}, which decode.py writes")
        suffix = f"{record['suffix']}_unit-{config.unit}"
        # A sweep must not take these for results in the unit of the decoding.
        options = record.get("config", {}) | {"unit": config.unit}
        write_json(
            file.with_name(f"results-{new_name}.json"),
            record | counts | {"suffix": suffix, "config": options, "utterances": per_utterance(scored)},
        )
    interval = " 95% interval {:.2f} to {:.2f}".format(*counts["interval"]) if counts["interval"] else ""
    print(scored.line(name) + interval)


def main() -> None:
    """Score every file."""
    config = parse_config(ScoreConfig)
    for file in config.recogs:
        rescore(file, config)


if __name__ == "__main__":
    run_main(main)
