"""HuBERT distilled for recognition: what its three trainings share, and fine-tuning with CTC or a transducer.

Wang et al. 2022, "Exploring Effective Distillation of Self-Supervised Speech Models for Automatic Speech Recognition",
arXiv 2210.15631.  A teacher is pre-trained by masked prediction of clusters (--objective ssl, systems/hubert_ssl.py) or
comes from a hub; students learn its states and cluster posteriors (--objective distil, systems/hubert_distil.py); every
one of them is fine-tuned as a whole (--objective asr, here).
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from icefall_kd.config import HubertAsrConfig, TrainConfig
from icefall_kd.config.checks import refuse_options
from icefall_kd.config.dual import is_share
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError
from icefall_kd.models.conformer import log_parameter_counts
from icefall_kd.models.ssl import sample_rows
from icefall_kd.models.waveform import WaveformFrontEnd
from icefall_kd.runtime import dist
from icefall_kd.systems.asr import TransducerSystem
from icefall_kd.systems.base import TRAINING_ONLY, LossTerms, System
from icefall_kd.systems.hubert_distil import build_distil
from icefall_kd.systems.hubert_encoder import frames_of, make_encoder, refuse_missing_cmvn, seconds_of
from icefall_kd.systems.hubert_ssl import build_hubert_ssl

logger = logging.getLogger(__name__)


class HubertAsrSystem(TransducerSystem):
    """A HuBERT encoder with a CTC head, a transducer or both, of which all weights are trained.

    As HuBERT and wav2vec 2.0 are fine-tuned: for some steps the heads alone, on top of a body that does not change;
    spans of frames and channels behind the front end are masked in training, those steps included.  Ours: each
    utterance keeps the masks that it drew, where the public code lets all of a batch have as many masked frames.

    Args:
        config: all options of the training.
        vocab_size: tokens.
        new: no other training gives the parameters.
        training: with what training alone needs.
    """

    needs_audio = hears_samples = True

    def __init__(self, config: TrainConfig, vocab_size: int, new: bool, training: bool = True) -> None:
        super().__init__(config, vocab_size, make_encoder(config, new, training))
        self.tune, encoder = config.hubert_asr, self.model.encoder
        _refuse_masks(self.tune, encoder.dim)
        self.freeze_steps = self.tune.freeze_steps
        if training and self.tune.time_mask_prob > 0:
            self.model.mask_embedding = nn.Parameter(torch.rand(encoder.dim))
        if config.ssl.feature_grad_scale == 0 and isinstance(encoder.subsampling, WaveformFrontEnd):
            encoder.subsampling.freeze()
        log_parameter_counts(self.model)

    @property
    def alignment_losses(self) -> dict[str, object]:
        """Return which losses are active, and how many frames an utterance has."""
        return super().alignment_losses | {"num_encoder_frames": frames_of(self.model.encoder)}

    def heard(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the samples (N, S), and how many are valid (N,)."""
        return batch.audio, batch.audio_lens

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return encoder_out (N, T', C) and encoder_out_lens (N,); in training of masked frames."""
        x, lens = self.model.encoder.subsampling(*self.heard(batch))
        out = self.model.encoder.forward_embedded(self._masked(x, lens) if self.training else x, lens)
        return out.encoder_out, out.encoder_out_lens

    def _masked(self, x: Tensor, lens: Tensor) -> Tensor:
        """Return (N, T', C) with masked spans of frames, then of channels."""
        tune = self.tune
        if tune.time_mask_prob > 0:
            mask = sample_rows(lens.tolist(), x.shape[1], tune.time_mask_prob, tune.time_mask_span, least=2)
            mask = mask.to(x.device).unsqueeze(-1)
            x = torch.where(mask, self.model.mask_embedding.to(x.dtype), x)
        if tune.channel_mask_prob > 0:
            widths = [x.shape[2]] * len(x)
            mask = sample_rows(widths, x.shape[2], tune.channel_mask_prob, tune.channel_mask_span)
            x = x.masked_fill(mask.to(x.device).unsqueeze(1), 0.0)
        return x

    def losses(self, batch: Batch, step: int) -> LossTerms:
        """Return the losses of ``config.asr``."""
        frozen = self.training and step < self.freeze_steps
        with torch.no_grad() if frozen else contextlib.nullcontext():
            encoder_out, lens = self.encode(batch)
        terms = self.recognise(batch, encoder_out, lens, step).terms
        if frozen:
            name, term = next((n, t) for n, t in terms.items() if t.scale != 0)
            terms[name] = dataclasses.replace(term, value=term.value + dist.zero_of(self._body()))
        return LossTerms(terms=terms, frames=int(lens.sum()))

    def _body(self) -> list[nn.Parameter]:
        """Return the parameters that --freeze-steps is about."""
        named = self.model.named_parameters()
        return [p for name, p in named if name.startswith(("encoder.", "mask_embedding")) and p.requires_grad]

    def frozen(self, step: int) -> Iterable[nn.Parameter]:
        """Return the body in its first steps."""
        return self._body() if step < self.freeze_steps else ()

    def heaviest_step(self, step: int) -> int:
        """Return one at which the body learns."""
        return max(step, int(self.freeze_steps))

    @property
    def needs_plan(self) -> bool:
        """Return whether --freeze-steps is told as a share."""
        return is_share(self.tune.freeze_steps)

    def plan(self, steps: int) -> None:
        """Turn that share of ``steps`` into steps."""
        if self.needs_plan:
            self.freeze_steps = max(1, round(self.tune.freeze_steps * steps))

    def after_step(self, step: int) -> dict[str, float]:
        """Say when the body begins to learn; refuse log-mel statistics that never came.

        Raises:
            ConfigError: the other training had no log-mel front end, and no --cmvn is given.
        """
        if step == 0:
            refuse_missing_cmvn(self.model.encoder)
        if step == self.freeze_steps > 0:
            logger.info("%d steps of the heads alone are done; from now on all weights learn", step)
        return {}

    def inference_state_dict(self) -> dict[str, Tensor]:
        """Return the parameters without the mask embedding."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(TRAINING_ONLY)}

    def frame_seconds(self, frame: int) -> float:
        """Return where a frame (0-based) of the encoder output begins, in seconds."""
        return seconds_of(self.model.encoder, frame)


def _refuse_masks(tune: HubertAsrConfig, dim: int) -> None:
    if tune.channel_mask_prob > 0 and tune.channel_mask_span > dim:
        raise ConfigError(f"--channel-mask-span {tune.channel_mask_span} is more than the {dim} channels there are")


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
        if config.objective == "asr":
            refuse_options(config.kd, "mvq or of --system hubert --objective distil")
        else:
            refuse_options(config.hubert_asr, "hubert --objective asr")
    new = not inference and config.loop.init_from is None
    if config.objective != "asr" and not inference:
        build = build_distil if config.objective == "distil" else build_hubert_ssl
        return build(config, make_encoder(config, new, training=True))
    return HubertAsrSystem(config, vocab_size, new, training=not inference)
