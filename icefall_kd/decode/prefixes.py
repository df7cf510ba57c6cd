"""Hypotheses of a beam search as nodes of a prefix tree, and how they live on from frame to frame."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from weakref import ref

from icefall_kd.decode.base import PrefixScorer
from icefall_kd.decode.context_table import ContextTable

# A continuation that is kept: score, index of the hypothesis, log-probability of the symbol, symbol.
Candidate = tuple[float, int, float, int]


@dataclass(eq=False, slots=True, weakref_slot=True)
class Prefix:
    """A token sequence of one utterance, as a node of that utterance's prefix tree.

    Two hypotheses hold the same tokens exactly when they point at the same node, so merging needs no
    comparison of sequences.  A node holds its parent, not its children: what no hypothesis begins with is freed.
    """

    parent: "Prefix | None"
    token: int
    length: int
    context: tuple[int, ...]
    row: int
    """Of the context in the table of decoder outputs."""
    states: tuple | None = None
    """Of the fusion, behind the last token; None where no hypothesis stands."""
    gain: float = 0.0
    """What the fusion added for the last token."""
    children: dict[int, ref] = field(default_factory=dict)

    def child(self, token: int, table: ContextTable) -> "Prefix":
        """Return the node of one token more."""
        known = self.children.get(token)
        node = known() if known is not None else None
        if node is None:
            node = Prefix(self, token, self.length + 1, table.after(self.context, token), 0)
            self.children[token] = ref(node)
        node.row = table.row(node.context)  # the table may have been emptied since
        return node

    def tokens(self) -> list[int]:
        """Return all tokens."""
        out: list[int] = []
        node = self
        while node.parent is not None:
            out.append(node.token)
            node = node.parent
        return out[::-1]


@dataclass(slots=True)
class Hyp:
    """A prefix, the score of all its alignments kept so far, and the frames of the best one."""

    prefix: Prefix
    score: float
    best: float
    times: tuple | None  # linked list (frame, earlier)

    def frames(self) -> list[int]:
        """Return the frame of each token."""
        out, times = [], self.times
        while times is not None:
            out.append(times[0])
            times = times[1]
        return out[::-1]


def extend(
    beams: Sequence[list[Hyp]],
    kept: Iterable[Sequence[Candidate]],
    at: Sequence[int],
    skipped: set,
    table: ContextTable,
    fusion: PrefixScorer | None,
) -> list[list[Hyp]]:
    """Return the hypotheses of each utterance after a frame, equal token sequences merged.

    Args:
        beams: hypotheses before the frame.
        kept: the continuations of each utterance, best first.
        at: number of the frame in each utterance.
        skipped: symbols that emit nothing.
        table: the table of decoder outputs.
        fusion: what adds to the score of each emitted token.
    """
    steps = []
    for hyps, candidates in zip(beams, kept, strict=True):
        old = [hyp.prefix for hyp in hyps]
        new = [old[k] if v in skipped else old[k].child(v, table) for _, k, _, v in candidates]
        steps.append((candidates, new))
    if fusion is not None:
        _score_new([prefix for _, new in steps for prefix in new], fusion)
    after = [_merge(hyps, *step, t) for hyps, step, t in zip(beams, steps, at, strict=True)]
    if fusion is not None:
        _drop_states(beams, after)
    return after


def _score_new(prefixes: list[Prefix], fusion: PrefixScorer) -> None:
    """Let the fusion score all prefixes at which no hypothesis stood before."""
    new = [prefix for prefix in dict.fromkeys(prefixes) if prefix.states is None]
    if new:
        gains, states = fusion.extend([prefix.parent.states for prefix in new], [prefix.token for prefix in new])
        for prefix, gain, state in zip(new, gains, states, strict=True):
            prefix.gain, prefix.states = gain, state


def _drop_states(before: Sequence[list[Hyp]], after: Sequence[list[Hyp]]) -> None:
    """Free the states of prefixes at which no hypothesis stands any more, however long the stream grows."""
    needed = {id(hyp.prefix) for hyps in after for hyp in hyps}
    for hyp in (hyp for hyps in before for hyp in hyps):
        if id(hyp.prefix) not in needed:
            hyp.prefix.states = None


def _logaddexp(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a + math.log1p(math.exp(b - a))


def _merge(hyps: list[Hyp], candidates: Sequence[Candidate], prefixes: list[Prefix], t: int) -> list[Hyp]:
    """Return the hypotheses after frame ``t``, equal token sequences merged by log-add."""
    merged: dict[int, Hyp] = {}
    for (score, k, log_prob, _), prefix in zip(candidates, prefixes, strict=True):
        old = hyps[k]
        times, best = old.times, old.best + log_prob
        if prefix is not old.prefix:
            score, times = score + prefix.gain, (t, times)
        present = merged.get(id(prefix))
        if present is None:
            merged[id(prefix)] = Hyp(prefix, score, best, times)
        else:
            present.score = _logaddexp(present.score, score)
            if best > present.best:
                present.best, present.times = best, times
    return list(merged.values())
