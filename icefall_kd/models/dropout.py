"""Dropout that costs little on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.errors import ConfigError


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014); on a CPU one random byte decides about one element.

    torch draws a Bernoulli variable an element there, which made a sixth of a training step of a small
    encoder; eight decisions from one 64-bit draw cost a fifth of that.  The probability is rounded to a
    multiple of 1/256, and the scale of the kept elements is exact for the rounded one.
    """

    def __init__(self, p: float, shared_over_time: bool = False) -> None:
        """Make the layer.

        Args:
            p: probability of zeroing an element.
            shared_over_time: draw one mask (N, 1, C) for all frames of an utterance, as the feed-forward modules of
                icefall's zipformer do; x is (N, T, C) then.
        """
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigError(f"--dropout is {p}; it must lie in [0, 1)")
        self.p, self.shared_over_time = p, shared_over_time

    def forward(self, x: Tensor) -> Tensor:
        """Return x with elements zeroed with probability p and the others scaled up, in training only."""
        if not self.training or self.p == 0:
            return x
        if self.shared_over_time:
            return x * x.new_empty(x.shape[0], 1, x.shape[2]).bernoulli_(1 - self.p).div_(1 - self.p)
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        threshold = round(self.p * 256)
        return _ByteDropout.apply(x, threshold) if threshold else x

    def extra_repr(self) -> str:
        """Return the probability for the printed module."""
        return f"p={self.p}, shared_over_time={self.shared_over_time}"


class _ByteDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, threshold):
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= threshold
        ctx.save_for_backward(kept)
        ctx.scale = 256 / (256 - threshold)
        return x.mul(kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return grad.mul(kept).mul_(ctx.scale), None
