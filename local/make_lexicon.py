#!/usr/bin/env python3
"""Collect the words of the decoding graphs, and the text of their language model."""

from icefall_kd.cli import parse_config
from icefall_kd.data.prepare import LexiconConfig, make_lexicon
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging


def main() -> None:
    """Collect the words of the decoding graphs, and the text of their language model."""
    config = parse_config(LexiconConfig)
    setup_logging()
    make_lexicon(config)


if __name__ == "__main__":
    run_main(main)
