"""What a student of HuBERT needs for its training alone: heads that predict the teacher's states and clusters.

Chang et al. 2021, arXiv 2110.01900 (from the last layer); Lee et al. 2022, arXiv 2207.00555 (layer by layer); Wang et
al. 2022, arXiv 2210.15631, as the co-author's code builds both (docs/hubert.md).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.models.hubert import HubertEncoder


class DistilModel(nn.Module):
    """The encoder alone, under the name that every other training of it has."""

    def __init__(self, encoder: HubertEncoder) -> None:
        super().__init__()
        self.encoder = encoder


class ExpandLast(nn.Module):
    """Predict several teacher layers from the last hidden states (DistilHuBERT): a wide map, GELU, and one for each.

    Args:
        dim: channels C of the student.
        teacher_dim: D of the teacher.
        count: teacher layers n.
    """

    def __init__(self, dim: int, teacher_dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.expand = nn.Linear(dim, count * teacher_dim)
        self.split = nn.ModuleList(nn.Linear(teacher_dim, teacher_dim) for _ in range(count))

    def taps(self, num_layers: int) -> tuple[int, ...]:
        """Return the student layers that are looked at."""
        return (num_layers,)

    def forward(self, taps: Mapping[int, Tensor], num_frames: int) -> Tensor:
        """Map the states of :meth:`taps`, (N, T', C) each, to predictions (N, n, T', D)."""
        (hidden,) = taps.values()
        wide = F.gelu(self.expand(hidden)).chunk(self.count, dim=-1)
        return torch.stack([head(x) for head, x in zip(self.split, wide, strict=True)], dim=1)


class LayerWise(nn.Module):
    """Predict a teacher layer from each student layer by a linear map of its own.

    Args:
        dim: channels C of the student.
        teacher_dim: D of the teacher.
        count: layers n of the student.
        upsample: the student's layers run at half the frame rate (FitHuBERT): a transposed convolution goes before.
    """

    def __init__(self, dim: int, teacher_dim: int, count: int, upsample: bool = False) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(dim, teacher_dim) for _ in range(count))
        up = (nn.ConvTranspose1d(dim, dim, kernel_size=2, stride=2) for _ in range(count))
        self.up = nn.ModuleList(up) if upsample else None

    def taps(self, num_layers: int) -> tuple[int, ...]:
        """Return the student layers that are looked at."""
        return tuple(range(1, num_layers + 1))

    def forward(self, taps: Mapping[int, Tensor], num_frames: int) -> Tensor:
        """Map the states of :meth:`taps`, (N, T', C) each, to predictions (N, n, T', D).

        Args:
            taps: by the layer's number, from 1.
            num_frames: T' of the teacher; an odd one's last frame had no partner, and what is behind it is dropped.
        """
        found = []
        for i, head in enumerate(self.heads):
            hidden = taps[i + 1]
            if self.up is not None:
                hidden = self.up[i](hidden.transpose(1, 2)).transpose(1, 2)[:, :num_frames]
            found.append(head(hidden))
        return torch.stack(found, dim=1)


def teacher_layers(kind: str, chosen: Sequence[int] | None, student_depth: int, teacher_depth: int) -> list[int]:
    """Return the teacher layers i of H[i] that are predicted, in their order.

    Args:
        kind: "expand_last" or "layer_wise".
        chosen: of the options; None: those of the published models, scaled to the teacher's depth.
        student_depth, teacher_depth: layers of both.
    """
    if chosen is not None:
        return list(chosen)
    if kind == "layer_wise":
        return list(range(1, student_depth + 1))
    return sorted({max(1, round(teacher_depth * part / 3)) for part in (1, 2, 3)})
