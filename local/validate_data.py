#!/usr/bin/env python3
"""Check prepared data against everything that training assumes; exit code 4 when something is wrong."""

from icefall_kd.cli import parse_config
from icefall_kd.data.validate import ValidateConfig, validate_data
from icefall_kd.errors import run_main
from icefall_kd.runtime.files import write_json
from icefall_kd.runtime.log import setup_logging


def main() -> None:
    """Validate, and leave the report in the data folder."""
    config = parse_config(ValidateConfig)
    setup_logging()
    write_json(config.data_dir / f"validated_{config.lang_dir.name}.json", validate_data(config))


if __name__ == "__main__":
    run_main(main)
