"""Pruned transducer loss (Kuang et al. 2022, arXiv 2206.13236), topology "regular".

An additive joiner, whose normaliser is one matrix product, gives the arc occupations that choose a window
of R symbol positions a frame; the full joiner runs inside the windows only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from icefall_kd.errors import DataError
from icefall_kd.losses import lattice
from icefall_kd.losses.rnnt_backends import Backend, load_backend


@dataclass(frozen=True)
class PrunedTransducer:
    """Both losses, and what the full joiner said inside the windows."""

    simple: Tensor
    """(N,) loss of the additive joiner in nats."""
    pruned: Tensor
    """(N,) loss of the full joiner in nats."""
    logits: Tensor
    """(N, T', R, V) of the full joiner."""
    positions: Tensor
    """(N, T', R) int64 symbol positions, at most U, that the windows hold."""


def pruned_transducer_loss(*args, **options) -> tuple[Tensor, Tensor]:
    """Return simple_loss (N,) and pruned_loss (N,) of :func:`pruned_transducer`, which has the same arguments."""
    result = pruned_transducer(*args, **options)
    return result.simple, result.pruned


def pruned_transducer(
    encoder_out: Tensor,
    decoder_out: Tensor,
    joiner: Callable[..., Tensor],
    simple_am_proj: Callable[[Tensor], Tensor],
    simple_lm_proj: Callable[[Tensor], Tensor],
    y: Tensor,
    encoder_out_lens: Tensor,
    y_lens: Tensor,
    *,
    prune_range: int = 5,
    lm_scale: float = 0.25,
    am_scale: float = 0.0,
    backend: str = "auto",
    blank_id: int = 0,
) -> PrunedTransducer:
    """Compute the simple and the pruned loss of every utterance, lattices in float32 or better.

    Args:
        encoder_out: (N, T', C).
        decoder_out: (N, U+1, C') of the blank followed by the tokens.
        joiner: models.transducer.Joiner, or a callable with its ``encoder_proj`` and ``decoder_proj``.
        simple_am_proj: maps encoder_out to (N, T', V).
        simple_lm_proj: maps decoder_out to (N, U+1, V).
        y: (N, U) token ids, padded with any valid id.
        encoder_out_lens: (N,) frames, at least 1.
        y_lens: (N,) tokens, 0 allowed.
        prune_range: R, symbol positions a frame that the joiner sees.
        lm_scale: share of the decoder-only log-probabilities in the simple loss.
        am_scale: share of the encoder-only ones.
        backend: "auto" (k2, else fast_rnnt, else torch), "torch", "k2" or "fast_rnnt".
        blank_id: id of blank.
    Returns:
        Losses in nats, not normalised; float32 (with the backend torch, float64 for float64 inputs).  With the windows.
    Raises:
        ConfigError: for an unknown backend, or one asked for that is absent or broken.
        DataError: for lengths that do not fit the tensors.
    """
    fewest = _check_lengths(encoder_out, decoder_out, y, encoder_out_lens, y_lens)
    chosen = load_backend(backend, encoder_out.device.type)
    y, y_lens, encoder_out_lens = y.long(), y_lens.long(), encoder_out_lens.long()
    am, lm = simple_am_proj(encoder_out), simple_lm_proj(decoder_out)
    projected = joiner.encoder_proj(encoder_out), joiner.decoder_proj(decoder_out)
    # k2 and fast_rnnt assert that every utterance has tokens, and the batch no more of them than frames.
    if chosen.module is not None and fewest >= 1 and y.shape[1] <= encoder_out.shape[1]:
        return _outside_loss(chosen, am, lm, projected, joiner, y, encoder_out_lens, y_lens,
                             prune_range, lm_scale, am_scale, blank_id)  # fmt: skip
    simple, px_grad, py_grad = smoothed_simple_loss(am, lm, y, encoder_out_lens, y_lens, lm_scale, am_scale, blank_id)
    width = lattice.window_width(prune_range, y_lens, encoder_out_lens, y.shape[1])
    starts = lattice.prune_starts(px_grad, py_grad, y_lens, encoder_out_lens, width)
    am_window, lm_window, positions = windows(*projected, starts, width)
    logits = joiner(am_window, lm_window, project_input=False)
    pruned = pruned_loss(logits, y, starts, positions, encoder_out_lens, y_lens, blank_id)
    return PrunedTransducer(simple, pruned, logits, positions)


def smoothed_simple_loss(
    am: Tensor,
    lm: Tensor,
    y: Tensor,
    x_lens: Tensor,
    y_lens: Tensor,
    lm_scale: float = 0.0,
    am_scale: float = 0.0,
    blank_id: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss of the additive joiner, smoothed with decoder-only and encoder-only probabilities.

    Args:
        am: (N, T, V).
        lm: (N, S+1, V).
        y: (N, S) token ids.
        x_lens: (N,) frames.
        y_lens: (N,) tokens.
        lm_scale: share of the decoder-only log-probabilities.
        am_scale: share of the encoder-only ones (times the mean decoder probabilities of the batch).
        blank_id: id of blank.
    Returns:
        loss (N,), and the occupations px_grad (N, S, T+1) and py_grad (N, S+1, T), detached.
    """
    with torch.autocast(am.device.type, enabled=False):
        am, lm = _at_least_float32(am), _at_least_float32(lm)
        px, py = _additive_arcs(am, lm, y, blank_id)
        if lm_scale or am_scale:
            px, py = (1.0 - lm_scale - am_scale) * px, (1.0 - lm_scale - am_scale) * py
        if lm_scale:
            px_lm, py_lm = _decoder_only_arcs(lm, y, blank_id)
            px, py = px + lm_scale * px_lm, py + lm_scale * py_lm
        if am_scale:
            px_am, py_am = _encoder_only_arcs(am, lm, y, blank_id)
            px, py = px + am_scale * px_am, py + am_scale * py_am
        return lattice.simple_loss(F.pad(px, (0, 1), value=float("-inf")), py, y_lens, x_lens)


def windows(am: Tensor, lm: Tensor, starts: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pair every frame with the decoder outputs of its window.

    Args:
        am: (N, T, D) projected encoder output.
        lm: (N, S+1, D) projected decoder output.
        starts: (N, T) first positions.
        width: R.
    Returns:
        am (N, T, 1, D), lm (N, T, R, D), and the symbol positions (N, T, R), at most S.
    """
    positions = starts.unsqueeze(2) + torch.arange(width, device=starts.device)
    positions = positions.clamp(max=lm.shape[1] - 1)
    rows = positions + lm.shape[1] * torch.arange(lm.shape[0], device=lm.device)[:, None, None]
    return am.unsqueeze(2), F.embedding(rows, lm.flatten(0, 1)), positions


def pruned_loss(
    logits: Tensor,
    y: Tensor,
    starts: Tensor,
    positions: Tensor,
    x_lens: Tensor,
    y_lens: Tensor,
    blank_id: int = 0,
) -> Tensor:
    """Compute the loss of logits that exist inside the windows only.

    Args:
        logits: (N, T, R, V) of the full joiner, any float type.
        y: (N, S) token ids.
        starts: (N, T) first positions of the windows.
        positions: (N, T, R) positions of :func:`windows`.
        x_lens: (N,) frames.
        y_lens: (N,) tokens.
        blank_id: id of blank.
    Returns:
        (N,) loss; plus infinity (with zero gradient) where the windows hold no path.
    """
    with torch.autocast(logits.device.type, enabled=False):
        padded = F.pad(y, (0, 1), value=blank_id)  # the position S has no symbol; the lattice ignores it
        symbols = padded.gather(1, positions.flatten(1)).view_as(positions)
        emit, blank = _WindowLogProbs.apply(logits, symbols, blank_id)
        return lattice.banded_loss(emit, blank, starts, y_lens, x_lens)


class _WindowLogProbs(torch.autograd.Function):
    """Log-probabilities of one symbol and of blank; backward makes one tensor of the size of the logits."""

    @staticmethod
    def forward(ctx, logits, symbols, blank_id):
        logprobs = _at_least_float32(logits).log_softmax(-1)
        ctx.save_for_backward(logprobs, symbols)
        ctx.blank_id, ctx.dtype = blank_id, logits.dtype
        return logprobs.gather(-1, symbols.unsqueeze(-1)).squeeze(-1), logprobs[..., blank_id].clone()

    @staticmethod
    def backward(ctx, emit_grad, blank_grad):
        logprobs, symbols = ctx.saved_tensors
        grad = logprobs.exp().mul_(-(emit_grad + blank_grad).unsqueeze(-1))
        grad.scatter_add_(-1, symbols.unsqueeze(-1), emit_grad.unsqueeze(-1))
        grad[..., ctx.blank_id] += blank_grad
        return grad.to(ctx.dtype), None, None


def _additive_arcs(am: Tensor, lm: Tensor, y: Tensor, blank_id: int) -> tuple[Tensor, Tensor]:
    """Return px (N, S, T) and py (N, S+1, T) of logits am[t] + lm[s], normalised by one matrix product."""
    am_max = am.detach().amax(2, keepdim=True)  # (N, T, 1)
    lm_max = lm.detach().amax(2, keepdim=True)  # (N, S+1, 1)
    product = (lm - lm_max).exp() @ (am - am_max).exp().transpose(1, 2)  # (N, S+1, T)
    norm = (product + torch.finfo(product.dtype).tiny).log() + lm_max + am_max.transpose(1, 2)
    px_am, px_lm = _of_symbols(am, lm, y)
    px = px_am + px_lm - norm[:, :-1]
    py = am[:, :, blank_id].unsqueeze(1) + lm[:, :, blank_id].unsqueeze(2) - norm
    return px, py


def _of_symbols(am: Tensor, lm: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return am of every symbol (N, S, T) and lm of the symbol that follows each position (N, S, 1)."""
    px_am = am.transpose(1, 2).gather(1, y.unsqueeze(2).expand(-1, -1, am.shape[1]))
    return px_am, lm[:, :-1].gather(2, y.unsqueeze(2))


def _decoder_only_arcs(lm: Tensor, y: Tensor, blank_id: int) -> tuple[Tensor, Tensor]:
    """Return log softmax of lm at symbols (N, S, 1) and at blank (N, S+1, 1)."""
    norm = lm.logsumexp(2, keepdim=True)
    px = lm[:, :-1].gather(2, y.unsqueeze(2)) - norm[:, :-1]
    return px, lm[:, :, blank_id : blank_id + 1] - norm


def _encoder_only_arcs(am: Tensor, lm: Tensor, y: Tensor, blank_id: int) -> tuple[Tensor, Tensor]:
    """Return log softmax of am plus the batch's mean decoder log-probability: px (N, S, T), py (N, 1, T).

    The mean runs over all positions of the padded batch, as in k2.
    """
    unigram = (lm.softmax(2).mean((0, 1)) + torch.finfo(lm.dtype).tiny).log()
    logprobs = (am + unigram).log_softmax(2)
    px = logprobs.transpose(1, 2).gather(1, y.unsqueeze(2).expand(-1, -1, am.shape[1]))
    return px, logprobs[:, :, blank_id].unsqueeze(1)


def _at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def _check_lengths(encoder_out: Tensor, decoder_out: Tensor, y: Tensor, x_lens: Tensor, y_lens: Tensor) -> int:
    """Return the fewest tokens of an utterance; a DataError when lengths and tensors disagree."""
    if decoder_out.shape[1] != y.shape[1] + 1:
        raise DataError(
            f"decoder_out has {decoder_out.shape[1]} positions for {y.shape[1]} tokens; it needs one more than tokens: "
            "put blank in front of y (StatelessDecoder.add_sos)"
        )
    x_min, x_max, y_min, y_max = torch.stack([*torch.aminmax(x_lens), *torch.aminmax(y_lens)]).tolist()
    if x_min < 1 or x_max > encoder_out.shape[1]:
        raise DataError(f"encoder_out_lens lie in {x_min}..{x_max}, not in 1..{encoder_out.shape[1]}")
    if y_min < 0 or y_max > y.shape[1]:
        raise DataError(f"y_lens lie in {y_min}..{y_max}, not in 0..{y.shape[1]}")
    return y_min


def _outside_loss(
    backend: Backend,
    am: Tensor,
    lm: Tensor,
    projected: tuple[Tensor, Tensor],
    joiner: Callable[..., Tensor],
    y: Tensor,
    x_lens: Tensor,
    y_lens: Tensor,
    prune_range: int,
    lm_scale: float,
    am_scale: float,
    blank_id: int,
) -> PrunedTransducer:
    """Compute both losses with k2 or fast_rnnt, whose functions have the same names."""
    lib = backend.module
    boundary = torch.zeros((y.shape[0], 4), dtype=torch.int64, device=am.device)
    boundary[:, 2], boundary[:, 3] = y_lens, x_lens
    common = {"symbols": y, "termination_symbol": blank_id, "boundary": boundary, "reduction": "none"}
    with torch.autocast(am.device.type, enabled=False):
        simple, (px_grad, py_grad) = lib.rnnt_loss_smoothed(
            lm=lm.float(), am=am.float(), lm_only_scale=lm_scale, am_only_scale=am_scale, return_grad=True, **common
        )
    width = lattice.window_width(prune_range, y_lens, x_lens, y.shape[1])
    ranges = lib.get_rnnt_prune_ranges(px_grad=px_grad, py_grad=py_grad, boundary=boundary, s_range=width)
    am_window, lm_window = lib.do_rnnt_pruning(am=projected[0], lm=projected[1], ranges=ranges)
    logits = joiner(am_window, lm_window, project_input=False)
    with torch.autocast(am.device.type, enabled=False):
        pruned = lib.rnnt_loss_pruned(logits=logits.float(), ranges=ranges, **common)
    return PrunedTransducer(simple, pruned, logits, ranges)
