#!/usr/bin/env python3
"""Print the report that local/train_quantizer.py wrote beside a quantizer.

local/quantizer_report.py --quantizer exp/quantizer/quantizer.safetensors
"""

from dataclasses import dataclass
from pathlib import Path

from icefall_kd.cli import parse_config
from icefall_kd.errors import DataError, run_main
from icefall_kd.runtime.files import read_json
from icefall_kd.runtime.log import setup_logging


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Print the report of a quantizer."""

    quantizer: Path
    """The quantizer file."""


def main() -> None:
    setup_logging()
    config = parse_config(ReportConfig, description=__doc__)
    # Imported late: torch is needed to check that file and report belong together.
    from icefall_kd.quantization.quantizer import Quantizer
    from icefall_kd.quantization.report import print_report

    report = read_json(config.quantizer.with_suffix(".report.json"))
    sha256 = Quantizer.load(config.quantizer).sha256
    if report["sha256"] != sha256:
        raise DataError(f"the report beside {config.quantizer} is of quantizer {report['sha256']}, "
                        f"the file is {sha256}; run local/train_quantizer.py again")  # fmt: skip
    print_report(report)


if __name__ == "__main__":
    run_main(main)
