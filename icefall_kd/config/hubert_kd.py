"""Options of distilling a HuBERT teacher: --system hubert --objective distil."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from icefall_kd.config.checks import at_least
from icefall_kd.config.dual import is_share
from icefall_kd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HubertKdConfig:
    """Distillation of a HuBERT teacher's states and clusters (--objective distil).

    --teacher names it.  Its states are made in training (--teacher-labels online) or stored, one label set a layer in
    --label-dir: embeddings, or codes, which are decoded.  H[0] is the input of its first layer, H[i] the output of
    layer i.
    """

    kd_heads: Literal["auto", "expand_last", "layer_wise"] = "auto"
    """expand_last: all teacher layers are predicted from the student's last one (DistilHuBERT); layer_wise: each by a
    student layer of its own (FitHuBERT); auto: expand_last for --structure shallow_wide, else layer_wise."""
    teacher_layers: list[int] | None = None
    """Teacher layers i of H[i]; None: expand_last has a third, two thirds and all of the depth (4,8,12), layer_wise
    1, 2, ... up to the student's depth."""
    regression: Literal["l1", "l2"] = "l1"
    """Distance of the states, mean over channels."""
    rec_scale: float = 1.0
    """Its weight."""
    cos_scale: float = 1.0
    """Weight of -log sigmoid of the cosine of the states; FitHuBERT: 0."""
    layer_scales: list[float] | None = None
    """Weight of each teacher layer within both; None: the mean over layers.  FitHuBERT: 0.1 each, 1 the last."""
    disc_scale: float = 1.0
    """Weight of the divergence from the teacher's posterior of clusters; 0: regression alone."""
    disc_type: Literal["type1", "type2", "type3"] = "type2"
    """What the student has for it: cosines of a projection to the teacher's clusters (type1); logits of its own
    (type2); cosines again, and the teacher's likeliest cluster as a hard label (type3)."""
    disc_temperature: float = 0.1
    """Temperature of the teacher's posterior."""
    disc_student_temperature: bool = False
    """The student's logits are divided by it, too."""
    pad_frames: bool = False
    """Padding counts in all losses, as in the co-author's code; there, the teacher's states are 0."""
    frontend_steps: float = 0
    """Steps in which --front-end fbank alone learns, to imitate H[0]; below 1: a share of the planned steps."""
    frontend_scale: float = 1.0
    """Weight of that loss."""
    init_from_teacher: bool = False
    """Parts of the teacher's shapes start from it: convolutions, projection, positional convolution, first layers."""
    kd_quantizers: list[Path] = field(default_factory=list)
    """Quantizers of the label sets of codes, in any order (ours: the paper knows no codes)."""

    def __post_init__(self) -> None:
        at_least(self, rec_scale=0, cos_scale=0, disc_scale=0, frontend_steps=0)
        for name in ("disc_temperature", "frontend_scale"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0")
        if self.rec_scale == self.cos_scale == self.disc_scale == 0:
            raise ConfigError("--rec-scale, --cos-scale and --disc-scale are all 0: there is nothing to learn")
        layers = self.teacher_layers
        if layers is not None and (not layers or min(layers) < 1 or len(set(layers)) < len(layers)):
            raise ConfigError(
                f"--teacher-layers is {layers}; name each layer once, from 1 on (H[0], which the layers hear, is what "
                "--frontend-steps learns)"
            )
        if self.layer_scales is not None and (not self.layer_scales or not min(self.layer_scales) > 0):
            raise ConfigError(f"--layer-scales is {self.layer_scales}; give a number above 0 for each teacher layer")
        if self.frontend_steps > 1 and self.frontend_steps != int(self.frontend_steps):
            raise ConfigError(f"--frontend-steps is {self.frontend_steps}; give whole steps, or a share below 1")

    @property
    def in_shares(self) -> bool:
        """Return whether the schedule is told as a share of the planned steps."""
        return is_share(self.frontend_steps)

    def in_steps(self, planned: int) -> "HubertKdConfig":
        """Return these options with whole steps, where a share is one of ``planned`` steps."""
        if not self.in_shares:
            return self
        return replace(self, frontend_steps=max(1, round(self.frontend_steps * planned)))
