#!/usr/bin/env python3
"""Export a trained transducer, Mask-CTC student or CIF recogniser, or one mode of a dual-mode recogniser.

    local/export.py --exp-dir exp/mvq --epoch 30 --avg 9 --format sherpa-onnx --quantize int8 --out-dir exported
    local/export.py --exp-dir exp/c2 --mode sparse --out-dir exported
"""

from icefall_kd.cli import parse_config
from icefall_kd.config import ExportConfig
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging


def main() -> None:
    """Export and print the files."""
    setup_logging()
    config = parse_config(ExportConfig, prog="local/export.py", description=__doc__)
    from icefall_kd.export.exporter import export  # here, so that --help does not wait for torch

    record = export(config)
    for precision, files in record["files"].items():
        print(f"{precision}: {', '.join(str(config.out_dir / name) for name in files.values())}")


if __name__ == "__main__":
    run_main(main)
