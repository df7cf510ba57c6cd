"""The posterior of HuBERT's clusters: what masked prediction trains, and what discriminative distillation compares.

Hsu et al. 2021, arXiv 2106.07447, eq. 3: p(k | h) = softmax_k(cos(A h, e_k) / tau), tau = 0.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClusterHead(nn.Module):
    """Projection A and an embedding of each cluster.

    Args:
        dim: channels C of the encoder.
        num_clusters: K (fairseq's models have four more, for the special symbols of its dictionary).
        proj_dim: E, 256 in the paper.
    """

    def __init__(self, dim: int, num_clusters: int, proj_dim: int = 256) -> None:
        super().__init__()
        self.final_proj = nn.Linear(dim, proj_dim)
        self.label_embs = nn.Parameter(torch.empty(num_clusters, proj_dim).uniform_())

    def forward(self, hidden: Tensor, temperature: float = 0.1) -> Tensor:
        """Map (..., C) to logits (..., K) in float32."""
        return cosine_logits(self.final_proj(hidden), self.label_embs, temperature)


def cosine_logits(projected: Tensor, label_embs: Tensor, temperature: float) -> Tensor:
    """Return the cosines of (..., E) to each of (K, E), over a temperature: (..., K) float32."""
    with torch.autocast(projected.device.type, enabled=False):
        x, embeddings = (F.normalize(v.float(), dim=-1, eps=1e-8) for v in (projected, label_embs))
        return x @ embeddings.T / temperature
