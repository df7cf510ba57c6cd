"""Tiny systems and trainings of --system dualmode; run as a program, one rank of a training."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from nar_toys import SIZES, VOCAB, toy_batch

from icefall_kd.config import AsrLossConfig, DualConfig, LoopConfig, ModelConfig, OptimConfig, TrainConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import run_main
from icefall_kd.models.pruning import prunable_layers
from icefall_kd.runtime import dist
from icefall_kd.systems.dualmode import DualModeSystem, build_dualmode
from icefall_kd.train.checkpoint import state_sha256
from icefall_kd.train.loop import train

MODEL = {
    **SIZES,
    "decoder_dim": 16,
    "joiner_dim": 24,
    "dropout": 0.0,
    "streaming": True,
    "convolution": "chunk",
    "chunk_size": [4, 2, 8, -1],
    "left_context_frames": [8, 4, -1],
}
PRUNED = {"sparsity": 0.5, "prune_end_step": 6, "mask_interval": 3}


def dual_config(dual=(), model=(), asr=(), loop=None) -> TrainConfig:
    """Return the configuration of a tiny dual-mode recogniser."""
    return TrainConfig(
        system="dualmode",
        model=ModelConfig(**{**MODEL, **dict(model)}),
        asr=AsrLossConfig(**{"rnnt_backend": "torch", "rnnt_warm_step": 0, "prune_range": 3, **dict(asr)}),
        dual=DualConfig(**dict(dual)),
        optim=OptimConfig(optimizer="adamw", base_lr=0.002, lr_warmup_steps=2),
        loop=loop or LoopConfig(device="cpu"),
    )


def dual_system(seed=7, **config) -> DualModeSystem:
    """Return a system of fixed parameters, whose masks are drawn if its schedule begins sparse."""
    torch.manual_seed(seed)
    system = build_dualmode(dual_config(**config), VOCAB)
    system.after_step(0)
    return system


def batch_of(seed=0) -> Batch:
    """Return four utterances of random features and tokens."""
    batch = toy_batch(seed, (6, 3, 1, 4), (120, 90, 50, 70))
    return dataclasses.replace(batch, durations=[1.2, 0.9, 0.5, 0.7])


class DualData:
    """Four batches an epoch; every rank sees its share of each."""

    def _share(self, seed: int) -> Batch:
        batch, pick = batch_of(seed), slice(dist.get_rank(), None, dist.get_world_size())
        tensors = {name: getattr(batch, name)[pick] for name in ("features", "x_lens", "y", "y_lens")}
        return dataclasses.replace(batch, ids=batch.ids[pick], durations=batch.durations[pick], **tensors)

    def train_batches(self, epoch, skip):
        return iter([self._share(10 * epoch + i) for i in range(4)][skip:])

    def num_batches(self, epoch):
        return 4

    def valid_batches(self):
        return iter([self._share(99)])

    def worst_batches(self):
        return [self._share(98)]

    def state(self):
        return {"train": "toy"}


def train_dual(exp_dir: Path, seed=7, dual=(), loop=(), inf_at=None, **config) -> tuple[dict, DualModeSystem]:
    """Train a tiny system for two epochs of four steps; ``inf_at``: step, rank and pass of a loss that is infinite."""
    options = {"num_epochs": 2, "log_interval": 1, "average_period": 1, "device": "cpu", "num_threads": 1}
    full = dual_config(dual, loop=LoopConfig(exp_dir=exp_dir, **{**options, **dict(loop)}), **config)
    torch.manual_seed(seed)
    system = build_dualmode(full, VOCAB)
    losses = system.losses

    def planted(batch, step, part=None):
        found = losses(batch, step, part)
        if [step, dist.get_rank(), part] != inf_at:
            return found
        terms = {n: dataclasses.replace(t, value=t.value * torch.inf) for n, t in found.terms.items()}
        return dataclasses.replace(found, terms=terms)

    system.losses = planted
    return train(system, DualData(), full), system


def main() -> int:
    """Train in a process of its own: dual_toys.py EXP_DIR '{"dual": {...}, "config": {...}}'."""
    torch.set_num_threads(1)
    options = json.loads(sys.argv[2])
    dist.init(timeout=120)
    try:
        planted = {"inf_at": options.get("inf_at")}
        result, system = train_dual(Path(sys.argv[1]), dual=options["dual"], **planted, **options["config"])
        masks = {name: layer.mask for name, layer in prunable_layers(system).items()}
        result["equal_masks"] = len(set(dist.gather_objects(state_sha256(masks)))) == 1
    finally:
        dist.shutdown()
    if dist.get_rank() == 0:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    run_main(main)
