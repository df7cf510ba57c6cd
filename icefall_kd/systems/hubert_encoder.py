"""The HuBERT encoder of a training, and its frames: for --system hubert, and for mvq students (--encoder hubert)."""

from collections.abc import Callable

from icefall_kd.config import TrainConfig
from icefall_kd.errors import ConfigError
from icefall_kd.frames import waveform_frames, waveform_seconds
from icefall_kd.models.fbank_front import FbankFrontEnd
from icefall_kd.models.hubert import HubertEncoder


def make_encoder(config: TrainConfig, new: bool, training: bool = False) -> HubertEncoder:
    """Return the encoder that the options name.

    Args:
        config: all options of the training.
        new: it is trained from scratch, so that log-mel features need the statistics of --cmvn.
        training: it is trained at all: given statistics are read, and those of another training replace them.
    Raises:
        ConfigError: SpecAugment, which masks features that are not heard; or no statistics.
    """
    if config.augment.spec_aug:
        raise ConfigError("--spec-aug true with a HuBERT encoder: it hears samples; give --spec-aug false")
    encoder = HubertEncoder(config.model, config.hubert, config.ssl)
    if config.ssl.front_end == "fbank":
        if config.hubert.cmvn is not None and (new or training):
            encoder.subsampling.load_cmvn(config.hubert.cmvn)
        elif new:
            raise ConfigError("--front-end fbank needs --cmvn FILE (local/compute_cmvn.py), or --init-from a student")
    return encoder


def refuse_missing_cmvn(encoder: HubertEncoder) -> None:
    """Raise a ConfigError before the first step where log-mel statistics came neither from a file nor with weights."""
    front = encoder.subsampling
    if isinstance(front, FbankFrontEnd) and bool((front.cmvn_std == 1).all()):
        raise ConfigError(
            "--init-from has no statistics of log-mel features, which --front-end fbank needs; give --cmvn FILE"
        )


def frames_of(encoder: HubertEncoder) -> Callable[[int], int]:
    """Return the function from log-mel frames of 10 ms, in which cuts are counted, to frames of the encoder output."""
    if encoder.time_reduction is None:
        return waveform_frames
    return lambda num_frames: (waveform_frames(num_frames) + 1) // 2


def hop_of(encoder: HubertEncoder) -> int:
    """Return the samples between two frames of the encoder output."""
    return encoder.subsampling.hop * (1 if encoder.time_reduction is None else 2)


def seconds_of(encoder: HubertEncoder, frame: int) -> float:
    """Return where a frame (0-based) of the encoder output begins, in seconds."""
    return waveform_seconds(frame * (1 if encoder.time_reduction is None else 2))
