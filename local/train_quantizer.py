#!/usr/bin/env python3
"""Train the quantizer of a label set on a sample of utterances and report on it before any label is extracted.

    local/train_quantizer.py --cuts data/fbank/cuts_train.jsonl.gz --out exp/quantizer/quantizer.safetensors \\
        --teacher whisper-tiny.en --num-codebooks 8
"""

from icefall_kd.cli import parse_config
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging


def main() -> None:
    # Imported late, so that a wrong shell line fails before torch is loaded.
    from icefall_kd.quantization.collect import TrainQuantizerConfig, train_quantizer
    from icefall_kd.quantization.report import print_report

    setup_logging()
    config = parse_config(TrainQuantizerConfig, description=__doc__)
    print_report(train_quantizer(config))


if __name__ == "__main__":
    run_main(main)
