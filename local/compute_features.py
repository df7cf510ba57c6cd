#!/usr/bin/env python3
"""Compute and store the log-mel features of cut sets, in one run or split by split.

    local/compute_features.py --data-dir data/demo --nj 4
    local/compute_features.py --data-dir data/demo --nj 4 --shard 0    and so on to 3; then the line above, which joins
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from icefall_kd.cli import parse_config
from icefall_kd.data.features import FbankExtractor, store_features
from icefall_kd.data.manifests import cuts_file
from icefall_kd.errors import run_main
from icefall_kd.runtime.files import read_record
from icefall_kd.runtime.log import setup_logging

logger = logging.getLogger("compute_features")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Compute and store features."""

    data_dir: Path
    """Folder of everything prepared: manifests/ is read, fbank/ is written."""
    parts: list[str] | None = None
    """Parts to compute; None: those of corpus.json."""
    nj: int = 4
    """Splits of a part and processes; clipped to the number of cuts."""
    shard: int | None = None
    """Compute this split alone, from 0, in this process; None: those that are missing, and join all of them."""
    backend: Literal["auto", "kaldifeat", "lhotse"] = "auto"
    """auto: kaldifeat where it imports, else lhotse."""


def main() -> None:
    """Compute the features of every part."""
    config = parse_config(FeaturesConfig, description=__doc__)
    setup_logging()
    parts = config.parts or list(read_record(config.data_dir / "corpus.json", parts=dict)["parts"])
    manifests = [cuts_file(config.data_dir / "manifests", part) for part in parts]
    extractor = FbankExtractor(backend=config.backend)
    counts = store_features(manifests, config.data_dir / "fbank", extractor, config.nj, config.shard)
    if config.shard is None:
        logger.info("features by %s: %s", extractor.backend, ", ".join(f"{p} {n} cuts" for p, n in counts.items()))


if __name__ == "__main__":
    run_main(main)
