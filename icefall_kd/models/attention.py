"""Multi-head self-attention with relative positions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.errors import ConfigError

# Added to forbidden scores: finite, so that a row without any allowed key stays free of NaN, and large
# enough for an exact zero after the softmax in every precision, float16 included.
MASKED_SCORE = -1.0e4


class RelativePositions(nn.Module):
    """Sinusoids of all distances between two frames (Dai et al. 2019, Transformer-XL, section 3.3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        # Not a buffer: its size follows the lengths seen, which differ between ranks that exchange buffers.
        self.table = torch.zeros(0, dim)

    def forward(self, x: Tensor, left: int = 0) -> Tensor:
        """Return the embeddings of the distances left+T-1, ..., -(T-1).

        Args:
            x: (N, T, C), read for its length, device and dtype.
            left: cached frames before x that its frames attend to as well.
        Returns:
            (left+2T-1, C).
        """
        num_frames = x.shape[1]
        if torch.jit.is_tracing():  # the graph must hold for every length: no table of those seen so far
            return self._sinusoids(left + num_frames, x.device)[: left + 2 * num_frames - 1].to(x.dtype)
        known = (self.table.shape[0] + 1) // 2
        if known < left + num_frames or self.table.device != x.device:
            known = max(left + num_frames, 2 * known)
            with torch.inference_mode(False):  # a table made while validating serves the next training step too
                self.table = self._sinusoids(known, x.device)
        return self.table[known - left - num_frames : known + num_frames - 1].to(x.dtype)

    def _sinusoids(self, num_frames: int, device: torch.device) -> Tensor:
        distance = torch.arange(num_frames - 1, -num_frames, -1.0, dtype=torch.float64)
        rate = torch.exp(torch.arange(0, self.dim, 2, dtype=torch.float64) * (-math.log(10000.0) / self.dim))
        angle = distance.unsqueeze(1) * rate
        # ONNX Runtime has no cosine of doubles.
        cos = (angle + math.pi / 2).sin() if torch.jit.is_tracing() else angle.cos()
        return torch.stack([angle.sin(), cos], dim=-1).flatten(1)[:, : self.dim].float().to(device)


def relative_shift(scores: Tensor) -> Tensor:
    """Re-index scores by distance to scores by key, without copying.

    Args:
        scores: (N, H, T, K+T-1) contiguous, of T queries, the last of K keys; column m holds the distance K-1-m
            (query minus key).
    Returns:
        (N, H, T, K) view; entry (i, j) is scores[i, T-1-i+j].
    """
    num_frames, row = scores.shape[2], scores.shape[3] - 1
    if torch.jit.is_tracing():
        # The shift of Dai et al. 2019, appendix B: it copies, but a graph of it holds for one frame, too.
        n, h, t, width = scores.shape
        shifted = F.pad(scores, (1, 0)).reshape(n, h, width + 1, t)[:, :, 1:].reshape(n, h, t, width)
        return shifted[..., : width - t + 1]
    if num_frames == 1:
        return scores
    # Row i starts T-1-i after its own beginning: in flat memory, rows of length K+T-2 that start at T-1.
    flat = scores.flatten(2)[..., num_frames - 1 : num_frames - 1 + num_frames * row]
    return flat.unflatten(2, (num_frames, row))[..., : row - num_frames + 2]


class RelativeSelfAttention(nn.Module):
    """Self-attention whose scores add a content-position term (Dai et al. 2019, terms a to d).

    The content bias u of the paper is the bias of the query projection here; the position bias v is kept.  With
    ``content_bias`` both biases of the query exist, as in fairseq's Conformer: no more expressive, but as many
    parameters as published models have.  Attention weights see no dropout.
    """

    def __init__(self, dim: int, num_heads: int, content_bias: bool = False) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"--encoder-dim {dim} is not a multiple of --num-heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.position = nn.Linear(dim, dim, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(num_heads, 1, dim // num_heads))
        self.content_bias = nn.Parameter(torch.zeros(num_heads, 1, dim // num_heads)) if content_bias else None
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, left: int = 0, columns: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x: (N, K, C): frames of which the first ``left`` are seen and do not look.
            positions: (K+T-1, C) of :class:`RelativePositions`, T = K - left.
            mask: bool that broadcasts to (N, H, T, K), True where attention is forbidden.
            left: cached frames in front.
            columns: (T, K) int64, the row of ``positions`` for each query and key; None: frames follow each other.
        Returns:
            (N, T, C).
        """
        heads = self.num_heads
        qkv = self.qkv(x).view(*x.shape[:2], 3, heads, -1)  # (N, K, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (N, K, 3, H, D) -> 3 x (N, H, K, D)
        q = q[:, :, left:] * (q.shape[-1] ** -0.5)
        p = self.position(positions).view(positions.shape[0], heads, -1)  # (K+T-1, H, D)
        p = p.permute(1, 2, 0)  # (K+T-1, H, D) -> (H, D, K+T-1)
        bias = (q + self.position_bias.to(q.dtype)) @ p  # (N, H, T, distances)
        if columns is None:
            bias = relative_shift(bias)
        else:
            bias = bias.gather(3, columns.expand(*bias.shape[:2], *columns.shape))
        bias = bias.masked_fill(mask, MASKED_SCORE)
        if self.content_bias is not None:
            q = q + self.content_bias.to(q.dtype)
        y = _attend(q, k, v, bias)
        return self.out(y.transpose(1, 2).flatten(2))  # (N, H, T, D) -> (N, T, C)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Return softmax(q k^T + bias) v for q (N, H, T, D), k and v (N, H, K, D) and a bias (N, H, T, K)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    # With a bias that needs a gradient, torch has no fused kernel for CPUs: its composite path makes
    # several passes over the scores more than this.
    scores = torch.baddbmm(bias.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))  # (N * H, T, K)
    return torch.bmm(scores.softmax(2), v.flatten(0, 1)).view_as(q)
