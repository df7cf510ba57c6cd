"""Continuous integrate-and-fire: encoder frames to one vector a token (Dong and Xu 2020, arXiv 1905.11235).

Every frame t has a weight alpha_t in (0, 1); C_t is their sum up to t.  Token u, counted from 0, takes the weight that
lies between u and u + 1 on this scale: of frame t it takes the overlap of (C_{t-1}, C_t) with (u, u + 1).  A frame may
lie in two tokens, or, where weights are scaled above 1, hold whole ones.

The public code of Han et al. 2023 walks through the frames, fires at 0.99, at most once a frame, and looks for fired
vectors afterwards by their being not zero.  The overlaps of all tokens and frames at once, as here, are exact: in
training there are as many tokens as the text has, whatever the number format.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.models.dropout import Dropout
from icefall_kd.models.masks import make_pad_mask

# Weight left behind the last whole token above which it makes one more; that of the public decoding script.
TAIL_THRESHOLD = 0.4
# A sum so little below a whole number is that number: what float32 weights leave open.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class CifOutput:
    """What integrate-and-fire makes of a batch."""

    c: Tensor
    """(N, U, C) one vector a token, 0 beyond the lengths."""
    lens: Tensor
    """(N,) int64 tokens of each utterance; U is the largest, or 1 where none fires at all."""
    quantity: Tensor
    """(N,) float32 sum of the weights before any scaling: the expected number of tokens."""
    alpha: Tensor
    """(N, T') float32 weights of frames before any scaling, 0 at padding."""
    weights: Tensor
    """(N, U, T') float32: how much of each frame a token took, c = weights @ encoder_out; rows add up to 1."""


def cif_weights(alpha: Tensor, num_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight of every frame in every token, the overlap matrix.

    min(C_t, u + 1) - max(C_{t-1}, u), not below 0, is how full token u is after frame t less how full it was before.

    Sums are in float64; split into their whole and their rest they lose nothing by the format of the result, which all
    that is as large as U times T' is calculated in.

    Args:
        alpha: (N, T') weights, scaled or not, 0 at padding.
        num_tokens: U.
        dtype: of the result.
    Returns:
        (N, U, T') of that type.
    """
    total = alpha.double().cumsum(dim=1).unsqueeze(1)  # (N, 1, T')
    whole = total.detach().floor()
    token = torch.arange(num_tokens, device=alpha.device, dtype=dtype).unsqueeze(1)
    filled = (whole.to(dtype) - token).add_((total - whole).to(dtype)).clamp(0.0, 1.0)
    return filled - F.pad(filled[..., :-1], (1, 0))  # not torch.diff, which ONNX lacks


def fired_tokens(quantity: Tensor, tail_threshold: float = TAIL_THRESHOLD) -> Tensor:
    """Return how many tokens (N,) int64 fire without scaling: the whole ones of a sum (N,), and the tail's."""
    whole = torch.floor(quantity + _ROUNDING)
    return (whole + (quantity - whole > tail_threshold)).long()


def integrate_and_fire(
    encoder_out: Tensor,
    alpha: Tensor,
    target_lens: Tensor | None = None,
    tail_threshold: float = TAIL_THRESHOLD,
    max_factor: float | None = None,
    num_tokens: int | None = None,
) -> CifOutput:
    """Integrate frames and fire tokens.

    With ``target_lens`` the weights are first scaled so that exactly so many tokens fire; the factor has a gradient.
    Without, what is left behind the last whole token fires, too, if it is above the threshold, scaled to weight 1.

    Args:
        encoder_out: (N, T', C).
        alpha: (N, T') weights, 0 at padding.
        target_lens: (N,) tokens, the end of the text included; None: as many as the weights say.
        tail_threshold: of the tail, without target_lens.
        max_factor: largest factor; an utterance that it leaves too short has fewer tokens; None: no limit.
        num_tokens: U of the result without target_lens, for a tracer, which cannot look into lengths: T' is always
            enough; None: the largest length.
    Returns:
        see :class:`CifOutput`; ``c`` has the type of encoder_out, whatever autocast says.
    """
    with torch.autocast(encoder_out.device.type, enabled=False):
        alpha = alpha if alpha.dtype == torch.float64 else alpha.float()
        quantity = alpha.double().sum(dim=1)
        if target_lens is not None:
            # The public code adds 1e-8 to the sum, which takes from the last token where the sum is small.
            lens, factor = target_lens, target_lens / quantity.clamp(min=1e-8)
            if max_factor is not None:
                factor = factor.clamp(max=max_factor)
                lens = torch.minimum(lens, torch.floor(quantity.detach() * factor.detach() + _ROUNDING).long())
            # The sums of scaled weights stay in float64: rounded ones would add up to a little more or less.
            scaled = alpha.double() * factor.unsqueeze(1)
            weights = cif_weights(scaled, max(int(target_lens.max()), 1), alpha.dtype)
        else:
            lens = fired_tokens(quantity, tail_threshold)
            weights = cif_weights(alpha, max(int(lens.max()), 1) if num_tokens is None else num_tokens, alpha.dtype)
            token = torch.arange(weights.shape[1], device=alpha.device)
            tail = token >= torch.floor(quantity + _ROUNDING).unsqueeze(1)  # (N, U)
            mass = weights.sum(dim=2).clamp(min=_ROUNDING)
            weights = weights / torch.where(tail, mass, 1.0).unsqueeze(2)
        weights = weights.masked_fill(make_pad_mask(lens, weights.shape[1]).unsqueeze(2), 0.0)
        c = (weights @ encoder_out.to(weights.dtype)).to(encoder_out.dtype)
    return CifOutput(c, lens, quantity.to(alpha.dtype), alpha, weights)


def token_frames(weights: Tensor) -> Tensor:
    """Return the frame (N, U) int64 that a token took most of, from the weights (N, U, T')."""
    return weights.argmax(dim=2)


class Cif(nn.Module):
    """Weights from a convolution, dropout, a linear layer and the sigmoid; then integrate-and-fire, all in float32."""

    def __init__(
        self,
        dim: int,
        kernel: int = 3,
        dropout: float = 0.2,
        initial_rate: float = 0.27,
        max_factor: float | None = None,
    ) -> None:
        """Make the module.

        Args:
            dim: C of the encoder.
            kernel: frames of the convolution, odd.
            dropout: behind the convolution.
            initial_rate: what the output layer's bias makes of no input, in tokens a frame: a half, as without it,
                would fire far too often in the first steps.
            max_factor: see :func:`integrate_and_fire`.
        """
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2)
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(dim, 1)
        nn.init.constant_(self.output.bias, math.log(initial_rate / (1 - initial_rate)))
        self.max_factor = max_factor

    def alpha(self, encoder_out: Tensor, lens: Tensor) -> Tensor:
        """Return the weights (N, T') float32 of encoder_out (N, T', C) with (N,) valid frames, 0 at padding."""
        padding = make_pad_mask(lens, encoder_out.shape[1])
        with torch.autocast(encoder_out.device.type, enabled=False):
            x = encoder_out.to(self.conv.weight.dtype).masked_fill(padding.unsqueeze(2), 0.0)
            x = self.conv(x.transpose(1, 2)).transpose(1, 2)  # (N, T', C) -> (N, C, T') -> (N, T', C)
            return self.output(self.dropout(x)).squeeze(2).sigmoid().masked_fill(padding, 0.0)

    def forward(
        self,
        encoder_out: Tensor,
        lens: Tensor,
        target_lens: Tensor | None = None,
        tail_threshold: float = TAIL_THRESHOLD,
    ) -> CifOutput:
        """Predict weights and fire; see :func:`integrate_and_fire`."""
        alpha = self.alpha(encoder_out, lens)
        return integrate_and_fire(encoder_out, alpha, target_lens, tail_threshold, self.max_factor)
