"""Greedy and beam search of the CIF recogniser, batched over utterances and beam.

Integrate-and-fire says how many tokens there are, the end of the text among them, so a search takes as many steps: no
length penalty and no guess where to stop (Han et al. 2023 and their public code).  What follows an end token is cut
off, but it counts: as in the public code, the score of a hypothesis is over all vectors that fired.  One that kept its
score when it ends would win by leaving the rest of the utterance out, for instance behind the first of two sentences.
There we differ: behind the end a hypothesis goes on with the best token alone, so that the n-best are different texts.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.base import UNK_ID, Hypothesis, PrefixScorer
from icefall_kd.models.cif import TAIL_THRESHOLD, CifOutput, token_frames


def _log_probs(model, logits: Tensor) -> Tensor:
    """Return float32 log-probabilities (R, V); blank, unknown and mask, which no text has, are impossible."""
    silent = torch.tensor([model.blank_id, UNK_ID, model.vocab_size - 1], device=logits.device)
    return logits.float().log_softmax(dim=-1).index_fill(1, silent, -torch.inf)


def _fire(model, encoder_out: Tensor, lens: Tensor, tail_threshold: float) -> tuple[CifOutput, list[int], list]:
    """Return what fires, the tokens of each utterance, and the frame of each token."""
    fired = model.fire(encoder_out, lens.to(encoder_out.device), tail_threshold=tail_threshold)
    return fired, fired.lens.tolist(), token_frames(fired.weights).tolist()


class CifGreedySearch:
    """Take the best token at every fired vector.

    Args:
        model: CifModel in evaluation mode.
        tail_threshold: weight behind the last whole token above which it makes one more.
    """

    def __init__(self, model, *, tail_threshold: float = TAIL_THRESHOLD) -> None:
        self.model, self.tail_threshold = model, tail_threshold

    @classmethod
    def from_config(cls, model, config: DecodeConfig) -> "CifGreedySearch":
        """Return the search that the options of decode.py describe."""
        return cls(model, tail_threshold=config.tail_threshold)

    @torch.no_grad()
    def decode(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> list[list[Hypothesis]]:
        """Return one hypothesis an utterance.

        Args:
            encoder_out: (N, T', C).
            encoder_out_lens: (N,).
        Returns:
            N lists of one :class:`Hypothesis`: the score is the log-probability of what is said to all vectors, the
            end and what follows it included; the timestamp of a token the frame that it took most of.
        """
        model = self.model
        fired, counts, frames = _fire(model, encoder_out, encoder_out_lens, self.tail_threshold)
        y = torch.full((len(counts),), model.sos_id, device=fired.c.device)
        before, cache = torch.zeros_like(fired.c[:, 0]), model.decoder.start(len(counts))
        tokens, scores = [], []
        for u in range(max(counts, default=0)):
            score, y = _log_probs(model, model.decoder.step(y, before, fired.c[:, u], cache)).max(dim=1)
            before = fired.c[:, u]
            tokens.append(y.tolist())
            scores.append(score.tolist())
        found = []
        for i, count in enumerate(counts):
            string = [step[i] for step in tokens[:count]]
            length = string.index(model.sos_id) if model.sos_id in string else count
            total = sum((step[i] for step in scores[:count]), 0.0)
            found.append([Hypothesis(string[:length], total, frames[i][:length])])
        return found


@dataclass
class _Hyp:
    """A hypothesis whose text goes on, or has ended."""

    score: float
    last: int
    """Token that the decoder saw last."""
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    states: Any = None
    """Of the fusion, behind the last token of the text."""
    source: int = 0
    """Row of the decoder's cache that it continues."""


class CifBeamSearch:
    """Beam search of as many steps as vectors fired.

    In every step each open hypothesis offers its ``beam_size`` best tokens, to which a fusion adds what it thinks of
    them, and one that has ended its best; the best of all these are kept.

    Args:
        model: CifModel in evaluation mode.
        beam_size: hypotheses kept an utterance; 1 equals greedy search.
        nbest: hypotheses returned, at most ``beam_size``.
        tail_threshold: weight behind the last whole token above which it makes one more.
        fusion: language models and hot words.
    """

    def __init__(
        self,
        model,
        beam_size: int = 10,
        *,
        nbest: int = 1,
        tail_threshold: float = TAIL_THRESHOLD,
        fusion: PrefixScorer | None = None,
    ) -> None:
        self.model, self.beam_size, self.nbest = model, beam_size, min(nbest, beam_size)
        self.tail_threshold, self.fusion = tail_threshold, fusion

    @classmethod
    def from_config(cls, model, config: DecodeConfig) -> "CifBeamSearch":
        """Return the search that the options of decode.py describe."""
        return cls(model, config.beam_size, nbest=config.nbest, tail_threshold=config.tail_threshold)

    @torch.no_grad()
    def decode(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> list[list[Hypothesis]]:
        """Return the n-best list of each utterance.

        Args:
            encoder_out: (N, T', C).
            encoder_out_lens: (N,).
        Returns:
            N lists of up to ``nbest`` different :class:`Hypothesis`, best first, scored and timed as those of greedy
            search, plus what the fusion adds to the text (nothing to the end and behind it).
        """
        fired, counts, frames = _fire(self.model, encoder_out, encoder_out_lens, self.tail_threshold)
        states = self.fusion.start() if self.fusion is not None else None
        beams = [[_Hyp(0.0, self.model.sos_id, states=states, source=i)] for i in range(len(counts))]
        cache, before = self.model.decoder.start(len(counts)), torch.zeros_like(fired.c[:, 0])
        for u in range(max(counts, default=0)):
            rows = [(i, hyp) for i, beam in enumerate(beams) for hyp in beam if u < counts[i]]
            owner = torch.tensor([i for i, _ in rows], device=before.device)
            cache.reorder(torch.tensor([hyp.source for _, hyp in rows], device=before.device))
            last = torch.tensor([hyp.last for _, hyp in rows], device=before.device)
            now = fired.c[:, u]
            log_probs = _log_probs(self.model, self.model.decoder.step(last, before[owner], now[owner], cache))
            self._grow(beams, rows, log_probs)
            before = now
        return [self._result(beam, times) for beam, times in zip(beams, frames, strict=True)]

    def _grow(self, beams: list[list[_Hyp]], rows: list[tuple[int, _Hyp]], log_probs: Tensor) -> None:
        """Replace the beams of the utterances of ``rows`` by those of one token more.

        Args:
            beams: hypotheses of all utterances.
            rows: utterance and hypothesis of each row of the cache.
            log_probs: (R, V).
        """
        values, tokens = log_probs.topk(min(self.beam_size, log_probs.shape[1]), dim=1)
        grown: dict[int, list[_Hyp]] = {i: [] for i, _ in rows}
        spoken: list[tuple[_Hyp, int]] = []
        for row, ((i, hyp), scores, symbols) in enumerate(zip(rows, values.tolist(), tokens.tolist(), strict=True)):
            for score, symbol in zip(scores[: 1 if hyp.ended else None], symbols, strict=False):
                if score == -torch.inf:  # fewer tokens than the beam is wide
                    continue
                if hyp.ended or symbol == self.model.sos_id:
                    new = _Hyp(hyp.score + score, symbol, hyp.tokens, True, hyp.states, row)
                else:
                    new = _Hyp(hyp.score + score, symbol, [*hyp.tokens, symbol], False, hyp.states, row)
                    spoken.append((new, symbol))
                grown[i].append(new)
        if self.fusion is not None:
            gains, states = self.fusion.extend([new.states for new, _ in spoken], [symbol for _, symbol in spoken])
            for (new, _), gain, state in zip(spoken, gains, states, strict=True):
                new.score, new.states = new.score + gain, state
        for i, hyps in grown.items():
            hyps.sort(key=lambda hyp: -hyp.score)
            beams[i] = hyps[: self.beam_size]

    def _result(self, beam: list[_Hyp], times: list[int]) -> list[Hypothesis]:
        final = self.fusion.final if self.fusion is not None else lambda states: 0.0
        scored = sorted(((hyp.score + final(hyp.states), hyp.tokens) for hyp in beam), key=lambda x: -x[0])
        return [Hypothesis(tokens, score, times[: len(tokens)]) for score, tokens in scored[: self.nbest]]
