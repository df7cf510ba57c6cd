"""Options of fine-tuning a HuBERT model for recognition: --system hubert --objective asr."""

from dataclasses import dataclass

from icefall_kd.config.checks import at_least
from icefall_kd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HubertAsrConfig:
    """Fine-tuning with CTC (--system hubert --objective asr): when the body learns, and what of it is masked.

    --feature-grad-scale 0 keeps the convolutions over samples as they are throughout; a log-mel front end has none of
    these, and learns.
    """

    freeze_steps: float = 0
    """Steps in which the heads alone learn; below 1: a share of the planned steps."""
    time_mask_prob: float = 0.0
    """Share of frames behind the front end that would be masked if no two spans overlapped; 0: none.  A masked frame
    becomes the mask embedding of the pre-training, or a new one."""
    time_mask_span: int = 10
    """Frames of a masked span, 20 ms each; shorter utterances are not masked."""
    channel_mask_prob: float = 0.0
    """The same share of channels, which are 0 throughout the utterance; 0: none."""
    channel_mask_span: int = 64
    """Channels of a masked span."""

    def __post_init__(self) -> None:
        at_least(self, freeze_steps=0, time_mask_span=1, channel_mask_span=1)
        if self.freeze_steps > 1 and self.freeze_steps != int(self.freeze_steps):
            raise ConfigError(f"--freeze-steps is {self.freeze_steps}; give whole steps, or a share below 1")
        for name in ("time_mask_prob", "channel_mask_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must lie in 0 ... 1")
