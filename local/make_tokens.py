#!/usr/bin/env python3
"""Train the tokenizer on the transcripts of the training parts."""

from icefall_kd.cli import parse_config
from icefall_kd.data.prepare import TokenConfig, make_tokens
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging


def main() -> None:
    """Make the tokens."""
    config = parse_config(TokenConfig)
    setup_logging()
    make_tokens(config)


if __name__ == "__main__":
    run_main(main)
