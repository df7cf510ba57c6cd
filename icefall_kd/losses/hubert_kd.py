"""Distillation of a HuBERT teacher: regression of its states, and divergence from its clusters' posterior.

Chang et al. 2021, arXiv 2110.01900 (regression); Wang et al. 2022, arXiv 2210.15631 (both; what the paper leaves open
is the co-author's public code's, docs/hubert.md).  Every function returns one number a frame, in float32.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from icefall_kd.models.cluster_head import cosine_logits

Distance = Literal["l1", "l2"]


def distance(predicted: Tensor, states: Tensor, kind: Distance = "l1") -> Tensor:
    """Return the mean over channels of |p - y| or (p - y)^2.

    Args:
        predicted: (..., C) p.
        states: (..., C) y of the teacher, which get no gradient.
        kind: "l1" or "l2".
    Returns:
        (...) float32.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        difference = predicted.float() - states.detach().float()
        return (difference.abs() if kind == "l1" else difference.square()).mean(dim=-1)


def cosine_distance(predicted: Tensor, states: Tensor) -> Tensor:
    """Return -log sigmoid(cos(p, y)) of (..., C) vectors: (...) float32 between 0.3133 and 1.3133 (1 and -1).

    Squares of large vectors overflow in float16, so both are float32 first.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        return -F.logsigmoid(F.cosine_similarity(predicted.float(), states.detach().float(), dim=-1))


def cluster_divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(q || p) of the teacher's posterior q from the student's p over K clusters, in nats.

    Args:
        logits: (..., K) of the student.
        teacher_logits: (..., K), which get no gradient.
    Returns:
        (...) float32.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_q, log_p = teacher_logits.detach().float().log_softmax(dim=-1), logits.float().log_softmax(dim=-1)
        return (log_q.exp() * (log_q - log_p)).sum(dim=-1)


def cluster_choice(projected: Tensor, label_embs: Tensor, chosen: Tensor, temperature: float = 1.0) -> Tensor:
    """Return -log softmax of the cosine to the teacher's likeliest cluster, among all clusters.

    The co-author's code puts the positive in front of all K clusters and leaves out those that equal it.

    Args:
        projected: (..., E) of the student.
        label_embs: (K, E), which get no gradient.
        chosen: (...) int64, the teacher's likeliest cluster of each frame.
        temperature: of the cosines.
    Returns:
        (...) float32 in nats.
    """
    logits = cosine_logits(projected, label_embs.detach(), temperature)
    positive = logits.gather(-1, chosen.unsqueeze(-1))
    _, group = label_embs.detach().unique(dim=0, return_inverse=True)  # (K,), the same for equal embeddings
    others = logits.masked_fill(group[chosen].unsqueeze(-1) == group, -torch.inf)
    return torch.cat([positive, others], dim=-1).logsumexp(dim=-1) - positive.squeeze(-1)
