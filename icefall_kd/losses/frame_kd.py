"""Regression of teacher embeddings, the baseline of codebook prediction."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.losses.frame_result import FrameLoss


class FrameKdLoss(nn.Module):
    """l1 or l2 distance between a projection of the student and joined teacher embeddings.

    The distance of a student frame is the mean over all ratio x D dimensions; frames are summed, as for the
    codebook loss.  A teacher frame without label adds nothing.  Our reading of the baseline that
    Guo et al. 2022 compare with.
    """

    def __init__(self, dim: int, teacher_dim: int, ratio: int = 2, kind: Literal["l1", "l2"] = "l2") -> None:
        """Make the head.

        Args:
            dim: C of the student's layer.
            teacher_dim: D of one teacher frame.
            ratio: teacher frames joined into a student frame.
            kind: "l1" (mean absolute) or "l2" (mean squared difference).
        """
        super().__init__()
        if kind not in ("l1", "l2"):
            raise ConfigError(f"the regression is {kind!r}; it must be l1 or l2")
        if min(dim, teacher_dim, ratio) < 1:
            raise ConfigError(f"a regression head of {dim=}, {teacher_dim=}, {ratio=} makes no sense")
        self.kind, self.ratio, self.teacher_dim = kind, ratio, teacher_dim
        self.output = nn.Linear(dim, ratio * teacher_dim)

    def forward(self, x: Tensor, embeddings: Tensor, mask: Tensor) -> FrameLoss:
        """Compute the loss.

        Args:
            x: (N, T', C) outputs of a student layer.
            embeddings: (N, T', ratio * D) joined teacher embeddings; any finite or non-finite value where masked.
            mask: bool, True where there is a label: (N, T') or (N, T', ratio), one a joined teacher frame.
        Returns:
            The sum over frames, and its parts per utterance and per joined teacher frame.
        Raises:
            DataError: for shapes that do not fit.
        """
        if embeddings.shape != (*x.shape[:2], self.ratio * self.teacher_dim):
            raise DataError(
                f"embeddings {tuple(embeddings.shape)} do not fit a student layer {tuple(x.shape)} "
                f"with {self.ratio} joined frames of {self.teacher_dim}"
            )
        if mask.dim() == 2:
            mask = mask.unsqueeze(2).expand(-1, -1, self.ratio)
        if mask.shape != (*x.shape[:2], self.ratio):
            raise DataError(f"a mask {tuple(mask.shape)} does not fit {tuple(x.shape[:2])} frames x {self.ratio}")
        utterance, frame = mask.any(2).nonzero(as_tuple=True)
        mask = mask[utterance, frame]  # (F, ratio)
        with torch.autocast(x.device.type, enabled=False):
            predicted = self.output(x[utterance, frame].float()).unflatten(1, (self.ratio, self.teacher_dim))
            target = embeddings[utterance, frame].float().unflatten(1, (self.ratio, self.teacher_dim))
            target = torch.where(mask.unsqueeze(2), target, predicted.detach())  # no difference, no gradient
            distance = F.l1_loss if self.kind == "l1" else F.mse_loss
            losses = distance(predicted, target, reduction="none").mean(2) / self.ratio  # (F, ratio)
        per_frame = losses.detach().sum(1)
        return FrameLoss(
            value=losses.sum(),
            per_utterance=per_frame.new_zeros(x.shape[0]).index_add_(0, utterance, per_frame),
            per_target=losses.detach().sum(0),
            counts=mask.sum(0).float(),
            num_frames=losses.shape[0],
        )
