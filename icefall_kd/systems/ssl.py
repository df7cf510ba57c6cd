"""Self-supervised training of the dual-mode encoder: wav2vec 2.0 in both modes, without transcripts.

With --modes full it is wav2vec 2.0 (Baevski et al. 2020, arXiv 2006.11477) over our Conformer.  With two modes, which
is our design (docs/dualmode.md), both see the same masked frames, targets and negatives, so that the front end and the
quantiser run once:

    total = L(full, dense) + lambda * L(streaming, sparse) + M * (0.1 * diversity + 10 * penalty) [+ beta * KD]

L is the sum over the M masked frames of -log softmax of the cosine to the own target among 100 others.  KD compares
the modes' distributions over the same candidates.
"""

import dataclasses
import logging
import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from icefall_kd.config import TrainConfig
from icefall_kd.config.dual import is_share
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError
from icefall_kd.frames import SSL_CONV, conv2d_subsampled_len
from icefall_kd.models.conformer import log_parameter_counts
from icefall_kd.models.dual import Mode, encoder_mode, make_dual, no_gradient_of_norms, refresh_masks
from icefall_kd.models.masks import make_pad_mask
from icefall_kd.models.ssl import (
    Quantized,
    SslModel,
    contrastive_kd,
    contrastive_logits,
    contrastive_loss,
    gumbel_temperature,
    sample_negatives,
    sample_spans,
    scale_gradient,
)
from icefall_kd.systems.base import LossTerm, LossTerms, System

logger = logging.getLogger(__name__)

# Steps between two looks at the health of a training, and what they warn of (our choice).
HEALTH_INTERVAL = 1000
FIRST_LOSS_TOLERANCE = 0.5
LEAST_CODE_PERPLEXITY = 20.0
# Log-mel frames of 10 ms in samples at 16 kHz.
_FBANK_HOP = 160
_UNIT = "masked frame"


class _AddGradient(torch.autograd.Function):
    """Return a tensor as it is; its gradient is joined by the one that a detached copy of it has got before."""

    @staticmethod
    def forward(ctx, x: Tensor, copy: Tensor) -> Tensor:
        ctx.copy = copy
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return (grad if ctx.copy.grad is None else grad + ctx.copy.grad), None


@dataclass
class _Task:
    """What the modes of a step share."""

    x: Tensor
    """(N, T', C) input of the layers, masked."""
    lens: Tensor
    """(N,) valid frames."""
    mask: Tensor
    """(N, T') bool, M True in each row."""
    quantized: Quantized
    targets: Tensor
    """(N, M, E)."""
    negatives: Tensor
    """(N, M, K)."""
    penalty: Tensor
    """Scalar: mean square of the front end's output before its LayerNorm."""
    temperature: float
    teacher: Tensor | None = None
    """(N, M, K + 1) detached logits of the full mode."""
    full_loss: Tensor | None = None
    """Scalar, detached: the sum of the full mode's loss."""

    @property
    def num_masked(self) -> int:
        """Return N * M."""
        return self.targets.shape[0] * self.targets.shape[1]


class SslSystem(System):
    """An encoder of two modes that learns to tell what is behind its mask."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.cfg, self.ssl = config.dual, config.ssl
        # A share of the planned steps is told later: until then, of one step.
        self.gumbel_decay = self.ssl.decay(1)
        self.is_new = config.loop.init_from is None
        self.model = SslModel(config.model, config.ssl)
        make_dual(self.model.encoder, self.cfg)
        self.norm_mode = "streaming" if self.cfg.modes == "streaming" else "full"
        # Between the passes of one step: what they share, and the detached copies that the first one was run on.
        self._shared: tuple[_Task, dict[str, Tensor]] | None = None
        log_parameter_counts(self.model)

    @property
    def needs_audio(self) -> bool:
        """Return whether the front end hears samples."""
        return self.ssl.front_end == "waveform"

    @property
    def alignment_losses(self) -> dict[str, object]:
        """Return which utterances are too short to be masked: less than two spans."""
        return {
            "transducer": False,
            "ctc": False,
            "num_encoder_frames": waveform_frames if self.needs_audio else conv2d_subsampled_len,
            "min_encoder_frames": 2 * self.ssl.span,
        }

    def passes(self, batch: Batch, step: int) -> int:
        """Return 2 in the memory-lean order of both modes, else 1."""
        return 2 if self.cfg.lean and self.cfg.modes == "dual" and not self.cfg.sampled_mode else 1

    def _modes(self) -> list[Mode]:
        if self.cfg.modes != "dual":
            return [self.cfg.modes]
        if self.training and self.cfg.sampled_mode:
            return [("full", "streaming")[int(torch.randint(2, ()))]]
        return ["full", "streaming"]

    def losses(self, batch: Batch, step: int, part: int | None = None) -> LossTerms:
        """Return the contrastive loss of each mode, diversity, penalty and KD; or one pass's share of that."""
        terms: dict[str, LossTerm] = {}
        if part == 0:  # the full mode, on detached copies: its backward pass frees all it has computed
            task = self._prepare(batch, step)
            copies = {name: getattr(task, name).detach().requires_grad_() for name in ("x", "targets")}
            metrics = self._contrast(terms, task, "full", step, **copies)
            self._shared = task, copies
            return LossTerms(terms, task.num_masked, metrics, _UNIT)
        if part is None:
            modes = self._modes()
            task = self._prepare(batch, step)
            x, targets, frames = task.x, task.targets, task.num_masked
        else:
            modes = ["streaming"]
            (task, copies), self._shared = self._shared, None
            x, targets = _AddGradient.apply(task.x, copies["x"]), _AddGradient.apply(task.targets, copies["targets"])
            frames = 0  # counted by the first pass
        metrics = {}
        for mode in modes:
            metrics |= self._contrast(terms, task, mode, step, x, targets)
        self._auxiliary(terms, task)
        if self.training and len(modes) == 1 and self.cfg.modes == "dual":
            # Nothing lacks a gradient: the other mode's norms, and targets that only the first pass trains.
            zero = no_gradient_of_norms(self.model.encoder) + 0.0 * targets.sum()
            name = f"{modes[0]}_contrastive_loss"
            terms[name] = dataclasses.replace(terms[name], value=terms[name].value + zero)
        return LossTerms(terms, frames, metrics | self._figures(task), _UNIT)

    def _prepare(self, batch: Batch, step: int) -> _Task:
        model, front, ssl = self.model, self.model.encoder.subsampling, self.ssl
        heard = (batch.audio, batch.audio_lens) if self.needs_audio else (batch.features, batch.x_lens)
        raw, lens = front.project(*heard)
        raw = scale_gradient(raw, ssl.feature_grad_scale)
        valid = ~make_pad_mask(lens, raw.shape[1])
        z = front.norm(raw)
        # In validation every epoch masks the same frames.
        seed = zlib.crc32("|".join(batch.ids).encode())
        generator = None if self.training else torch.Generator().manual_seed(seed)
        mask = sample_spans(lens.cpu(), z.shape[1], ssl.mask_prob, ssl.span, generator)
        n, num_masked = len(mask), int(mask[0].sum())
        negatives = sample_negatives(n, num_masked, ssl.num_negatives, generator).to(z.device)
        mask = mask.to(z.device)
        temperature = gumbel_temperature(step, ssl.gumbel_start, ssl.gumbel_end, self.gumbel_decay)
        quantized = model.quantizer(z[mask].view(n, num_masked, -1), temperature)
        x = front.finish(z)
        return _Task(
            x=torch.where(mask.unsqueeze(-1), model.mask_embedding.to(x.dtype), x),
            lens=lens,
            mask=mask,
            quantized=quantized,
            targets=quantized.targets,
            negatives=negatives,
            penalty=raw[valid].float().square().mean(),
            temperature=temperature,
        )

    def _contrast(
        self, terms: dict[str, LossTerm], task: _Task, mode: Mode, step: int, x: Tensor, targets: Tensor
    ) -> dict[str, tuple]:
        """Add the terms of one mode; return its metrics."""
        n, num_masked = task.targets.shape[:2]
        with encoder_mode(self.model.encoder, mode, sparse=mode == "streaming"):
            out = self.model.encoder.forward_embedded(x, task.lens).encoder_out
        context = self.model.context_out(out[task.mask].view(n, num_masked, -1))
        if mode == "streaming" and self.ssl.detach_targets:
            targets = targets.detach()
        codes, temperature = task.quantized.codes, self.ssl.contrast_temperature
        logits = contrastive_logits(context, targets, codes, task.negatives, temperature)
        loss, wins = contrastive_loss(logits)
        scale = self.cfg.streaming_scale if mode == "streaming" else 1.0
        terms[f"{mode}_contrastive_loss"] = _term(loss, scale)
        if mode == "full":
            task.full_loss = loss.detach().sum()
            task.teacher = logits.detach() if self.cfg.dual_kd_scale > 0 else None
        elif task.teacher is not None:
            warm = min(step / self.cfg.dual_kd_warm_step, 1.0) if self.cfg.dual_kd_warm_step else 1.0
            terms["mode_kd_loss"] = _term(contrastive_kd(task.teacher, logits), warm * self.cfg.dual_kd_scale)
        if self.training and step % HEALTH_INTERVAL == 0 and (mode == "full" or self.cfg.modes != "dual"):
            self._check_health(float(loss.detach().mean()), float(task.quantized.code_perplexity), step)
        elif self.training and step % HEALTH_INTERVAL == 0 and task.full_loss is not None:
            warn_of_equal_modes(float(task.full_loss), float(loss.detach().sum()), step)
        return {f"{mode}_acc": (wins.sum(), float(wins.numel()))}

    def _auxiliary(self, terms: dict[str, LossTerm], task: _Task) -> None:
        count = task.num_masked
        for name, value, scale in (
            ("diversity_loss", task.quantized.diversity_loss, self.ssl.diversity_scale),
            ("feature_penalty", task.penalty, self.ssl.feature_penalty),
        ):
            terms[name] = LossTerm(count * value, scale, count, _UNIT)

    def _figures(self, task: _Task) -> dict[str, tuple]:
        """Return what is logged beside the losses; the perplexities with their bound."""
        best = float(self.ssl.codebook_groups * self.ssl.codebook_entries)
        found = {
            "code_perplexity": (task.quantized.code_perplexity, 1.0, best),
            "prob_perplexity": (task.quantized.perplexity, 1.0, best),
        }
        if self.training:  # validation has always the same
            found["gumbel_temperature"] = (task.temperature, 1.0)
            found["masked_share"] = (float(task.num_masked), float(task.lens.sum()))
        return found

    def _check_health(self, loss: float, code_perplexity: float, step: int) -> None:
        """Warn of a loss that does not begin at the logarithm of its candidates, and of collapsed codebooks."""
        expected = math.log(1 + self.ssl.num_negatives)
        if step == 0 and self.is_new and abs(loss - expected) > FIRST_LOSS_TOLERANCE:
            logger.warning(
                "the contrastive loss begins at %.3f nats a masked frame; ln(1 + --num-negatives) = %.3f is what an "
                "untrained model has (a smaller --target-dim, or few codes in use, move it)",
                loss,
                expected,
            )
        if step > 0 and code_perplexity < LEAST_CODE_PERPLEXITY:
            logger.warning(
                "the code perplexity is down to %.1f of %d at step %d: the codebooks collapse; raise --diversity-scale "
                "or lower --base-lr",
                code_perplexity,
                self.ssl.codebook_groups * self.ssl.codebook_entries,
                step,
            )

    @property
    def needs_plan(self) -> bool:
        """Return whether a step of the schedules is told as a share."""
        return self.cfg.in_shares or is_share(self.ssl.gumbel_end_step)

    def plan(self, steps: int) -> None:
        """Turn shares of ``steps`` into steps."""
        self.cfg = self.cfg.in_steps(steps)
        self.gumbel_decay = self.ssl.decay(steps)

    def after_step(self, step: int) -> dict[str, float]:
        """Refresh the masks when it is time to."""
        return refresh_masks(self.model.encoder, self.cfg, step)


def _term(each: Tensor, scale: float) -> LossTerm:
    """Return the term of a loss (N, M) a masked frame."""
    rows = each.sum(dim=1)
    return LossTerm(rows.sum(), scale, each.numel(), _UNIT, rows.detach())


def waveform_frames(num_frames: int) -> int:
    """Return the frames of 20 ms of an utterance of so many log-mel frames of 10 ms, at least."""
    return SSL_CONV.num_frames(max(num_frames * _FBANK_HOP - _FBANK_HOP // 2, 0))


def warn_of_equal_modes(full: float, streaming: float, step: int) -> None:
    """Warn where the streaming mode's loss is the full mode's: then chunks, masks and dropout all do nothing."""
    if full == streaming:
        logger.warning(
            "both modes have the same contrastive loss %.6g at step %d: are all utterances shorter than a chunk "
            "(--chunk-size)?",
            full,
            step,
        )


def build_ssl(config: TrainConfig) -> SslSystem:
    """Build the system of --objective ssl.

    Raises:
        ConfigError: SpecAugment, or a front end that the modes cannot use.
    """
    ssl, dual = config.ssl, config.dual
    if config.augment.spec_aug:
        raise ConfigError("--spec-aug true with --objective ssl: its mask is the augmentation; give --spec-aug false")
    if dual.modes != "full" and ssl.front_end == "waveform" and ssl.extractor_norm == "default":
        raise ConfigError(
            f"--extractor-norm default with --modes {dual.modes}: it normalises over the whole utterance, which no "
            "stream has; use layer_norm"
        )
    if ssl.detach_targets and dual.modes != "dual":
        raise ConfigError(f"--detach-targets true with --modes {dual.modes}: nothing would train the quantiser")
    return SslSystem(config)
