"""What CTC output says about token strings: the greedy one with its confidences, and the probability of any."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from icefall_kd.decode.base import UNK_ID
from icefall_kd.models.masks import make_pad_mask


@dataclass(frozen=True)
class CtcStrings:
    """Token strings of N utterances with what CTC says of each token; beyond the lengths all fields are 0."""

    tokens: Tensor
    """(N, U) token ids."""
    confidences: Tensor
    """(N, U) float32: the highest probability of the token within its run of frames."""
    frames: Tensor
    """(N, U) first frame of each run."""
    lens: Tensor
    """(N,) tokens."""


def pack_left(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the True entries of each row stand.

    Args:
        chosen: (N, T) bool.
    Returns:
        (N, M) columns in ascending order, M the largest count, T behind a row's last one; (N,) counts.
    """
    counts = chosen.sum(dim=1)
    width = int(counts.max()) if len(counts) else 0
    columns = (~chosen).int().sort(dim=1, stable=True).indices[:, :width]
    return columns.masked_fill(make_pad_mask(counts, width), chosen.shape[1]), counts


def collapse(log_probs: Tensor, lens: Tensor, *, blank_id: int = 0, unk_id: int | None = UNK_ID) -> CtcStrings:
    """Return the strings of the best CTC path: runs of one symbol are one token, blanks are dropped.

    A token's confidence is the maximum over its run, as in Mask-CTC (Higuchi et al. 2020), not the mean.  Runs of the
    unknown token are dropped like those of the blank, so that the tokens are those of
    :class:`~icefall_kd.decode.ctc.CtcGreedySearch`; like a blank, such a run parts two runs of one token.

    Args:
        log_probs: (N, T', V).
        lens: (N,) valid frames, which may be 0.
        blank_id: id of the blank.
        unk_id: dropped from the output; None: kept.
    """
    best, symbols = log_probs.max(dim=-1)  # (N, T')
    padding = make_pad_mask(lens.to(best.device), best.shape[1])
    begins = torch.ones_like(padding)
    begins[:, 1:] = symbols[:, 1:] != symbols[:, :-1]
    runs = begins.cumsum(dim=1) - 1
    highest = torch.full_like(best, -torch.inf).scatter_reduce(1, runs, best.masked_fill(padding, -torch.inf), "amax")
    begins &= ~padding & (symbols != blank_id)
    if unk_id is not None:
        begins &= symbols != unk_id
    frames, counts = pack_left(begins)
    unused = frames == best.shape[1]
    frames = frames.masked_fill(unused, 0)
    tokens = symbols.gather(1, frames).masked_fill(unused, 0)
    confidences = highest.gather(1, runs.gather(1, frames)).float().exp().masked_fill(unused, 0.0)
    return CtcStrings(tokens, confidences, frames, counts)


def unknown_as_blank(log_probs: Tensor, blank_id: int = 0, unk_id: int | None = UNK_ID) -> Tensor:
    """Return log-probabilities (..., V) in which the unknown token's probability has gone to the blank.

    A search that never emits the unknown token then spreads all probability over strings that it may return.
    """
    if unk_id is None:
        return log_probs
    folded = log_probs.clone()
    folded[..., blank_id] = torch.logaddexp(log_probs[..., blank_id], log_probs[..., unk_id])
    folded[..., unk_id] = -torch.inf
    return folded


def ctc_string_scores(
    log_probs: Tensor, lens: Tensor, owners: Sequence[int], strings: Sequence[Sequence[int]], *, blank_id: int = 0
) -> list[float]:
    """Return the natural log-probability of strings, summed over all their alignments (CTC forward).

    Args:
        log_probs: (N, T', V).
        lens: (N,) valid frames.
        owners: utterance of each of R strings.
        strings: R token strings without blanks.
    Returns:
        R numbers, minus infinity where a string does not fit in the frames; the empty string of no frame has 0.
    """
    frames = lens.tolist()
    scores = [0.0 if not frames[i] and not string else -torch.inf for i, string in zip(owners, strings, strict=True)]
    rows = [r for r, i in enumerate(owners) if frames[i]]
    if not rows:
        return scores
    device = log_probs.device
    y_lens = torch.tensor([len(strings[r]) for r in rows])
    y = torch.zeros(len(rows), max(int(y_lens.max()), 1), dtype=torch.int64)
    for k, r in enumerate(rows):
        y[k, : len(strings[r])] = torch.tensor(strings[r], dtype=torch.int64)
    owner = torch.tensor([owners[r] for r in rows], device=device)
    # The columns of the string's own tokens suffice; equal tokens share the column of the first of them.
    labels = (y.unsqueeze(2) == y.unsqueeze(1)).int().argmax(dim=2) + 1  # (R, U)
    columns = F.pad(y, (1, 0), value=blank_id).to(device)
    times = torch.arange(log_probs.shape[1], device=device)
    emitted = log_probs[owner[:, None, None], times[None, :, None], columns[:, None, :]]  # (R, T', U + 1)
    losses = F.ctc_loss(
        emitted.double().transpose(0, 1), labels.to(device), lens.to(device)[owner], y_lens.to(device), reduction="none"
    )
    for r, loss in zip(rows, losses.tolist(), strict=True):
        scores[r] = -loss
    return scores
