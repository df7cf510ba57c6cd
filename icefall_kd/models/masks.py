"""Masks over frames: the one place where lengths become booleans."""

import torch
from torch import Tensor


def make_pad_mask(lens: Tensor, max_len: int | None = None) -> Tensor:
    """Return which frames are padding.

    Args:
        lens: (N,) integer lengths in frames.
        max_len: T of the mask; None: the largest length (which waits for the device).
    Returns:
        (N, T) bool, True at padding.
    """
    if max_len is None:
        max_len = int(lens.max())
    return torch.arange(max_len, device=lens.device) >= lens.unsqueeze(1)


def make_attention_mask(pad_mask: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return which keys a query may not see.

    Args:
        pad_mask: (N, T) bool, True at padding.
        allowed: (T, T) or (N, T, T) bool, True where query i (rows) may see key j, for instance a
            chunk mask; None: every frame sees the whole utterance.
    Returns:
        (N, 1, 1, T) or (N, 1, T, T) bool, True where attention is forbidden; broadcasts over heads.
    """
    mask = pad_mask[:, None, None, :]  # (N, 1, 1, T)
    if allowed is None:
        return mask
    if allowed.dim() == 2:
        allowed = allowed.unsqueeze(0)
    return mask | ~allowed.unsqueeze(1)
