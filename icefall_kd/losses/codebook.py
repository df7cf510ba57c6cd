"""Prediction of multi-codebook indexes (Guo et al. 2022, arXiv 2211.00508).

Both heads, with their scales and initial values, are those of ``JointCodebookLoss`` in the authors'
multi_quantization 0.1.1; their recipe in icefall uses the independent one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from icefall_kd.data.batch import IGNORE
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.losses.frame_result import FrameLoss


class CodebookLoss(nn.Module):
    """Cross-entropy of M codebook indexes a frame, summed, given a vector of the student.

    Independent: logits_m = W_m h + b_m.  Joint adds V_m ReLU(A h + a + g * sum_{j<m} E_j[code_j]), so that
    each codebook sees the true indexes of the earlier ones.  Parameters exist only for what is used.
    The logits are float32 whatever the autocast; frames without any label are never computed.
    """

    def __init__(
        self,
        dim: int,
        num_codebooks: int,
        codebook_size: int = 256,
        joint: bool = False,
        joint_dim: int = 512,
        recompute: bool = False,
    ) -> None:
        """Make the head.

        Args:
            dim: C of the student's layer.
            num_codebooks: M, the codebooks of all joined teacher frames.
            codebook_size: K.
            joint: condition each codebook on the earlier ones.
            joint_dim: hidden dimension of the joint part.
            recompute: compute logits again in backward instead of keeping them.
        """
        super().__init__()
        if min(dim, num_codebooks, codebook_size) < 1:
            raise ConfigError(f"a codebook head of {dim=}, {num_codebooks=}, {codebook_size=} makes no sense")
        self.num_codebooks, self.codebook_size, self.recompute = num_codebooks, codebook_size, recompute
        self.joint = joint
        self.output = nn.Linear(dim, num_codebooks * codebook_size)
        nn.init.normal_(self.output.weight, std=dim**-0.5)
        nn.init.zeros_(self.output.bias)
        if joint:
            self.hidden = nn.Linear(dim, joint_dim)
            self.joint_weight = nn.Parameter(torch.randn(num_codebooks, joint_dim, codebook_size) * joint_dim**-0.5)
            self.embedding_scale = 0.5 * math.sqrt(joint_dim / num_codebooks)
            if num_codebooks > 1:  # nothing follows the last codebook
                self.embedding = nn.Embedding((num_codebooks - 1) * codebook_size, joint_dim)
                nn.init.normal_(self.embedding.weight, std=joint_dim**-0.5)

    def forward(self, x: Tensor, codebook_indexes: Tensor) -> FrameLoss:
        """Compute the loss.

        Args:
            x: (N, T', C) outputs of a student layer.
            codebook_indexes: (N, T', M) integers in 0..K-1, -100 where there is no label.
        Returns:
            The sum over all labels, and its parts per utterance and per codebook.
        Raises:
            DataError: for another shape, or for indexes outside the codebook.
        """
        if codebook_indexes.shape != (*x.shape[:2], self.num_codebooks) or x.shape[2] != self.output.in_features:
            raise DataError(
                f"codebook_indexes {tuple(codebook_indexes.shape)} do not fit a student layer {tuple(x.shape)} "
                f"with {self.num_codebooks} codebooks a frame and a head for {self.output.in_features} channels"
            )
        codebook_indexes = codebook_indexes.long()  # before any comparison: 156 equals -100 among unsigned bytes
        labelled = (codebook_indexes != IGNORE).any(2)  # (N, T')
        utterance, frame = labelled.nonzero(as_tuple=True)
        codes = codebook_indexes[utterance, frame]  # (F, M)
        self._check(codes)
        with torch.autocast(x.device.type, enabled=False):
            h = x[utterance, frame].float()
            if self.recompute and torch.is_grad_enabled():
                losses, correct = checkpoint(self._losses, h, codes, use_reentrant=False)
            else:
                losses, correct = self._losses(h, codes)
        per_frame = losses.detach().sum(1)
        return FrameLoss(
            value=losses.sum(),
            per_utterance=per_frame.new_zeros(len(x)).index_add_(0, utterance, per_frame),
            per_target=losses.detach().sum(0),
            counts=(codes != IGNORE).sum(0).float(),
            correct=correct.sum(0).float(),
            num_frames=codes.shape[0],
        )

    def logits(self, h: Tensor, codes: Tensor) -> Tensor:
        """Return logits (F, M, K) of frames h (F, C); the joint head reads the codes (F, M)."""
        logits = self.output(h).unflatten(1, (self.num_codebooks, self.codebook_size))
        if not self.joint:
            return logits
        hidden = self.hidden(h).unsqueeze(1)  # (F, 1, H)
        if self.num_codebooks > 1:
            shift = self.codebook_size * torch.arange(self.num_codebooks - 1, device=codes.device)
            earlier = self.embedding(codes[:, :-1].clamp(min=0) + shift).cumsum(1) * self.embedding_scale
            hidden = hidden + F.pad(earlier, (0, 0, 1, 0))  # (F, M, H): nothing precedes the first codebook
        hidden = F.relu(hidden).transpose(0, 1)  # (F, M, H) -> (M, F, H)
        return logits + (hidden @ self.joint_weight).transpose(0, 1)  # (M, F, K) -> (F, M, K)

    def _losses(self, h: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return cross-entropies (F, M), 0 where ignored, and whether the best entry is the label (F, M)."""
        logits = self.logits(h, codes)
        losses = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), ignore_index=IGNORE, reduction="none")
        with torch.no_grad():
            picked = logits.gather(2, codes.clamp(min=0).unsqueeze(2)).squeeze(2)
            correct = (picked >= logits.amax(2)) & (codes != IGNORE)
        return losses.view_as(codes), correct

    def _check(self, codes: Tensor) -> None:
        """Raise a DataError for indexes that are neither entries of the codebook nor IGNORE."""
        wrong = (codes >= self.codebook_size) | ((codes < 0) & (codes != IGNORE))
        if bool(wrong.any()):
            raise DataError(
                f"codebook index {int(codes[wrong][0])} lies outside 0..{self.codebook_size - 1}: "
                "the labels do not belong to a quantizer of this codebook size"
            )
