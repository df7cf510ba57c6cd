#!/usr/bin/env python3
"""Average the parameters of a training's checkpoints into one file, and name the files used.

    local/average.py --exp-dir exp/mvq --last 5
    local/average.py --exp-dir exp/mvq --best 3 --metric valid_loss
    local/average.py --exp-dir exp/mvq --from-averaged 5 --epoch 30

--last and --best take the mean of epoch files.  --from-averaged N takes the mean over all steps of the
last N epochs, from the running averages that the training kept.  The result is a checkpoint with the
configuration of the last file; decode.py --epoch E --avg N averages by itself and needs no such file.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from icefall_kd.cli import parse_config
from icefall_kd.errors import ConfigError, run_main
from icefall_kd.runtime.log import setup_logging
from icefall_kd.train.average import (
    average_checkpoints,
    average_from_averaged,
    averaged_checkpoint,
    best_n,
    last_n,
    range_ends,
    save_weights,
)
from icefall_kd.train.checkpoint import save_checkpoint

logger = logging.getLogger("average")


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Average the parameters of a training's checkpoints into one file, and name the files used."""

    exp_dir: Path
    """Folder of the training."""
    last: int | None = None
    """Mean of the last N epoch files up to --epoch."""
    best: int | None = None
    """Mean of the N epoch files with the lowest --metric."""
    metric: str = "valid_loss"
    """For --best: valid_loss, train_loss, or another validation result such as valid_ctc_loss."""
    from_averaged: int | None = None
    """Mean over all steps of the last N epochs up to --epoch."""
    epoch: int | None = None
    """Last epoch of the range; None: the newest."""
    out: Path | None = None
    """File to write, a checkpoint or (NAME.safetensors) weights for decode.py --weights, which any version of torch
    reads; None: a checkpoint with a name after the options, in exp-dir."""

    def __post_init__(self) -> None:
        chosen = [x for x in (self.last, self.best, self.from_averaged) if x is not None]
        if len(chosen) != 1:
            raise ConfigError("give one of --last N, --best N and --from-averaged N")
        if chosen[0] < 1:
            raise ConfigError(f"cannot average {chosen[0]} epochs; give at least 1")
        if self.best is not None and self.epoch is not None:
            raise ConfigError("--best looks at all epochs; --epoch goes with --last and --from-averaged")


def main() -> None:
    """Average, save, and print the files used and the file written."""
    config = parse_config(AverageConfig)
    setup_logging()
    if config.from_averaged is not None:
        start, end = range_ends(config.exp_dir, "epoch", config.epoch, config.from_averaged)
        files = [f for f in (start, end) if f is not None]
        model, source = average_from_averaged(start, end), end
        name = f"averaged-{config.from_averaged}-up-to-{end.stem}.pt"
    elif config.best is not None:
        files = best_n(config.exp_dir, config.best, config.metric)
        model, source = average_checkpoints(files), files[0]
        name = f"best-{config.best}-{config.metric}.pt"
    else:
        files = last_n(config.exp_dir, config.last, "epoch", config.epoch)
        model, source = average_checkpoints(files), files[-1]
        name = f"last-{config.last}-up-to-{source.stem}.pt"
    out = config.out if config.out is not None else config.exp_dir / name
    save = save_weights if out.suffix == ".safetensors" else save_checkpoint
    save(out, averaged_checkpoint(source, model))
    logger.info("averaged %s", ", ".join(f.name for f in files))
    for file in files:
        print(f"used {file}")
    print(f"wrote {out}")


if __name__ == "__main__":
    run_main(main)
