"""Lattices of the transducer: totals and arc occupations, with analytic gradients.

Node (s, t): s symbols emitted, t frames consumed.  A symbol arc keeps the frame, a blank arc consumes it.
All recursions run in float64: they are tiny beside the joiner, and their cumulative sums need it.
Functions, not modules; the names of the arcs follow Kuang et al. 2022 (arXiv 2206.13236).
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from icefall_kd.models.masks import make_pad_mask

_NEG_INF = float("-inf")


def simple_lattice(px: Tensor, py: Tensor, y_lens: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute totals and occupations of full lattices, row by row (one step a symbol, none a frame).

    alpha[s, :] = Y[s, :] + logcumsumexp_t(alpha[s-1, :] + px[s-1, :] - Y[s, :]) with Y the exclusive
    cumulative sum of py over time, and the mirrored recursion for beta.  Needs finite py.

    Args:
        px: (N, S, T+1) log-probabilities of the symbol arcs; the column T is not used.
        py: (N, S+1, T) log-probabilities of the blank arcs.
        y_lens: (N,) symbols S_b.
        x_lens: (N,) frames T_b, at least 1.
    Returns:
        total (N,) log-probability, and the occupations px_grad (N, S, T+1) and py_grad (N, S+1, T) = its
        gradients; float64.
    """
    num_symbols, num_frames = px.shape[1], py.shape[2]
    px, py = px.double(), py.double()
    pad_t = make_pad_mask(x_lens, num_frames)  # (N, T)
    pad_s = make_pad_mask(y_lens, num_symbols)  # (N, S)
    # No symbol at the end of the utterance or later; blanks beyond it weigh nothing and lead nowhere.
    px = px.masked_fill(F.pad(pad_t, (0, 1), value=True).unsqueeze(1) | pad_s.unsqueeze(2), _NEG_INF)
    py = py.masked_fill(pad_t.unsqueeze(1), 0.0)
    blanks = F.pad(py.cumsum(2), (1, 0))  # (N, S+1, T+1)
    up = blanks[:, :-1] - blanks[:, 1:]  # what a path gains in the cumulative sums by moving up one row
    # In units of Y: a[s] = alpha[s] - Y[s], b[s] = beta[s] + Y[s].
    step = px + up
    rows = [torch.zeros_like(blanks[:, 0])]
    for s in range(num_symbols):
        rows.append(torch.logcumsumexp(rows[-1] + step[:, s], dim=1))
    alpha = torch.stack(rows, dim=1)
    n = torch.arange(px.shape[0], device=px.device)
    total = alpha[n, y_lens, x_lens] + blanks[n, y_lens, x_lens]
    goal = torch.full_like(blanks, _NEG_INF)
    goal[n, y_lens, x_lens] = blanks[n, y_lens, x_lens]
    goal, step = goal.flip(2), step.flip(2)
    rows = [torch.logcumsumexp(goal[:, num_symbols], dim=1)]
    for s in range(num_symbols - 1, -1, -1):
        rows.append(torch.logcumsumexp(torch.logaddexp(step[:, s] + rows[-1], goal[:, s]), dim=1))
    beta = torch.stack(rows[::-1], dim=1).flip(2)
    norm = total.masked_fill(total == _NEG_INF, 0.0)[:, None, None]  # without a path every occupation is zero
    px_grad = (alpha[:, :-1] + step.flip(2) + beta[:, 1:] - norm).exp()
    py_grad = (alpha[:, :, :-1] + beta[:, :, 1:] - norm).exp().masked_fill(pad_t.unsqueeze(1), 0.0)
    return total, px_grad, py_grad


def banded_lattice(
    emit: Tensor, blank: Tensor, starts: Tensor, y_lens: Tensor, x_lens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute totals and occupations of lattices that live in one window of symbols a frame.

    Inside a frame the chain of symbol arcs is one logcumsumexp in units of the cumulative emissions E:
    a_t[r] = E_t[r] + logcumsumexp_r(in_t[r] - E_t[r]); from frame to frame the window moves.

    Args:
        emit: (N, T, R) log-probability of symbol starts[t] + r at frame t; any value where there is none.
        blank: (N, T, R) log-probability of blank there.
        starts: (N, T) int64 first symbol position of the window, as :func:`prune_starts` makes them.
        y_lens: (N,) symbols S_b.
        x_lens: (N,) frames T_b, at least 1.
    Returns:
        total (N,), emit_grad (N, T, R) and blank_grad (N, T, R); float64.
    """
    num, num_frames, width = emit.shape
    pad_t = make_pad_mask(x_lens, num_frames).unsqueeze(2)  # (N, T, 1)
    node = starts.unsqueeze(2) + torch.arange(width, device=emit.device)  # (N, T, R)
    beyond = node > y_lens[:, None, None]
    # Where there is no symbol (beyond S_b) or no frame, a finite stand-in keeps the differences finite.
    emit = emit.double().masked_fill(pad_t | (node >= y_lens[:, None, None]), 0.0)
    blank = blank.double().masked_fill(pad_t, 0.0)
    climbed = F.pad(emit.cumsum(2)[:, :, :-1], (1, 0))  # E: exclusive
    jump = F.pad(starts[:, 1:] - starts[:, :-1], (1, 0))  # (N, T); jump[t] leads into frame t
    offset = torch.arange(width, device=emit.device)

    # Time first, so that each step reads one contiguous block.
    enter = (offset + jump.unsqueeze(2)).clamp_(max=width).transpose(0, 1).contiguous()  # (T, N, R)
    closed = torch.zeros_like(blank).masked_fill(beyond, _NEG_INF)
    climbed_t = climbed.transpose(0, 1).contiguous()
    to_enter = (-climbed + closed).transpose(0, 1).contiguous()
    to_leave = (climbed + blank).transpose(0, 1).contiguous()
    shelf = emit.new_full((num, width + 1), _NEG_INF)  # the last column is "outside the window"
    first = shelf[:, :width].clone()
    first[:, 0] = 0.0
    sums = emit.new_empty((num_frames, num, width))  # a_t - E_t
    for t in range(num_frames):
        arriving = first if t == 0 else shelf.gather(1, enter[t])
        torch.logcumsumexp(arriving + to_enter[t], dim=1, out=sums[t])
        torch.add(sums[t], to_leave[t], out=shelf[:, :width])
    alpha = (sums + climbed_t).transpose(0, 1) + closed  # (N, T, R)
    n = torch.arange(num, device=emit.device)
    last = x_lens - 1
    goal = y_lens - starts[n, last]
    reachable = (goal >= 0) & (goal < width)
    slot = goal.clamp(0, width - 1)
    total = alpha[n, last, slot] + blank[n, last, slot]
    total = total.masked_fill(~reachable, _NEG_INF)

    # Backward, in flipped windows: position q holds r = R-1-q, so that the suffix sum is again a prefix sum.
    leave = (offset + F.pad(jump[:, 1:], (0, 1)).unsqueeze(2)).clamp_(max=width).transpose(0, 1).contiguous()
    finish = torch.full_like(blank, _NEG_INF)
    finish[n, last, slot] = torch.where(reachable, 0.0, _NEG_INF).to(blank.dtype)
    finish = finish.flip(2).transpose(0, 1).contiguous()
    to_leave, climbed_f = to_leave.flip(2), climbed_t.flip(2)
    outs, befores = torch.empty_like(finish), torch.empty_like(finish)  # out_t, and b_t + E_t; flipped
    shelf.fill_(_NEG_INF)
    for t in range(num_frames - 1, -1, -1):
        torch.maximum(shelf.gather(1, leave[t]), finish[t], out=outs[t])
        torch.logcumsumexp(outs[t] + to_leave[t], dim=1, out=befores[t])
        torch.sub(befores[t], climbed_f[t], out=shelf[:, :width])
    out = outs.flip(2).transpose(0, 1)
    suffix = befores.flip(2).transpose(0, 1)  # b_t + E_t
    norm = total.masked_fill(total == _NEG_INF, 0.0)[:, None, None]
    dead = pad_t | beyond | (total == _NEG_INF)[:, None, None]
    blank_grad = (alpha + blank + out - norm).exp().masked_fill(dead, 0.0)
    # emit[r] + b[r+1] = emit[r] - E[r+1] + suffix[r+1] = -E[r] + suffix[r+1]
    emit_grad = (alpha - climbed + F.pad(suffix[:, :, 1:], (0, 1), value=_NEG_INF) - norm).exp()
    emit_grad = emit_grad.masked_fill(dead | (node >= y_lens[:, None, None]), 0.0)
    return total, emit_grad, blank_grad


class _Loss(torch.autograd.Function):
    """Minus the total of a lattice whose occupations are known: the gradient is minus the occupations."""

    @staticmethod
    def forward(ctx, first, second, total, first_grad, second_grad):
        ctx.save_for_backward(first_grad.to(first.dtype), second_grad.to(second.dtype))
        return -total.to(first.dtype)

    @staticmethod
    def backward(ctx, grad):
        first_grad, second_grad = ctx.saved_tensors
        scale = -grad[:, None, None]
        # A loss of plus infinity has zero occupations: its utterance changes nothing.
        return scale * first_grad, scale * second_grad, None, None, None


def simple_loss(px: Tensor, py: Tensor, y_lens: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (N,) = -total of :func:`simple_lattice`, differentiable, and detached occupations."""
    total, px_grad, py_grad = simple_lattice(px.detach(), py.detach(), y_lens, x_lens)
    return _Loss.apply(px, py, total, px_grad, py_grad), px_grad, py_grad


def banded_loss(emit: Tensor, blank: Tensor, starts: Tensor, y_lens: Tensor, x_lens: Tensor) -> Tensor:
    """Return the loss (N,) = -total of :func:`banded_lattice`, differentiable in emit and blank."""
    total, emit_grad, blank_grad = banded_lattice(emit.detach(), blank.detach(), starts, y_lens, x_lens)
    return _Loss.apply(emit, blank, total, emit_grad, blank_grad)


def window_width(prune_range: int, y_lens: Tensor, x_lens: Tensor, num_symbols: int) -> int:
    """Return the symbols a frame that a batch needs: at least ``prune_range``, at most S+1.

    A window moves by at most R-1 symbols a frame, so short audio with a long text needs a larger R.
    """
    needed = int(((y_lens - 1).clamp(min=0) // x_lens).max()) + 2
    if needed > prune_range:
        logging.getLogger(__name__).warning(
            "prune_range %d is too small for the texts of this batch; using %d", prune_range, needed
        )
    return min(max(prune_range, needed), num_symbols + 1)


def prune_starts(px_grad: Tensor, py_grad: Tensor, y_lens: Tensor, x_lens: Tensor, width: int) -> Tensor:
    """Choose the window of symbols of every frame.

    The start maximises the blank occupation inside the window minus the mass that would enter it from
    below through the cut edge; then starts are made monotone with increments of at most R-1
    (Kuang et al. 2022, section 3.2, in the form of k2's get_rnnt_prune_ranges).

    Args:
        px_grad: (N, S, T+1) occupations of the symbol arcs.
        py_grad: (N, S+1, T) occupations of the blank arcs.
        y_lens: (N,) symbols.
        x_lens: (N,) frames.
        width: R of :func:`window_width`.
    Returns:
        (N, T) int64 first positions p, 0 <= p[t] <= p[t+1] <= p[t] + R-1.
    """
    num_frames = py_grad.shape[2]
    if width > py_grad.shape[1]:
        raise ValueError(f"a window of {width} does not fit {py_grad.shape[1]} symbol positions")
    mass = F.pad(py_grad.double().cumsum(1), (0, 0, 1, 0))  # (N, S+2, T)
    score = mass[:, width:] - mass[:, :-width]  # (N, S-R+2, T)
    score[:, 1:] -= px_grad[:, : score.shape[1] - 1, :num_frames]
    starts = score.argmax(1)  # (N, T)
    # The last frame must contain S_b; so may the padding after it.
    final = (y_lens - width + 1).clamp(min=0).unsqueeze(1)
    starts = torch.where(make_pad_mask(x_lens - 1, num_frames), final, starts)
    starts = _reverse_cummin(starts)
    slope = (width - 1) * torch.arange(num_frames, device=starts.device)
    return slope - _reverse_cummin(slope - starts).clamp(min=0)


def _reverse_cummin(x: Tensor) -> Tensor:
    """Return min over t' >= t of x (N, T)."""
    return x.flip(1).cummin(1).values.flip(1)
