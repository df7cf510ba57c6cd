#!/usr/bin/env python3
"""Import codebook indexes that icefall published (.h5 and jsonl.gz) as a label set; a killed import goes on by itself.

    local/import_labels.py --indexes vq/with_codebook_indexes-librispeech-cuts_train-clean-100.jsonl.gz \\
        --cuts data/fbank/cuts_train-clean-100.jsonl.gz --label-dir data/labels/hubert-layer36-q8 \\
        --teacher hubert_xtralarge_ll60k_finetune_ls960 --layer 36 --layer-convention 1-based --dim 1280
"""

from icefall_kd.cli import parse_config
from icefall_kd.config import ImportConfig
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging


def main() -> None:
    setup_logging()
    config = parse_config(ImportConfig, description=__doc__)
    # Imported late, so that --help and usage errors answer at once.
    from icefall_kd.labels.import_icefall import import_labels

    print(import_labels(config))


if __name__ == "__main__":
    run_main(main)
