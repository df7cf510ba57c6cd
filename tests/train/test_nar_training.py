"""Trainings of --system nar: a resumed one ends in the same weights, and a transferred one begins where it should."""

import dataclasses

import pytest
import torch
from nar_toys import VOCAB, nar_config, toy_batch, toy_labels, write_exp_dir

from icefall_kd.config import LoopConfig, OptimConfig, TransferConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.files import read_json
from icefall_kd.systems.nar import KD_LABELS, NarSystem
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.checkpoint import load_checkpoint
from icefall_kd.train.loop import train
from tests.train.toy import same_weights


class Data:
    """Four batches an epoch, with labels of every kind."""

    def train_batches(self, epoch, skip):
        batches = [toy_labels(dataclasses.replace(toy_batch(10 * epoch + i), durations=[1.0] * 3)) for i in range(4)]
        return iter(batches[skip:])

    def valid_batches(self):
        return iter([dataclasses.replace(toy_batch(99), durations=[1.0] * 3)])

    def worst_batches(self):
        return [toy_labels(dataclasses.replace(toy_batch(98), durations=[1.0] * 3))]

    def state(self):
        return {"train": "toy"}


def run(exp_dir, decoder, seed=7, transfer=None, dropout=0.1, online=None, **loop):
    options = {"num_epochs": 2, "log_interval": 1, "average_period": 2, "device": "cpu", "num_threads": 1, **loop}
    config = nar_config(decoder, attention={"decoder_dropout": dropout}, loop=LoopConfig(exp_dir=exp_dir, **options))
    config = dataclasses.replace(
        config, optim=OptimConfig(optimizer="adamw", base_lr=0.002, lr_warmup_steps=2), transfer=transfer
        or TransferConfig(),
    )  # fmt: skip
    torch.manual_seed(seed)
    kd = dict.fromkeys(KD_LABELS, 0.2) if decoder == "mlm" else None
    system = NarSystem(config, VOCAB, kd, online=online, teacher_dim=16)
    return train(system, Data(), config, tokenizer_hash=loop.get("hash", "")), system


@pytest.mark.parametrize("decoder", ["ar", "mlm"])
def test_a_resumed_training_is_the_same_bit_by_bit(tmp_path, decoder):
    whole, system = run(tmp_path / "whole", decoder)
    run(tmp_path / "parts", decoder, max_steps=3)
    result, resumed = run(tmp_path / "parts", decoder, seed=8)
    assert same_weights(system.state_dict(), resumed.state_dict()) and result["train_loss"] == whole["train_loss"]
    assert result["valid"] == whole["valid"]


def test_a_transferred_student_begins_with_its_teachers_parts_and_says_so(tmp_path):
    tokens = Tokenizer.train_char(["ONE TWO THREE"])
    assert tokens.vocab_size == VOCAB
    teacher = write_exp_dir(tmp_path / "teacher", nar_config("ar"), tokens)
    run(
        tmp_path / "student", "mlm", transfer=TransferConfig(init_modules=["encoder", "ctc"]),
        init_from=tmp_path / "teacher", max_steps=1, average_period=100,
    )  # fmt: skip
    # No sample is taken in one step: the saved average is what the training began with.
    begun = load_checkpoint(tmp_path / "student/checkpoint-1.pt")["model_avg"]
    for name, tensor in teacher.state_dict().items():
        taken = name.startswith(("model.encoder.", "model.ctc_output."))
        assert torch.equal(begun[name], tensor.double()) == taken or begun[name].std() == 0, name
    report = read_json(tmp_path / "student/transfer.json")
    assert {n.split(".")[1] for n in report["tensors"]["loaded"]} == {"encoder", "ctc_output"}
    assert {n.split(".")[1] for n in report["tensors"]["skipped"]} == {"decoder"}
    assert report["loaded"] == len(report["tensors"]["loaded"]) and not report["tensors"]["mismatched"]


def test_what_to_take_without_from_where_is_refused_but_not_at_a_resume(tmp_path):
    wanted = TransferConfig(init_modules=["encoder", "ctc"])
    with pytest.raises(ConfigError, match="--init-modules says what is taken of --init-from, which is not given"):
        run(tmp_path / "new", "mlm", transfer=wanted, max_steps=1)
    assert not (tmp_path / "new").exists()
    write_exp_dir(tmp_path / "teacher", nar_config("ar"), Tokenizer.train_char(["ONE TWO THREE"]))
    run(tmp_path / "student", "mlm", transfer=wanted, init_from=tmp_path / "teacher", max_steps=1)
    result, _ = run(tmp_path / "student", "mlm", transfer=wanted, max_steps=2)
    assert result["steps"] == 2


class Online:
    """A teacher of some weights that makes labels in training."""

    def __init__(self, weights: str) -> None:
        self.weights = weights

    def labels(self, batch, kinds):
        return toy_labels(batch).labels

    def provenance(self):
        return {"weights_sha256": self.weights}


def test_a_resumed_training_refuses_an_online_teacher_that_was_trained_further(tmp_path):
    run(tmp_path, "mlm", online=Online("first"), max_steps=1)
    with pytest.raises(DataError, match="online_teacher: first -> second"):
        run(tmp_path, "mlm", online=Online("second"), max_steps=2)
    result, _ = run(tmp_path, "mlm", online=Online("first"), max_steps=2)
    assert result["steps"] == 2
