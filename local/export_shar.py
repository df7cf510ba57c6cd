#!/usr/bin/env python3
"""Write cuts, their features or audio and their teacher labels as a Lhotse Shar, for train.py --shar-dir.

A finished shard is skipped, a killed export goes on where it was, and --job K --num-jobs N is a job of an array.

    local/export_shar.py --cuts data/fbank/cuts_train.jsonl.gz --label-dir data/labels/hubert \\
        --shar-dir data/shar/train --num-shards 1024
"""

from icefall_kd.cli import parse_config
from icefall_kd.config import SharConfig
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging


def main() -> None:
    setup_logging()
    config = parse_config(SharConfig, description=__doc__)
    # Imported late, so that --help and usage errors answer at once.
    from icefall_kd.data.shar_export import export_shar

    report = export_shar(config)
    to_come = report.num_shards - report.finished
    state = f"{to_come} are to come" if to_come else "it is whole"
    print(f"{report.path}: {report.written} shards written, {report.finished} of {report.num_shards} finished; {state}")


if __name__ == "__main__":
    run_main(main)
