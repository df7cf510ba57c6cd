"""What the frame-level distillation losses return."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FrameLoss:
    """A loss summed over frames, with what the log shows of it."""

    value: Tensor
    """Scalar float32, the sum over utterances, frames and targets (differentiable)."""
    per_utterance: Tensor
    """(N,) detached sums."""
    per_target: Tensor
    """(M,) detached sums of each codebook, or of each joined teacher frame for a regression."""
    counts: Tensor
    """(M,) float: frames that had a label, of each codebook or joined teacher frame."""
    correct: Tensor | None = None
    """(M,) float: frames whose best-scored entry is the label; None for a regression."""
    num_frames: int = 0
    """Student frames with at least one label."""
