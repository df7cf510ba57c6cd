"""A dense recogniser of whole utterances and a sparse streaming one in one set of weights.

"Learning a Dual-Mode Speech Recognition Model via Self-Pruning", arXiv 2207.11906: of the paper only the abstract is
known to us; what follows is our design (docs/dualmode.md).  Every step trains both modes on the same batch:

    total = L(full, dense) + lambda * L(streaming, sparse) + beta * KD(full -> streaming)

L is the transducer and the CTC loss of ``config.asr``; KD compares the modes where the student's lattice has its
windows, and at the frames of CTC that are not sure of the blank.  The teacher gets no gradient.

In the memory-lean order the full mode runs forward and backward before the streaming mode does; only its detached
encoder output stays, from which the teacher's heads are run again.  Gradients are those of the joint order.
"""

import contextlib
import dataclasses

import torch
from torch import Tensor

from icefall_kd.config import DecodeConfig, ModelConfig, TrainConfig
from icefall_kd.config.checks import refuse_options
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError
from icefall_kd.frames import waveform_frames
from icefall_kd.losses.dual_kd import ctc_mode_kd, lattice_mode_kd
from icefall_kd.losses.rnnt import windows
from icefall_kd.models.conformer import log_parameter_counts
from icefall_kd.models.dual import (
    StartMasks,
    current_sparsity,
    encoder_mode,
    make_dual,
    no_gradient_of_norms,
    refresh_masks,
    set_mode,
    trial_sparsity,
)
from icefall_kd.models.pruning import sparse_size
from icefall_kd.models.ssl import set_front_end
from icefall_kd.models.streaming import WHOLE_UTTERANCE, choose_chunks
from icefall_kd.runtime import dist
from icefall_kd.systems.asr import Recognition, TransducerSystem
from icefall_kd.systems.base import LossTerm, LossTerms, System, by_row
from icefall_kd.systems.ssl import build_ssl, refuse_front_end

# Weight of the third pass (our design).
SANDWICH_SCALE = 0.5
# Of a stored weight, in what results tell of a model's size: float32, in which it is run.
WEIGHT_BYTES = 4


class DualModeSystem(TransducerSystem):
    """A transducer, a CTC head or both over an encoder of two modes."""

    def __init__(self, config: TrainConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.cfg = config.dual
        self.ssl = config.ssl
        set_front_end(self.model.encoder, self.ssl)
        if self.hears_samples and self.ssl.feature_grad_scale == 0:
            self.model.encoder.subsampling.freeze()
        make_dual(self.model.encoder, self.cfg)
        self.start_masks = StartMasks(config.loop.exp_dir)
        self.norm_mode = "streaming" if self.cfg.modes == "streaming" else "full"
        self._teacher: Tensor | None = None
        log_parameter_counts(self.model)

    @property
    def needs_audio(self) -> bool:
        """Return whether the front end hears samples."""
        return self.ssl.front_end == "waveform"

    hears_samples = needs_audio

    @property
    def alignment_losses(self) -> dict[str, object]:
        """Return which losses are active, and how many frames an utterance has."""
        return super().alignment_losses | ({"num_encoder_frames": waveform_frames} if self.hears_samples else {})

    def heard(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what the encoder's front end hears, and how much of it is valid (N,)."""
        return (batch.audio, batch.audio_lens) if self.hears_samples else (batch.features, batch.x_lens)

    def frame_seconds(self, frame: int) -> float:
        """Return where a frame (0-based) of the encoder output begins, in seconds."""
        return self.model.encoder.subsampling.frame_seconds(frame)

    def passes(self, batch: Batch, step: int) -> int:
        """Return the number of modes of a step in the memory-lean order, else 1."""
        return len(self._kinds()) if self.cfg.lean and self.cfg.modes == "dual" and not self.cfg.sampled_mode else 1

    def _kinds(self) -> list[str]:
        """Return what a batch is run through: "full", "streaming", "sandwich"."""
        if self.cfg.modes != "dual":
            return [self.cfg.modes]
        if not self.training:
            return ["full", "streaming"]
        if self.cfg.sampled_mode:
            return [("full", "streaming")[int(torch.randint(2, ()))]]
        return ["full", "streaming", *(["sandwich"] if self.cfg.sandwich else [])]

    def losses(self, batch: Batch, step: int, part: int | None = None) -> LossTerms:
        """Return the losses of both modes and, in training, of the distillation between them; or one part of that."""
        kinds = self._kinds()
        chosen = kinds if part is None else [kinds[part]]
        terms: dict[str, LossTerm] = {}
        for kind in chosen:
            terms |= self._full(batch, step) if kind == "full" else self._streamed(batch, step, kind == "sandwich")
        if self.training and chosen[-1] == kinds[-1]:
            terms, self._teacher = self._touch(terms, chosen), None
        frames = 0 if part else int(self.model.encoder.output_lens(self.heard(batch)[1]).sum())
        return LossTerms(terms=terms, frames=frames)

    def _full(self, batch: Batch, step: int) -> dict[str, LossTerm]:
        with encoder_mode(self.model.encoder, "full", sparse=False):
            out, lens = self.encode(batch)
        teaches = self.training and self.cfg.modes == "dual" and (self.cfg.dual_kd_scale > 0 or self.cfg.sandwich)
        self._teacher = out.detach() if teaches else None
        return _named("full", self.recognise(batch, out, lens, step).terms, 1.0)

    def _streamed(self, batch: Batch, step: int, sandwich: bool) -> dict[str, LossTerm]:
        encoder, masks = self.model.encoder, contextlib.nullcontext()
        if sandwich:
            masks = trial_sparsity(encoder, self.cfg, float(torch.rand(())) * current_sparsity(self.cfg, step))
        with masks, encoder_mode(encoder, "streaming", sparse=True):
            out, lens = self.encode(batch)
        student = self.recognise(batch, out, lens, step)
        terms = {} if sandwich else _named("streaming", student.terms, self.cfg.streaming_scale)
        scale = SANDWICH_SCALE if sandwich else self.cfg.dual_kd_scale
        if self._teacher is not None and scale > 0:
            warm = min(step / self.cfg.dual_kd_warm_step, 1.0) if self.cfg.dual_kd_warm_step else 1.0
            terms |= _named("sandwich" if sandwich else "mode", self._distil(batch, student, lens), warm * scale)
        return terms

    def _distil(self, batch: Batch, student: Recognition, lens: Tensor) -> dict[str, LossTerm]:
        """Return the divergences of a student from the full mode, each weighed like its loss and as one a frame."""
        terms, frames, n = {}, float(lens.sum()), len(lens)
        if student.transducer is not None:
            positions = student.transducer.positions
            teacher = self._teacher_logits(batch, positions)
            kd, rows = lattice_mode_kd(student.transducer.logits, teacher, batch.y, positions, lens, batch.y_lens)
            scale, each = self.asr.transducer_scale * frames / max(len(kd), 1), by_row(kd.detach(), rows, n)
            terms["lattice_kd_loss"] = LossTerm(kd.sum(), scale, max(len(kd), 1), "node", per_utterance=each)
        if student.ctc_logits is not None:
            with torch.no_grad():
                teacher = self.model.ctc_output(self._teacher)
            kd, rows = ctc_mode_kd(student.ctc_logits, teacher, lens, self.cfg.kd_skip_blank)
            each = by_row(kd.detach(), rows, n)
            terms["ctc_kd_loss"] = LossTerm(kd.sum(), self.asr.ctc_scale, max(len(kd), 1), per_utterance=each)
        return terms

    @torch.no_grad()
    def _teacher_logits(self, batch: Batch, positions: Tensor) -> Tensor:
        """Return what the joiner says (N, T', R, V) of the full mode's frames, in the windows of the student."""
        model = self.model
        decoder_out = model.joiner.decoder_proj(model.decoder(model.decoder.add_sos(batch.y)))
        encoder_out = model.joiner.encoder_proj(self._teacher)
        am, lm, _ = windows(encoder_out, decoder_out, positions[..., 0].long(), positions.shape[2])
        return model.joiner(am, lm, project_input=False)

    def _touch(self, terms: dict[str, LossTerm], chosen: list[str]) -> dict[str, LossTerm]:
        """Give what the last backward pass of a step would miss a gradient of 0."""
        if {"full", "streaming"} <= set(chosen):
            return terms
        zero = dist.zero_of(self.parameters()) if chosen == ["sandwich"] else no_gradient_of_norms(self.model.encoder)
        name, term = next((n, t) for n, t in terms.items() if t.scale != 0 or chosen == ["sandwich"])
        # A scale of 0, as at the beginning of a warm-up, would take the term out of the total.
        return {**terms, name: dataclasses.replace(term, value=term.value + zero, scale=term.scale or 1e-30)}

    @property
    def needs_plan(self) -> bool:
        """Return whether a step of the schedules is told as a share."""
        return self.cfg.in_shares

    def plan(self, steps: int) -> None:
        """Turn shares of ``steps`` into steps."""
        self.cfg = self.cfg.in_steps(steps)

    def after_step(self, step: int) -> dict[str, float]:
        """Refresh the masks when it is time to."""
        return refresh_masks(self.model.encoder, self.cfg, step, self.start_masks)

    def set_up_decoding(self, config: DecodeConfig, model: ModelConfig) -> None:
        """Choose the mode, the chunks and dense or masked weights that the options name.

        Raises:
            ConfigError: the training did not have that mode, or no masks, or the chunks do not fit the mode.
        """
        chosen = config.decode_chunk_size, config.left_context_frames
        streams = config.chunk_by_chunk or any(value not in (None, -1) for value in chosen)
        mode, trained = config.encoder_mode, self.cfg.modes
        if mode == "auto":
            mode = "streaming" if streams or trained == "streaming" else "full"
        if trained not in ("dual", mode):
            raise ConfigError(
                f"this model was trained with --modes {trained}, the options of decoding ask for its {mode} mode; "
                f"leave out --encoder-mode{' and options of chunks' if streams else ''}"
            )
        if mode == "full" and streams:
            raise ConfigError("--encoder-mode full sees whole utterances; leave out the options of chunks")
        sparse = mode == "streaming" and self.cfg.sparsity > 0 if config.sparse == "auto" else config.sparse == "true"
        if sparse and not self.cfg.sparsity > 0:
            raise ConfigError("--sparse true: this model was trained without --sparsity and has no masks")
        encoder, chunks = self.model.encoder, WHOLE_UTTERANCE
        if mode == "streaming":
            finite = [size for size in model.chunk_size if size > 0]
            chunks = choose_chunks(dataclasses.replace(model, chunk_size=finite), *chosen, config.chunk_by_chunk)
        encoder.chunks = chunks
        set_mode(encoder, mode, sparse, chunks)
        encoder.pinned = None  # outside training, ``chunks`` say the same, and whoever measures may change them
        size = sparse_size(self, self.cfg.prune_block)
        parameters = size.prunable + size.rest
        self.decoded_as = {
            "encoder_mode": mode,
            "sparse": sparse,
            "parameters": parameters,
            "nonzeros": size.nonzeros + size.rest if sparse else parameters,
            "model_bytes": round(size.sparse_bytes(WEIGHT_BYTES) if sparse else size.dense_bytes(WEIGHT_BYTES)),
        }


def _named(prefix: str, terms: dict[str, LossTerm], scale: float) -> dict[str, LossTerm]:
    """Return terms under longer names, with scales multiplied."""
    return {f"{prefix}_{name}": dataclasses.replace(term, scale=scale * term.scale) for name, term in terms.items()}


def _refuse_ssl_options(config: TrainConfig) -> None:
    """Raise a ConfigError for options of self-supervised training, but those of a front end that hears samples."""
    waveform = config.ssl.front_end == "waveform"
    besides = ("front_end", "extractor_norm", "extractor_channels", "feature_grad_scale") if waveform else ()
    refuse_options(config.ssl, "dualmode --objective ssl", besides)
    if not waveform:
        return
    refuse_front_end(config)
    if config.augment.spec_aug:
        raise ConfigError(
            "--spec-aug true with --front-end waveform: it masks log-mel frames, which are not heard; give --spec-aug "
            "false"
        )


def build_dualmode(config: TrainConfig, vocab_size: int, inference: bool = False) -> System:
    """Build the system of ``config.objective``; it is the same at inference.

    Raises:
        ConfigError: options of other systems, or an encoder that has not both modes.
    """
    if not inference:
        refuse_options(config.kd, "mvq")
        for group in (config.recogniser_kd, config.attention):
            refuse_options(group, "nar")
        for group in (config.cif, config.text_kd):
            refuse_options(group, "hkd")
        if not config.self_supervised:
            _refuse_ssl_options(config)
    if config.self_supervised:
        return build_ssl(config)
    return DualModeSystem(config, vocab_size)
