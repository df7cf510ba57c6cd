"""Options of self-supervised training (--objective ssl) and of the front ends that hear samples."""

from dataclasses import dataclass
from typing import Literal

from icefall_kd.config.checks import at_least
from icefall_kd.config.dual import is_share
from icefall_kd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SslConfig:
    """Masked prediction of quantised speech, wav2vec 2.0 (--objective ssl); defaults are its BASE model's.

    A recogniser (--objective asr) has of these the front end that hears samples; HuBERT's masked prediction front end,
    mask, penalty and pieces.
    """

    front_end: Literal["fbank", "waveform"] = "fbank"
    """fbank: log-mel and the Conformer's own subsampling, 40 ms a frame; waveform: seven convolutions, 20 ms
    a frame."""
    extractor_norm: Literal["layer_norm", "default"] = "layer_norm"
    """Of the waveform front end: behind every convolution, or once and over the whole utterance, which serves no
    stream."""
    extractor_channels: int = 512
    """Channels of its convolutions."""
    mask_prob: float = 0.65
    """Share of frames that would be masked if no two spans overlapped; about half of them are."""
    mask_span: int | None = None
    """Frames of a masked span; None: 200 ms."""
    num_negatives: int = 100
    """Other masked frames of the utterance that each one must be told from, drawn with replacement."""
    contrast_temperature: float = 0.1
    """Temperature of their cosines."""
    codebook_groups: int = 2
    """Codebooks of the quantiser."""
    codebook_entries: int = 320
    """Entries of each."""
    target_dim: int = 256
    """Dimension of targets and of what is compared with them."""
    gumbel_start: float = 2.0
    """Temperature of the quantiser's choice at the first step."""
    gumbel_end: float = 0.5
    """Its floor."""
    gumbel_decay: float = 0.999995
    """Its factor a step; 0.25^(1 / (0.7 steps)) reaches a floor of a quarter at 70 % of a shorter training."""
    gumbel_end_step: float | None = None
    """Step at which it reaches its floor, in place of that factor; below 1: a share of the planned steps."""
    diversity_scale: float = 0.1
    """Weight of the diversity loss, a masked frame."""
    feature_penalty: float = 10.0
    """Weight of the mean square of the front end's output before its LayerNorm, a masked frame."""
    feature_grad_scale: float = 0.1
    """Factor on the gradient of the front end; a recogniser's convolutions do not change with 0."""
    detach_targets: bool = False
    """The streaming mode's loss does not train the quantiser."""
    crop_duration: float = 15.0
    """Longer utterances are cut into equally long pieces of at most so many seconds."""

    def __post_init__(self) -> None:
        at_least(self, extractor_channels=1, mask_span=1, num_negatives=1, codebook_groups=1, codebook_entries=2)
        if self.gumbel_end_step is not None and not self.gumbel_end_step > 0:
            raise ConfigError(f"--gumbel-end-step is {self.gumbel_end_step}; it must be above 0")
        at_least(self, diversity_scale=0, feature_penalty=0, feature_grad_scale=0, crop_duration=0.5)
        if not 0 < self.mask_prob <= 1:
            raise ConfigError(f"--mask-prob is {self.mask_prob}; it must be above 0 and at most 1")
        if not 0 < self.gumbel_end <= self.gumbel_start or not 0 < self.gumbel_decay <= 1:
            raise ConfigError(
                f"--gumbel-start {self.gumbel_start}, --gumbel-end {self.gumbel_end}, --gumbel-decay "
                f"{self.gumbel_decay}: the temperature falls by a factor of at most 1 to a floor above 0"
            )
        if not self.contrast_temperature > 0:
            raise ConfigError(f"--contrast-temperature is {self.contrast_temperature}; it must be above 0")
        if self.target_dim < 1 or self.target_dim % self.codebook_groups:
            raise ConfigError(
                f"--target-dim is {self.target_dim}; it must be a multiple of --codebook-groups {self.codebook_groups}"
            )

    @property
    def span(self) -> int:
        """Return the frames of a masked span."""
        return self.mask_span or (5 if self.front_end == "fbank" else 10)

    def decay(self, planned: int) -> float:
        """Return the factor on the temperature a step, in a training of so many planned steps."""
        if self.gumbel_end_step is None:
            return self.gumbel_decay
        steps = self.gumbel_end_step * planned if is_share(self.gumbel_end_step) else self.gumbel_end_step
        return (self.gumbel_end / self.gumbel_start) ** (1 / max(steps, 1))
