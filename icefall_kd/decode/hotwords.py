"""Hot words: phrases that a beam search prefers (our design after the context graphs of icefall and WeNet).

A phrase of n tokens with score s earns n * s each time it occurs in the tokens of a hypothesis.  So that the beam
does not lose it before it is complete, s is lent for each token of a match that may still become complete, and is
taken back when the match breaks.  Matches are followed by the automaton of Aho and Corasick (1975).
"""

import math
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.files import read_lines
from icefall_kd.text.normalize import normalize_text
from icefall_kd.text.tokenizer import Tokenizer

Phrase = tuple[Sequence[int], float]


class HotwordGraph:
    """The automaton over all phrases; a state is a number, 0 that of no match."""

    def __init__(self, phrases: Sequence[Phrase]) -> None:
        """Build the automaton.

        Args:
            phrases: (token ids, score a token); of the same tokens twice the higher score counts.
        """
        self.children: list[dict[int, int]] = [{}]
        self.fail = [0]
        # What completing matches earns on arrival, and what is lent to matches that are not complete.
        self.earned, self.lent = [0.0], [0.0]
        for tokens, score in phrases:
            node = 0
            for depth, token in enumerate(tokens):
                self.lent[node] = max(self.lent[node], depth * score)
                if token not in self.children[node]:
                    self.children[node][token] = len(self.fail)
                    self.children.append({})
                    self.fail.append(0)
                    self.earned.append(0.0)
                    self.lent.append(0.0)
                node = self.children[node][token]
            self.earned[node] = max(self.earned[node], len(tokens) * score)
        queue = deque(self.children[0].values())
        while queue:
            node = queue.popleft()
            # Shorter phrases that end here, too, and longer ones that a shorter match may begin.
            self.earned[node] += self.earned[self.fail[node]]
            self.lent[node] = max(self.lent[node], self.lent[self.fail[node]])
            for token, child in self.children[node].items():
                self.fail[child] = self._go(self.fail[node], token)
                queue.append(child)

    def _go(self, state: int, token: int) -> int:
        while token not in self.children[state]:
            if state == 0:
                return 0
            state = self.fail[state]
        return self.children[state][token]

    def extend(self, state: int, token: int) -> tuple[float, int]:
        """Return what ``token`` adds after ``state``, and the next state."""
        after = self._go(state, token)
        return self.earned[after] + self.lent[after] - self.lent[state], after

    def final(self, state: int) -> float:
        """Return what the end of the hypothesis adds: minus what is lent."""
        return -self.lent[state]


def read_hotwords(file: Path, tokenizer: Tokenizer, score: float) -> list[Phrase]:
    """Read phrases, one a line, with a score of its own as in ``NEW YORK :2.5``; ``score`` counts for the others.

    A phrase is taken as it stands or, where that gives unknown tokens, normalised as transcripts are.

    Raises:
        DataError: the file is missing, or holds no phrase.
        ConfigError: a score is not positive, or a phrase has tokens that the model lacks.
    """
    phrases = []
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        text, _, own = re.fullmatch(r"(.*?)(\s:(\S+))?", line.strip()).groups()
        phrases.append((_tokens(text, tokenizer, f"{file}:{number}"), _score(own, score, f"{file}:{number}")))
    if not phrases:
        raise DataError(f"{file} holds no phrase; write one a line")
    return phrases


def _tokens(text: str, tokenizer: Tokenizer, where: str) -> list[int]:
    language = "en" if tokenizer.unit == "word" else "zh"
    for form in (text, normalize_text(text, language)):
        tokens = tokenizer.encode(form)
        if tokens and tokenizer.unk_id not in tokens:
            return tokens
    raise ConfigError(f"{where}: {text!r} cannot be written with the tokens of this model; spell it as transcripts do")


def _score(text: str | None, default: float, where: str) -> float:
    try:
        score = default if text is None else float(text)
    except ValueError:
        score = 0.0
    if not 0 < score < math.inf:
        raise ConfigError(f"{where}: the score {text if text is not None else default} is no number above 0")
    return score
