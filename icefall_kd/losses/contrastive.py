"""Contrastive distillation: each projected vector must find its teacher's among those of the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    predicted: Tensor, wanted: Tensor, temperature: float, negatives: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return InfoNCE with cosines (van den Oord et al. 2018; the acoustic loss of Han et al. 2023) of every row.

    -log exp(cos(p_i, e_i) / t) / sum over j of exp(cos(p_i, e_j) / t), with j = i and ``negatives`` others, drawn for
    each row from all rows uniformly without replacement; where i is drawn itself, it has one less, as in the public
    code.  Of R rows, where there are not more than ``negatives``, 0.8 R are drawn.  The public code gathers the
    negatives, (R, K, D) numbers; one product of all rows with a mask is the same loss.  Ours: rows that equal e_i bit
    by bit (an utterance and its copy at another speed, the same text twice) are no negatives of it.

    Args:
        predicted: (R, D) p.
        wanted: (R, D) e, which gets no gradient.
        temperature: t.
        negatives: K; None: all other rows.
    Returns:
        (R,) float32 in nats, and (R,) bool, whether e_i has the largest cosine of those that count.
    """
    rows = len(predicted)
    if rows == 0:
        return predicted.float().sum(dim=1), predicted.new_zeros(0, dtype=torch.bool)
    with torch.autocast(predicted.device.type, enabled=False):
        wanted = wanted.detach().float()
        scores = F.normalize(predicted.float(), dim=1, eps=1e-6) @ F.normalize(wanted, dim=1, eps=1e-6).T
        kept = ~_equal_rows(wanted)
        if negatives is not None:
            kept &= _drawn(rows, negatives if negatives < rows else int(0.8 * rows), predicted.device)
        kept.fill_diagonal_(True)
        scores = (scores / temperature).masked_fill(~kept, -torch.inf)
        target = torch.arange(rows, device=scores.device)
        return F.cross_entropy(scores, target, reduction="none"), scores.detach().argmax(dim=1) == target


def _drawn(rows: int, count: int, device: torch.device) -> Tensor:
    """Return (R, R) bool with ``count`` True in each row, at random places."""
    kept = torch.zeros(rows, rows, dtype=torch.bool, device=device)
    if count > 0:
        kept.scatter_(1, torch.rand(rows, rows, device=device).topk(count, dim=1).indices, True)
    return kept


def _equal_rows(x: Tensor) -> Tensor:
    """Return (R, R) bool, True where two rows of (R, D) float32 are equal bit by bit.

    Compared by hashes of 64 bits, sums of the bits times odd numbers modulo 2^64: exact, in whatever order they add up.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (x.shape[1],), generator=generator) * 2 + 1
    keys = (x.contiguous().view(torch.int32).long() * factors.to(x.device)).sum(dim=1)
    return keys.unsqueeze(1) == keys
