"""CTC prefix beam search, batched over utterances and prefixes.

A prefix is scored by the sum of its alignments, kept apart by whether they end in a blank (Graves 2012, section 7.5;
Hannun et al. 2014).  Alignments of prefixes that left the beam are lost, so a score is the string's log-probability
when the beam is wide enough, else a little less.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.alignment import ctc_align
from icefall_kd.decode.base import UNK_ID, Hypothesis
from icefall_kd.decode.ctc_string import CtcStrings, unknown_as_blank


@dataclass
class _Beam:
    """Prefixes of N utterances, B of each; minus infinity: none."""

    tokens: Tensor
    """(N, B, U), -1 behind a prefix."""
    lens: Tensor
    """(N, B)"""
    blank: Tensor
    """(N, B) float64 log-probability of the alignments that end in a blank."""
    token: Tensor
    """(N, B) of those that end in the last token."""

    @property
    def total(self) -> Tensor:
        return torch.logaddexp(self.blank, self.token)

    @property
    def last(self) -> Tensor:
        """(N, B) last tokens; 0, the blank, of empty prefixes."""
        at = (self.lens - 1).clamp(min=0).unsqueeze(2)
        return self.tokens.gather(2, at).squeeze(2).clamp(min=0)


class CtcPrefixBeamSearch:
    """Keep the ``beam_size`` most probable prefixes of every frame.

    The unknown token acts like the blank; sos/eos and mask, which CTC never learns to emit, are not emitted.

    Args:
        model: CtcAttentionModel in evaluation mode.
        beam_size: prefixes kept.
        nbest: hypotheses returned, at most ``beam_size``.
    """

    def __init__(self, model, beam_size: int = 4, *, nbest: int = 1) -> None:
        self.model, self.beam_size, self.nbest = model, beam_size, min(nbest, beam_size)
        self.blank_id = model.blank_id
        self.silent = [model.blank_id, UNK_ID, model.sos_id, model.mask_id]

    @classmethod
    def from_config(cls, model, config: DecodeConfig) -> "CtcPrefixBeamSearch":
        """Return the search that the options of decode.py describe."""
        return cls(model, config.beam_size, nbest=config.nbest)

    @torch.no_grad()
    def decode(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> list[list[Hypothesis]]:
        """Return the n-best list of each utterance.

        Args:
            encoder_out: (N, T', C).
            encoder_out_lens: (N,).
        Returns:
            N lists of up to ``nbest`` different :class:`Hypothesis`, best first; the score is the log-probability of
            the string, timestamps are the first frames of its tokens in its best alignment.
        """
        log_probs = self.model.ctc_log_probs(encoder_out)
        strings, owners, scores = self.search(log_probs, encoder_out_lens, self.nbest)
        found: list[list[Hypothesis]] = [[] for _ in encoder_out]
        rows = zip(strings.tokens.tolist(), strings.lens.tolist(), strings.frames.tolist(), strict=True)
        for (y, n, times), owner, score in zip(rows, owners, scores, strict=True):
            found[owner].append(Hypothesis(y[:n], score, times[:n]))
        return found

    @torch.no_grad()
    def search(self, log_probs: Tensor, lens: Tensor, nbest: int) -> tuple[CtcStrings, list[int], list[float]]:
        """Return the best strings of all utterances with the confidences and frames of their tokens.

        A token's confidence is the highest probability within its run in the string's best alignment, which for the
        string of the best path is that of :func:`~icefall_kd.decode.ctc_string.collapse`.

        Args:
            log_probs: (N, T', V).
            lens: (N,) valid frames.
            nbest: strings of an utterance, at most.
        Returns:
            R strings, those of an utterance together, best first; the utterance and the score of each.
        """
        lens = lens.to(log_probs.device)
        folded = unknown_as_blank(log_probs, self.blank_id)
        beam = self._prefixes(folded, lens)
        frames, found = lens.tolist(), []
        folded = folded.cpu()
        rows = zip(beam.tokens.tolist(), beam.lens.tolist(), beam.total.tolist(), strict=True)
        for i, (tokens, sizes, totals) in enumerate(rows):
            for y, n, score in list(zip(tokens, sizes, totals, strict=True))[:nbest]:
                if score > -torch.inf:
                    found.append((i, score, *self._aligned(folded[i, : frames[i]], y[:n])))
        width = max((len(y) for *_, y, _, _ in found), default=0)
        padded = [[x + [0] * (width - len(x)) for x in (y, p, times)] for *_, y, p, times in found]
        tokens, confidences, times = (
            torch.tensor([row[k] for row in padded], device=lens.device).view(len(found), width) for k in range(3)
        )
        counts = torch.tensor([len(y) for *_, y, _, _ in found], device=lens.device)
        strings = CtcStrings(tokens.long(), confidences.float(), times.long(), counts)
        return strings, [i for i, *_ in found], [score for _, score, *_ in found]

    def _aligned(self, folded: Tensor, y: list[int]) -> tuple[list[int], list[float], list[int]]:
        """Return a string, its tokens' confidences and first frames."""
        columns = folded[:, [self.blank_id, *y]]  # equal tokens have equal numbers: the first one's column
        spans = ctc_align(columns, [y.index(token) + 1 for token in y])
        best = [float(columns[first : last + 1, k + 1].max().exp()) for k, (first, last) in enumerate(spans)]
        return y, best, [first for first, _ in spans]

    def _prefixes(self, log_probs: Tensor, lens: Tensor) -> _Beam:
        """Return the prefixes (N, B) after the last frame of each utterance, best first."""
        n, _, v = log_probs.shape
        device = log_probs.device
        beam = _Beam(
            torch.full((n, 1, 1), -1, device=device),
            torch.zeros(n, 1, dtype=torch.int64, device=device),
            torch.zeros(n, 1, dtype=torch.float64, device=device),
            torch.full((n, 1), -torch.inf, dtype=torch.float64, device=device),
        )
        log_probs = log_probs.double()
        # The best B continuations of a prefix are among those by a frame's 2 B best tokens: at most B - 1 of them are
        # prefixes of the beam already, and one repeats the last token and is scored otherwise.
        open_ = log_probs.index_fill(2, torch.tensor(self.silent, device=device), -torch.inf)
        values, tokens = open_.topk(min(2 * self.beam_size, v), dim=2)
        shortest, longest = (int(lens.min()), int(lens.max())) if n else (0, 0)
        for t in range(longest):
            new = self._frame(beam, log_probs[:, t], values[:, t], tokens[:, t])
            beam = _merge((lens <= t).unsqueeze(1), beam, new) if t >= shortest else new
        return beam

    def _frame(self, beam: _Beam, frame: Tensor, values: Tensor, tokens: Tensor) -> _Beam:
        """Return the beam after one frame.

        Args:
            beam: before it.
            frame: (N, V) log-probabilities.
            values, tokens: (N, C) the best tokens of the frame and their log-probabilities.
        """
        last, total = beam.last, beam.total
        said = frame.gather(1, last).masked_fill(beam.lens == 0, -torch.inf)  # (N, B) of each prefix's last token
        blank, token = total + frame[:, self.blank_id, None], beam.token + said
        # Prefix i with one token more may be prefix j: its alignments then go to j.
        parent = _parents(beam)  # (N, j, i)
        again = last.unsqueeze(2) == last.unsqueeze(1)
        grown = torch.where(again, beam.blank.unsqueeze(1), total.unsqueeze(1)) + said.unsqueeze(2)
        grown = grown.masked_fill(~parent, -torch.inf).amax(dim=2)  # a prefix has one parent
        token = torch.logaddexp(token, grown)
        repeated = tokens.unsqueeze(1) == last.unsqueeze(2)  # (N, B, C)
        extended = torch.where(repeated, beam.blank.unsqueeze(2), total.unsqueeze(2)) + values.unsqueeze(1)
        known = (parent.unsqueeze(3) & repeated.unsqueeze(2)).any(dim=1)  # (N, i, C)
        extended = extended.masked_fill(known, -torch.inf)
        pool = torch.cat([torch.logaddexp(blank, token), extended.flatten(1)], dim=1)  # (N, B + B * C)
        totals, index = pool.topk(min(self.beam_size, pool.shape[1]), dim=1)
        b, c = last.shape[1], tokens.shape[1]
        longer = index >= b
        source = torch.where(longer, (index - b) // c, index)
        added = tokens.gather(1, (index - b).clamp(min=0) % c)
        lens = beam.lens.gather(1, source)
        width = int(lens.max()) + 1
        strings = beam.tokens[..., :width]
        strings = torch.cat([strings, strings.new_full((*strings.shape[:2], width - strings.shape[2] + 1), -1)], dim=2)
        strings = strings.gather(1, source.unsqueeze(2).expand(*source.shape, strings.shape[2]))
        strings = strings.scatter(2, lens.unsqueeze(2), torch.where(longer, added, -1).unsqueeze(2))
        return _Beam(
            strings,
            lens + longer,
            blank.gather(1, source).masked_fill(longer, -torch.inf),
            torch.where(longer, totals, token.gather(1, source)),
        )


def _parents(beam: _Beam) -> Tensor:
    """Return (N, B, B) bool: whether prefix j (dimension 1) is prefix i (dimension 2) and one token more."""
    shorter = beam.tokens.scatter(2, (beam.lens - 1).clamp(min=0).unsqueeze(2), -1)
    equal = (shorter.unsqueeze(2) == beam.tokens.unsqueeze(1)).all(dim=3)
    alive = beam.total > -torch.inf
    equal &= beam.lens.unsqueeze(2) == beam.lens.unsqueeze(1) + 1
    return equal & alive.unsqueeze(2) & alive.unsqueeze(1)


def _merge(ended: Tensor, old: _Beam, new: _Beam) -> _Beam:
    """Return the old beam where an utterance (N, 1) has ended, the new one elsewhere."""

    def fit(x: Tensor, fill: float) -> Tensor:
        more = x.new_full((x.shape[0], new.lens.shape[1] - x.shape[1], *x.shape[2:]), fill)
        x = torch.cat([x, more], dim=1)
        if x.dim() == 3:
            width = new.tokens.shape[2]
            x = torch.cat([x, x.new_full((*x.shape[:2], max(width - x.shape[2], 0)), fill)], dim=2)[..., :width]
        return x

    return _Beam(
        torch.where(ended.unsqueeze(2), fit(old.tokens, -1), new.tokens),
        torch.where(ended, fit(old.lens, 0), new.lens),
        torch.where(ended, fit(old.blank, -torch.inf), new.blank),
        torch.where(ended, fit(old.token, -torch.inf), new.token),
    )
