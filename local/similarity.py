#!/usr/bin/env python3
"""Compare the layers of two models by centred kernel alignment (CKA): JSON and a table.

    local/similarity.py --student exp/student --teacher exp/hubert --cuts data/fbank/cuts_dev.jsonl.gz --out cka.json
"""

from icefall_kd.cli import parse_config
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging


def main() -> None:
    """Compare, write and print."""
    # Imported late, so that --help answers at once.
    from icefall_kd.report.similarity import SimilarityConfig, measure, table

    setup_logging()
    print(table(measure(parse_config(SimilarityConfig, description=__doc__))), end="")


if __name__ == "__main__":
    run_main(main)
