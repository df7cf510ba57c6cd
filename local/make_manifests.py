#!/usr/bin/env python3
"""Write the cut sets of a corpus (with speed copies of the training parts), and what was rejected."""

from dataclasses import dataclass

from icefall_kd.cli import parse_config
from icefall_kd.data.prepare import CorpusConfig, ManifestConfig, make_manifests
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging


@dataclass(frozen=True, kw_only=True)
class MakeManifestsConfig:
    """Write the manifests of a corpus."""

    corpus: CorpusConfig
    manifests: ManifestConfig


def main() -> None:
    """Make the manifests."""
    config = parse_config(MakeManifestsConfig)
    setup_logging()
    make_manifests(config.corpus, config.manifests)


if __name__ == "__main__":
    run_main(main)
