"""A plain float64 form of the refinement search, straight from its description; slow on purpose."""

import math

import torch


def refine_reference(centers: torch.Tensor, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Refine codes (N, Q) of frames (N, C) once with centers (Q, K, C), materialising every change of the error."""
    num_codebooks, size, dim = centers.shape
    frames = len(x)
    chosen = centers[torch.arange(num_codebooks), codes]  # (N, Q, C)
    error = chosen.sum(dim=1) - x
    delta = centers.unsqueeze(0) - chosen.unsqueeze(2)  # (N, slots, K', C)
    total = (error[:, None, None] + delta).square().sum(dim=-1)
    indexes = torch.arange(size).view(1, 1, size, 1).expand(frames, num_codebooks, size, 1)
    slots, candidates, joined = num_codebooks, size, 1
    base = 8 if size <= 16 else 16
    while True:
        cut = min(128, base * 2 ** int(math.log(joined, 4) + 1e-9))
        if slots == 1 and candidates == 1:
            return indexes[:, 0, 0]
        if candidates > cut or slots == 1:
            candidates = 1 if slots == 1 else cut
            order = total.sort(dim=-1).indices[..., :candidates]
            total = total.gather(2, order)
            delta = delta.gather(2, order.unsqueeze(3).expand(-1, -1, -1, dim))
            indexes = indexes.gather(2, order.unsqueeze(3).expand(-1, -1, -1, joined))
            continue
        even, odd = delta[:, 0::2].unsqueeze(3), delta[:, 1::2].unsqueeze(2)
        delta = (even + odd).flatten(2, 3)
        total = (error[:, None, None] + delta).square().sum(dim=-1)
        left = indexes[:, 0::2].unsqueeze(3).expand(-1, -1, -1, candidates, -1)
        right = indexes[:, 1::2].unsqueeze(2).expand(-1, -1, candidates, -1, -1)
        indexes = torch.cat([left, right], dim=-1).flatten(2, 3)
        slots, candidates, joined = slots // 2, candidates**2, joined * 2
