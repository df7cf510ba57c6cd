"""How a training is followed: the log line of an interval, its records, and what is left to do."""

import logging
import math
import resource
import time
from pathlib import Path

import torch

from icefall_kd.config import LoopConfig
from icefall_kd.runtime import dist
from icefall_kd.runtime.log import format_seconds
from icefall_kd.train.metrics import RESET_INTERVAL, MetricsWriter, Tracker, format_values
from icefall_kd.train.state import TrainState
from icefall_kd.train.step import Stepper

logger = logging.getLogger(__name__)


class TrainProgress:
    """Losses of the latest step and their running values, speed, memory and time left.

    Args:
        config: options of the loop.
        stepper: the rate, the gradient norm and the device.
        epoch_seconds: audio of one epoch over all ranks; None: the time left is unknown in the first epoch.
    """

    def __init__(self, config: LoopConfig, stepper: Stepper, epoch_seconds: float | None = None) -> None:
        self.config, self.stepper, self.epoch_seconds = config, stepper, epoch_seconds
        self.running, self.current = Tracker(1 - 1 / RESET_INTERVAL), Tracker()
        self.writer: MetricsWriter | None = None
        self.interval_audio = 0.0
        self.figures: dict[str, float] = {}

    def open(self, exp_dir: Path, step: int) -> None:
        """Write records to ``exp_dir`` from ``step`` on; on rank 0 alone."""
        self.writer = MetricsWriter(exp_dir, step)

    def close(self) -> None:
        """Close the records."""
        if self.writer is not None:
            self.writer.close()

    def start(self, state: TrainState) -> None:
        """Start the clock of this run at what an earlier one has done."""
        self.started = self.interval_start = time.monotonic()
        self.seconds_before, self.steps_before = state.seconds, state.step

    @property
    def seconds(self) -> float:
        """Seconds spent training, earlier runs of the command included."""
        return self.seconds_before + time.monotonic() - self.started

    def add(self, values: Tracker, audio: float, figures: dict[str, float]) -> None:
        """Count one step: its losses, its seconds of audio on this rank, and what figures the system has.

        The latest figures stand in every record until there are others.
        """
        self.current = values
        self.figures = figures or self.figures
        self.running.add_tracker(values)
        self.interval_audio += audio

    def log(self, state: TrainState, batch_size: int) -> None:
        """Write the line and the record of an interval; every rank must call it."""
        current, running = self.current.reduced(), self.running.reduced()
        now = time.monotonic()
        audio, = dist.all_reduce_sum([self.interval_audio], self.stepper.device)
        speed = audio / max(now - self.interval_start, 1e-9)
        self.interval_start, self.interval_audio = now, 0.0
        rate, memory, scaler = self.stepper.lr, self.peak_memory(), self.stepper.scaler
        eta = self._eta(state, now)
        logger.info(
            "Epoch %d, batch %d, step %d, loss[%s], tot_loss[%s], batch size: %d, lr: %.3g, grad_norm: %.4g, "
            "%.4g audio hours/hour, memory: %.2f GiB, ETA: %s%s%s",
            state.epoch,
            state.batch,
            state.step,
            current,
            format_values({"loss": running.means().get("loss", math.nan)}),
            batch_size,
            rate,
            self.stepper.grad_norm,
            speed,
            memory,
            "unknown" if eta is None else format_seconds(eta),
            f", grad_scale: {scaler.get_scale():g}" if scaler.is_enabled() else "",
            f", {format_values(self.figures)}" if self.figures else "",
        )
        if self.writer is not None:
            self.writer.write(
                "train",
                state.step,
                current.means(),
                tot=running.means(),
                epoch=state.epoch,
                batch=state.batch,
                lr=rate,
                grad_norm=self.stepper.grad_norm,
                audio_hours_per_hour=speed,
                memory_gib=memory,
                skipped=state.skipped,
                units=current.units,
                **({"figures": self.figures} if self.figures else {}),
            )

    def log_validation(self, state: TrainState, results: Tracker, seconds: float) -> None:
        """Write the line and the record of a validation."""
        logger.info(
            "Epoch %d, step %d, validation[%s], %s", state.epoch, state.step, results, format_seconds(seconds)
        )
        if self.writer is not None:
            self.writer.write("valid", state.step, results.means(), epoch=state.epoch, units=results.units)

    def _eta(self, state: TrainState, now: float) -> float | None:
        """Return the seconds left at this run's pace, or None when unknown."""
        done = state.step - self.steps_before
        if not done:
            return None
        steps, batches = self.config.max_steps, state.batches_per_epoch
        if batches is None and self.epoch_seconds:
            # In the first epoch, from the share of its audio that is done (this rank's, taken for that of each).
            share = state.audio_seconds * dist.get_world_size() / self.epoch_seconds
            batches = max(state.batch, round(state.batch / share)) if share else None
        if batches is not None:
            left = batches * (self.config.num_epochs - state.epoch + 1) - state.batch
            by_epochs = state.step + math.ceil(left / self.config.accum_grad)
            steps = by_epochs if steps is None else min(steps, by_epochs)
        return None if steps is None else (now - self.started) / done * max(0, steps - state.step)

    def peak_memory(self) -> float:
        """Return the peak memory in GiB: of the GPU, or resident on the host."""
        if self.stepper.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.stepper.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
