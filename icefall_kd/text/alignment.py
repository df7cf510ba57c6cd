"""Which pieces of a language model belong to which tokens of a recogniser, by the characters that both stand for.

Both sides read the same normalised text, so a token and a piece that share characters belong together, however each
side cuts the text up (our design): the state of a token is the mean over the pieces that it overlaps, weighted by the
characters that they share.  Characters against characters, and the language model's own vocabulary as tokens, are the
case where each token has one piece of its own.  A space belongs to what follows it, as sentencepiece writes it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from icefall_kd.text.tokenizer import SPACE, Tokenizer, pinyin_of_characters

Unit = Literal["token", "word"]


@dataclass(frozen=True)
class Alignment:
    """How the states of a text's pieces become states of its units."""

    weights: np.ndarray
    """(M, P) float32: share of each piece in each unit; rows add up to 1.  The last of both is the end of the text."""
    owner: np.ndarray
    """(U,) int64: the unit of each token, the end token included."""
    one_to_one: np.ndarray
    """(M,) bool: the unit has a piece to itself, and this piece no other unit."""


@dataclass(frozen=True)
class Misaligned:
    """Why a text cannot be aligned."""

    reason: str


def token_spans(tokenizer: Tokenizer, text: str) -> np.ndarray | None:
    """Return the characters (U, 2) of a normalised text that each token stands for, as start and end.

    Returns:
        None when the tokens do not spell the text, for instance because it is not normalised.
    """
    if tokenizer.kind == "pinyin":
        counts = [len(pieces) for pieces in pinyin_of_characters(text)]
        start = np.repeat(np.arange(len(text)), counts)
        return np.stack([start, start + 1], axis=1)
    pieces = tokenizer.pieces(text)
    lead = int(tokenizer.kind == "bpe" or (tokenizer.kind == "plm" and tokenizer.unit == "word"))
    if "".join(pieces) != SPACE * (lead if text else 0) + text.replace(" ", SPACE):
        return None
    ends = np.cumsum([0, *map(len, pieces)]) - lead
    return np.stack([ends[:-1], ends[1:]], axis=1).clip(min=0)


def close_gaps(spans: np.ndarray, text: str) -> np.ndarray:
    """Return spans (P, 2) of pieces without white space at their ends and without gaps inside of a word.

    What a language model's normalisation drops (accents that it strips) belongs to the piece before it.  A word of
    which it dropped the beginning keeps the gap, and so does one that it dropped as a whole.
    """
    closed = np.array(spans, np.int64).reshape(-1, 2)
    for span in closed:
        while span[0] < span[1] and text[span[0]].isspace():
            span[0] += 1
        while span[0] < span[1] and text[span[1] - 1].isspace():
            span[1] -= 1
    for i, (start, end) in enumerate(closed):
        following = closed[i + 1, 0] if i + 1 < len(closed) else len(text)
        while start < end < following and not text[end].isspace():
            end += 1
        closed[i, 1] = end
    return closed


def align(tokenizer: Tokenizer, text: str, pieces: np.ndarray, unit: Unit = "token") -> Alignment | Misaligned:
    """Align the tokens of a text, or its words, with the pieces of a language model.

    Args:
        tokenizer: of the recogniser.
        text: normalised text.
        pieces: (P, 2) characters of each piece; the last one is the end of the text.
        unit: "word": between spaces; without spaces (characters, pinyin) a character is one.
    Returns:
        The alignment of M units, the end of the text included; why there is none, when a unit has no piece.
    """
    spans = token_spans(tokenizer, text) if text else None
    if spans is None:
        return Misaligned("its tokens do not spell it")
    tokens = _characters(_without_spaces(spans, text), len(text))
    units, owner = tokens, np.arange(len(tokens))
    if unit == "word":
        words = _words(tokenizer, text)
        belongs = tokens @ words.T > 0
        if not (belongs.sum(axis=1) == 1).all():
            return Misaligned(f"token {int(np.argmax(belongs.sum(axis=1) != 1)) + 1} is of no word, or of several")
        units, owner = words, belongs.argmax(axis=1)
    shared = units @ _characters(pieces[:-1], len(text)).T
    total = shared.sum(axis=1, keepdims=True)
    if not total.all():
        i = int(np.argmin(total[:, 0]))
        where = np.flatnonzero(units[i])
        said = f"{text[where[0] : where[-1] + 1]!r}" if len(where) else "nothing"
        return Misaligned(f"{unit} {i + 1}, {said}, has no piece of the language model")
    overlaps = shared > 0
    alone = (overlaps.sum(axis=1) == 1) & (overlaps[:, overlaps.sum(axis=0) == 1].sum(axis=1) == 1)
    weights = np.zeros((len(units) + 1, len(pieces)), np.float32)
    weights[:-1, :-1] = shared / total
    weights[-1, -1] = 1
    return Alignment(weights, np.append(owner, len(units)), np.append(alone, True))


def _characters(spans: np.ndarray, length: int) -> np.ndarray:
    """Return which characters (n, length) float32 are in each span (n, 2)."""
    places = np.arange(length)
    return ((places >= spans[:, :1]) & (places < spans[:, 1:])).astype(np.float32)


def _without_spaces(spans: np.ndarray, text: str) -> np.ndarray:
    """Return spans without spaces in front; a token that is a space gets the first character behind it."""
    spans = spans.copy()
    for span in spans:
        while span[0] < len(text) and text[span[0]].isspace():
            span[0] += 1
        span[1] = max(span[1], min(span[0] + 1, len(text)))
    return spans


def _words(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return which characters (M, L) are in each word."""
    spaces = np.array([c.isspace() for c in text], bool)
    number = np.cumsum(spaces) if tokenizer.unit == "word" else np.arange(len(text))
    return ((number == np.unique(number[~spaces])[:, None]) & ~spaces).astype(np.float32)
