"""HuBERT distilled for recognition: what its three trainings share, and fine-tuning with CTC or a transducer.

Wang et al. 2022, "Exploring Effective Distillation of Self-Supervised Speech Models for Automatic Speech Recognition",
arXiv 2210.15631.  A teacher is pre-trained by masked prediction of clusters (--objective ssl, systems/hubert_ssl.py) or
comes from a hub; students learn its states and cluster posteriors (--objective distil, systems/hubert_distil.py); every
one of them is fine-tuned as a whole (--objective asr, here).
"""

from torch import Tensor

from icefall_kd.config import TrainConfig
from icefall_kd.config.checks import refuse_options
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError
from icefall_kd.frames import waveform_frames, waveform_seconds
from icefall_kd.models.conformer import log_parameter_counts
from icefall_kd.models.hubert import HubertEncoder
from icefall_kd.systems.asr import TransducerSystem
from icefall_kd.systems.base import System
from icefall_kd.systems.hubert_distil import build_distil
from icefall_kd.systems.hubert_ssl import build_hubert_ssl


def make_encoder(config: TrainConfig, new: bool) -> HubertEncoder:
    """Return the encoder that the options name.

    Args:
        config: all options of the training.
        new: it is trained from scratch, so that log-mel features need the statistics of --cmvn.
    Raises:
        ConfigError: SpecAugment, which masks features that are not heard; or no statistics.
    """
    if config.augment.spec_aug:
        raise ConfigError("--spec-aug true with --system hubert: its models hear samples; give --spec-aug false")
    encoder = HubertEncoder(config.model, config.hubert, config.ssl)
    if new and config.ssl.front_end == "fbank":
        if config.hubert.cmvn is None:
            raise ConfigError("--front-end fbank needs --cmvn FILE (local/compute_cmvn.py), or --init-from a student")
        encoder.subsampling.load_cmvn(config.hubert.cmvn)
    return encoder


class HubertAsrSystem(TransducerSystem):
    """A HuBERT encoder with a CTC head, a transducer or both, of which all weights are trained."""

    needs_audio = hears_samples = True

    def __init__(self, config: TrainConfig, vocab_size: int, new: bool) -> None:
        super().__init__(config, vocab_size, make_encoder(config, new))
        log_parameter_counts(self.model)

    @property
    def alignment_losses(self) -> dict[str, object]:
        """Return which losses are active, and how many frames an utterance has."""
        half = self.model.encoder.time_reduction is not None
        frames = (lambda n: (waveform_frames(n) + 1) // 2) if half else waveform_frames
        return super().alignment_losses | {"num_encoder_frames": frames}

    def heard(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the samples (N, S), and how many are valid (N,)."""
        return batch.audio, batch.audio_lens

    def frame_seconds(self, frame: int) -> float:
        """Return where a frame (0-based) of the encoder output begins, in seconds."""
        return waveform_seconds(frame * (1 if self.model.encoder.time_reduction is None else 2))


def build_hubert(config: TrainConfig, vocab_size: int, inference: bool = False) -> System:
    """Build the system of ``config.objective``.

    Raises:
        ConfigError: options of other systems, or a model that cannot be trained.
    """
    if not inference:
        refuse_options(config.dual, "dualmode")
        for group in (config.recogniser_kd, config.attention):
            refuse_options(group, "nar")
        for group in (config.cif, config.text_kd):
            refuse_options(group, "hkd")
        if config.objective != "ssl":
            refuse_options(config.hubert_ssl, "hubert --objective ssl")
        if config.objective != "distil":
            refuse_options(config.hubert_kd, "hubert --objective distil")
        if config.objective == "distil":
            return build_distil(config, make_encoder(config, new=config.loop.init_from is None))
        if config.objective == "ssl":
            return build_hubert_ssl(config, make_encoder(config, new=config.loop.init_from is None))
    return HubertAsrSystem(config, vocab_size, new=not inference and config.loop.init_from is None)
