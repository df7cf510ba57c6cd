#!/usr/bin/env python3
"""Train a small neural language model over a tokenizer's tokens, for shallow fusion in decode.py --lm.

    local/train_lm.py --cuts data/manifests/cuts_train.jsonl.gz --valid-cuts data/manifests/cuts_dev.jsonl.gz \
        --lang-dir data/lang_bpe_500 --exp-dir exp/lm

Run the same command again to resume.
"""

import torch

from icefall_kd.cli import parse_config
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging
from icefall_kd.train.lm import TrainLmConfig, train_lm


def main() -> None:
    """Train."""
    config = parse_config(TrainLmConfig)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    setup_logging(config.exp_dir, "train-lm")
    train_lm(config)


if __name__ == "__main__":
    run_main(main)
