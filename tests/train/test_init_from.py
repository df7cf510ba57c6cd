"""--init-from: parameters of another training, with every one that does not fit named, and never at a resume."""

import logging

import pytest
import torch
from torch import nn

from icefall_kd.errors import ConfigError
from icefall_kd.runtime.files import read_json
from icefall_kd.train.average import load_for_decoding
from icefall_kd.train.checkpoint import load_checkpoint
from icefall_kd.train.loop import train
from tests.train.toy import NUM_CLASSES, ToyData, ToySystem, run_toy, same_weights, toy_config


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    exp_dir = tmp_path_factory.mktemp("source") / "exp"
    run_toy(exp_dir, num_epochs=2)
    return exp_dir


class Started(Exception):
    pass


def first_weights(exp_dir, source, system=None) -> dict:
    """Return the parameters with which a training would begin."""
    torch.manual_seed(8)
    system = system or ToySystem()

    def stop():
        raise Started

    with pytest.raises(Started):
        train(system, ToyData(), toy_config(exp_dir, init_from=source), on_start=stop)
    return system.state_dict()


def test_the_averaged_parameters_are_where_it_begins(tmp_path, source):
    weights, _, used = load_for_decoding(source)
    assert "average of all steps" in used
    assert same_weights(first_weights(tmp_path, source), weights)


def test_a_training_without_averages_gives_its_newest_parameters(tmp_path, source):
    (tmp_path / "source").mkdir()
    for epoch in (1, 2):
        saved = load_checkpoint(source / f"epoch-{epoch}.pt")
        del saved["model_avg"]
        torch.save(saved, tmp_path / "source" / f"epoch-{epoch}.pt")
    assert same_weights(first_weights(tmp_path / "exp", tmp_path / "source"), saved["model"])


def test_what_does_not_fit_is_named_and_stays_as_it_was_drawn(tmp_path, source, caplog):
    system = ToySystem()
    system.output = nn.Linear(16, NUM_CLASSES + 1)
    system.extra = nn.Linear(2, 2)
    del system.scale
    drawn = {name: tensor.clone() for name, tensor in system.state_dict().items()}
    with caplog.at_level(logging.INFO):
        begun = first_weights(tmp_path, source, system)
    weights = load_for_decoding(source)[0]
    for name, tensor in begun.items():
        wanted = weights if name.startswith(("encoder.", "num_forwards")) else drawn
        assert torch.equal(tensor, wanted[name]), name
    told = [m.partition(f"--init-from {source}: ")[2] for m in caplog.messages]
    assert {m for m in told if m} == {
        "loaded 5 tensors",
        "missing: extra.weight",
        "missing: extra.bias",
        "unexpected: scale",
        "of another shape: output.weight (5, 16) in the file, (6, 16) in the model",
        "of another shape: output.bias (5,) in the file, (6,) in the model",
    }
    stated = read_json(tmp_path / "config.json")
    assert stated["config"]["init_from"] == str(source)
    assert {k: stated["init"][k] for k in ("exp_dir", "loaded", "missing", "unexpected", "mismatched")} == {
        "exp_dir": str(source), "loaded": 5, "missing": 2, "unexpected": 1, "mismatched": 2,
    }  # fmt: skip
    assert len(stated["init"]["weights_sha256"]) == 64


def test_the_running_average_begins_there_too(tmp_path, source):
    # No sample is taken in one step: what is saved is what the average began with.
    run_toy(tmp_path, init_from=source, max_steps=1, average_period=100)
    saved = load_checkpoint(tmp_path / "checkpoint-1.pt")["model_avg"]
    weights = load_for_decoding(source)[0]
    assert all(torch.equal(saved[name], weights[name].double()) for name in saved if name != "num_forwards")


def test_the_optimizer_knows_the_sizes_of_the_parameters_it_begins_with(tmp_path, source):
    # Their sizes are measured again after four steps only.
    run_toy(tmp_path, init_from=source, max_steps=1)
    state = load_checkpoint(tmp_path / "checkpoint-1.pt")["optimizer"]["state"]
    weights = load_for_decoding(source)[0]
    names = [name for name, _ in ToySystem().named_parameters()]
    for name, one in zip(names, state, strict=True):
        if "param_rms" in one:
            assert float(one["param_rms"]) == pytest.approx(float(weights[name].square().mean().sqrt())), name


@pytest.mark.parametrize("again", ["same", "other", "none"])
def test_a_resumed_training_does_not_begin_again(tmp_path, source, caplog, again):
    whole, system = run_toy(tmp_path / "whole", init_from=source)
    plain, _ = run_toy(tmp_path / "plain")
    assert whole["train_loss"] != plain["train_loss"] and whole["init_from"] == str(source)
    run_toy(tmp_path / "parts", init_from=source, max_steps=3)
    other = {"same": source, "other": tmp_path / "plain", "none": None}[again]
    with caplog.at_level(logging.INFO):
        result, resumed = run_toy(tmp_path / "parts", init_from=other)
    assert same_weights(system.state_dict(), resumed.state_dict()) and result["train_loss"] == whole["train_loss"]
    assert any(f"--init-from {other} is not used: the training goes on from" in m for m in caplog.messages) == (
        other is not None
    )
    # What the training truly began with stays on record.
    assert result["init_from"] == str(source) and read_json(tmp_path / "parts/config.json")["init"]["loaded"] == 8


def test_nothing_to_load_is_an_error_and_leaves_nothing(tmp_path, source):
    system = ToySystem()
    torch.manual_seed(1)
    with pytest.raises(ConfigError, match=r"none is no folder; name the exp_dir of a training"):
        train(system, ToyData(), toy_config(tmp_path / "exp", init_from=tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"epoch-2\.pt is no folder"):
        train(system, ToyData(), toy_config(tmp_path / "exp", init_from=source / "epoch-2.pt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty holds no"):
        train(system, ToyData(), toy_config(tmp_path / "exp", init_from=tmp_path / "empty"))
    stranger = ToySystem()
    stranger.encoder, stranger.output = nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3)
    del stranger.scale, stranger.num_forwards
    with pytest.raises(ConfigError, match="no tensor has a name and shape of this model"):
        train(stranger, ToyData(), toy_config(tmp_path / "exp", init_from=source))
    assert not (tmp_path / "exp").exists()
