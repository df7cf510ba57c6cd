"""Greedy and modified beam search for transducers with a stateless decoder, batched.

Both emit at most one symbol per frame (Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR
training", 2022, section on decoding; icefall's conventions for the start context and the final choice).
The decoder's output is a function of the last ``context_size`` tokens alone, so each context is
embedded, convolved and projected once a call, whatever the number of hypotheses that share it.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.base import UNK_ID, Hypothesis, logits_to_scores
from icefall_kd.errors import ConfigError


class _ContextTable:
    """Projected decoder outputs of all contexts seen in one call, one row each."""

    def __init__(self, model) -> None:
        self.model = model
        self.context_size = model.decoder.context_size
        self.blank_id = model.decoder.blank_id
        self.index: dict[tuple[int, ...], int] = {}
        self.pending: list[tuple[int, ...]] = []
        self.rows: Tensor | None = None
        self.used = 0

    @property
    def start(self) -> tuple[int, ...]:
        return (-1,) * (self.context_size - 1) + (self.blank_id,)

    def row(self, context: tuple[int, ...]) -> int:
        """Return the row of a context; a new one is computed at the next :meth:`gather`."""
        row = self.index.get(context)
        if row is None:
            row = self.index[context] = len(self.index)
            self.pending.append(context)
        return row

    def after(self, context: tuple[int, ...], token: int) -> tuple[int, ...]:
        """Return the context that follows ``context`` when ``token`` is emitted."""
        return (*context[1:], token)

    def gather(self, rows: list[int], device: torch.device) -> Tensor:
        """Return the projected decoder outputs (len(rows), C) of the given rows."""
        if self.pending:
            y = torch.tensor(self.pending, dtype=torch.int64, device=device)
            new = self.model.joiner.decoder_proj(self.model.decoder(y)[:, -1])
            need = self.used + len(new)
            if self.rows is None or need > len(self.rows):
                grown = new.new_empty((max(64, 2 * need), new.size(1)))
                if self.rows is not None:
                    grown[: self.used] = self.rows[: self.used]
                self.rows = grown
            self.rows[self.used : need] = new
            self.used = need
            self.pending = []
        return self.rows[torch.tensor(rows, dtype=torch.int64, device=device)]


def _check_model(model) -> None:
    if model.decoder is None or model.joiner is None:
        raise ConfigError(
            "the model has no transducer (it was trained with --transducer-scale 0); "
            "decode it with --decoding-method ctc_greedy_search"
        )


def _by_length(encoder_out: Tensor, encoder_out_lens: Tensor) -> tuple[list[int], list[int]]:
    """Return utterance indexes, longest first, and their lengths in that order."""
    if encoder_out.ndim != 3 or encoder_out_lens.shape != encoder_out.shape[:1]:
        raise ConfigError(
            f"a search needs encoder_out (N, T', C) and encoder_out_lens (N,), "
            f"got {tuple(encoder_out.shape)} and {tuple(encoder_out_lens.shape)}"
        )
    lens = encoder_out_lens.tolist()
    if lens and not 0 <= min(lens) <= max(lens) <= encoder_out.size(1):
        raise ConfigError(f"encoder_out_lens {lens} do not fit in {encoder_out.size(1)} frames of encoder_out")
    order = sorted(range(len(lens)), key=lambda i: -lens[i])
    return order, [lens[i] for i in order]


class GreedySearch:
    """Take the best symbol of every frame; blank leaves the decoder output unchanged.

    Args:
        model: TransducerModel in evaluation mode.
        blank_penalty: subtracted from the blank's logit.
        unk_id: treated like the blank; None: emitted like any token.
    """

    def __init__(self, model, *, blank_penalty: float = 0.0, unk_id: int | None = UNK_ID) -> None:
        _check_model(model)
        self.model = model
        self.blank_penalty = blank_penalty
        self.unk_id = unk_id

    @classmethod
    def from_config(cls, model, config: DecodeConfig) -> "GreedySearch":
        """Return the search that the options of decode.py describe."""
        return cls(model, blank_penalty=config.blank_penalty)

    @torch.no_grad()
    def decode(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> list[list[Hypothesis]]:
        """Return one hypothesis an utterance.

        Args:
            encoder_out: (N, T', C).
            encoder_out_lens: (N,).
        Returns:
            N lists of one :class:`Hypothesis`; the score is the sum of the log-probabilities of the
            chosen symbols, blanks included.
        """
        order, lens = _by_length(encoder_out, encoder_out_lens)
        n = len(order)
        if n == 0:
            return []
        table = _ContextTable(self.model)
        joiner, device = self.model.joiner, encoder_out.device
        skipped = {table.blank_id, self.unk_id}
        contexts = [table.start] * n
        tokens: list[list[int]] = [[] for _ in range(n)]
        times: list[list[int]] = [[] for _ in range(n)]
        frames = joiner.encoder_proj(encoder_out[order])  # (N, T', C), longest first
        decoder_out = table.gather([table.row(table.start)] * n, device)
        scores = torch.zeros(n, dtype=torch.float32, device=device)
        active = n
        for t in range(lens[0]):
            while lens[active - 1] <= t:
                active -= 1
            logits = joiner(frames[:active, t], decoder_out[:active], project_input=False)  # (active, V)
            logits = logits_to_scores(logits, table.blank_id, self.blank_penalty, 1.0)
            best, symbols = logits.max(dim=-1)
            scores[:active] += best - logits.logsumexp(dim=-1)
            changed = []
            for i, symbol in enumerate(symbols.tolist()):
                if symbol not in skipped:
                    tokens[i].append(symbol)
                    times[i].append(t)
                    contexts[i] = table.after(contexts[i], symbol)
                    changed.append(i)
            if changed:
                decoder_out[changed] = table.gather([table.row(contexts[i]) for i in changed], device)
        result: list[list[Hypothesis]] = [[] for _ in range(n)]
        for i, (place, score) in enumerate(zip(order, scores.tolist(), strict=True)):
            result[place] = [Hypothesis(tokens[i], score, times[i])]
        return result


@dataclass
class _Prefix:
    """A token sequence of one utterance, as a node of that utterance's prefix tree.

    Two hypotheses hold the same tokens exactly when they point at the same node, so merging needs no
    comparison of sequences.
    """

    parent: "_Prefix | None"
    token: int
    length: int
    context: tuple[int, ...]
    row: int
    children: dict[int, "_Prefix"] = field(default_factory=dict)

    def child(self, token: int, table: _ContextTable) -> "_Prefix":
        node = self.children.get(token)
        if node is None:
            context = table.after(self.context, token)
            node = _Prefix(self, token, self.length + 1, context, table.row(context))
            self.children[token] = node
        return node

    def tokens(self) -> list[int]:
        out: list[int] = []
        node = self
        while node.parent is not None:
            out.append(node.token)
            node = node.parent
        return out[::-1]


@dataclass(slots=True)
class _Hyp:
    """A prefix, the log-probability of all its alignments kept so far, and the frames of the best one."""

    prefix: _Prefix
    score: float
    best: float
    times: tuple | None  # linked list (frame, earlier)


def _logaddexp(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a + math.log1p(math.exp(b - a))


def _extend(hyps: list[_Hyp], candidates: list[tuple[float, int, float, int]], t: int, skipped, table) -> list[_Hyp]:
    """Return the hypotheses after frame ``t``, equal token sequences merged by log-add.

    Args:
        hyps: hypotheses before the frame.
        candidates: the kept (score, index into hyps, log-probability of the symbol, symbol), best first.
        t: frame.
        skipped: symbols that emit nothing.
        table: the context table.
    """
    merged: dict[int, _Hyp] = {}
    for score, k, log_prob, symbol in candidates:
        old = hyps[k]
        prefix = old.prefix if symbol in skipped else old.prefix.child(symbol, table)
        times = old.times if symbol in skipped else (t, old.times)
        best = old.best + log_prob
        present = merged.get(id(prefix))
        if present is None:
            merged[id(prefix)] = _Hyp(prefix, score, best, times)
        else:
            present.score = _logaddexp(present.score, score)
            if best > present.best:
                present.best, present.times = best, times
    return list(merged.values())


def _linked(times: tuple | None) -> list[int]:
    out = []
    while times is not None:
        out.append(times[0])
        times = times[1]
    return out[::-1]


class ModifiedBeamSearch:
    """Beam search with at most one symbol per frame; equal token sequences are merged.

    The joiner runs once a frame over the hypotheses of all active utterances, packed.

    Args:
        model: TransducerModel in evaluation mode.
        beam_size: hypotheses kept an utterance; 1 equals greedy search.
        nbest: hypotheses returned, at most ``beam_size``.
        blank_penalty: subtracted from the blank's logit.
        temperature: divides the logits before the softmax.
        unk_id: treated like the blank; None: emitted like any token.
    """

    def __init__(
        self,
        model,
        beam_size: int = 4,
        *,
        nbest: int = 1,
        blank_penalty: float = 0.0,
        temperature: float = 1.0,
        unk_id: int | None = UNK_ID,
    ) -> None:
        _check_model(model)
        if beam_size < 1 or nbest < 1:
            raise ConfigError(f"--beam-size {beam_size} and --nbest {nbest} must be at least 1")
        if temperature <= 0:
            raise ConfigError(f"--temperature is {temperature}; it must be positive")
        self.model = model
        self.beam_size = beam_size
        self.nbest = nbest
        self.blank_penalty = blank_penalty
        self.temperature = temperature
        self.unk_id = unk_id

    @classmethod
    def from_config(cls, model, config: DecodeConfig) -> "ModifiedBeamSearch":
        """Return the search that the options of decode.py describe."""
        return cls(
            model,
            config.beam_size,
            nbest=config.nbest,
            blank_penalty=config.blank_penalty,
            temperature=config.temperature,
        )

    @torch.no_grad()
    def decode(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> list[list[Hypothesis]]:
        """Return the n-best list of each utterance.

        The order is by log-probability over length, the length counting the start context as icefall
        does; the score is the log-probability of the sequence summed over its kept alignments.

        Args:
            encoder_out: (N, T', C).
            encoder_out_lens: (N,).
        Returns:
            N lists of up to ``nbest`` :class:`Hypothesis`, best first.
        """
        order, lens = _by_length(encoder_out, encoder_out_lens)
        if not order:
            return []
        table = _ContextTable(self.model)
        device, skipped = encoder_out.device, {table.blank_id, self.unk_id}
        frames = self.model.joiner.encoder_proj(encoder_out[order])  # (N, T', C), longest first
        root_row = table.row(table.start)
        beams = [[_Hyp(_Prefix(None, -1, 0, table.start, root_row), 0.0, 0.0, None)] for _ in order]
        active = len(order)
        for t in range(lens[0]):
            while lens[active - 1] <= t:
                active -= 1
            for i, candidates in enumerate(self._expand(beams[:active], frames[:active, t], table, device)):
                beams[i] = _extend(beams[i], candidates, t, skipped, table)
        result: list[list[Hypothesis]] = [[] for _ in order]
        for place, beam in zip(order, beams, strict=True):
            beam.sort(key=lambda h: -h.score / (h.prefix.length + table.context_size))
            result[place] = [Hypothesis(h.prefix.tokens(), h.score, _linked(h.times)) for h in beam[: self.nbest]]
        return result

    def _expand(self, beams: list[list[_Hyp]], frame: Tensor, table: _ContextTable, device: torch.device):
        """Yield the ``beam_size`` best (score, hypothesis, log-probability, symbol) of each utterance.

        Args:
            beams: hypotheses of the active utterances.
            frame: projected encoder frame of each, (active, C).
            table: the context table.
            device: where the joiner runs.
        """
        owner = torch.tensor([i for i, beam in enumerate(beams) for _ in beam], dtype=torch.int64, device=device)
        decoder_out = table.gather([h.prefix.row for beam in beams for h in beam], device)
        logits = self.model.joiner(frame[owner], decoder_out, project_input=False)  # (hypotheses, V)
        logits = logits_to_scores(logits, table.blank_id, self.blank_penalty, self.temperature)
        # The best of hypotheses x V lie among the best of each hypothesis: no padding, no large sort.
        values, symbols = logits.topk(min(self.beam_size, logits.size(-1)), dim=-1)
        values = (values - logits.logsumexp(dim=-1, keepdim=True)).tolist()
        symbols = symbols.tolist()
        row = 0
        for beam in beams:
            candidates = [
                (h.score + value, k, value, symbol)
                for k, h in enumerate(beam)
                for value, symbol in zip(values[row + k], symbols[row + k], strict=True)
            ]
            candidates.sort(key=lambda c: -c[0])
            yield candidates[: self.beam_size]
            row += len(beam)
