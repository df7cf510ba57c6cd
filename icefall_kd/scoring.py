"""Error counting and the recogs, errs and wer-summary files that icefall users know.

Units: ``word`` splits at white space; ``char`` takes every character that is no white space, Latin
letters too (icefall's compute_CER); ``mixed`` takes CJK characters one by one and keeps runs of other
scripts whole; ``token`` takes tokens separated by white space.  Errors are those of a Levenshtein
alignment with unit costs (kaldialign).  No torch here: results are compared and re-scored without it.
"""

import ast
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import kaldialign
import numpy as np

from icefall_kd.bootstrap import confidence_interval
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.files import atomic_write, write_text

# No unit can be the empty string, so it is a safe gap symbol in counting; files show '*'.
_GAP = ""
SHOWN_GAP = "*"
_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_MIXED = re.compile(rf"[{_HAN}]|[^\s{_HAN}]+")

UNITS = {
    "word": lambda text: text.split(),
    "char": lambda text: list("".join(text.split())),
    "mixed": _MIXED.findall,
    "token": lambda text: text.split(),
}
RATE_NAMES = {"word": "WER", "char": "CER", "mixed": "MER", "token": "TER"}
NORMALIZATION = {
    "word": "none; split at white space",
    "char": "none; every character that is no white space",
    "mixed": "none; CJK characters one by one, other runs between white space whole",
    "token": "none; tokens split at white space",
}


@dataclass(frozen=True)
class Score:
    """Errors of one system on one set, utterance by utterance."""

    unit: str
    ids: list[str]
    """Utterance ids, sorted."""
    refs: list[list[str]]
    """Reference units of each utterance."""
    hyps: list[list[str]]
    """Hypothesis units of each utterance."""
    alignments: list[list[tuple[str, str]]]
    """Aligned (reference, hypothesis) units; an empty string is a gap."""
    ins: np.ndarray
    """(n,) int64 insertions of each utterance."""
    dels: np.ndarray
    """(n,) int64 deletions."""
    subs: np.ndarray
    """(n,) int64 substitutions."""
    ref_lens: np.ndarray
    """(n,) int64 reference units."""

    @property
    def errors(self) -> np.ndarray:
        """Return the errors of each utterance, (n,) int64."""
        return self.ins + self.dels + self.subs

    @property
    def num_errors(self) -> int:
        """Return all errors."""
        return int(self.errors.sum())

    @property
    def num_ref(self) -> int:
        """Return all reference units."""
        return int(self.ref_lens.sum())

    @property
    def error_rate(self) -> float:
        """Return the error rate in per cent; nan without a single reference unit."""
        return 100.0 * self.num_errors / self.num_ref if self.num_ref else math.nan

    @property
    def name(self) -> str:
        """Return WER, CER, MER or TER."""
        return RATE_NAMES[self.unit]

    def line(self, label: str) -> str:
        """Return the log line that icefall prints for a set."""
        counts = f"{int(self.ins.sum())} ins, {int(self.dels.sum())} del, {int(self.subs.sum())} sub"
        return f"[{label}] %{self.name} {self.error_rate:.2f}% [{self.num_errors} / {self.num_ref}, {counts} ]"


def split_units(text: str | Sequence[str], unit: str) -> list[str]:
    """Return the scoring units of a text; a sequence of strings is joined with spaces first.

    Args:
        text: transcript, or words, or for ``token`` the tokens themselves.
        unit: word, char, mixed or token.
    """
    if unit not in UNITS:
        raise ConfigError(f"unknown scoring unit {unit!r}; use one of {', '.join(UNITS)}")
    return UNITS[unit](text if isinstance(text, str) else " ".join(text))


def score(
    refs: Sequence[str | Sequence[str]], hyps: Sequence[str | Sequence[str]], ids: Sequence[str], unit: str = "word"
) -> Score:
    """Align hypotheses with references and count errors.

    Args:
        refs: reference texts (or lists of units), one an utterance.
        hyps: hypothesis texts (or lists of units).
        ids: utterance ids, unique.
        unit: word, char, mixed or token.
    Returns:
        The :class:`Score`, sorted by id.
    Raises:
        DataError: different lengths, or a repeated id.
    """
    if not len(refs) == len(hyps) == len(ids):
        raise DataError(f"{len(refs)} references, {len(hyps)} hypotheses and {len(ids)} ids do not match")
    repeated = [i for i, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(f"{len(repeated)} utterance ids occur more than once, the first are {repeated[:5]}")
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    units = [(split_units(refs[i], unit), split_units(hyps[i], unit)) for i in order]
    alignments = [kaldialign.align(ref, hyp, _GAP) for ref, hyp in units]
    counts = np.zeros((len(ids), 3), dtype=np.int64)
    for row, alignment in zip(counts, alignments, strict=True):
        for ref, hyp in alignment:
            if ref != hyp:
                row[0 if ref == _GAP else 1 if hyp == _GAP else 2] += 1
    return Score(
        unit=unit,
        ids=[ids[i] for i in order],
        refs=[ref for ref, _ in units],
        hyps=[hyp for _, hyp in units],
        alignments=alignments,
        ins=counts[:, 0],
        dels=counts[:, 1],
        subs=counts[:, 2],
        ref_lens=np.array([len(ref) for ref, _ in units], dtype=np.int64),
    )


def summarize(scored: Score, num_samples: int, seed: int = 0) -> dict:
    """Return totals, error rate and its 95 % bootstrap interval as plain data (rates in per cent)."""
    interval = confidence_interval(scored.errors, scored.ref_lens, num_samples, seed) if num_samples else None
    return {
        "unit": scored.unit,
        "normalization": NORMALIZATION[scored.unit],
        "num_utterances": len(scored.ids),
        "num_ref": scored.num_ref,
        "errors": scored.num_errors,
        "ins": int(scored.ins.sum()),
        "del": int(scored.dels.sum()),
        "sub": int(scored.subs.sum()),
        "error_rate": scored.error_rate if scored.num_ref else None,
        "interval": [interval.low, interval.high] if interval else None,
        "bootstrap": {"samples": num_samples, "seed": seed, "level": 0.95},
    }


def per_utterance(scored: Score) -> dict[str, list]:
    """Return ids, error counts, reference lengths and reference hashes, as parallel lists."""
    return {
        "ids": scored.ids,
        "ins": scored.ins.tolist(),
        "del": scored.dels.tolist(),
        "sub": scored.subs.tolist(),
        "ref_len": scored.ref_lens.tolist(),
        "ref_hash": [hashlib.blake2b(" ".join(ref).encode(), digest_size=8).hexdigest() for ref in scored.refs],
    }


def write_recogs(path: Path, result: Score) -> None:
    """Write two lines an utterance, reference and hypothesis as lists of units, sorted by id."""
    with atomic_write(path, "w") as f:
        for utterance, ref, hyp in zip(result.ids, result.refs, result.hyps, strict=True):
            f.write(f"{utterance}:\tref={ref}\n{utterance}:\thyp={hyp}\n")


def read_recogs(path: Path) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Read a recogs file, ours or icefall's; return ids, references and hypotheses.

    Raises:
        DataError: a line of another form, or an utterance without its pair; names the line.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        match = re.fullmatch(r"(.*?):\t(ref|hyp)=(\[.*\])", line)
        if match is None:
            raise DataError(f"{path}:{number} is no line of a recogs file: {line[:80]!r}")
        utterance, side, units = match.groups()
        try:
            found.setdefault(utterance, {})[side] = ast.literal_eval(units)
        except (SyntaxError, ValueError) as error:
            raise DataError(f"{path}:{number} holds no list of strings: {units[:80]!r}") from error
    lonely = [i for i, pair in found.items() if len(pair) != 2]
    if lonely:
        raise DataError(f"{path}: {len(lonely)} utterances lack ref or hyp, the first are {lonely[:5]}")
    return list(found), [pair["ref"] for pair in found.values()], [pair["hyp"] for pair in found.values()]


def write_errs(path: Path, result: Score) -> None:
    """Write the errs file: totals, alignment of each utterance, counts of each kind of error."""
    with atomic_write(path, "w") as f:
        correct = result.num_ref - int(result.subs.sum() + result.dels.sum())
        f.write(f"%WER = {result.error_rate:.2f}\n")
        f.write(
            f"Errors: {int(result.ins.sum())} insertions, {int(result.dels.sum())} deletions, "
            f"{int(result.subs.sum())} substitutions, over {result.num_ref} reference words ({correct} correct)\n"
        )
        f.write(
            "Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, "
            "INSERTIONS:, PER-WORD STATS:\n"
        )
        f.write(f"Unit: {result.unit}; text normalisation: {NORMALIZATION[result.unit]}\n")
        f.write("\nPER-UTT DETAILS: corr or (ref->hyp)\n")
        for utterance, alignment in zip(result.ids, result.alignments, strict=True):
            f.write(f"{utterance}:\t{' '.join(_shown(alignment))}\n")
        _write_counts(f, result)


def _shown(alignment: list[tuple[str, str]]) -> Iterator[str]:
    """Yield correct units as they are and each run of adjacent errors as one (ref->hyp)."""
    refs: list[str] = []
    hyps: list[str] = []
    for ref, hyp in [*alignment, (None, None)]:
        if ref != hyp:
            refs += [ref] if ref != _GAP else []
            hyps += [hyp] if hyp != _GAP else []
            continue
        if refs or hyps:
            yield f"({' '.join(refs) or SHOWN_GAP}->{' '.join(hyps) or SHOWN_GAP})"
            refs, hyps = [], []
        if ref is not None:
            yield ref


def _write_counts(f: IO[str], result: Score) -> None:
    subs: Counter = Counter()
    dels: Counter = Counter()
    ins: Counter = Counter()
    correct: Counter = Counter()
    missed: Counter = Counter()
    invented: Counter = Counter()
    for alignment in result.alignments:
        for ref, hyp in alignment:
            if ref == hyp:
                correct[ref] += 1
            elif ref == _GAP:
                ins[hyp] += 1
            elif hyp == _GAP:
                dels[ref] += 1
            else:
                subs[f"{ref} -> {hyp}"] += 1
                missed[ref] += 1
                invented[hyp] += 1
    for title, counter in (
        ("SUBSTITUTIONS: count ref -> hyp", subs),
        ("DELETIONS: count ref", dels),
        ("INSERTIONS: count hyp", ins),
    ):
        f.write(f"\n{title}\n")
        f.writelines(f"{count}   {what}\n" for what, count in _most_common(counter))
    f.write("\nPER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp\n")
    errors = missed + invented + ins + dels
    words = _most_common(Counter({w: errors[w] for w in correct | errors}))
    for word, count in words:
        in_ref = correct[word] + missed[word] + dels[word]
        in_hyp = correct[word] + invented[word] + ins[word]
        f.write(f"{word}   {correct[word]} {count} {in_ref} {in_hyp}\n")


def _most_common(counter: Counter) -> list[tuple[str, int]]:
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))


def write_summary(path: Path, rates: dict[str, float]) -> None:
    """Write the wer-summary file: settings and error rates, best first."""
    lines = [f"{key}\t{rate:.2f}\n" for key, rate in sorted(rates.items(), key=lambda item: item[1])]
    write_text(path, "settings\tWER\n" + "".join(lines))
