"""Distillation from the full to the streaming mode of one model, on the fly.

Three classes at the nodes of a transducer's lattice are the idea of Dual-mode ASR (Yu et al. 2021, arXiv 2010.06030);
that both modes are compared inside the student's windows, and the frames left out for CTC, are our design.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from icefall_kd.losses.posterior_kd import posterior_kd
from icefall_kd.models.masks import make_pad_mask


def ctc_mode_kd(
    student: Tensor, teacher: Tensor, lens: Tensor, skip_blank: float = 0.99, blank_id: int = 0
) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student) of the frames where the teacher is not sure of the blank.

    Modes differ in when they emit: at the many frames of blanks there is little to learn but to stay silent longer.

    Args:
        student: (N, T', V) logits.
        teacher: (N, T', V) logits; no gradient reaches them.
        lens: (N,) valid frames.
        skip_blank: frames of a larger blank probability are left out; 1: none is.
        blank_id: id of blank.
    Returns:
        (M,) float32 in nats, and the utterances (M,) that the frames are of.
    """
    with torch.autocast(student.device.type, enabled=False):
        log_p = teacher.detach().float().log_softmax(2)
        wanted = ~make_pad_mask(lens, student.shape[1]) & (log_p[..., blank_id].exp() <= skip_blank)
        log_p, log_q = log_p[wanted], student[wanted].float().log_softmax(1)
        loss = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    return loss, wanted.nonzero()[:, 0]


def lattice_mode_kd(
    student: Tensor, teacher: Tensor, y: Tensor, positions: Tensor, lens: Tensor, y_lens: Tensor, blank_id: int = 0
) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student) over {next token, blank, all others} at the nodes inside the windows.

    Behind the last token there is no next one, and two classes are left.

    Args:
        student: (N, T', R, V) logits of the joiner.
        teacher: (N, T', R, V) of the teacher, in the same windows; no gradient reaches them.
        y: (N, U) token ids.
        positions: (N, T', R) tokens emitted before each node.
        lens: (N,) valid frames.
        y_lens: (N,) tokens.
        blank_id: id of blank.
    Returns:
        (M,) float32 in nats, and the utterances (M,) that the nodes are of.
    """
    inside = ~make_pad_mask(lens, student.shape[1]).unsqueeze(2) & (positions <= y_lens[:, None, None])
    at_end = positions == y_lens[:, None, None]
    symbols = F.pad(y, (0, 1), value=blank_id).gather(1, positions.flatten(1)).view_as(positions)
    losses, rows = [], []
    for nodes, has_next in ((inside & ~at_end, True), (inside & at_end, False)):
        blank = torch.full_like(symbols[nodes], blank_id)
        ids = torch.stack([symbols[nodes], blank] if has_next else [blank], dim=1)
        probs = teacher[nodes].detach().float().softmax(1).gather(1, ids)
        losses.append(posterior_kd(student[nodes], ids, probs, 1 - probs.sum(1)))
        rows.append(nodes.nonzero()[:, 0])
    return torch.cat(losses), torch.cat(rows)
