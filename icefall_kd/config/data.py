"""Options of data and augmentation."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from icefall_kd.config.checks import at_least
from icefall_kd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where training data is and how it is batched."""

    manifest_dir: Path = Path("data/fbank")
    """Folder of cuts_<part>.jsonl.gz as prepare.sh writes it."""
    lang_dir: Path = Path("data/lang_bpe_500")
    """Folder of the tokenizer (tokenizer.json)."""
    train_parts: list[str] = field(default_factory=lambda: ["train"])
    """Parts to train on: names in manifest-dir, or paths of lhotse cut sets."""
    valid_parts: list[str] = field(default_factory=lambda: ["dev"])
    """Parts to validate on."""
    valid_utts: int | None = None
    """Validate on so many utterances, evenly spaced over the parts; None: on all."""
    features: Literal["precomputed", "on_the_fly"] = "precomputed"
    """Read stored Fbank features, or compute them from audio in the workers."""
    max_duration: float = 200.0
    """Seconds of audio a batch (and a rank)."""
    max_tokens: int | None = None
    """Upper limit of padded tokens (utterances x longest) a batch; None: no limit."""
    min_utt_duration: float = 0.3
    """Shorter utterances are left out, in seconds."""
    max_utt_duration: float = 20.0
    """Longer utterances are left out of training, in seconds."""
    num_buckets: int = 10
    """Buckets of similar duration."""
    num_workers: int = 2
    """Loader processes; 0 loads in the training process."""
    drop_last: bool = False
    """Drop the last, smaller batch of an epoch."""
    shar_dir: Path | None = None
    """Stream the training cuts, with features or audio and labels, from a Shar (local/export_shar.py) in place of
    train-parts; None: read cut sets and label sets."""
    shar_streams: int = 4
    """Streams of the Shar that each rank reads at a time, each with shards of its own; num-workers must divide them."""
    shar_buffer: int = 2000
    """Cuts that a stream holds, with their data, to draw batches from."""

    def __post_init__(self) -> None:
        at_least(self, valid_utts=1, max_duration=0.1, max_tokens=1, shar_streams=1, shar_buffer=1)
        if self.shar_dir is not None and self.num_workers and self.shar_streams % self.num_workers:
            raise ConfigError(
                f"--num-workers {self.num_workers} does not divide --shar-streams {self.shar_streams}: a stream is "
                "read by one process; change one of them"
            )
        at_least(self, num_buckets=1, num_workers=0, min_utt_duration=0)


@dataclass(frozen=True, kw_only=True)
class SharConfig:
    """Which cuts and labels to write as a Shar."""

    cuts: list[Path]
    """Cut sets (cuts_*.jsonl.gz), several as a,b."""
    shar_dir: Path
    """Folder of the Shar."""
    num_shards: int
    """Shards to divide the cuts among; of about 1000 cuts each, and many for each rank and stream of a training.  A
    multiple of a label set's number of shards makes the labels of a shard lie in one of them."""
    label_dir: list[Path] = field(default_factory=list)
    """Label sets whose labels go along, several as a,b."""
    store: Literal["features", "recording", "both"] = "features"
    """What to write of a cut: its stored features, its audio (FLAC of 16 bits), or both."""
    feature_codec: Literal["lilcom", "numpy"] = "lilcom"
    """lilcom: a byte a number, up to 1/64 off what was stored; numpy: four bytes a number, as it was."""
    job: int = 0
    """Which job of an array this is, from 0."""
    num_jobs: int = 1
    """Jobs that write at the same time; each writes every num-jobs-th shard."""
    pieces: float | None = None
    """Write pieces of at most so many seconds, as a training with this --crop-duration hears them; None: utterances."""
    min_coverage: float = 1.0
    """Least fraction of the cuts that must have labels, of each set."""

    def __post_init__(self) -> None:
        at_least(self, num_shards=1, num_jobs=1, pieces=0.5)
        if not 0 <= self.job < self.num_jobs:
            raise ConfigError(f"--job is {self.job}; with --num-jobs {self.num_jobs} it runs from 0")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of the student's input; the teacher always hears clean audio."""

    spec_aug: bool = True
    """Apply SpecAugment."""
    spec_aug_time_warp_factor: int = 0
    """Time warp in frames, 0 or less: off.  Refused together with frame-level teacher labels."""
    spec_aug_p: float = 0.9
    """Probability of SpecAugment for an utterance."""
    num_frame_masks: int = 10
    """Most time masks an utterance."""
    max_frames_mask_fraction: float = 0.15
    """Largest fraction of masked frames."""
    frames_mask_size: int = 100
    """Longest time mask in frames."""
    num_feature_masks: int = 2
    """Frequency masks."""
    features_mask_size: int = 27
    """Widest frequency mask in bins."""
    musan_cuts: Path | None = None
    """Cut set of noises to mix in; None: no noise."""
    musan_p: float = 0.5
    """Probability of noise for an utterance."""
    musan_snr: tuple[float, float] = (10.0, 20.0)
    """Range of the signal-to-noise ratio in dB."""

    def __post_init__(self) -> None:
        at_least(self, num_frame_masks=1, frames_mask_size=2, num_feature_masks=0, features_mask_size=1)
        for name in ("spec_aug_p", "musan_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; a probability is in 0 ... 1")
        if not 0 < self.max_frames_mask_fraction <= 1:
            raise ConfigError(
                f"--max-frames-mask-fraction is {self.max_frames_mask_fraction}; it must be above 0 and at most 1"
            )
