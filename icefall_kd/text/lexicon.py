"""Lexicon: words, the tokens that spell them, and the disambiguation symbols that keep the graphs determinizable.

Files, as icefall's users know them: ``lexicon.txt`` ("WORD token token ..." a line, several lines for several
spellings), ``words.txt`` (word and id a line) and, from the tokenizer, ``tokens.txt``.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from icefall_kd.errors import DataError
from icefall_kd.runtime.files import fingerprint, read_lines, write_text
from icefall_kd.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

EPS, BACKOFF, BOS, EOS = "<eps>", "#0", "<s>", "</s>"


@dataclass(frozen=True)
class Lexicon:
    """Words with their spellings; every word has an id, counted from 1 in the order of the words."""

    entries: list[tuple[str, tuple[str, ...]]]
    """(word, tokens), sorted and different."""

    def __post_init__(self) -> None:
        if not self.entries:
            raise DataError("the lexicon is empty: no word of the text can be written with the tokenizer's tokens")

    @property
    def words(self) -> list[str]:
        """Return all words by id: ``<eps>`` first, then the lexicon's, then ``#0``, ``<s>`` and ``</s>``."""
        return [EPS, *sorted({word for word, _ in self.entries}), BACKOFF, BOS, EOS]

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: Tokenizer) -> "Lexicon":
        """Collect the words of normalised texts with the tokens that the tokenizer writes them with."""
        return cls.checked((pair for text in texts for pair in tokenizer.spell(text)), tokenizer)

    @classmethod
    def checked(cls, pairs: Iterable[tuple[str, Iterable[str]]], tokenizer: Tokenizer) -> "Lexicon":
        """Keep the entries whose tokens the tokenizer has; the log says how many words fell away."""
        known = set(tokenizer.tokens[tokenizer.unk_id + 1 : tokenizer.mask_id])
        entries = {(word, tuple(pieces)) for word, pieces in pairs}
        kept = sorted((word, pieces) for word, pieces in entries if pieces and known.issuperset(pieces))
        lost = {word for word, _ in entries} - {word for word, _ in kept}
        if lost:
            shown = ", ".join(sorted(lost)[:5])
            logger.warning("%d words are left out, since the tokenizer lacks tokens of theirs: %s", len(lost), shown)
        return cls(kept)

    @classmethod
    def read(cls, path: str | Path, tokenizer: Tokenizer) -> "Lexicon":
        """Read a lexicon; a line with a word alone is spelt by the tokenizer.

        Raises:
            DataError: the file cannot be read, or no word of it has known tokens.
        """
        lines = [line.split() for line in read_lines(path)]
        reserved = {EPS, BACKOFF, BOS, EOS}
        pairs = ((w[0], w[1:] or _spelt(w[0], tokenizer)) for w in lines if w and w[0] not in reserved)
        return cls.checked(pairs, tokenizer)

    def write(self, folder: str | Path) -> None:
        """Write ``lexicon.txt`` and ``words.txt``."""
        lines = (" ".join((word, *pieces)) + "\n" for word, pieces in self.entries)
        write_text(Path(folder) / "words.txt", "".join(f"{word} {i}\n" for i, word in enumerate(self.words)))
        write_text(Path(folder) / "lexicon.txt", "".join(lines))

    @property
    def hash(self) -> str:
        """SHA-256 of all entries."""
        return fingerprint([[word, *pieces] for word, pieces in self.entries])


def _spelt(word: str, tokenizer: Tokenizer) -> list[str]:
    return [piece for _, pieces in tokenizer.spell(word) for piece in pieces]


def disambiguate(spellings: list[tuple[str, ...]]) -> list[int]:
    """Choose the disambiguation symbol of every spelling, as Kaldi's add_lex_disambig does.

    A spelling that several words share, or that begins another one, is closed with #1, #2, ...; without it the
    lexicon could not be determinized.  (#0 is the language model's backoff.)

    Args:
        spellings: of all entries, in order.
    Returns:
        The number k of #k for each entry, 0 for none.
    """
    uses = Counter(spellings)
    beginnings = {pieces[:n] for pieces in uses for n in range(1, len(pieces))}
    taken: Counter = Counter()
    chosen = []
    for pieces in spellings:
        if uses[pieces] > 1 or pieces in beginnings:
            taken[pieces] += 1
            chosen.append(taken[pieces])
        else:
            chosen.append(0)
    return chosen
