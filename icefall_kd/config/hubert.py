"""Options of HuBERT models: --system hubert."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from icefall_kd.config.checks import at_least


@dataclass(frozen=True, kw_only=True)
class HubertConfig:
    """The structure of a HuBERT model, teacher or student (--system hubert).

    --num-encoder-layers, --encoder-dim, --num-heads and --feedforward-dim override single numbers of a structure,
    --front-end, --extractor-channels and --extractor-norm choose what stands before the layers.
    """

    structure: Literal["base", "shallow_wide", "deep_thin", "fithubert"] = "base"
    """base: the teacher's, 12 layers of 768; shallow_wide: 2 layers of 768, as DistilHuBERT; deep_thin: 12 layers of
    480; fithubert: those behind FitHuBERT's thin convolutions, at half the frame rate."""
    conv_pos: int = 128
    """Kernel of the convolution that stands for positions, in frames."""
    conv_pos_groups: int = 16
    """Its groups."""
    cmvn: Path | None = None
    """Mean and deviation of log-mel features (local/compute_cmvn.py), for --front-end fbank; they travel with the
    model, so that only a training from scratch needs them."""

    def __post_init__(self) -> None:
        at_least(self, conv_pos=1, conv_pos_groups=1)
