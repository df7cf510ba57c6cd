"""Masks over frames: the one place where lengths become booleans."""

import torch
from torch import Tensor


def make_pad_mask(lens: Tensor, max_len: int | None = None) -> Tensor:
    """Return which frames are padding.

    Args:
        lens: (N,) integer lengths in frames, or of any other shape.
        max_len: T of the mask; None: the largest length (which waits for the device).
    Returns:
        (N, T) bool, True at padding; a dimension T behind those of ``lens``.
    """
    if max_len is None:
        max_len = int(lens.max())
    return torch.arange(max_len, device=lens.device) >= lens.unsqueeze(-1)


def chunk_mask(
    queries: Tensor, keys: Tensor, chunk_size: int, left_context_frames: int, right_context: int = 0
) -> Tensor:
    """Return which frames see which: those of their own chunk, and some before and behind it.

    The one chunk mask of training, of decoding whole utterances, and of chunk-by-chunk decoding with caches.  Our
    design; with a left context of whole chunks it is that of icefall's streaming Zipformer.

    Args:
        queries: (Tq,) or (N, Tq) positions in the utterance.
        keys: (Tk,) or (N, Tk) positions; those below 0 do not exist and are never seen.
        chunk_size: frames, -1: the whole utterance is one chunk.
        left_context_frames: frames before the chunk's first one that are seen, -1: all.
        right_context: frames behind the chunk that are seen.
    Returns:
        (Tq, Tk) or (N, Tq, Tk) bool, True where the query may see the key.
    """
    queries, keys = queries.unsqueeze(-1), keys.unsqueeze(-2)
    allowed = keys >= 0
    if chunk_size < 0:
        return allowed.expand(torch.broadcast_shapes(queries.shape, keys.shape))
    begin = queries // chunk_size * chunk_size
    allowed = allowed & (keys < begin + (chunk_size + right_context))
    return allowed if left_context_frames < 0 else allowed & (keys >= begin - left_context_frames)


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
