"""Losses of attention decoders: label smoothing, and masks for the conditional masked language model."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def smoothed_cross_entropy(logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """Return the divergence of each prediction from its smoothed label (Szegedy et al. 2016, as in ESPnet).

    The target q has 1 - smoothing at the label and smoothing / (V - 1) everywhere else; the result is KL(q || p), so
    that a perfect prediction costs nothing.

    Args:
        logits: (M, V) before the softmax.
        y: (M,) token ids.
        smoothing: at least 0, below 1.
    Returns:
        (M,) float32 in nats.
    """
    num_classes = logits.shape[-1]
    with torch.autocast(logits.device.type, enabled=False):
        # torch spreads its smoothing over all V classes, the label's included.
        loss = F.cross_entropy(
            logits.float(), y, reduction="none", label_smoothing=smoothing * num_classes / (num_classes - 1)
        )
    entropy = 0.0
    if smoothing > 0:
        entropy = -smoothing * math.log(smoothing / (num_classes - 1))
        entropy -= (1 - smoothing) * math.log(1 - smoothing)
    return loss - entropy


def draw_masks(y_lens: Tensor, max_len: int, sampling: Literal["without_replacement", "with_replacement"]) -> Tensor:
    """Draw which tokens of each sequence are masked: n uniform in 1 ... L of them, at uniform positions.

    Without replacement (Ghazvininejad et al. 2019) every share of masks is equally frequent, all of them included.
    With replacement, as ESPnet's Mask-CTC draws them, a position may be drawn again, so that fewer are masked: 0.40 of
    14 tokens on average instead of 0.54, and a fully masked sequence practically never comes.

    Args:
        y_lens: (N,) tokens L of each sequence; one without tokens gets no mask.
        max_len: U.
        sampling: how positions are drawn.
    Returns:
        (N, U) bool, True at masked tokens.
    """
    device, lens = y_lens.device, y_lens.unsqueeze(1)
    count = (torch.rand(len(y_lens), 1, device=device) * lens).long() + 1  # (N, 1), in 1 ... L
    draws = torch.rand(len(y_lens), max_len, device=device)
    position = torch.arange(max_len, device=device)
    valid = position < lens
    if sampling == "without_replacement":
        ranks = draws.masked_fill(~valid, 2.0).argsort(dim=1).argsort(dim=1)
        return valid & (ranks < count)
    drawn = (draws * lens).long().clamp(max=max_len - 1)  # (N, U): draw u hits this position
    masked = torch.zeros(len(y_lens), max_len + 1, dtype=torch.bool, device=device)
    masked.scatter_(1, torch.where(position < count, drawn, max_len), True)
    return valid & masked[:, :max_len]
