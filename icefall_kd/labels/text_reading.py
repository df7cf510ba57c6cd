"""The states of a batch's texts, aligned with its tokens, and how well that works on a corpus (our design)."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from icefall_kd.data.batch import IGNORE, TextStates
from icefall_kd.errors import DataError
from icefall_kd.labels.keys import text_key
from icefall_kd.labels.store import LabelStore
from icefall_kd.labels.text_states import rows_problem, unpack_states
from icefall_kd.text.alignment import Alignment, Misaligned, Unit, align
from icefall_kd.text.tokenizer import Tokenizer


def align_text(tokenizer: Tokenizer, text: str, rows: np.ndarray, unit: Unit, where: str) -> Alignment | Misaligned:
    """Align a text with the rows of its key; a DataError names ``where`` when they are damaged, or of another text."""
    if (problem := rows_problem(rows)) is not None:
        raise DataError(f"{where}: {problem}; extract it again")
    if rows[-1, 1] != len(text):
        raise DataError(f"{where}: states of {rows[-1, 1]} characters, the text has {len(text)}; extract it again")
    return align(tokenizer, text, rows[:, :2].astype(np.int64), unit)


def read_text_states(
    store: LabelStore,
    texts: Sequence[str],
    num_tokens: Sequence[int],
    tokenizer: Tokenizer,
    unit: Unit,
    made_up: bool = False,
) -> TextStates:
    """Return the states of a batch; a text that the set lacks, or that cannot be aligned, has none.

    Args:
        store: a set of text_states.
        texts: normalised texts, as they are tokenized.
        num_tokens: of each text, its end left out.
        tokenizer: of the recogniser.
        unit: "token" or "word".
        made_up: give texts without states some of the right size, for a look at the memory.
    Raises:
        DataError: rows of another text.
    """
    values: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    for text, count in zip(texts, num_tokens, strict=True):
        rows = store.get(text_key(text), missing_ok=True)
        found = None if rows is None else align_text(tokenizer, text, rows, unit, f"{store.path}: {text!r}")
        if isinstance(found, Alignment):
            values.append(found.weights @ unpack_states(rows)[1])
            owners.append(found.owner)
        elif made_up:
            owners.append(np.arange(count + 1))
            values.append(np.ones((len(owners[-1]), store.info.dim), np.float32))
        else:
            owners.append(np.zeros(0, np.int64))
            values.append(np.zeros((0, store.info.dim), np.float32))
    return _collate(values, owners, [count + 1 for count in num_tokens], store.info.dim)


def _collate(values: Sequence[np.ndarray], owners: Sequence[np.ndarray], tokens: Sequence[int], dim: int) -> TextStates:
    lens = [len(v) for v in values]
    padded = torch.zeros(len(values), max(lens, default=0), dim)
    owner = torch.full((len(owners), max(tokens, default=0)), IGNORE)
    for i, (v, o) in enumerate(zip(values, owners, strict=True)):
        padded[i, : len(v)], owner[i, : len(o)] = torch.from_numpy(v), torch.from_numpy(o)
    return TextStates(padded, torch.tensor(lens, dtype=torch.int64), owner)


@dataclass
class Coverage:
    """How the texts of some utterances meet a set of states."""

    utterances: int = 0
    missing: int = 0
    """Utterances whose text the set lacks."""
    misaligned: int = 0
    """Utterances whose text cannot be aligned."""
    units: int = 0
    """Tokens or words of the others, ends of texts left out."""
    one_to_one: int = 0
    """Units with a piece to themselves."""
    several: int = 0
    """Units with more than one piece."""
    unknown: int = 0
    """Units with a piece that stands for characters unknown to the language model."""
    reasons: Counter = field(default_factory=Counter)
    """Utterances by the reason for their misalignment."""
    examples: list[str] = field(default_factory=list)
    """The first misaligned texts."""

    @property
    def aligned(self) -> int:
        """Utterances with states."""
        return self.utterances - self.missing - self.misaligned

    def __str__(self) -> str:
        rest = self.units - self.one_to_one - self.several
        shares = [f"{n / max(self.units, 1):.2%}" for n in (self.one_to_one, rest, self.several, self.unknown)]
        text = (
            f"{self.aligned} of {self.utterances} utterances aligned, {self.missing} without states, "
            f"{self.misaligned} misaligned; {self.units} units: {shares[0]} with a piece of their own, {shares[1]} "
            f"share one, {shares[2]} have several; {shares[3]} unknown to the language model"
        )
        return text + (f"; misaligned, for instance: {'; '.join(self.examples)}" if self.examples else "")


def coverage(store: LabelStore, texts: Iterable[str], tokenizer: Tokenizer, unit: Unit) -> Coverage:
    """Align the texts of utterances, each text once, and count; nothing is changed."""
    report = Coverage()
    for text, count in Counter(texts).items():
        report.utterances += count
        rows = store.get(text_key(text), missing_ok=True)
        if rows is None:
            report.missing += count
            continue
        found = align_text(tokenizer, text, rows, unit, f"{store.path}: {text!r}")
        if isinstance(found, Misaligned):
            report.misaligned += count
            report.reasons[found.reason] += count
            if len(report.examples) < 3:
                report.examples.append(f"{text!r}: {found.reason}")
            continue
        overlaps = found.weights[:-1, :-1] > 0
        report.units += count * len(overlaps)
        report.one_to_one += count * int(found.one_to_one[:-1].sum())
        report.several += count * int((overlaps.sum(axis=1) > 1).sum())
        report.unknown += count * int(overlaps[:, rows[:-1, 2] > 0].any(axis=1).sum())
    return report
