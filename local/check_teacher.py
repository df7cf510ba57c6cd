#!/usr/bin/env python3
"""Check a teacher on a few utterances before labels are extracted.

    local/check_teacher.py --cuts data/fbank/cuts_train.jsonl.gz --teacher whisper-tiny.en --out exp/teacher.json
"""

from icefall_kd.cli import parse_config
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging


def main() -> None:
    # Imported late, so that --help answers at once.
    import torch

    from icefall_kd.teachers.check import CheckConfig, run_check

    setup_logging()
    config = parse_config(CheckConfig, description=__doc__)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    run_check(config)


if __name__ == "__main__":
    run_main(main)
