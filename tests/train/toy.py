"""A toy system and its data: a linear encoder with dropout and a classifier of frames."""

import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from icefall_kd.config import DataConfig, LoopConfig, OptimConfig, TrainConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import run_main
from icefall_kd.runtime import dist
from icefall_kd.runtime.log import setup_logging
from icefall_kd.runtime.signals import outlive_sigterm
from icefall_kd.systems.base import LossTerm, LossTerms, System
from icefall_kd.train.loop import train

FEATURE_DIM, NUM_CLASSES = 8, 5


class ToySystem(System):
    """Classify every frame; ``unused`` adds a parameter that no loss uses."""

    def __init__(self, dropout: float = 0.3, unused: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURE_DIM, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 16))
        self.output = nn.Linear(16, NUM_CLASSES)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("num_forwards", torch.zeros((), dtype=torch.int64))
        if unused:
            self.forgotten = nn.Linear(3, 3)

    def losses(self, batch: Batch, step: int) -> LossTerms:
        if self.training:
            self.num_forwards += 1
        logits = self.output(self.encoder(batch.features)).float() * self.scale  # (N, T, V)
        mask = torch.arange(logits.size(1), device=logits.device) < batch.x_lens[:, None]
        ce = nn.functional.cross_entropy(logits.transpose(1, 2), batch.y, reduction="none") * mask
        frames = int(batch.x_lens.sum())
        correct = ((logits.argmax(-1) == batch.y) & mask).sum()
        return LossTerms(
            terms={
                "ce_loss": LossTerm(ce.sum(), 1.0, frames, per_utterance=ce.sum(dim=1).detach()),
                "logged_only": LossTerm(logits.detach().square().mean(), 0.0, 1.0),
            },
            frames=frames,
            metrics={"accuracy": (correct, float(frames)), "ce_bounded": (ce.sum(), float(frames), math.log(5))},
        )


class ToyData:
    """Batches that depend on (seed, epoch, index) alone; every rank sees its share of the utterances.

    Args:
        num_batches: batches an epoch.
        per_batch: utterances a batch of all ranks.
        inf_at: (epoch, index, rank) triples whose batch holds an infinite feature.
        fail_at: (epoch, index, rank) at which reading fails.
        stall_at: (epoch, index, rank) at which reading takes ten minutes.
        die_at: (epoch, index, rank) at which the process gets SIGKILL.
        fewer: (rank, number): that rank has so many batches fewer an epoch.
        delay: seconds a batch takes to read.
        num_workers: processes that read.
    """

    def __init__(
        self,
        num_batches=7,
        per_batch=4,
        inf_at=(),
        fail_at=None,
        stall_at=None,
        die_at=None,
        fewer=(-1, 0),
        delay=0.0,
        num_workers=0,
    ) -> None:
        self.num_batches, self.per_batch, self.fewer = num_batches, per_batch, fewer
        self.inf_at, self.fail_at, self.delay = {tuple(x) for x in inf_at}, fail_at, delay
        self.stall_at, self.die_at = stall_at, die_at
        self.num_read, self.num_workers = 0, num_workers
        self.fingerprint = "toy"

    def _batch(self, epoch: int, index: int, share: bool = True) -> Batch:
        self.num_read += 1
        g = torch.Generator().manual_seed(1000 * epoch + index)
        features = torch.randn(self.per_batch, 12, FEATURE_DIM, generator=g)
        x_lens = torch.randint(6, 13, (self.per_batch,), generator=g)
        y = features[..., :NUM_CLASSES].argmax(-1)
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if share else (0, 1)
        if (epoch, index, rank) in self.inf_at:
            features[rank, 0, 0] = float("inf")
        pick = slice(rank, None, world_size)
        ids = [f"utt-{epoch}-{index}-{i}" for i in range(self.per_batch)]
        return Batch(
            ids=ids[pick],
            features=features[pick],
            x_lens=x_lens[pick],
            y=y[pick],
            durations=[0.1] * len(ids[pick]),
        )

    def __getitem__(self, position):
        epoch, index = position
        here = (epoch, index, dist.get_rank())
        if self.fail_at == here:
            raise RuntimeError("planted failure")
        if self.stall_at == here:
            time.sleep(600)
        if self.die_at == here:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.delay:
            time.sleep(self.delay)
        return self._batch(epoch, index)

    def train_batches(self, epoch, skip):
        short = self.fewer[1] if dist.get_rank() == self.fewer[0] else 0
        positions = [(epoch, index) for index in range(skip, self.num_batches - short)]
        if self.num_workers:
            init = lambda _: outlive_sigterm()  # noqa: E731
            return iter(DataLoader(self, None, sampler=positions, num_workers=self.num_workers, worker_init_fn=init))
        return (self[position] for position in positions)

    def valid_batches(self):
        for index in range(2):
            yield self._batch(0, index)

    def worst_batches(self):
        return [self._batch(1, 100), self._batch(1, 101)]

    def state(self):
        return {"train": self.fingerprint}


def toy_config(exp_dir: Path, optimizer: str = "scaled_adam", **loop) -> TrainConfig:
    """Return a configuration with short intervals; ``optim_*`` goes to the optimizer, ``data_*`` to the data."""
    optim = {k.removeprefix("optim_"): loop.pop(k) for k in list(loop) if k.startswith("optim_")}
    data = {k.removeprefix("data_"): loop.pop(k) for k in list(loop) if k.startswith("data_")}
    defaults = {"num_epochs": 3, "log_interval": 1, "save_every_n": 4, "average_period": 2, "device": "cpu"}
    return TrainConfig(
        optim=OptimConfig(optimizer=optimizer, **{"base_lr": 0.02, "lr_warmup_steps": 5, "lr_batches": 50.0, **optim}),
        loop=LoopConfig(exp_dir=exp_dir, **{**defaults, **loop}),
        data=DataConfig(max_duration=100.0, **data),
    )


def run_toy(
    exp_dir: Path, data: ToyData | None = None, dropout: float = 0.3, unused: bool = False, **config
) -> tuple[dict, ToySystem]:
    """Train a toy system from a fixed initialisation."""
    torch.manual_seed(7)
    system = ToySystem(dropout, unused)
    result = train(system, data or ToyData(), toy_config(exp_dir, **config), tokenizer_hash="abc")
    return result, system


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Return whether two state dicts are bit-equal."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def main() -> int:
    """Train in a process of its own: toy.py EXP_DIR '{"data": {...}, "config": {...}}'."""
    import json

    torch.set_num_threads(1)
    random.seed(0)
    options = json.loads(sys.argv[2])
    data = options.get("data", {})
    for name in ("fail_at", "stall_at", "die_at"):
        if data.get(name):
            data[name] = tuple(data[name])
    dist.init(options["config"].get("dist_timeout", 60))
    try:
        setup_logging(None, "toy", dist.get_rank())
        system = {name: options[name] for name in ("dropout", "unused") if name in options}
        result, _ = run_toy(Path(sys.argv[1]), ToyData(**data), **system, **options["config"])
    finally:
        dist.shutdown()
    if dist.get_rank() == 0:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    run_main(main)
