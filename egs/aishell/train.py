#!/usr/bin/env python3
"""Train a student; the same command resumes where it stopped.

    ./train.py --config conf/mvq.yaml --exp-dir exp/mvq --kd mvq --label-dir data/labels/whisper_q8
    ../../local/torchrun.py --standalone --nproc-per-node 4 ./train.py --config conf/mvq.yaml --exp-dir exp/mvq ...
"""

from icefall_kd.errors import run_main
from icefall_kd.recipe import train_main

if __name__ == "__main__":
    run_main(train_main)
