"""The one training loop of all systems.

What a step computes depends on the configuration, the data and (seed, step, rank) alone, so a training that was
stopped at any step and is started again with the same command ends in the same weights, bit by bit on a CPU.
"""

import contextlib
import errno
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from icefall_kd.cli import config_to_dict
from icefall_kd.config import TrainConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime import dist
from icefall_kd.runtime.env import pick_device
from icefall_kd.runtime.files import file_lock, read_json, remove_leftovers, write_json
from icefall_kd.systems.base import System
from icefall_kd.train import checkpoint as ckpt
from icefall_kd.train import guards
from icefall_kd.train.average import RunningAverage
from icefall_kd.train.metrics import Tracker, finite_only
from icefall_kd.train.optim import needs_plan
from icefall_kd.train.progress import TrainProgress
from icefall_kd.train.state import TrainState, refuse_changed_config, refuse_changed_data, write_config
from icefall_kd.train.step import Stepper, Wishes
from icefall_kd.train.transfer import TransferReport, initialise

logger = logging.getLogger(__name__)


class TrainData(Protocol):
    """What the loop needs of a data module."""

    def train_batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        """Return this rank's batches of ``epoch`` (from 1) without the first ``skip``, equally many on all ranks.

        Where batches hold a position, that of the last one before comes as a third argument: they go on from there.
        """

    def valid_batches(self) -> Iterator[Batch]:
        """Return this rank's share of the validation data."""

    def num_batches(self, epoch: int) -> int:
        """Return how many batches an epoch has for each rank; for systems that need a plan."""

    def worst_batches(self) -> list[Batch]:
        """Return the batches that need most memory."""

    def state(self) -> dict:
        """Return a fingerprint of the training data."""


def train(
    system: System,
    data: TrainData,
    config: TrainConfig,
    tokenizer_hash: str = "",
    on_start: Callable[[], None] | None = None,
    epoch_seconds: float | None = None,
) -> dict[str, Any]:
    """Train ``system``, or continue the training that ``exp_dir`` holds.

    Args:
        system: model and losses, on the CPU; it holds the trained weights afterwards.
        data: see :class:`TrainData`.
        config: all options; those of ``config.loop`` and ``config.optim`` are used here.
        tokenizer_hash: stored in every checkpoint; a checkpoint of another tokenizer is refused.
        on_start: called on rank 0 once the run is found to fit what exp_dir holds, before its first step; for a
            training that is complete, too, so that files beside the checkpoints are mended.
        epoch_seconds: audio of one epoch over all ranks, for the time left in the first epoch; None: unknown.
    Returns:
        What exp_dir/train_summary.json holds: finished, epochs, steps, train_loss, valid, seconds, ...
    Raises:
        ConfigError: changed options, unused parameters, out of memory, no room on the disk, or another process that
            trains in exp_dir.
        DataError: other data than before, or damaged checkpoints.
        NumericError: too many non-finite steps in a row.
        RankError: another rank is gone, or late by more than --dist-timeout.
        SystemExit: another rank has failed before, and said why.
    """
    dist.init(config.loop.dist_timeout)
    trainer = _Trainer(system, data, config, tokenizer_hash, epoch_seconds)
    try:
        with trainer.signals():
            return trainer.run(on_start)
    except BaseException as error:
        cause = dist.report_failure(error)
        if cause is error:
            raise
        raise cause from error
    finally:
        trainer.close()


# Seconds to wait for another training in the same exp_dir: its loader processes outlive a kill for a moment.
LOCK_PATIENCE = 20.0
# What schedulers send before they end a job.
STOPS = (signal.SIGTERM, signal.SIGUSR1)


class _Stop(Exception):
    """Raised inside a run when it ends before its last epoch."""

    def __init__(self, by_signal: bool) -> None:
        super().__init__()
        self.by_signal = by_signal


class _Trainer:
    def __init__(
        self,
        system: System,
        data: TrainData,
        config: TrainConfig,
        tokenizer_hash: str,
        epoch_seconds: float | None,
    ) -> None:
        self.config, self.loop = config, config.loop
        self.data, self.tokenizer_hash = data, tokenizer_hash
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.exp_dir = Path(self.loop.exp_dir)
        if self.loop.num_threads:
            torch.set_num_threads(self.loop.num_threads)
        self.device = pick_device(self.loop.device)
        if self.device.type == "cuda" and self.world_size > 1:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.system = system.to(self.device)
        self.stepper = Stepper(self.system, config, self.device)
        sources = {**data.state(), **system.online_sources}
        self.state = TrainState(average_period=self.loop.average_period, world_size=self.world_size, data=sources)
        self.average = RunningAverage(system, self.loop.average_period) if self.rank == 0 else None
        self.progress, self.epoch_tracker = TrainProgress(self.loop, self.stepper, epoch_seconds), Tracker()
        self.position: dict[str, Any] | None = None  # of this rank's last batch, where batches hold one
        self.stop_signal: str | None = None
        self.save_wanted = False
        self.transfer: TransferReport | None = None
        self.locked = contextlib.ExitStack()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Note signals while the training runs: a scheduler's warnings save and stop, SIGUSR2 saves and goes on."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _frame: object) -> None:
            if number == signal.SIGUSR2:
                self.save_wanted = True
            else:
                self.stop_signal = signal.Signals(number).name

        before = {s: signal.signal(s, note) for s in (*STOPS, signal.SIGUSR2)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, on_start: Callable[[], None] | None) -> dict[str, Any]:
        if self.system.needs_plan or needs_plan(self.config.optim):
            self.stepper.planned = self._planned_steps()
            self.system.plan(self.stepper.planned)
        self._resume()
        # A kill may have come between a save and what follows it.
        self._link_best()
        if self._finished():
            logger.info("%s is trained already: %d steps", self.exp_dir, self.state.step)
            if self.rank == 0 and on_start is not None:
                on_start()
            return self._summary(finished=True, write=not self._has_summary())
        self._start(on_start)
        self.progress.start(self.state)
        try:
            while not self._finished():
                self._epoch()
        except _Stop as stop:
            self._save(f"checkpoint-{self.state.step}.pt", "checkpoint", self.loop.keep_last_k)
            if stop.by_signal:
                logger.warning(
                    "stopped by %s after step %d and saved; run the same command again to continue",
                    self.stop_signal or "a signal to another rank",
                    self.state.step,
                )
                return self._summary(finished=False, write=False)
        return self._summary(finished=True, write=True)

    def _finished(self) -> bool:
        steps = self.loop.max_steps
        return self.state.epoch > self.loop.num_epochs or (steps is not None and self.state.step >= steps)

    def _has_summary(self) -> bool:
        try:
            read_json(self.exp_dir / "train_summary.json")
        except DataError:  # gone, or cut off
            return False
        return True

    def _planned_steps(self) -> int:
        """Return the steps of the whole training if all epochs have as many batches as the first."""
        steps = self.loop.num_epochs * math.ceil(self.data.num_batches(1) / self.loop.accum_grad)
        logger.info("%d steps are planned", steps)
        return steps if self.loop.max_steps is None else min(steps, self.loop.max_steps)

    def _resume(self) -> None:
        found = ckpt.load_newest(self.exp_dir)
        steps = dist.gather_objects(found[1]["train"]["step"] if found else -1)
        if len(set(steps)) > 1:
            raise DataError(f"the ranks found checkpoints of steps {steps}: is {self.exp_dir} one folder for all?")
        if self.loop.start_epoch > 1 and (found is None or found[1]["train"]["epoch"] < self.loop.start_epoch):
            raise ConfigError(
                f"--start-epoch is {self.loop.start_epoch}, but {self.exp_dir} holds no training that got so far; "
                "leave it out: a training resumes by itself from the newest checkpoint"
            )
        if found is None:
            self._initialise()
            self.system.after_step(0)
            return
        path, saved = found
        if self.loop.init_from is not None:
            logger.info("--init-from %s is not used: the training goes on from %s", self.loop.init_from, path)
        ckpt.check_tokenizer(saved, self.tokenizer_hash, path)
        refuse_changed_config(saved["config"], config_to_dict(self.config), path)
        state = TrainState.from_dict(saved["train"])
        refuse_changed_data(state.data, self.state.data, path)
        if state.world_size != self.world_size:
            if state.batch:
                raise DataError(
                    f"{path} was saved within an epoch by {state.world_size} ranks; {self.world_size} ranks see other "
                    f"batches. Continue with {state.world_size}, or from an epoch-N.pt (move {path.name} away)"
                )
            logger.warning("continuing with %d ranks instead of %d", self.world_size, state.world_size)
            state.world_size = self.world_size
        ckpt.load_model(self.system, saved["model"], source=str(path))
        self.stepper.optimizer.load_state_dict(saved["optimizer"])
        self.stepper.scaler.load_state_dict(saved["grad_scaler"])
        if self.average is not None:
            self.average.load_state_dict(saved["model_avg"])
        self.state = state
        self.position = state.positions[self.rank] if state.positions else None
        self.stepper.guard.in_a_row, self.stepper.guard.total = state.skipped_in_a_row, state.skipped
        if self.rank == 0:  # the saved sums are those of all ranks
            self.progress.running.load_state_dict(state.running_sums)
            self.epoch_tracker.load_state_dict(state.epoch_sums)
        logger.info("continuing from %s: epoch %d, batch %d, step %d", path, state.epoch, state.batch, state.step)

    def _initialise(self) -> None:
        """Start from the parameters of another training, where the options name one."""
        if self.loop.init_from is None:
            if given := [f.name for f in fields(self.config.transfer) if getattr(self.config.transfer, f.name)]:
                raise ConfigError(
                    f"--{given[0].replace('_', '-')} says what is taken of --init-from, which is not given; name the "
                    "other training's exp_dir, or leave it out"
                )
            found = self.system.start()
            if found is None:
                return
        else:
            found = initialise(self.system, self.loop.init_from, self.config.transfer, self.tokenizer_hash)
        self.state.init, self.transfer = found
        self.stepper.build_optimizer()
        if self.average is not None:
            self.average = RunningAverage(self.system, self.loop.average_period)

    def _start(self, on_start: Callable[[], None] | None) -> None:
        # Nobody writes before every rank has read.
        dist.barrier()
        if self.rank == 0:
            self.exp_dir.mkdir(parents=True, exist_ok=True)
            self._lock()
            # Of a shorter training that is continued; the file says that the training is complete.
            (self.exp_dir / "train_summary.json").unlink(missing_ok=True)
            remove_leftovers(self.exp_dir, "*.pt")
            write_config(self.exp_dir, self.config, self.state.step, self.state.init)
            if self.transfer is not None:
                write_json(self.exp_dir / "transfer.json", {**self.state.init, "tensors": asdict(self.transfer)})
            self.progress.open(self.exp_dir, self.state.step)
            if on_start is not None:
                on_start()
        num_params = sum(p.numel() for p in self.system.parameters())
        logger.info("%d parameters, device %s, %d ranks", num_params, self.device, self.world_size)
        if self.loop.oom_scan:
            guards.scan_worst_batches(
                self.system,
                self.data.worst_batches(),
                self.device,
                self.stepper.autocast,
                self.exp_dir,
                self.config.data.max_duration,
                rank=self.rank,
                step=self.system.heaviest_step(self.state.step),
                reserve=self.stepper.memory_to_come(),
            )
        self.stepper.distribute()

    def _lock(self) -> None:
        """Keep other trainings out of exp_dir: a job that is started again may meet the one that outlived its shell."""
        try:
            self.locked.enter_context(file_lock(self.exp_dir / ".lock", LOCK_PATIENCE))
        except TimeoutError as error:
            raise ConfigError(
                f"another process trains in {self.exp_dir}; wait for its end or end it, then run the same command again"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            logger.warning("%s is on a file system without locks: let no other process train in it", self.exp_dir)

    def close(self) -> None:
        """Close the records and let others train in exp_dir."""
        self.progress.close()
        self.locked.close()

    def _epoch(self) -> None:
        """Train what is left of the epoch in progress, validate and save."""
        state, loop = self.state, self.loop
        after = () if self.position is None else (self.position,)
        groups = _groups(self.data.train_batches(state.epoch, state.batch, *after), loop.accum_grad)
        self.system.train()
        for batches, is_last in groups:
            stop, save = self._step(batches, is_last)
            if self.average is not None:
                self.average.update(self.system, state.step)
            if state.step % loop.log_interval == 0 or state.step == 1:
                self.progress.log(state, len(batches[-1]))
            at_end = loop.max_steps is not None and state.step >= loop.max_steps
            if at_end or (loop.valid_interval and state.step % loop.valid_interval == 0 and not is_last):
                stop = self._validate() or stop
            if stop or at_end:
                raise _Stop(by_signal=stop and not at_end)
            if save or state.step % loop.save_every_n == 0:
                self._save(f"checkpoint-{state.step}.pt", "checkpoint", loop.keep_last_k)
        if state.batch == 0:
            raise DataError(f"epoch {state.epoch} has no training batches")
        if self._validate():
            raise _Stop(by_signal=True)
        self._end_epoch()

    def _end_epoch(self) -> None:
        state, epoch = self.state, self.state.epoch
        state.train_loss = self.epoch_tracker.reduced().means().get("loss", math.nan)
        state.history.append(
            {"epoch": epoch, "step": state.step, "train_loss": state.train_loss, "valid": state.valid}
        )
        guards.constant_metrics([h["valid"] for h in state.history if h["valid"]])
        if _is_better(state.train_loss, state.best_train_loss):
            state.best_train_loss, state.best_train_epoch = state.train_loss, epoch
        if state.valid and _is_better(state.valid["loss"], state.best_valid_loss):
            state.best_valid_loss, state.best_valid_epoch = state.valid["loss"], epoch
        state.batches_per_epoch = state.batch
        state.epoch, state.batch, self.position = epoch + 1, 0, None
        self.epoch_tracker = Tracker()
        self._save(f"epoch-{epoch}.pt", "epoch", self.loop.keep_epochs, state.best_epochs(self.loop.keep_best))
        self._link_best()

    def _link_best(self) -> None:
        """Give the files of the best epochs their second names, where they lack them."""
        state = self.state
        for name, epoch in (("train", state.best_train_epoch), ("valid", state.best_valid_epoch)):
            file = self.exp_dir / f"epoch-{epoch}.pt"
            if self.rank == 0 and file.exists():
                ckpt.copy_as(file, f"best-{name}-loss.pt")

    def _step(self, batches: list[Batch], is_last: bool) -> tuple[bool, bool]:
        """Do one step and count it; return whether some rank was told to stop, and whether one was told to save."""
        state, audio = self.state, sum(sum(batch.durations) for batch in batches)
        wishes = Wishes(stop=self.stop_signal is not None, save=self.save_wanted)
        outcome = self.stepper.step(batches, state.step, state.epoch, is_last, wishes)
        self.save_wanted = self.save_wanted and not wishes.save
        state.audio_seconds += audio
        state.batch += len(batches)
        self.position = batches[-1].position
        state.step += 1
        state.skipped, state.skipped_in_a_row = self.stepper.guard.total, self.stepper.guard.in_a_row
        values = outcome.values or Tracker()
        self.progress.add(values, audio, self.system.after_step(state.step))
        self.epoch_tracker.add_tracker(values)
        return outcome.wishes.stop, outcome.wishes.save

    def _validate(self) -> bool:
        """Validate and record the results; return True when a signal to stop came meanwhile."""
        tracker = Tracker()
        self.system.eval()
        start = time.monotonic()
        with torch.no_grad():
            for batch in self.data.valid_batches():
                if self.stop_signal is not None:
                    break
                with self.stepper.memory_guard(batch, self.state.step, "in validation"), self.stepper.autocast():
                    tracker.add_terms(self.system(batch.to(self.device), self.state.step))
        self.system.train()
        if dist.any_rank(self.stop_signal is not None, self.device):
            return True
        tracker = tracker.reduced()
        if tracker.frames:
            self.state.valid = tracker.means()
            self.progress.log_validation(self.state, tracker, time.monotonic() - start)
        return False

    def _save(self, name: str, kind: str, keep: int | None, spare: Collection[int] = ()) -> None:
        state = self.state
        running, epoch_tracker = self.progress.running.reduced(), self.epoch_tracker.reduced()
        state.positions = [] if self.position is None else dist.gather_objects(self.position)
        if self.rank != 0:
            return
        state.running_sums, state.epoch_sums = running.state_dict(), epoch_tracker.state_dict()
        state.seconds = self.progress.seconds
        ckpt.save_checkpoint(
            self.exp_dir / name,
            {
                "model": self.system.state_dict(),
                "model_avg": self.average.state_dict(),
                "optimizer": self.stepper.optimizer.state_dict(),
                # The rate is a function of these two; they are here for whoever reads the file.
                "scheduler": {"step": state.step, "epoch": state.epoch},
                "grad_scaler": self.stepper.scaler.state_dict(),
                "train": state.to_dict(),
                "config": config_to_dict(self.config),
                "tokenizer_hash": self.tokenizer_hash,
            },
        )
        ckpt.remove_old(self.exp_dir, kind, keep, spare)
        logger.info("saved %s", self.exp_dir / name)

    def _summary(self, finished: bool, write: bool) -> dict[str, Any]:
        state = self.state
        audio, = dist.all_reduce_sum([state.audio_seconds], self.device)
        train_loss = state.train_loss
        if state.batch:  # not whether this rank holds sums: all ranks must take part
            train_loss = self.epoch_tracker.reduced().means().get("loss", train_loss)
        summary = {
            "finished": finished,
            "epochs": state.epoch - 1,
            "steps": state.step,
            "init_from": state.init.get("exp_dir"),
            "skipped_steps": state.skipped,
            "train_loss": train_loss,
            "valid": state.valid,
            "best_valid_epoch": state.best_valid_epoch,
            "seconds": state.seconds,
            "text_coverage": getattr(self.data, "text_coverage", None),
            "audio_hours": audio / 3600,
            "audio_hours_per_hour": audio / state.seconds if state.seconds else None,
            "peak_memory_gib": self.progress.peak_memory(),
            "parameters": sum(p.numel() for p in self.system.parameters()),
            "world_size": self.world_size,
            "device": str(self.device),
        }
        if write and self.rank == 0:
            write_json(self.exp_dir / "train_summary.json", finite_only(summary))
        return summary


def _is_better(loss: float, best: float | None) -> bool:
    return math.isfinite(loss) and (best is None or loss < best)


def _groups(batches: Iterator[Batch], size: int) -> Iterator[tuple[list[Batch], bool]]:
    """Yield groups of ``size`` batches (the last may be smaller) and whether a group is the last."""
    pending: list[Batch] = []
    for batch in batches:
        if len(pending) == size:
            yield pending, False
            pending = []
        pending.append(batch)
    if pending:
        yield pending, True
