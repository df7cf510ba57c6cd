"""Greedy and modified beam search for transducers with a stateless decoder, batched.

Both emit at most one symbol per frame (Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR
training", 2022, section on decoding; icefall's conventions for the start context and the final choice).
The decoder's output is a function of the last ``context_size`` tokens alone, so each context is
embedded, convolved and projected once, whatever the number of hypotheses that share it.

A search goes on from a state: ``start`` makes one for N streams, ``advance`` consumes frames, as many as there
are, and ``result`` reads the hypotheses at any time.  However the frames are cut, the result is the same.  A state
keeps what its hypotheses hold (tokens and times) and a bounded table of decoder outputs, nothing else.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.base import UNK_ID, Hypothesis, PrefixScorer, logits_to_scores
from icefall_kd.decode.context_table import ContextTable
from icefall_kd.decode.prefixes import Hyp, Prefix, extend
from icefall_kd.errors import ConfigError


def _check_model(model) -> None:
    if model.decoder is None or model.joiner is None:
        raise ConfigError(
            "the model has no transducer (it was trained with --transducer-scale 0); "
            "decode it with --decoding-method ctc_greedy_search"
        )


def _by_length(encoder_out: Tensor, encoder_out_lens: Tensor, streams: int) -> tuple[list[int], list[int]]:
    """Return stream indexes, longest first, and their lengths in that order."""
    if encoder_out.ndim != 3 or encoder_out_lens.shape != encoder_out.shape[:1]:
        raise ConfigError(
            f"a search needs encoder_out (N, T', C) and encoder_out_lens (N,), "
            f"got {tuple(encoder_out.shape)} and {tuple(encoder_out_lens.shape)}"
        )
    lens = encoder_out_lens.tolist()
    if len(lens) != streams:
        raise ConfigError(f"the state holds {streams} streams, encoder_out has {len(lens)}")
    if lens and not 0 <= min(lens) <= max(lens) <= encoder_out.size(1):
        raise ConfigError(f"encoder_out_lens {lens} do not fit in {encoder_out.size(1)} frames of encoder_out")
    order = sorted(range(len(lens)), key=lambda i: -lens[i])
    return order, [lens[i] for i in order]


@dataclass
class GreedyState:
    """What :class:`GreedySearch` knows of N streams."""

    table: ContextTable
    frames: list[int]
    """Frames that each stream has consumed."""
    tokens: list[list[int]]
    times: list[list[int]]
    contexts: list[tuple[int, ...]]
    decoder_out: Tensor
    """Projected decoder output of each stream, (N, C)."""
    scores: Tensor
    """(N,) float32."""


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
    def start(self, n: int) -> GreedyState:
        """Return the state of ``n`` streams of which nothing has been heard."""
        table, device = ContextTable(self.model), self.model.joiner.output_linear.weight.device
        decoder_out = table.gather([table.row(table.start)] * n, device)
        scores = torch.zeros(n, dtype=torch.float32, device=device)
        tokens, times = [[] for _ in range(n)], [[] for _ in range(n)]
        return GreedyState(table, [0] * n, tokens, times, [table.start] * n, decoder_out, scores)

    @torch.no_grad()
    def advance(self, state: GreedyState, encoder_out: Tensor, encoder_out_lens: Tensor) -> None:
        """Consume the next frames of each stream.

        Args:
            state: changed in place.
            encoder_out: (N, T', C).
            encoder_out_lens: (N,) new frames of each stream, 0 for none.
        """
        order, lens = _by_length(encoder_out, encoder_out_lens, len(state.frames))
        if not order:
            return
        table, joiner, device = state.table, self.model.joiner, encoder_out.device
        table.forget()
        skipped = {table.blank_id, self.unk_id}
        frames = joiner.encoder_proj(encoder_out[order])  # (N, T', C), longest first
        decoder_out, scores = state.decoder_out[order], state.scores[order]
        active = len(order)
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
                    k = order[i]
                    state.tokens[k].append(symbol)
                    state.times[k].append(state.frames[k] + t)
                    state.contexts[k] = table.after(state.contexts[k], symbol)
                    changed.append(i)
            if changed:
                rows = [table.row(state.contexts[order[i]]) for i in changed]
                decoder_out[changed] = table.gather(rows, device)
        state.decoder_out[order], state.scores[order] = decoder_out, scores
        for k, length in zip(order, lens, strict=True):
            state.frames[k] += length

    def result(self, state: GreedyState) -> list[list[Hypothesis]]:
        """Return one hypothesis a stream, of what it has heard; the state stays as it is."""
        found = zip(state.tokens, state.scores.tolist(), state.times, strict=True)
        return [[Hypothesis(list(tokens), score, list(times))] for tokens, score, times in found]

    def decode(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> list[list[Hypothesis]]:
        """Return one hypothesis an utterance.

        Args:
            encoder_out: (N, T', C).
            encoder_out_lens: (N,).
        Returns:
            N lists of one :class:`Hypothesis`; the score is the sum of the log-probabilities of the
            chosen symbols, blanks included.
        """
        state = self.start(len(encoder_out))
        self.advance(state, encoder_out, encoder_out_lens)
        return self.result(state)


@dataclass
class BeamState:
    """What :class:`ModifiedBeamSearch` knows of N streams."""

    table: ContextTable
    frames: list[int]
    """Frames that each stream has consumed."""
    beams: list[list[Hyp]]
    """Hypotheses of each stream."""


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
        fusion: language models and hot words, whose scores are added to those of the hypotheses kept in a frame.
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
        fusion: PrefixScorer | None = None,
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
        self.fusion = fusion

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

    def start(self, n: int) -> BeamState:
        """Return the state of ``n`` streams of which nothing has been heard."""
        table = ContextTable(self.model)
        row, states = table.row(table.start), self.fusion.start() if self.fusion is not None else None
        beams = [[Hyp(Prefix(None, -1, 0, table.start, row, states), 0.0, 0.0, None)] for _ in range(n)]
        return BeamState(table, [0] * n, beams)

    @torch.no_grad()
    def advance(self, state: BeamState, encoder_out: Tensor, encoder_out_lens: Tensor) -> None:
        """Consume the next frames of each stream.

        Args:
            state: changed in place.
            encoder_out: (N, T', C).
            encoder_out_lens: (N,) new frames of each stream, 0 for none.
        """
        order, lens = _by_length(encoder_out, encoder_out_lens, len(state.frames))
        if not order:
            return
        table, device = state.table, encoder_out.device
        if table.forget():
            for hyp in (h for beam in state.beams for h in beam):
                hyp.prefix.row = table.row(hyp.prefix.context)
        skipped = {table.blank_id, self.unk_id}
        frames = self.model.joiner.encoder_proj(encoder_out[order])  # (N, T', C), longest first
        beams = [state.beams[k] for k in order]
        active = len(order)
        for t in range(lens[0]):
            while lens[active - 1] <= t:
                active -= 1
            kept = self._expand(beams[:active], frames[:active, t], table, device)
            at = [state.frames[k] + t for k in order[:active]]
            beams[:active] = extend(beams[:active], kept, at, skipped, table, self.fusion)
        for k, length, beam in zip(order, lens, beams, strict=True):
            state.beams[k] = beam
            state.frames[k] += length

    def result(self, state: BeamState) -> list[list[Hypothesis]]:
        """Return the n-best list of each stream, of what it has heard; the state stays as it is."""
        nbest = []
        for beam in state.beams:
            ended = [(h.score + self.fusion.final(h.prefix.states) if self.fusion else h.score, h) for h in beam]
            ended.sort(key=lambda x: -x[0] / (x[1].prefix.length + state.table.context_size))
            nbest.append([Hypothesis(h.prefix.tokens(), score, h.frames()) for score, h in ended[: self.nbest]])
        return nbest

    def decode(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> list[list[Hypothesis]]:
        """Return the n-best list of each utterance.

        The order is by log-probability over length, the length counting the start context as icefall
        does; the score is the log-probability of the sequence summed over its kept alignments, plus what the
        fusion adds to the sequence.

        Args:
            encoder_out: (N, T', C).
            encoder_out_lens: (N,).
        Returns:
            N lists of up to ``nbest`` :class:`Hypothesis`, best first.
        """
        state = self.start(len(encoder_out))
        self.advance(state, encoder_out, encoder_out_lens)
        return self.result(state)

    def _expand(self, beams: list[list[Hyp]], frame: Tensor, table: ContextTable, device: torch.device):
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
