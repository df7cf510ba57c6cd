"""One Conformer in two modes: whole utterances with dense weights, and chunks with masked ones.

Chunk masks, the convolution of one kernel and the caches are those of every streaming Conformer here; norms of their
own for each mode follow Dual-mode ASR (Yu et al. 2021, arXiv 2010.06030).  Which matrices are pruned, and when, is our
design: all of a layer but positions, depthwise kernels, biases and norms.
"""

import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from icefall_kd.config import DualConfig
from icefall_kd.errors import ConfigError
from icefall_kd.models.conformer import Conformer
from icefall_kd.models.pruning import (
    PrunableLinear,
    actual_sparsity,
    compare_masks,
    make_masks,
    prunable_layers,
    sparsity_at,
)
from icefall_kd.models.streaming import WHOLE_UTTERANCE, Chunks, draw_chunks
from icefall_kd.runtime import dist
from icefall_kd.runtime.tensors import read_tensors, write_tensors

logger = logging.getLogger(__name__)

Mode = Literal["full", "streaming"]

# Query, key and value are one layer, and three matrices.
_STACKED = {"attention.qkv": 3}
_PRUNABLE = (
    "feed_forward1.expand", "feed_forward1.contract", "attention.qkv", "attention.out", "convolution.gate",
    "convolution.out", "feed_forward2.expand", "feed_forward2.contract",
)  # fmt: skip


class DualNorm(nn.Module):
    """A LayerNorm with parameters of their own for each mode, which start equal."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.full, self.streaming = norm, copy.deepcopy(norm)
        self.mode: Mode = "full"

    @property
    def active(self) -> nn.LayerNorm:
        """Return the norm of the present mode."""
        return self.full if self.mode == "full" else self.streaming

    @property
    def idle(self) -> nn.LayerNorm:
        """Return the norm of the other mode, which a model of one mode does without."""
        return self.streaming if self.mode == "full" else self.full

    @property
    def weight(self) -> Tensor:
        """Return the gain (C,) of the present mode."""
        return self.active.weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., C)."""
        return self.active(x)


def make_dual(encoder: Conformer, cfg: DualConfig) -> None:
    """Give the layers of an encoder prunable matrices and two norms, in place; no parameter changes its value.

    Args:
        encoder: a streaming Conformer whose convolution is of the kind "chunk".
        cfg: without masks (sparsity 0) linear layers stay; with one mode, or shared norms, norms stay.
    Raises:
        ConfigError: the encoder is of another kind, or no finite chunk is named.
    """
    if not encoder.cfg.streaming or encoder.cfg.convolution != "chunk":
        raise ConfigError(
            f"--system dualmode with --streaming {str(encoder.cfg.streaming).lower()} and --convolution "
            f"{encoder.cfg.convolution}: both modes share one kernel; use --streaming true --convolution chunk"
        )
    streaming_chunks(encoder)
    for layer in encoder.layers:
        if cfg.sparsity > 0:
            for name in _PRUNABLE:
                linear = PrunableLinear.wrap(layer.get_submodule(name), _STACKED.get(name, 1))
                linear.straight_through = cfg.prune_ste
                _replace(layer, name, linear)
        if cfg.modes == "dual" and cfg.separate_norms:
            norms = [name for name, module in layer.named_modules() if isinstance(module, nn.LayerNorm)]
            for name in norms:
                _replace(layer, name, DualNorm(layer.get_submodule(name)))
    if cfg.sparsity > 0:
        # Steps done when the masks last changed: what averages must not reach across.
        encoder.register_buffer("mask_step", torch.zeros((), dtype=torch.int64))


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, new)


def streaming_chunks(encoder: Conformer) -> Chunks:
    """Return the chunks of the streaming mode: drawn in training, those of ``encoder.chunks`` if finite, or the first.

    Raises:
        ConfigError: no chunk size is finite.
    """
    finite = [size for size in encoder.cfg.chunk_size if size > 0]
    if not finite:
        raise ConfigError("--chunk-size names no finite size; the streaming mode needs one, for instance 16")
    if encoder.training:
        return draw_chunks(dataclasses.replace(encoder.cfg, chunk_size=finite))
    return encoder.chunks if encoder.chunks.chunk_size > 0 else Chunks(finite[0], encoder.cfg.left_context_frames[0])


def set_mode(encoder: Conformer, mode: Mode, sparse: bool, chunks: Chunks | None = None) -> None:
    """Run an encoder in a mode from now on.

    Args:
        encoder: of :func:`make_dual`, or one that has a single mode.
        mode: "full": whole utterances and their norms; "streaming": chunks and theirs.
        sparse: without the masked weights.
        chunks: of the streaming mode; None: those of :func:`streaming_chunks`.
    """
    encoder.pinned = WHOLE_UTTERANCE if mode == "full" else chunks or streaming_chunks(encoder)
    for module in encoder.modules():
        if isinstance(module, DualNorm):
            module.mode = mode
        elif isinstance(module, PrunableLinear):
            module.sparse = sparse


@contextmanager
def encoder_mode(encoder: Conformer, mode: Mode, sparse: bool, chunks: Chunks | None = None) -> Iterator[None]:
    """Run an encoder in a mode inside the block, as :func:`set_mode` does, and as before behind it."""
    pinned = encoder.pinned
    norms = [(m, m.mode) for m in encoder.modules() if isinstance(m, DualNorm)]
    linears = [(m, m.sparse) for m in encoder.modules() if isinstance(m, PrunableLinear)]
    set_mode(encoder, mode, sparse, chunks)
    try:
        yield
    finally:
        encoder.pinned = pinned
        for norm, before in norms:
            norm.mode = before
        for linear, before in linears:
            linear.sparse = before


@contextmanager
def trial_sparsity(encoder: Conformer, cfg: DualConfig, sparsity: float) -> Iterator[None]:
    """Inside the block, the sparse mode has masks of another sparsity; those of the encoder stay as they are."""
    layers = prunable_layers(encoder)
    masks = make_masks(layers, sparsity, cfg.prune_block, cfg.prune_ranking, cfg.prune_score)
    for name, layer in layers.items():
        layer.trial = masks[name]
    try:
        yield
    finally:
        for layer in layers.values():
            layer.trial = None


def no_gradient_of_norms(encoder: nn.Module) -> Tensor | float:
    """Return :func:`zero_of` the norms of both modes, of which a pass uses one mode's."""
    return dist.zero_of(p for m in encoder.modules() if isinstance(m, DualNorm) for p in m.parameters())


def current_sparsity(cfg: DualConfig, step: int) -> float:
    """Return the sparsity that the schedule wants after ``step`` steps."""
    return sparsity_at(step, cfg.sparsity, cfg.prune_begin_step, cfg.prune_end_step)


def _warn_of_a_ramp_cut_short(cfg: DualConfig) -> None:
    """Warn where the masks stay before the schedule has come to its sparsity."""
    if cfg.mask_freeze_step is None:
        return
    last = cfg.mask_freeze_step // cfg.mask_interval * cfg.mask_interval
    reached = current_sparsity(cfg, last)
    if reached < cfg.sparsity:
        logger.warning(
            "the masks are drawn for the last time at step %d (--mask-interval %d, --mask-freeze-step %d) and stay at "
            "a sparsity of %.3f, not --sparsity %g, which the schedule has from --prune-end-step %d on; freeze later",
            last,
            cfg.mask_interval,
            cfg.mask_freeze_step,
            reached,
            cfg.sparsity,
            cfg.prune_end_step,
        )


class StartMasks:
    """The masks that a training began with, those of --init-from: kept in its folder, not in its checkpoints.

    Args:
        exp_dir: folder of the training.
    """

    def __init__(self, exp_dir: Path) -> None:
        self.file = exp_dir / "start_masks.safetensors"
        self._masks: dict[str, Tensor] | None = None

    def begin(self, masks: Mapping[str, Tensor]) -> None:
        """Keep the masks of a training that begins now; there may be none."""
        self._masks = {name: mask.clone() for name, mask in masks.items()}
        if dist.get_rank() == 0:
            if masks:
                write_tensors(self.file, self._masks, {"content": "masks of the first step"})
            else:
                self.file.unlink(missing_ok=True)

    def iou(self, now: Mapping[str, Tensor]) -> float | None:
        """Return the overlap with the masks of the beginning; None where there were none.

        Raises:
            DataError: the file is damaged.
        """
        if self._masks is None:  # a training that was resumed
            self._masks = read_tensors(self.file)[1] if self.file.exists() else {}
        if self._masks.keys() != now.keys():
            return None
        self._masks = {name: mask.to(now[name].device) for name, mask in self._masks.items()}
        return compare_masks(self._masks, now).iou


def refresh_masks(encoder: Conformer, cfg: DualConfig, step: int, start: StartMasks | None = None) -> dict[str, float]:
    """Draw the masks anew from the weights if it is time to: rank 0 decides, and all ranks get the same.

    Args:
        encoder: of :func:`make_dual`.
        cfg: schedule, interval, and the step after which masks stay.
        step: steps done; 0, before the first: masks are drawn only if the schedule begins sparse and there are none
            (from another training).
        start: keeps these, to be compared with; None: nothing is.
    Returns:
        Figures for the log (sparsity, its range over layers, churn, iou, and iou_start where there is a start); nothing
        when the masks stay as they are.
    """
    if step % cfg.mask_interval or (cfg.mask_freeze_step is not None and step > cfg.mask_freeze_step):
        return {}
    layers = prunable_layers(encoder)
    if not layers:
        return {}
    before = {name: layer.mask for name, layer in layers.items()}
    inherited = step == 0 and not all(bool(mask.all()) for mask in before.values())
    if step == 0:
        _warn_of_a_ramp_cut_short(cfg)
        if start is not None:
            start.begin(before if inherited else {})
    if inherited:
        return {}
    now = make_masks(layers, current_sparsity(cfg, step), cfg.prune_block, cfg.prune_ranking, cfg.prune_score)
    # Equal weights give equal masks but for sorts of different devices: the first rank's hold.
    flat = torch.cat([mask.flatten() for mask in now.values()])
    flat = dist.broadcast_from_first(flat.to(torch.uint8)).bool()
    pieces = flat.split([mask.numel() for mask in now.values()])
    now = {name: piece.view_as(before[name]) for name, piece in zip(now, pieces, strict=True)}
    change, sparsities = compare_masks(before, now), actual_sparsity(now)
    if any(not torch.equal(before[name], mask) for name, mask in now.items()):
        encoder.mask_step.fill_(step)
        for name, layer in layers.items():
            layer.mask.copy_(now[name])
    overlap = start.iou(now) if start is not None else None
    return {
        "sparsity": 1 - float(flat.float().mean()),
        "lowest": min(sparsities.values()),
        "highest": max(sparsities.values()),
        "churn": change.churn,
        "iou": change.iou,
        **({} if overlap is None else {"iou_start": overlap}),
    }
