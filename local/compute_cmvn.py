#!/usr/bin/env python3
"""Compute the statistics of log-mel features that a HuBERT student with --front-end fbank starts from (--cmvn).

    local/compute_cmvn.py --manifest-dir data/fbank --parts train --out data/cmvn.safetensors
"""

from icefall_kd.cli import parse_config
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging


def main() -> None:
    """Read the audio and write the file."""
    # Imported late, so that a wrong shell line fails before torch is loaded.
    from icefall_kd.data.cmvn import CmvnConfig, compute_cmvn

    setup_logging()
    config = parse_config(CmvnConfig, description=__doc__)
    compute_cmvn(config.manifest_dir, config.parts, config.out, config.cmvn_utts)


if __name__ == "__main__":
    run_main(main)
