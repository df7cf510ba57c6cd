"""Distillation from posteriors of which the top k classes are known, and from weighted n-best lists."""

import math

import torch
from torch import Tensor

from icefall_kd.errors import DataError

# Keeps the logarithm of a teacher's probability finite; its product with the probability is 0 below it.
_TINY = 1e-30


def posterior_kd(logits: Tensor, ids: Tensor, probs: Tensor, rest: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the divergence KL(teacher || student) over k + 1 classes: the teacher's top k, and all others as one.

    Its gradient is that of the cross-entropy with the same targets (Hinton et al. 2015; at k = V the plain one).  What
    it leaves out is rest * KL among the other classes, at least 0: that is the top-k error.  With a temperature the
    rest is taken as spread evenly over its classes, since only its sum is known.

    Args:
        logits: (M, V) of the student; -inf at classes that neither side has.
        ids: (M, k) int64 different classes.
        probs: (M, k) float of the teacher.
        rest: (M,) float, 1 - probs.sum(1).
        temperature: divides both sides' logits; the loss is multiplied by its square, so that its gradient keeps its
            size.
    Returns:
        (M,) float32 in nats.
    Raises:
        DataError: shapes that do not fit, or classes outside the vocabulary.
    """
    if ids.shape != probs.shape or ids.shape[:1] != rest.shape or len(ids) != len(logits):
        raise DataError(
            f"posteriors {tuple(ids.shape)}, {tuple(probs.shape)}, {tuple(rest.shape)} do not fit logits "
            f"{tuple(logits.shape)}"
        )
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < logits.shape[1]:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise DataError(f"posteriors name class {wrong}; the student has {logits.shape[1]}")
    with torch.autocast(logits.device.type, enabled=False):
        log_q = (logits.float() / temperature).log_softmax(dim=1)
        log_q_top = log_q.gather(1, ids)  # (M, k)
        others = log_q.scatter(1, ids, -math.inf)
        p, p_rest = probs.float(), rest.float().clamp(min=0)  # a difference of floats may lie below 0
        if temperature != 1.0:
            num_others = others.isfinite().sum(dim=1).clamp(min=1)
            p, p_rest = p ** (1 / temperature), num_others * (p_rest / num_others) ** (1 / temperature)
            total = p.sum(dim=1) + p_rest
            p, p_rest = p / total.unsqueeze(1), p_rest / total
        loss = _divergence(p, log_q_top).sum(dim=1)
        # Where nothing is left beside the top k there is no logarithm of a sum, nor a gradient of it.
        open_rows = (p_rest > 0) & others.isfinite().any(dim=1)
        log_q_rest = torch.where(open_rows.unsqueeze(1), others, 0.0).logsumexp(dim=1)
        loss = loss + torch.where(open_rows, _divergence(p_rest, log_q_rest), 0.0)
    return loss * temperature**2


def _divergence(p: Tensor, log_q: Tensor) -> Tensor:
    """Return p * (log p - log q), 0 where p is."""
    log_q = torch.where(p > 0, log_q, 0.0)  # a class that the student lacks: 0 * inf has no gradient
    return p * (p.clamp(min=_TINY).log() - log_q)


def nbest_weights(scores: Tensor, temperature: float) -> Tensor:
    """Return the weights of hypotheses (N, B) from their log-probabilities, softmax(scores / temperature).

    Hypotheses of score -inf get 0; an utterance without any other gets 0 everywhere.
    """
    scores = scores.float() / temperature
    known = scores.isfinite()
    weights = scores.masked_fill(~known, -1e30).softmax(dim=1)
    return weights * known
