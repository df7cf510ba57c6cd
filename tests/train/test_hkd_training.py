"""Trainings of --system hkd: a resumed one ends in the same weights, and half precision trains."""

import dataclasses

import pytest
import torch
from hkd_toys import TEACHER_DIM, hkd_batch, hkd_config
from nar_toys import VOCAB

from icefall_kd.config import LoopConfig, OptimConfig
from icefall_kd.systems.hkd import HkdSystem
from icefall_kd.train.loop import train
from tests.train.toy import same_weights


class Data:
    """Four batches an epoch, one of which has no text state at all."""

    def train_batches(self, epoch, skip):
        batches = [toy(10 * epoch + i, lens=[0, 0, 0] if i == 2 else None) for i in range(4)]
        return iter(batches[skip:])

    def valid_batches(self):
        return iter([dataclasses.replace(toy(99), labels={})])

    def worst_batches(self):
        return [toy(98)]

    def state(self):
        return {"train": "toy"}


def toy(seed, lens=None):
    return dataclasses.replace(hkd_batch(seed, lens), durations=[1.0] * 3)


def run(exp_dir, seed=7, **loop):
    options = {"num_epochs": 2, "log_interval": 1, "average_period": 2, "device": "cpu", "num_threads": 1, **loop}
    config = hkd_config(
        model={"dropout": 0.1},
        attention={"decoder_dropout": 0.1},
        cif={"cif_dropout": 0.2, "quantity_warm_step": 5},
        text={"acd_negatives": 5, "standardise_text_states": True},
        loop=LoopConfig(exp_dir=exp_dir, **options),
    )
    config = dataclasses.replace(config, optim=OptimConfig(optimizer="adamw", base_lr=0.002, lr_warmup_steps=2))
    torch.manual_seed(seed)
    system = HkdSystem(config, VOCAB, {"acd": 1.0, "lrd": 0.01}, teacher_dim=TEACHER_DIM)
    return train(system, Data(), config), system


def test_a_resumed_training_is_the_same_bit_by_bit(tmp_path):
    whole, system = run(tmp_path / "whole")
    run(tmp_path / "parts", max_steps=3)
    result, resumed = run(tmp_path / "parts", seed=8)
    assert same_weights(system.state_dict(), resumed.state_dict()) and result["train_loss"] == whole["train_loss"]
    assert result["valid"] == whole["valid"] and whole["skipped_steps"] == 0
    # Every row of every batch was seen once, by the resumed training, too; the scan of the memory left no trace.
    assert resumed.heads["states"].count == 6 * 13


@pytest.mark.parametrize("precision", ["bf16"])
def test_half_precision_trains(tmp_path, precision):
    result, _ = run(tmp_path, precision=precision, max_steps=4)
    assert result["skipped_steps"] == 0 and result["train_loss"] > 0
