#!/usr/bin/env python3
"""Synthesise a demo corpus: LibriSpeech layout (--language en) or AISHELL-1 layout (--language zh)."""

import logging
from dataclasses import dataclass
from pathlib import Path

from icefall_kd.cli import parse_config
from icefall_kd.data.demo import DemoSpec, make_demo
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging

logger = logging.getLogger("prepare_demo")


@dataclass(frozen=True, kw_only=True)
class PrepareDemoConfig:
    """Synthesise a demo corpus."""

    out_dir: Path
    """Folder of the corpus; LibriSpeech or data_aishell is made in it."""
    nj: int = 2
    """Processes."""
    demo: DemoSpec = DemoSpec()


def main() -> None:
    """Make the corpus, unless it is there."""
    config = parse_config(PrepareDemoConfig)
    setup_logging()
    done = make_demo(config.out_dir, config.demo, config.nj)
    logger.info("%s %s", config.out_dir, "made" if done else "is up to date")


if __name__ == "__main__":
    run_main(main)
