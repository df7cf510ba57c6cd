#!/usr/bin/env python3
"""Write report.html of a training: one page with options, losses, results and what its system shows.

    local/report.py --exp-dir exp/demo/mvq-seed42
    local/report.py --exp-dir exp/demo-nar/small-both-seed42 --compare-with exp/demo-nar/small-seed42
"""

from icefall_kd.cli import parse_config
from icefall_kd.config import ReportConfig
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging


def main() -> None:
    """Write the page and print its path."""
    setup_logging()
    config = parse_config(ReportConfig, prog="local/report.py", description=__doc__)
    from icefall_kd.report.build import write_report  # here, so that --help does not wait for torch and matplotlib

    print(write_report(config))


if __name__ == "__main__":
    run_main(main)
