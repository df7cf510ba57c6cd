"""One optimizer step: forward, agreement of all ranks, backward, normalisation, clipping, update."""

import contextlib
import hashlib
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from icefall_kd.config import TrainConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import DataError, NumericError
from icefall_kd.runtime import dist
from icefall_kd.runtime.files import write_json
from icefall_kd.systems.base import LossTerms, System, parts
from icefall_kd.train import guards
from icefall_kd.train.metrics import Tracker
from icefall_kd.train.optim import ScaledAdam, build_optimizer, learning_rate

logger = logging.getLogger(__name__)

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of all randomness of one step on one rank."""
    digest = hashlib.blake2b(f"{seed},{step},{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@dataclass(frozen=True)
class Wishes:
    """What signals asked for: of one rank, or of at least one of all."""

    stop: bool = False
    save: bool = False


@dataclass(frozen=True)
class StepOutcome:
    """What one step did."""

    values: Tracker | None
    """This rank's losses; None when the step was skipped on all ranks."""
    wishes: Wishes
    """Those of all ranks."""


class Stepper:
    """The system, its optimizer and what a step needs besides.

    Args:
        system: on ``device``.
        config: all options.
        device: where to train.
    """

    def __init__(self, system: System, config: TrainConfig, device: torch.device) -> None:
        self.system, self.config, self.device = system, config, device
        self.exp_dir = Path(config.loop.exp_dir)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.build_optimizer()
        # The scale starts at 1, where nothing overflows that would not overflow by itself.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=1.0, enabled=config.loop.precision == "fp16")
        self.guard = guards.NonFiniteGuard(config.loop.max_skips, self.exp_dir, self.rank)
        self.model: nn.Module = system
        self.grad_norm = math.nan
        self._gradients_checked = False
        self.planned: int | None = None

    def build_optimizer(self) -> None:
        """Make the optimizer anew; ScaledAdam measures the parameters at that time."""
        self.optimizer = build_optimizer(self.config.optim, self.system)

    def distribute(self) -> None:
        """Wrap the system for several ranks (rank 0's parameters go to all of them)."""
        if self.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(self.system, device_ids=ids)

    def memory_to_come(self) -> int:
        """Return the bytes that the optimizer's state and DDP's buckets will take from the first step on."""
        trainable = sum(p.nbytes for p in self.system.parameters() if p.requires_grad)
        # ScaledAdam has its state from the beginning, AdamW's two tensors a parameter are there after a resume alone.
        has_state = isinstance(self.optimizer, ScaledAdam) or bool(self.optimizer.state)
        return (0 if has_state else 2 * trainable) + (trainable if self.world_size > 1 else 0)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context of a forward pass at the configured precision."""
        dtype = AUTOCAST[self.config.loop.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    @property
    def lr(self) -> float:
        """The learning rate of the latest step."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self, batches: Sequence[Batch], step: int, epoch: int, is_last: bool, wishes: Wishes) -> StepOutcome:
        """Do one optimizer step on ``batches``, or skip it on all ranks.

        Args:
            batches: accumulated before the update.
            step: global step, from 0.
            epoch: from 1.
            is_last: whether these are the last batches of this rank's epoch.
            wishes: what this rank was asked for.
        Raises:
            NumericError: too many skipped steps in a row.
            DataError: the ranks do not have equally many batches.
            ConfigError: out of memory, or (first step) parameters without a gradient.
        """
        rate = learning_rate(self.config.optim, step, epoch - 1, self.planned)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seed_everything(step_seed(self.config.loop.seed, step, self.rank))
        self.optimizer.zero_grad(set_to_none=True)
        values, frames, shared = Tracker(), 0.0, wishes
        work = [(batch, part) for batch in batches for part in parts(self.system, batch, step)]
        for i, (batch, part) in enumerate(work):
            synchronise = i == len(work) - 1 or self.model is self.system
            with contextlib.nullcontext() if synchronise else self.model.no_sync():
                terms, sums = self._forward(batch, step, part)
                finite = math.isfinite(sums.sums["loss"][0])
                # One collective tells all ranks whether to skip or stop, and how much data the step holds.
                flags = [not finite, wishes.stop, wishes.save, is_last, terms.frames, len(work), len(work) ** 2]
                bad, stops, saves, lasts, all_frames, passes, squares = dist.all_reduce_sum(flags, self.device)
                shared = Wishes(stops > 0, saves > 0)
                # Numbers are equal where their variance is 0; one with more passes would wait for the others in vain.
                if 0 < lasts < self.world_size or self.world_size * squares != passes**2:
                    found = dist.gather_objects((len(work), is_last))
                    each = ", ".join(f"{n}{' and no more' if last else ''}" for n, last in found)
                    raise DataError(
                        f"the ranks differ in batches at step {step} of epoch {epoch}: forward passes by rank are "
                        f"{each}; every rank needs equally many (TrainData.train_batches)"
                    )
                if bad:
                    if synchronise and self.model is not self.system:
                        # DDP's forward pass waits for gradients: the next backward pass, even one that is not to be
                        # exchanged, would be taken for this one's.
                        dist.zero_of(p for p in self.system.parameters() if p.requires_grad).backward()
                    self._skip(step, terms, [batch], locally=not finite)
                    return StepOutcome(None, shared)
                with self.memory_guard(batch, step):
                    self.scaler.scale(terms.total).backward()
            values.add_tracker(sums)
            frames += all_frames
        if not self._gradients_checked:
            guards.refuse_unused(guards.parameters_without_gradient(self.system))
            self._gradients_checked = True
        for parameter in self.system.frozen(step):  # no decay, no moments: the optimizer does not see them
            parameter.grad = None
        with self.memory_guard(batches[-1], step):
            finite = self._update(frames, step, batches)
        if not finite:
            self._skip(step, None, batches, locally=True)
            return StepOutcome(None, shared)
        self.guard.good()
        return StepOutcome(values, shared)

    def _forward(self, batch: Batch, step: int, part: int | None) -> tuple[LossTerms, Tracker]:
        sums = Tracker()
        if self.model is not self.system:
            dist.count_collective()  # DDP exchanges buffers
        with self.memory_guard(batch, step), self.autocast():
            terms = self.model(batch.to(self.device), step, part)
            sums.add_terms(terms)
        return terms, sums

    def _skip(self, step: int, terms: LossTerms | None, batches: Sequence[Batch], locally: bool) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.bad(step, terms, batches, locally)

    @contextlib.contextmanager
    def memory_guard(self, batch: Batch, step: int, where: str = "") -> Iterator[None]:
        """Turn running out of memory inside into an error that says what to do.

        Args:
            batch: what is being computed.
            step: global step, for the name of the dump.
            where: for the message; empty: the step.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not guards.is_out_of_memory(error):
                raise
            file = self.exp_dir / f"oom-step{step}-rank{self.rank}.json"
            where = where or f"at step {step}"
            raise guards.out_of_memory(error, batch, where, file, self.config.data.max_duration) from error

    def _update(self, frames: float, step: int, batches: Sequence[Batch]) -> bool:
        """Normalise, clip and apply the gradients; return False when they are not finite."""
        self.scaler.unscale_(self.optimizer)
        params = [p for p in self.system.parameters() if p.grad is not None]
        scaled_adam = isinstance(self.optimizer, ScaledAdam)
        # DDP leaves the mean over ranks: back to the sum, and for AdamW (its clipping is absolute) to a mean a frame.
        factor = self.world_size / (1.0 if scaled_adam else max(frames, 1.0))
        if factor != 1.0:
            torch._foreach_mul_([p.grad for p in params], factor)
        if not scaled_adam:
            norm = nn.utils.get_total_norm([p.grad for p in params])
            self.grad_norm = float(norm)
            if not math.isfinite(self.grad_norm) and not self.scaler.is_enabled():
                return False
            nn.utils.clip_grads_with_norm_(params, self.config.optim.grad_clip, norm)
        self.scaler.step(self.optimizer)
        if scaled_adam and self.optimizer.last_grad_norm is not None:
            self.grad_norm = self.optimizer.last_grad_norm
        if self.scaler.is_enabled():
            self._adjust_scale(step, batches)
            return True
        return math.isfinite(self.grad_norm)

    def _adjust_scale(self, step: int, batches: Sequence[Batch]) -> None:
        """Update the fp16 loss scale: torch halves it at an overflow, but is slow to double a small one."""
        self.scaler.update()
        scale = self.scaler.get_scale()
        if scale < 1e-5:
            file = self.exp_dir / f"nonfinite-step{step}-rank{self.rank}.json"
            shapes = [guards.batch_shapes(batch) for batch in batches]
            write_json(file, {"step": step, "grad_scale": scale, "batches": shapes})
            raise NumericError(
                f"the fp16 loss scale fell to {scale:g} at step {step}: the gradients of the last steps overflowed, of "
                f"{', '.join(shapes[0]['ids'][:5])} too (all: {file}); use --precision bf16 or fp32"
            )
        if (step % 25 == 0 and scale < 2) or (step % 100 == 0 and scale < 8) or (step % 400 == 0 and scale < 32):
            self.scaler.update(scale * 2)
        if scale < 0.01 and step % self.config.loop.log_interval == 0:
            logger.warning("the fp16 loss scale is down to %g at step %d", scale, step)
