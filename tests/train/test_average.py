import subprocess
import sys

import pytest
import torch
from torch import nn

from icefall_kd.errors import ConfigError
from icefall_kd.train import average as avg
from icefall_kd.train.checkpoint import load_checkpoint, save_checkpoint

PERIOD = 3


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def weights(step):
    """The weights that an imagined training has after ``step`` steps."""
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(step))


@pytest.fixture
def exp_dir(tmp_path):
    """Epochs of 7 steps, a checkpoint every 5, the model averaged every 3."""
    model = Model()
    running = avg.RunningAverage(model, PERIOD)
    for step in range(1, 29):
        with torch.no_grad():
            model.w.copy_(weights(step))
            model.mean.fill_(step)
            model.count.fill_(step)
        running.update(model, step)
        names = [f"epoch-{step // 7}.pt"] * (step % 7 == 0) + [f"checkpoint-{step}.pt"] * (step % 5 == 0)
        for name in names:
            counters = {"step": step, "average_period": PERIOD, "train_loss": float(step)}
            counters["valid"] = {"loss": abs(step - 15.0), "wer": 100.0 - step}
            save_checkpoint(
                tmp_path / name,
                {
                    "model": model.state_dict(),
                    "model_avg": running.state_dict(),
                    "train": counters,
                    "config": {"name": name},
                    "tokenizer_hash": "t",
                },
            )
    return tmp_path


def sampled_mean(after, upto):
    """The brute-force mean of the weights at every PERIOD-th step in (after, upto]."""
    steps = [s for s in range(PERIOD, upto + 1, PERIOD) if s > after]
    return torch.stack([weights(s).double() for s in steps]).mean(0).float(), sum(steps) / len(steps)


def test_running_average_is_the_mean_of_all_samples():
    model = Model()
    running = avg.RunningAverage(model, PERIOD)
    for step in range(1, 3000):
        with torch.no_grad():
            model.w.copy_(weights(step))
        assert running.update(model, step) == (step % PERIOD == 0)
    expected = torch.stack([weights(s).double() for s in range(PERIOD, 3000, PERIOD)]).mean(0)
    assert running.state_dict()["w"].dtype == torch.float64
    torch.testing.assert_close(running.state_dict()["w"], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("epoch", "num"), [(4, 1), (4, 2), (4, 3), (3, 1), (2, 1)])
def test_the_average_between_two_epochs_is_the_mean_of_the_steps_between(exp_dir, epoch, num):
    state, config, used = avg.load_for_decoding(exp_dir, epoch=epoch, avg=num)
    # the counters of both ends are rounded down to the period, as the samples were
    start = 7 * (epoch - num) // PERIOD * PERIOD
    expected, mean_step = sampled_mean(start, 7 * epoch)
    torch.testing.assert_close(state["w"], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state["mean"], torch.full((2,), mean_step))
    assert state["w"].dtype == torch.float32
    assert state["count"] == 7 * epoch // PERIOD * PERIOD
    assert config == {"name": f"epoch-{epoch}.pt"}
    assert f"epoch-{epoch}.pt" in used and f"epoch-{epoch - num}.pt" in used


def test_a_range_from_the_start_is_the_running_average(exp_dir):
    state, _, used = avg.load_for_decoding(exp_dir, epoch=3, avg=3)
    torch.testing.assert_close(state["w"], sampled_mean(0, 21)[0])
    assert "the start" in used


def test_the_newest_epoch_is_the_default(exp_dir):
    assert "epoch-4.pt" in avg.load_for_decoding(exp_dir)[2]
    for path in exp_dir.glob("epoch-*.pt"):
        path.unlink()
    assert "checkpoint-25.pt" in avg.load_for_decoding(exp_dir)[2]


def test_a_training_goes_on_from_its_last_epoch_and_never_from_its_start(exp_dir):
    last, _, used = avg.load_trained(exp_dir)
    assert used == "average of all steps after epoch-3.pt up to epoch-4.pt"
    torch.testing.assert_close(last["w"], sampled_mean(21, 28)[0])
    # The mean of a first epoch would hold what was drawn, and what a first stage left as it was.
    for epoch in (2, 3, 4):
        (exp_dir / f"epoch-{epoch}.pt").unlink()
    first, _, used = avg.load_trained(exp_dir)
    assert used == "epoch-1.pt" and torch.equal(first["w"], weights(7))
    (exp_dir / "epoch-1.pt").unlink()
    for step in (10, 15, 20, 25):
        (exp_dir / f"checkpoint-{step}.pt").unlink()
    assert avg.load_trained(exp_dir)[2] == "checkpoint-5.pt"


def test_ranges_of_checkpoints(exp_dir):
    state, _, used = avg.load_for_decoding(exp_dir, iter=25, avg=2)
    torch.testing.assert_close(state["w"], sampled_mean(15, 25)[0], rtol=1e-6, atol=1e-6)
    assert "checkpoint-15.pt" in used and "checkpoint-25.pt" in used
    state, _, _ = avg.load_for_decoding(exp_dir, iter=20, avg=3, use_averaged_model=False)
    torch.testing.assert_close(state["w"], (weights(10) + weights(15) + weights(20)) / 3)


def test_plain_average_of_the_last_epochs(exp_dir):
    state, config, used = avg.load_for_decoding(exp_dir, epoch=4, avg=3, use_averaged_model=False)
    torch.testing.assert_close(state["w"], (weights(14) + weights(21) + weights(28)) / 3)
    assert used == "mean of epoch-2.pt, epoch-3.pt, epoch-4.pt"
    assert state["count"] == 28 and config == {"name": "epoch-4.pt"}
    single, _, used = avg.load_for_decoding(exp_dir, epoch=2, avg=1, use_averaged_model=False)
    assert torch.equal(single["w"], weights(14)) and used == "epoch-2.pt"


def test_best_n_by_metric(exp_dir):
    names = [p.name for p in avg.best_n(exp_dir, 2)]  # |7-15|, |14-15|, |21-15|, |28-15|
    assert names == ["epoch-2.pt", "epoch-3.pt"]
    assert [p.name for p in avg.best_n(exp_dir, 1, "valid_wer")] == ["epoch-4.pt"]
    assert [p.name for p in avg.best_n(exp_dir, 1, "train_loss")] == ["epoch-1.pt"]
    with pytest.raises(ConfigError, match="valid_loss, valid_wer"):
        avg.best_n(exp_dir, 1, "valid_cer")
    with pytest.raises(ConfigError, match="best 5 of the 4"):
        avg.best_n(exp_dir, 5)


def test_a_metric_that_is_no_number_is_never_the_best(tmp_path):
    for epoch, loss in ((1, float("nan")), (2, 5.0), (3, float("nan")), (4, 4.0)):
        train = {"step": epoch, "valid": {"loss": loss}}
        save_checkpoint(tmp_path / f"epoch-{epoch}.pt", {"model": {}, "train": train})
    assert [p.name for p in avg.best_n(tmp_path, 3)] == ["epoch-4.pt", "epoch-2.pt", "epoch-1.pt"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"epoch": 9}, r"no epoch-9\.pt; there are 1, 2, 3, 4"),
        ({"epoch": 2, "avg": 3}, "can be at most 2"),
        ({"epoch": 2, "avg": 3, "use_averaged_model": False}, r"epoch-0\.pt is not there"),
        ({"epoch": 2, "iter": 5}, "exclude each other"),
        ({"avg": 0}, "at least 1"),
        ({"iter": 10, "avg": 2}, "needs 2 checkpoints before it"),
        ({"iter": 11}, r"no checkpoint-11\.pt"),
    ],
)
def test_impossible_ranges_are_refused_with_the_reason(exp_dir, arguments, reason):
    with pytest.raises(ConfigError, match=reason):
        avg.load_for_decoding(exp_dir, **arguments)


def test_a_missing_end_of_the_range_is_named(exp_dir):
    (exp_dir / "epoch-2.pt").unlink()
    with pytest.raises(ConfigError, match=r"needs epoch-2\.pt.*there are 1, 3, 4"):
        avg.load_for_decoding(exp_dir, epoch=4, avg=2)


def test_no_sample_in_the_range(tmp_path):
    model = Model()
    for epoch, step in ((1, 4), (2, 5)):
        save_checkpoint(
            tmp_path / f"epoch-{epoch}.pt",
            {
                "model": model.state_dict(),
                "model_avg": avg.RunningAverage(model, PERIOD).state_dict(),
                "train": {"step": step, "average_period": PERIOD},
                "config": {},
            },
        )
    with pytest.raises(ConfigError, match="every 3 steps; take a longer range"):
        avg.load_for_decoding(tmp_path, epoch=2, avg=1)


def test_files_of_different_models_are_not_averaged(exp_dir, tmp_path):
    save_checkpoint(tmp_path / "other.pt", {"model": {"v": torch.zeros(1)}, "train": {"step": 1}, "config": {}})
    with pytest.raises(ConfigError, match="another model"):
        avg.average_checkpoints([exp_dir / "epoch-1.pt", tmp_path / "other.pt"])


def run_cli(repo, *arguments):
    command = [sys.executable, str(repo / "local" / "average.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_names_its_files_and_writes_a_checkpoint(exp_dir, repo):
    expected = {
        ("--last", 2): (["epoch-3.pt", "epoch-4.pt"], (weights(21) + weights(28)) / 2),
        ("--best", 2): (["epoch-2.pt", "epoch-3.pt"], (weights(14) + weights(21)) / 2),
        ("--from-averaged", 2, "--epoch", 4): (["epoch-2.pt", "epoch-4.pt"], sampled_mean(12, 28)[0]),
    }
    for i, (arguments, (names, mean)) in enumerate(expected.items()):
        out = exp_dir / f"out{i}.pt"
        done = run_cli(repo, "--exp-dir", exp_dir, "--out", out, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [f"used {exp_dir / n}" for n in names] + [f"wrote {out}"]
        saved = load_checkpoint(out)
        torch.testing.assert_close(saved["model"]["w"], mean, rtol=1e-6, atol=1e-6)
        assert saved["tokenizer_hash"] == "t"


def test_the_command_refuses_two_ways_at_once(exp_dir, repo):
    done = run_cli(repo, "--exp-dir", exp_dir, "--last", 2, "--best", 2)
    assert done.returncode == 2 and "give one of --last N" in done.stderr
