"""N-gram language models: interpolated modified Kneser-Ney estimation, ARPA files, scores with back-off.

Estimation is that of Chen and Goodman ("An empirical study of smoothing techniques for language modeling", 1998)
with the conventions of KenLM's lmplz (Heafield et al. 2013): counts of distinct left neighbours below the highest
order, except for what begins with <s>; unigrams interpolated with the uniform distribution over all words but <s>.
The code is ours, since the Python package of KenLM is a source package that only queries.  It holds all counts in
memory: for millions of sentences, not for billions of words; any ARPA file of another tool can be read.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.files import atomic_write, read_lines

logger = logging.getLogger(__name__)

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
# What lmplz --discount_fallback takes where too little text gives no discounts.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
_LN10 = math.log(10.0)
# log10 of the probability of <s>, which is never predicted, and of unknown words of a file without <unk>.
_NEVER, _UNKNOWN = -99.0, -100.0

Ngram = tuple[str, ...]
State = Ngram


class NgramLm:
    """A back-off model.  A state is the part of the history that matters, a tuple of words."""

    def __init__(self, order: int, ngrams: dict[Ngram, tuple[float, float]]) -> None:
        """Hold the entries of an ARPA file.

        Args:
            order: longest n-gram.
            ngrams: n-gram -> (log10 probability, log10 back-off weight; 0 where it has none).
        """
        self.order, self.ngrams = order, ngrams

    @property
    def words(self) -> list[str]:
        """All words, <s>, </s> and <unk> included where the file has them."""
        return [ngram[0] for ngram in self.ngrams if len(ngram) == 1]

    @property
    def start(self) -> State:
        """Return the state at the begin of a sentence."""
        return self._shorten((BOS,))

    def score(self, state: State, word: str) -> tuple[float, State]:
        """Return the natural log-probability of ``word`` (``</s>``: of the end) after ``state``, and the next state."""
        if (word,) not in self.ngrams:
            if (UNK,) not in self.ngrams:
                return _UNKNOWN * _LN10, ()
            word = UNK
        log_prob, history = 0.0, state
        while (entry := self.ngrams.get((*history, word))) is None:
            log_prob += self.ngrams.get(history, (0.0, 0.0))[1]
            history = history[1:]
        return (log_prob + entry[0]) * _LN10, self._shorten((*state, word))

    def _shorten(self, history: Ngram) -> State:
        """Return the longest end of ``history`` that the model has as a history."""
        history = history[max(0, len(history) - self.order + 1) :] if self.order > 1 else ()
        while history and history not in self.ngrams:
            history = history[1:]
        return history

    def write(self, path: Path | str) -> None:
        """Write the model as an ARPA file."""
        by_length: list[list[Ngram]] = [[] for _ in range(self.order)]
        for ngram in self.ngrams:
            by_length[len(ngram) - 1].append(ngram)
        with atomic_write(path, "w") as f:
            f.write("\\data\\\n" + "".join(f"ngram {n}={len(x)}\n" for n, x in enumerate(by_length, 1)))
            for n, found in enumerate(by_length, 1):
                f.write(f"\n\\{n}-grams:\n")
                for ngram in sorted(found):
                    log_prob, backoff = self.ngrams[ngram]
                    tail = f"\t{backoff:.7f}" if n < self.order else ""
                    f.write(f"{log_prob:.7f}\t{' '.join(ngram)}{tail}\n")
            f.write("\n\\end\\\n")


def read_arpa(path: Path | str) -> NgramLm:
    """Read an ARPA file (or .arpa.gz).

    Raises:
        DataError: it is missing, or is none; names the line.
    """
    path = Path(path)
    counts: dict[int, int] = {}
    ngrams: dict[Ngram, tuple[float, float]] = {}
    found: Counter[int] = Counter()
    section, number = None, 0
    for number, line in enumerate(read_lines(path), 1):
        words = line.split()
        if not words or section == "\\end\\":
            continue
        try:
            if words[0].startswith("\\"):
                section = words[0]
                n = int(section[1 : section.index("-")]) if section.endswith("-grams:") else 0
            elif section == "\\data\\":
                left, _, right = " ".join(words).removeprefix("ngram").partition("=")
                counts[int(left)] = int(right)
            elif section is not None:
                if len(words) not in (n + 1, n + 2):
                    raise ValueError(f"{n} words and one or two numbers belong there")
                values = [float(words[0]), float(words[n + 1]) if len(words) == n + 2 else 0.0]
                if not max(values) < math.inf or any(map(math.isnan, values)):
                    raise ValueError("a logarithm of a probability is finite")
                # A score of -inf would make the sum of two hypotheses no number.
                ngrams[tuple(words[1 : n + 1])] = (max(values[0], _UNKNOWN), max(values[1], _UNKNOWN))
                found[n] += 1
        except (ValueError, IndexError) as error:
            raise DataError(f"{path}:{number} is no line of an ARPA file ({error}): {line.strip()[:80]}") from None
    if section != "\\end\\" or not counts or dict(found) != {n: c for n, c in counts.items() if c}:
        raise DataError(
            f"{path} is no whole ARPA file: its header names {counts} n-grams by order, {dict(found)} were found "
            f"in {number} lines, the last section is {section}; make it again"
        )
    return NgramLm(max(counts), ngrams)


def estimate(sentences: Iterable[Sequence[str]], order: int, vocabulary: Iterable[str] = ()) -> NgramLm:
    """Estimate an interpolated modified Kneser-Ney model.

    Args:
        sentences: words (or tokens) of each sentence, without <s> and </s>.
        order: longest n-gram, 1 or more.
        vocabulary: words that the model knows even if the text lacks them.
    Raises:
        DataError: there is no text, or it holds <s> or </s>.
    """
    if order < 1:
        raise ConfigError(f"--order is {order}; it must be at least 1")
    counts = _adjusted_counts(sentences, order)
    words = sorted({w for (w,) in counts[0]} | set(vocabulary) | {EOS, UNK})
    uniform = 1.0 / len(words)
    ngrams: dict[Ngram, tuple[float, float]] = {}
    shorter: dict[Ngram, float] = {}
    weights: dict[Ngram, float] = {}  # of the back-off, by history
    for n, adjusted in enumerate(counts, 1):
        discounts = _discounts(adjusted, n)
        totals: dict[Ngram, int] = defaultdict(int)
        held: dict[Ngram, float] = defaultdict(float)
        for ngram, count in adjusted.items():
            totals[ngram[:-1]] += count
            held[ngram[:-1]] += discounts[min(count, 3) - 1]
        weights |= {history: mass / totals[history] for history, mass in held.items()}
        listed = [(w,) for w in words] if n == 1 else adjusted
        probs = {}
        for ngram in listed:
            count, history = adjusted.get(ngram, 0), ngram[:-1]
            kept = (count - discounts[min(count, 3) - 1]) / totals[history] if count else 0.0
            probs[ngram] = kept + weights[history] * (uniform if n == 1 else shorter[ngram[1:]])
        ngrams |= {ngram: (math.log10(p), 0.0) for ngram, p in probs.items()}
        shorter = probs
    ngrams[(BOS,)] = (_NEVER, 0.0)
    for history, weight in weights.items():
        if history:
            ngrams[history] = (ngrams[history][0], math.log10(weight))
    return NgramLm(order, ngrams)


def _adjusted_counts(sentences: Iterable[Sequence[str]], order: int) -> list[Counter[Ngram]]:
    """Return the counts of each order: occurrences at the highest and after <s>, else distinct left neighbours."""
    counts: list[Counter[Ngram]] = [Counter() for _ in range(order)]
    empty = True
    for sentence in sentences:
        empty = False
        padded = (BOS, *sentence, EOS)
        if BOS in padded[1:] or EOS in padded[:-1]:
            raise DataError(f"a sentence holds {BOS} or {EOS}: {' '.join(sentence)[:80]}")
        first = 1 if order == 1 else 0
        for i in range(first, len(padded) - order + 1):
            counts[-1][padded[i : i + order]] += 1
        for n in range(2, order):
            if n <= len(padded):
                counts[n - 1][padded[:n]] += 1
    if empty:
        raise DataError("there is no sentence to estimate a language model from")
    for n in range(order - 1, 0, -1):
        counts[n - 1].update(ngram[1:] for ngram in counts[n])
    return counts


def _discounts(adjusted: Counter[Ngram], n: int) -> tuple[float, float, float]:
    """Return the discounts of counts 1, 2, and 3 or more (Chen and Goodman 1998, equation 26)."""
    t = [0, 0, 0, 0]
    for count in adjusted.values():
        if count <= 4:
            t[count - 1] += 1
    if t[0] and t[1] and t[2]:
        y = t[0] / (t[0] + 2 * t[1])
        found = tuple(k - (k + 1) * y * t[k] / t[k - 1] for k in (1, 2, 3))
        if all(0 < d <= k for k, d in enumerate(found, 1)):
            return found
    logger.warning("%d-grams are too few for discounts of their own; taken are %s", n, FALLBACK_DISCOUNTS)
    return FALLBACK_DISCOUNTS
