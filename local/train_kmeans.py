#!/usr/bin/env python3
"""Find the clusters that HuBERT predicts: k-means of MFCC, or of a layer of a model that is there already.

    local/train_kmeans.py --cuts data/fbank/cuts_train.jsonl.gz --out exp/kmeans/mfcc.safetensors \\
        --teacher mfcc --num-clusters 100
"""

from icefall_kd.cli import parse_config
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging


def main() -> None:
    # Imported late, so that a wrong shell line fails before torch is loaded.
    from icefall_kd.quantization.kmeans import TrainKmeansConfig, describe, train_kmeans

    setup_logging()
    config = parse_config(TrainKmeansConfig, description=__doc__)
    print(f"{config.out}: {describe(train_kmeans(config))}")


if __name__ == "__main__":
    run_main(main)
