#!/usr/bin/env python3
"""Select small training sets, each inside the next one, balanced over speakers."""

from dataclasses import dataclass, field
from pathlib import Path

from icefall_kd.cli import parse_config
from icefall_kd.data.hours import select_hours
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging


@dataclass(frozen=True, kw_only=True)
class SelectHoursConfig:
    """Which sets are made of which part."""

    manifest_dir: Path
    """Folder of cuts_<part>.jsonl.gz."""
    out_dir: Path | None = None
    """Folder of cuts_<part>_<amount>.jsonl.gz and <part>_<amount>.list; None: the same."""
    part: str = "train"
    """The part."""
    hours: list[str] = field(default_factory=lambda: ["10min", "1h", "10h"])
    """How much, as 90s, 10min or 1h."""
    seed: int = 42
    """Of the draw."""


def main() -> None:
    """Write the sets."""
    config = parse_config(SelectHoursConfig)
    setup_logging()
    select_hours(config.manifest_dir, config.part, config.hours, config.seed, config.out_dir)


if __name__ == "__main__":
    run_main(main)
