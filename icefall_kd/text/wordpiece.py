"""WordPiece over a recogniser's own spelling: greedy longest match, as BERT's tokenizer does it (Wu et al. 2016).

A language model's pieces are written here as they stand in the normalised text: in its case, with its accents, with
"\u2581" in front of what follows a space.  So joining pieces gives the text back, and what the language model folds
together (case, accents) stays apart.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

SPACE = "\u2581"
# What BERT's tokenizer makes words of one character of.
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


def is_alone(character: str) -> bool:
    """Tell whether BERT's tokenizer takes a character for a word of its own: an ideograph, or punctuation."""
    code = ord(character)
    if code < 128:
        return 32 < code < 127 and not character.isalnum()
    return unicodedata.category(character)[0] == "P" or any(a <= code <= b for a, b in _IDEOGRAPHS)


def split_words(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of the words within which pieces lie: between spaces, with some characters alone."""
    start = None
    for i, c in enumerate(text):
        alone = is_alone(c)
        if (alone or c.isspace()) and start is not None:
            yield start, i
            start = None
        if alone:
            yield i, i + 1
        elif start is None and not c.isspace():
            start = i
    if start is not None:
        yield start, len(text)


@dataclass(frozen=True)
class WordPieces:
    """The pieces that texts are spelled with."""

    first: frozenset[str]
    """Pieces that begin a word; SPACE in front of those that follow a space."""
    inner: frozenset[str]
    """Pieces that continue one."""
    spaced: bool
    """Whether the texts have spaces; without them SPACE occurs in no piece."""

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.first | self.inner), default=1)

    def split(self, text: str) -> list[str]:
        """Return the pieces of a text, the longest first in each word; a character that has none stays itself."""
        found = []
        for start, end in split_words(text):
            lead, known = self._lead(text, start), self.first
            while start < end:
                stop = min(end, start + self._longest)
                while stop > start + 1 and lead + text[start:stop] not in known:
                    stop -= 1
                found.append(lead + text[start:stop])
                start, lead, known = stop, "", self.inner
        return found

    def _lead(self, text: str, start: int) -> str:
        return SPACE if self.spaced and (start == 0 or text[start - 1].isspace()) else ""

    def to_dict(self) -> dict:
        """Return the plain form that is stored."""
        return {"first": sorted(self.first), "inner": sorted(self.inner), "spaced": self.spaced}

    @classmethod
    def from_dict(cls, content: dict) -> "WordPieces":
        """Read back what :meth:`to_dict` wrote."""
        return cls(frozenset(content["first"]), frozenset(content["inner"]), bool(content["spaced"]))

    @classmethod
    def collect(
        cls, texts: Sequence[str], pieces: Iterable[Sequence[tuple[int, int, bool]]], min_count: int = 1
    ) -> "WordPieces":
        """Collect the pieces that a language model cuts texts into, and all characters, which spell everything else.

        Args:
            texts: normalised texts.
            pieces: of each text: start and end of every piece, and whether the language model knows it.
            min_count: pieces that occur less often are spelled with shorter ones.
        """
        some = cls(frozenset(), frozenset(), any(" " in text for text in texts))
        first, inner, characters = Counter(), Counter(), (set(), set())
        for text, spans in zip(texts, pieces, strict=True):
            at = {}
            for start, end, known in spans:
                at.setdefault(start, []).append((end, known))
            for start, end in split_words(text):
                lead = some._lead(text, start)
                for kind, place, stop in _tiles(at, start, end):
                    (inner if kind else first)[("" if kind else lead) + text[place:stop]] += 1
                some._spell(text[start:end], lead, characters)
        kept = [frozenset(p for p, n in count.items() if n >= min_count) for count in (first, inner)]
        return cls(kept[0] | characters[0], kept[1] | characters[1], some.spaced)

    def _spell(self, word: str, lead: str, characters: tuple[set[str], set[str]]) -> None:
        """Add the pieces of one character each that spell a word, and others of the same characters."""
        if len(word) == 1 and is_alone(word):
            characters[0].add(lead + word)
            return
        for c in word:
            characters[0].update({c, SPACE + c} if self.spaced else {c})
            characters[1].add(c)


def _tiles(at: dict[int, list[tuple[int, bool]]], start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number in the word, start, end) of the pieces of a word, nothing unless known pieces tile it exactly."""
    found, place = [], start
    while place < end:
        here = at.get(place, [])
        if len(here) != 1 or not here[0][1] or not place < here[0][0] <= end:
            return
        found.append((len(found), place, here[0][0]))
        place = here[0][0]
    yield from found
