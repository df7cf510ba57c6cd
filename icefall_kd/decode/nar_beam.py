"""Beam search over the tokens that a masked decoder fills in, batched over utterances and hypotheses.

Gong, Zhou and Qian 2022 (arXiv 2207.10600) keep several hypotheses through the passes of Mask-CTC and rank them by
accumulated log-probability; the rest is our reconstruction: every hypothesis fills its own easiest positions, with the
best combinations of tokens.  All hypotheses of a string have the same number of filled tokens after each pass, so that
their scores need no normalisation.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.base import Hypothesis
from icefall_kd.decode.ctc_prefix import CtcPrefixBeamSearch
from icefall_kd.decode.ctc_string import collapse, ctc_string_scores, unknown_as_blank
from icefall_kd.decode.mask_ctc import Filling, MaskPredict, easiest


class NarBeamSearch(MaskPredict):
    """Mask-predict with ``beam_size`` hypotheses; one decoder call a pass, for all utterances and hypotheses.

    A beam of 1 is mask-predict.  In one pass (K = 1), or where every utterance has one mask at most, the best
    hypothesis is mask-predict's too.

    Args:
        model: CtcAttentionModel with a mask-predicting decoder, in evaluation mode.
        beam_size: hypotheses kept a string.
        nbest: hypotheses returned, at most ``beam_size``.
        rescore_ctc_weight: w above 0: finished hypotheses are ranked by (1 - w) times the decoder's score plus w times
            the log-probability that CTC gives the whole string.  Those too long for the frames (CTC needs one between
            equal tokens) are dropped, or all left as they are where none fits.
        seeds: "greedy": begin with the greedy CTC string; "prefix_beam": with the ``beam_size`` best strings of a CTC
            prefix beam search, of different lengths and each with its own masks, so that insertions and deletions can
            be repaired too.  Each is searched with the whole beam; then all hypotheses of an utterance are ranked by
            the log-probability of their seed plus the decoder's score or, with ``rescore_ctc_weight``, as said there.
        options: of :class:`MaskPredict`.
    Raises:
        ConfigError: the decoder is autoregressive.
    """

    def __init__(
        self,
        model,
        beam_size: int = 4,
        *,
        nbest: int = 1,
        rescore_ctc_weight: float = 0.0,
        seeds: str = "greedy",
        **options,
    ) -> None:
        super().__init__(model, **options)
        self.beam_size, self.nbest, self.rescore_ctc_weight = beam_size, min(nbest, beam_size), rescore_ctc_weight
        self.prefixes = CtcPrefixBeamSearch(model, beam_size) if seeds == "prefix_beam" else None

    @classmethod
    def from_config(cls, model, config: DecodeConfig) -> "NarBeamSearch":
        """Return the search that the options of decode.py describe."""
        return cls(
            model,
            config.beam_size,
            nbest=config.nbest,
            rescore_ctc_weight=config.rescore_ctc_weight,
            seeds=config.nar_seeds,
            passes=config.passes,
            mask_threshold=config.mask_threshold,
            rank_masks_by=config.rank_masks_by,
        )

    @torch.no_grad()
    def decode(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> list[list[Hypothesis]]:
        """Return the n-best list of each utterance.

        The score is the sum of the log-probabilities of the tokens that were filled in, 0 when none was masked; with
        rescoring or seeds of a prefix beam search, what the finished hypotheses were ranked by.

        Args:
            encoder_out: (N, T', C).
            encoder_out_lens: (N,).
        Returns:
            N lists of up to ``nbest`` different :class:`Hypothesis`, best first; timestamps are the first frames of
            the runs of the CTC string that a hypothesis began with.
        """
        log_probs = self.model.ctc_log_probs(encoder_out)
        if self.prefixes is None:
            strings = collapse(log_probs, encoder_out_lens, blank_id=self.model.blank_id)
            found = self.fill(strings, encoder_out, encoder_out_lens)
        else:
            found = self._from_prefixes(log_probs, encoder_out, encoder_out_lens)
        return [hyps[: self.nbest] for hyps in self._rescore(found, log_probs, encoder_out_lens)]

    def _from_prefixes(self, log_probs: Tensor, encoder_out: Tensor, lens: Tensor) -> list[list[Hypothesis]]:
        """Return the different hypotheses of all seeds of each utterance, best first."""
        strings, owners, scores = self.prefixes.search(log_probs, lens, self.beam_size)
        filled = self.fill(strings, encoder_out, lens, torch.tensor(owners, device=encoder_out.device))
        pools: list[dict[tuple[int, ...], Hypothesis]] = [{} for _ in encoder_out]
        for owner, score, hyps in zip(owners, scores, filled, strict=True):
            for hyp in hyps:
                # The rescoring has CTC's opinion of the whole string: that of the seed would count twice.
                new = hyp if self.rescore_ctc_weight else dataclasses.replace(hyp, score=score + hyp.score)
                old = pools[owner].setdefault(tuple(hyp.tokens), new)
                if new.score > old.score:
                    pools[owner][tuple(hyp.tokens)] = new
        return [sorted(pool.values(), key=lambda h: -h.score) for pool in pools]

    def _rescore(self, found: list[list[Hypothesis]], log_probs: Tensor, lens: Tensor) -> list[list[Hypothesis]]:
        weight = self.rescore_ctc_weight
        if not weight:
            return found
        owners = [i for i, hyps in enumerate(found) for _ in hyps]
        log_probs = unknown_as_blank(log_probs, self.model.blank_id)
        ctc = iter(ctc_string_scores(log_probs, lens, owners, [h.tokens for hyps in found for h in hyps]))
        scored = [
            [dataclasses.replace(h, score=(1 - weight) * h.score + weight * next(ctc)) for h in hyps] for hyps in found
        ]
        fitting = [[h for h in hyps if h.score > -torch.inf] for hyps in scored]
        return [sorted(hyps, key=lambda h: -h.score) or old for hyps, old in zip(fitting, found, strict=True)]

    def advance(self, work: Filling, held: Tensor, scores: Tensor, amounts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Do one pass: every hypothesis fills its easiest slots in, the best ``beam_size`` of all live on.

        Args:
            work: A strings.
            held: (A, G, S) what the slots of G hypotheses of each string hold.
            scores: (A, G) float64, minus infinity: no hypothesis.
            amounts: slots that are filled, of each string.
        Returns:
            (A, B, S) and (A, B) of at most ``beam_size`` hypotheses, best first.
        """
        log_probs, ease = work.ask(held, self.rank_masks_by)
        slots, used = easiest(ease, amounts)  # (A, G, M)
        totals, tokens = self._combinations(log_probs, slots, used, scores)
        a, g, p, m = tokens.shape
        # Slots that a string does not fill in go to a column behind the last one.
        spare = slots.masked_fill(~used, held.shape[2]).unsqueeze(2).expand(a, g, p, m)
        pool = torch.cat([held, held.new_zeros(a, g, 1)], dim=2).unsqueeze(2).repeat(1, 1, p, 1)
        pool = pool.scatter_(3, spare, tokens)[..., :-1].flatten(1, 2)  # (A, G * P, S)
        totals, order = totals.flatten(1).sort(dim=1, descending=True, stable=True)
        pool = pool.gather(1, order.unsqueeze(2).expand_as(pool))
        if g > 1:  # two hypotheses may have become one: the better one, in front, stays
            same = (pool.unsqueeze(2) == pool.unsqueeze(1)).all(dim=3).tril(-1)
            totals, order = totals.masked_fill(same.any(dim=2), -torch.inf).sort(dim=1, descending=True, stable=True)
            pool = pool.gather(1, order.unsqueeze(2).expand_as(pool))
        return pool[:, : self.beam_size], totals[:, : self.beam_size]

    def _combinations(self, log_probs: Tensor, slots: Tensor, used: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best combinations of tokens of each hypothesis: exact, position by position.

        Args:
            log_probs: (A, G, S, V).
            slots: (A, G, M) slots that are filled.
            used: (A, 1, M) bool.
            scores: (A, G).
        Returns:
            (A, G, P) scores of at most ``beam_size`` combinations, (A, G, P, M) their tokens.
        """
        width = min(self.beam_size, log_probs.shape[3])
        asked = log_probs.gather(2, slots.unsqueeze(3).expand(*slots.shape, log_probs.shape[3]))
        # Of equal tokens mask-predict takes the first; topk promises no order.
        values, tokens = asked.max(dim=3, keepdim=True) if width == 1 else asked.topk(width)
        # A slot that is not filled in has one choice, which changes nothing.
        nothing = torch.full((width,), -torch.inf, device=values.device)
        nothing[0] = 0.0
        values = values.where(used.unsqueeze(3), nothing).double()  # (A, G, M, R)
        totals, picked = scores.unsqueeze(2), tokens.new_zeros(*scores.shape, 1, 0)
        for i in range(slots.shape[2]):
            sums = (totals.unsqueeze(3) + values[:, :, i].unsqueeze(2)).flatten(2)  # (A, G, P * R)
            # Equal scores keep their order, whatever else is in the batch.
            totals, index = (x[..., : self.beam_size] for x in sums.sort(dim=2, descending=True, stable=True))
            earlier = (index // width).unsqueeze(3).expand(*index.shape, i)
            choice = tokens[:, :, i].gather(2, index % width).unsqueeze(3)
            picked = torch.cat([picked.gather(2, earlier), choice], dim=3)
        return totals, picked
