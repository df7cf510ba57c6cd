#!/usr/bin/env python3
"""Write the cut set of a noise corpus (MUSAN), which training mixes into its audio."""

import logging
from dataclasses import dataclass
from pathlib import Path

from icefall_kd.cli import parse_config
from icefall_kd.data.corpora import download
from icefall_kd.data.manifests import cuts_file, write_cuts
from icefall_kd.data.recordings import noise_cuts
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging

logger = logging.getLogger("make_noise")


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Write manifests/cuts_musan.jsonl.gz."""

    data_dir: Path
    """Folder of everything prepared."""
    musan_dir: Path
    """Folder of MUSAN, or of any other audio."""
    download: bool = False
    """Download MUSAN into musan-dir where it is absent."""


def main() -> None:
    """Make the cut set."""
    config = parse_config(NoiseConfig)
    setup_logging()
    if config.download:
        download("musan", config.musan_dir)
    count = write_cuts(cuts_file(config.data_dir / "manifests", "musan"), noise_cuts(config.musan_dir))
    logger.info("%d noises", count)


if __name__ == "__main__":
    run_main(main)
