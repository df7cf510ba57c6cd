#!/usr/bin/env python3
"""Decode test sets with a trained student and print error rates.

    ./decode.py --exp-dir exp/mvq --epoch 30 --avg 10 --decoding-method modified_beam_search \
        --manifest-dir data/aishell/fbank --test-parts test
"""

from icefall_kd.errors import run_main
from icefall_kd.recipe import decode_main

if __name__ == "__main__":
    run_main(decode_main)
