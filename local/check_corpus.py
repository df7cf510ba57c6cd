#!/usr/bin/env python3
"""Download a corpus where it is absent, and compare its counts and hours with the table of published ones."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from icefall_kd.cli import parse_config
from icefall_kd.data.corpora import check_corpus, download, open_corpus
from icefall_kd.data.manifests import read_cuts
from icefall_kd.data.prepare import CorpusConfig, cut_set_files
from icefall_kd.errors import run_main
from icefall_kd.runtime.files import write_json
from icefall_kd.runtime.log import setup_logging


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Check a corpus, and download what is absent."""

    corpus: CorpusConfig
    download: bool = False
    """Download into corpus-dir what is absent (librispeech, mini, aishell)."""
    partial: bool = False
    """Accept a corpus that holds less than was published."""
    out: Path | None = None
    """JSON file of the counts."""


def main() -> None:
    """Check, and leave the counts in a file."""
    config = parse_config(CheckConfig)
    setup_logging()
    c = config.corpus
    if config.download:
        download(c.corpus, c.corpus_dir, c.parts or ())
    if c.corpus == "cuts":
        rows = [{"part": part, "utterances": len(read_cuts(file))} for part, file in cut_set_files(c).items()]
    else:
        corpus = open_corpus(c.corpus, c.corpus_dir, c.parts or (), c.language)
        checks = check_corpus(corpus, nj=c.nj, partial=config.partial, max_reject_ratio=c.max_reject_ratio)
        rows = [dataclasses.asdict(check) for check in checks]
    if config.out is not None:
        write_json(config.out, rows)


if __name__ == "__main__":
    run_main(main)
