"""Mask-CTC: what CTC is unsure of is masked and filled in by the masked decoder, in a constant number of passes.

Mask-predict, easy first (Ghazvininejad et al. 2019; Higuchi et al. 2020, "Mask CTC").  Two things are ours: blank,
sos/eos, unknown and mask are never predicted, and a position is easy when its best *probability* is high (ESPnet: its
best logit, ``--rank-masks-by logit``).  The number of tokens is CTC's: only substitutions can be repaired.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.base import UNK_ID, Hypothesis
from icefall_kd.decode.ctc_string import CtcStrings, collapse, pack_left
from icefall_kd.errors import ConfigError
from icefall_kd.models.attention_decoder import DecoderMemory
from icefall_kd.models.masks import make_pad_mask


def plan_passes(masked: int, passes: int) -> list[int]:
    """Return how many masks each pass fills in: ``masked // passes``, the last pass what is left.

    Args:
        masked: number of masks.
        passes: most passes K; 0, or more than there are masks: one mask a pass.
    """
    if not masked:
        return []
    count = passes if 0 < passes <= masked else masked
    each = masked // count
    return [each] * (count - 1) + [masked - each * (count - 1)]


class Filling:
    """Strings with masks, of which each has its own number, and the memory that the decoder looks at.

    A masked position is called a slot; a hypothesis of a string is what its slots hold, so that only these are kept
    and compared.  Strings leave when they are done.
    """

    def __init__(self, model, tokens: Tensor, masked: Tensor, lens: Tensor, memory: DecoderMemory) -> None:
        """Begin with strings of at least one mask.

        Args:
            model: CtcAttentionModel.
            tokens: (A, U).
            masked: (A, U) bool, False beyond the lengths.
            lens: (A,).
            memory: of A rows.
        """
        self.model, self.lens, self.memory = model, lens, memory
        self.tokens = torch.cat([tokens, tokens.new_zeros(len(tokens), 1)], dim=1)  # a column for unused slots
        self.slots, counts = pack_left(masked)  # (A, S)
        self.unused = make_pad_mask(counts, self.slots.shape[1])
        self.specials = torch.tensor([model.blank_id, model.sos_id, UNK_ID, model.mask_id], device=tokens.device)

    def start(self) -> Tensor:
        """Return what the slots hold at first, (A, 1, S): masks, 0 in unused ones."""
        return torch.full_like(self.slots, self.model.mask_id).masked_fill(self.unused, 0).unsqueeze(1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these strings alone, by their numbers (A',)."""
        self.memory = self.memory.select(rows)
        self.tokens, self.slots, self.lens = self.tokens[rows], self.slots[rows], self.lens[rows]
        self.unused = self.unused[rows]

    def strings(self, held: Tensor) -> Tensor:
        """Return whole strings (A, G, U) by what their slots hold (A, G, S)."""
        whole = self.tokens.unsqueeze(1).repeat(1, held.shape[1], 1)
        return whole.scatter_(2, self.slots.unsqueeze(1).expand_as(held), held)[..., :-1]

    def ask(self, held: Tensor, rank_by: str) -> tuple[Tensor, Tensor]:
        """Run the decoder once.

        Args:
            held: (A, G, S) what the slots of G hypotheses of each string hold.
            rank_by: "probability" or "logit".
        Returns:
            (A, G, S, V) float32 log-probabilities, minus infinity for tokens that are never predicted; (A, G, S) how
            easy each slot is, minus infinity for those that hold a token.
        """
        y, g = self.strings(held), held.shape[1]
        slots = self.slots.clamp(max=y.shape[2] - 1).repeat_interleave(g, dim=0)  # an unused slot: any position
        logits = self.model.decoder(y.flatten(0, 1), self.lens.repeat_interleave(g), self.memory, slots)
        logits = logits.float().view(*held.shape, -1)
        log_probs = logits.log_softmax(dim=-1).index_fill_(3, self.specials, -torch.inf)
        ranked = log_probs if rank_by == "probability" else logits.index_fill_(3, self.specials, -torch.inf)
        return log_probs, ranked.amax(dim=-1).masked_fill(held != self.model.mask_id, -torch.inf)


def easiest(ease: Tensor, amounts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the slots that a pass fills in, easiest first.

    Args:
        ease: (A, G, S) of :meth:`Filling.ask`.
        amounts: how many slots of each string.
    Returns:
        (A, G, M) slots, M the largest amount; (A, 1, M) bool, True where the string has so many.
    """
    slots = ease.sort(dim=-1, descending=True, stable=True).indices[..., : max(amounts)]
    order = torch.arange(slots.shape[2], device=ease.device)
    return slots, (order < torch.tensor(amounts, device=ease.device).unsqueeze(1)).unsqueeze(1)


class MaskPredict:
    """CTC greedy search, then passes of the masked decoder over what CTC was unsure of.

    Args:
        model: CtcAttentionModel with a mask-predicting decoder, in evaluation mode.
        passes: most passes K; 0: one mask a pass.
        mask_threshold: CTC tokens of a lower probability are masked; 0: none, which is CTC greedy search.
        rank_masks_by: "probability" or "logit".
    Raises:
        ConfigError: the decoder is autoregressive.
    """

    def __init__(
        self, model, *, passes: int = 10, mask_threshold: float = 0.99, rank_masks_by: str = "probability"
    ) -> None:
        if model.decoder.causal:
            raise ConfigError(
                "this model's decoder is autoregressive (--attention-decoder ar) and fills no masks in; "
                "decode it with --decoding-method joint_beam_search"
            )
        self.model, self.passes, self.mask_threshold = model, passes, mask_threshold
        self.rank_masks_by = rank_masks_by

    @classmethod
    def from_config(cls, model, config: DecodeConfig) -> "MaskPredict":
        """Return the search that the options of decode.py describe."""
        return cls(
            model,
            passes=config.passes,
            mask_threshold=config.mask_threshold,
            rank_masks_by=config.rank_masks_by,
        )

    @torch.no_grad()
    def decode(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> list[list[Hypothesis]]:
        """Return one hypothesis an utterance.

        The score is the sum of the decoder's log-probabilities of the tokens that it filled in: 0 when none was masked,
        whether CTC was sure of every token or heard none.

        Args:
            encoder_out: (N, T', C).
            encoder_out_lens: (N,).
        Returns:
            N lists of one :class:`Hypothesis`; timestamps are the first frames of CTC's runs.
        """
        log_probs = self.model.ctc_log_probs(encoder_out)
        strings = collapse(log_probs, encoder_out_lens, blank_id=self.model.blank_id)
        return self.fill(strings, encoder_out, encoder_out_lens)

    def fill(
        self, strings: CtcStrings, encoder_out: Tensor, encoder_out_lens: Tensor, owners: Tensor | None = None
    ) -> list[list[Hypothesis]]:
        """Mask and fill strings in.

        Args:
            strings: R strings.
            encoder_out: (N, T', C).
            encoder_out_lens: (N,).
            owners: (R,) the utterance of each string; None: one string an utterance.
        Returns:
            R lists of hypotheses.
        """
        valid = ~make_pad_mask(strings.lens, strings.tokens.shape[1])
        masked = valid & (strings.confidences < self.mask_threshold)
        masks, lens = masked.sum(dim=1).tolist(), strings.lens.tolist()
        filled = [[(0.0, y[:n])] for y, n in zip(strings.tokens.tolist(), lens, strict=True)]
        rows = [r for r, n in enumerate(masks) if n]
        if rows:
            at = torch.tensor(rows, device=encoder_out.device)
            width = max(lens[r] for r in rows)
            of = at if owners is None else owners[at]
            memory = self.model.decoder.memory(encoder_out[of], encoder_out_lens.to(of.device)[of])
            work = Filling(self.model, strings.tokens[at, :width], masked[at, :width], strings.lens[at], memory)
            found = self._passes(work, [plan_passes(masks[r], self.passes) for r in rows])
            for r, hyps in zip(rows, found, strict=True):
                filled[r] = [(score, y[: lens[r]]) for score, y in hyps]
        frames = [times[:n] for times, n in zip(strings.frames.tolist(), lens, strict=True)]
        return [
            [Hypothesis(y, score, list(times), masked=n) for score, y in hyps]
            for hyps, times, n in zip(filled, frames, masks, strict=True)
        ]

    def _passes(self, work: Filling, plans: list[list[int]]) -> list[list[tuple[float, list[int]]]]:
        """Return scores and strings of each string's hypotheses, best first, after as many passes as its plan has."""
        found: list[list[tuple[float, list[int]]]] = [[] for _ in plans]
        held, rows = work.start(), list(range(len(plans)))
        scores = torch.zeros(held.shape[:2], dtype=torch.float64, device=held.device)
        for k in range(max(map(len, plans))):
            held, scores = self.advance(work, held, scores, [plans[r][k] for r in rows])
            done = [i for i, r in enumerate(rows) if len(plans[r]) == k + 1]
            if not done:
                continue
            for i, strings, totals in zip(done, work.strings(held)[done].tolist(), scores[done].tolist(), strict=True):
                found[rows[i]] = [(s, y) for s, y in zip(totals, strings, strict=True) if s > -math.inf]
            rest = [i for i, r in enumerate(rows) if len(plans[r]) > k + 1]
            if rest:
                left = torch.tensor(rest, device=held.device)
                work.keep(left)
                held, scores, rows = held[left], scores[left], [rows[i] for i in rest]
        return found

    def advance(self, work: Filling, held: Tensor, scores: Tensor, amounts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Do one pass: fill the easiest slots with their best tokens.

        Args:
            work: A strings.
            held: (A, 1, S) what their slots hold.
            scores: (A, 1) float64.
            amounts: slots that are filled, of each string.
        Returns:
            ``held`` and ``scores`` after the pass.
        """
        log_probs, ease = work.ask(held, self.rank_masks_by)
        slots, used = easiest(ease, amounts)
        best, tokens = log_probs.max(dim=-1)
        gains = best.gather(2, slots).double().masked_fill(~used, 0.0)
        for i in range(gains.shape[2]):  # in the order of the beam search, so that equal tokens have equal scores
            scores = scores + gains[..., i]
        old = held.gather(2, slots)
        return held.scatter(2, slots, tokens.gather(2, slots).where(used, old)), scores
