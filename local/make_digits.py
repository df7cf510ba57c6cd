#!/usr/bin/env python3
"""Join recordings of single digits into strings: a corpus for prepare.sh --corpus trans."""

import logging
from dataclasses import dataclass
from pathlib import Path

from icefall_kd.cli import parse_config
from icefall_kd.data.digits import DigitsSpec, make_digits
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging

logger = logging.getLogger("make_digits")


@dataclass(frozen=True, kw_only=True)
class MakeDigitsConfig:
    """Make a corpus of connected digits."""

    source: Path
    """Folder of single digits: <speaker>/<...>-<take>.flac below it, and *.trans.txt."""
    out_dir: Path
    """Folder of the corpus; train and dev are made in it."""
    digits: DigitsSpec = DigitsSpec()


def main() -> None:
    """Make the corpus, unless it is there."""
    config = parse_config(MakeDigitsConfig)
    setup_logging()
    done = make_digits(config.source, config.out_dir, config.digits)
    logger.info("%s %s", config.out_dir, "made" if done else "is up to date")


if __name__ == "__main__":
    run_main(main)
