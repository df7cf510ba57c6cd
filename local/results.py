#!/usr/bin/env python3
"""Print a table of results from exp_dirs, and write it into a Markdown file between its markers.

local/results.py --exp-dirs exp/none,exp/mvq --table demo --out results/demo.md
local/results.py --exp-dirs exp/none-1,exp/none-2,exp/mvq-1,exp/mvq-2 --name mvq --out RESULTS.md
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from icefall_kd.cli import parse_config
from icefall_kd.errors import ConfigError, run_main
from icefall_kd.results import Row, build_rows, part_order, read_run
from icefall_kd.results_table import (
    demo_table,
    details,
    dual_table,
    full_table,
    hkd_table,
    hubert_table,
    markdown_table,
    nar_table,
    print_table,
    replace_block,
)
from icefall_kd.runtime.files import write_json, write_text

TABLES = {
    "demo": demo_table,
    "full": full_table,
    "nar": nar_table,
    "hkd": hkd_table,
    "dualmode": dual_table,
    "hubert": hubert_table,
}


@dataclass(frozen=True, kw_only=True)
class ResultsConfig:
    """Print a table of results from exp_dirs, and write it into files."""

    exp_dirs: list[Path]
    """Folders of trainings; those that differ in their seed alone become one row."""
    table: Literal["demo", "full", "nar", "hkd", "dualmode", "hubert"] = "full"
    """demo: system, size, labels, error rates, seconds; full: also decoding, seeds, commands and git states; nar:
    systems of --system nar by search, with masked tokens, speed and the change against scratch of the same size; hkd:
    those of --system hkd, with the change against CIF alone; dualmode: each mode of those of --system dualmode, with
    weights that are not zero, size, latency and the difference to the first of the same mode; hubert: fine-tuned models
    of --system hubert by structure, what they learnt before and transcripts."""
    name: str | None = None
    """Name in the markers <!-- results:NAME begin/end -->; None: the name of the table."""
    out: Path | None = None
    """Markdown file; its text outside the markers is kept."""
    json: Path | None = None
    """JSON file of the same numbers."""
    decoding_method: str | None = None
    """Show this search alone."""
    suffix: str | None = None
    """Show this decoding alone (the suffix of the result files)."""


def rows_as_data(rows: list[Row]) -> list[dict]:
    """Return rows as plain data, utterances left out."""
    data = []
    for row in rows:
        kind, bytes_per_hour, ratio = row.label_texts()
        rates = {part: row.rate(part) for part in part_order(rows)}
        data.append(
            {
                "system": row.system,
                "decoding": row.decoding,
                "seeds": [run.seed for run in row.runs],
                "commits": [run.commit for run in row.runs],
                "commands": [run.command for run in row.runs],
                "exp_dirs": [str(run.exp_dir) for run in row.runs],
                "parameters": row.parameters,
                "labels": {"kind": kind, "bytes_per_hour": bytes_per_hour, "ratio_to_float32": ratio},
                "error_rates": {part: asdict(rate) for part, rate in rates.items() if rate is not None},
                "seconds": row.seconds,
                "trainings": [run.summary for run in row.runs],
                "decodings": {
                    part: [{k: v for k, v in r.items() if k != "utterances"} for r in results]
                    for part, results in row.results.items()
                },
            }
        )
    return data


def main() -> None:
    """Read the exp_dirs, print the table, write the files."""
    config = parse_config(ResultsConfig)
    if not config.exp_dirs:
        raise ConfigError("--exp-dirs is empty; give one folder of a training at least")
    rows = build_rows([read_run(d, config.decoding_method, config.suffix) for d in config.exp_dirs])
    header, cells = TABLES[config.table](rows)
    name = config.name or config.table
    if config.out is not None:
        content = markdown_table(header, cells)
        if config.table == "full":
            content += "\n\n" + details(rows)
        before = config.out.read_text(encoding="utf-8") if config.out.exists() else ""
        after = replace_block(before, name, content)
        if after != before:
            write_text(config.out, after)
    if config.json is not None:
        write_json(config.json, rows_as_data(rows))
    print_table(header, cells, title=name)


if __name__ == "__main__":
    run_main(main)
