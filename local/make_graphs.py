#!/usr/bin/env python3
"""Make L, G, LG and HLG of a lexicon and an ARPA language model; needs k2."""

from icefall_kd.cli import parse_config
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging
from icefall_kd.text.graphs import GraphConfig, make_graphs


def main() -> None:
    """Make L, G, LG and HLG of a lexicon and an ARPA language model; needs k2."""
    config = parse_config(GraphConfig)
    setup_logging()
    make_graphs(config)


if __name__ == "__main__":
    run_main(main)
