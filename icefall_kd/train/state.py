"""What a training has done so far, and how it is saved, found again and checked."""

import dataclasses
import logging
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icefall_kd.cli import config_to_dict
from icefall_kd.config import TrainConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.env import environment
from icefall_kd.runtime.files import read_json, write_json

logger = logging.getLogger(__name__)

# Options that may change when a training is resumed: they do not alter what is computed at a step, or (folders)
# what they point to is compared by content.
MAY_CHANGE = frozenset(
    "exp_dir num_epochs max_steps device num_threads dist_timeout log_interval valid_interval save_every_n keep_last_k "
    "keep_epochs keep_best max_skips oom_scan start_epoch init_from manifest_dir lang_dir label_dir valid_parts "
    "valid_utts num_workers shar_dir".split()
)


@dataclass
class TrainState:
    """The counters of a training; all of them are in every checkpoint."""

    epoch: int = 1
    """Epoch in progress, from 1."""
    batch: int = 0
    """Batches of this epoch that the trainer (not the loader) has consumed on this rank."""
    positions: list[dict[str, Any]] = field(default_factory=list)
    """Where the streams of each rank stand (data/stream.py); empty: at an epoch's beginning, or batches are not of
    streams."""
    step: int = 0
    """Steps done since the start, skipped ones included."""
    skipped: int = 0
    """Steps skipped for non-finite losses or gradients."""
    skipped_in_a_row: int = 0
    batches_per_epoch: int | None = None
    """Batches of the last complete epoch, for the time left."""
    average_period: int = 0
    world_size: int = 1
    seconds: float = 0.0
    """Time spent training, over all runs of the command."""
    audio_seconds: float = 0.0
    """Audio seen by this rank, copies of the epochs included."""
    train_loss: float | None = None
    """Loss per frame of the last complete epoch."""
    valid: dict[str, float] | None = None
    """Latest validation results by name."""
    best_train_loss: float | None = None
    best_train_epoch: int | None = None
    best_valid_loss: float | None = None
    best_valid_epoch: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    """{"epoch", "step", "train_loss", "valid"} of every complete epoch."""
    epoch_sums: dict[str, list[float]] = field(default_factory=dict)
    """Loss sums of the epoch in progress."""
    running_sums: dict[str, list[float]] = field(default_factory=dict)
    """Decayed loss sums of the log's tot_loss."""
    init: dict[str, Any] = field(default_factory=dict)
    """Where the first parameters came from (--init-from); empty: they were drawn."""
    data: dict[str, Any] = field(default_factory=dict)
    """Fingerprint of the training data, labels and their sources included."""

    def to_dict(self) -> dict[str, Any]:
        """Return the counters as plain containers."""
        return dataclasses.asdict(self)

    def best_epochs(self, count: int) -> list[int]:
        """Return the ``count`` complete epochs with the lowest finite validation loss, best first."""
        losses = [(h["valid"]["loss"], h["epoch"]) for h in self.history if h["valid"]]
        return [epoch for loss, epoch in sorted(x for x in losses if math.isfinite(x[0]))[:count]]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """Read back :meth:`to_dict`; counters of a newer version are ignored."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


def refuse_changed_config(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    """Refuse to resume with options that alter the training.

    Raises:
        ConfigError: naming every such option with its old and its new value.
    """
    changed = [
        f"--{name.replace('_', '-')}: {old[name]!r} -> {new[name]!r}"
        for name in old
        if name in new and name not in MAY_CHANGE and old[name] != new[name]
    ]
    if changed:
        raise ConfigError(
            f"{path} was trained with other options ({'; '.join(changed)}); "
            "give the old values to continue, or another --exp-dir to start anew"
        )


def refuse_changed_data(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    """Refuse to resume on other data.

    Raises:
        DataError: naming what differs.
    """
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    changed = [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names]
    if changed:
        raise DataError(
            f"the data is not what {path} was trained on ({'; '.join(changed)}); restore it, or use another --exp-dir"
        )


def write_config(exp_dir: Path, config: TrainConfig, step: int, init: dict[str, Any] | None = None) -> None:
    """Write exp_dir/config.json: resolved options, command, git state, versions, seed, and the earlier commands.

    Args:
        exp_dir: folder of the training.
        config: all options.
        step: where this run begins.
        init: what transfer.initialise recorded when the training began; None: its parameters were drawn.
    """
    file, runs = exp_dir / "config.json", []
    if file.exists():
        try:
            runs = read_json(file).get("runs", [])
        except DataError as error:  # a record that nothing depends on
            logger.warning("%s is written anew, without the earlier runs of the command: %s", file, error)
    run = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "from_step": step, "environment": environment()}
    write_json(
        file,
        {
            "config": config_to_dict(config),
            "seed": config.loop.seed,
            "init": init or {},
            "command": run["command"],
            "environment": run["environment"],
            "runs": [*runs, run],
        },
    )
