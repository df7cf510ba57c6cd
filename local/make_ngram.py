#!/usr/bin/env python3
"""Estimate an n-gram language model from text and write it as an ARPA file.

    local/make_ngram.py --cuts data/manifests/cuts_train.jsonl.gz --order 3 --out data/lm/words_3gram.arpa
    local/make_ngram.py --text more.txt --order 4 --lang-dir data/lang_bpe_500 --out data/lm/tokens_4gram.arpa

With --lang-dir the units are that tokenizer's tokens, which is what decode.py --lm takes; without, words.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from icefall_kd.cli import parse_config
from icefall_kd.errors import run_main
from icefall_kd.runtime.files import write_json
from icefall_kd.runtime.log import setup_logging
from icefall_kd.text.corpus import TextConfig, sentences
from icefall_kd.text.ngram import UNK, estimate
from icefall_kd.text.tokenizer import Tokenizer

logger = logging.getLogger("make_ngram")


@dataclass(frozen=True, kw_only=True)
class NgramConfig:
    """Estimate an n-gram language model from text and write it as an ARPA file."""

    source: TextConfig
    out: Path
    """ARPA file; beside it FILE.json records order, units and tokenizer."""
    order: int = 3
    """Longest n-gram."""
    lang_dir: Path | None = None
    """Units are the tokens of this tokenizer; None: words, separated by spaces."""


def main() -> None:
    """Estimate and write."""
    config = parse_config(NgramConfig)
    setup_logging()
    tokenizer = Tokenizer.load(config.lang_dir) if config.lang_dir is not None else None
    if tokenizer is None:
        lm = estimate((line.split() for line in sentences(config.source)), config.order)
    else:
        known = dict.fromkeys(tokenizer.tokens[3:-1])
        # decode.py wants words that are tokens, and a search emits no others.
        lines = ([p if p in known else UNK for p in tokenizer.pieces(line)] for line in sentences(config.source))
        lm = estimate(lines, config.order, known)
    lm.write(config.out)
    record = {"order": config.order, "units": "words", "ngrams": len(lm.ngrams)}
    if tokenizer is not None:
        record |= {"units": "tokens", "tokenizer_hash": tokenizer.hash}
    write_json(config.out.with_name(config.out.name + ".json"), record)
    logger.info("%s: %d n-grams of up to %d %s", config.out, len(lm.ngrams), config.order, record["units"])


if __name__ == "__main__":
    run_main(main)
