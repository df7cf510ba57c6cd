"""Kill a training anywhere and run the same command again: the same weights, bit by bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from icefall_kd.train.checkpoint import list_checkpoints, load_checkpoint, load_newest
from icefall_kd.train.metrics import read_metrics
from tests.train.toy import ToyData, run_toy

STEPS = 21


def start(repo, exp_dir, **options):
    command = [sys.executable, str(repo / "tests/train/toy.py"), str(exp_dir), json.dumps({"config": {}, **options})]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_step(exp_dir, process, step, timeout=300):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        records = read_metrics(exp_dir / "log" / "metrics.jsonl", "train")
        if records and records[-1]["step"] >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.poll()}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    exp_dir = tmp_path_factory.mktemp("whole")
    run_toy(exp_dir, ToyData())
    return load_checkpoint(exp_dir / "epoch-3.pt")


def assert_same_end(whole, exp_dir):
    end = load_checkpoint(exp_dir / "epoch-3.pt")
    for group in ("model", "model_avg"):
        assert all(torch.equal(whole[group][k], end[group][k]) for k in whole[group])
    steps = [r["step"] for r in read_metrics(exp_dir / "log" / "metrics.jsonl", "train")]
    assert steps == list(range(1, STEPS + 1))


def test_kill_9_at_random_steps_then_the_same_command(repo, tmp_path, whole):
    rng = random.Random(os.getpid())
    for _ in range(2):
        done = max(list_checkpoints(tmp_path, "checkpoint"), default=0)
        process = start(repo, tmp_path, data={"delay": 0.05})
        target = rng.randint(done + 1, min(done + 8, STEPS - 2))
        wait_for_step(tmp_path, process, target)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.communicate()
    process = start(repo, tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same_end(whole, tmp_path)


KILLED = """
import os, signal, sys, torch
from icefall_kd.train import checkpoint
from tests.train import toy

place, countdown = sys.argv.pop(), 2  # the second save is epoch-1.pt
save, link = torch.save, checkpoint.copy_as

def killed_save(obj, stream):
    global countdown
    countdown -= 1
    if countdown == 0 and place == "save":
        stream.write(b"half" * 5000), stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(obj, stream)

def killed_link(*args):
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = killed_save
if place == "link":
    checkpoint.copy_as = killed_link
toy.main()
"""


@pytest.mark.parametrize(("place", "step"), [("save", 4), ("link", 7)])
def test_kill_9_in_the_middle_of_a_save_or_right_after_it(repo, tmp_path, whole, place, step):
    options = json.dumps({"config": {}})
    command = [sys.executable, "-c", KILLED, str(tmp_path), options, place]
    done = subprocess.run(command, cwd=repo, env={**os.environ, "PYTHONPATH": str(repo)}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert load_newest(tmp_path)[1]["train"]["step"] == step
    assert len(list(tmp_path.glob(".tmp-*"))) == (place == "save")
    assert not list(tmp_path.glob("best-*"))
    run_toy(tmp_path, ToyData(), max_steps=8)
    assert not list(tmp_path.glob(".tmp-*"))
    assert (tmp_path / "best-valid-loss.pt").samefile(tmp_path / "epoch-1.pt")
    run_toy(tmp_path, ToyData())
    assert_same_end(whole, tmp_path)


@pytest.mark.parametrize("fraction", [0.0, 0.6])
def test_a_truncated_newest_checkpoint_costs_a_few_steps(tmp_path, whole, caplog, fraction):
    run_toy(tmp_path, ToyData(), max_steps=10)
    newest = tmp_path / "checkpoint-10.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[: int(fraction * len(content))])
    run_toy(tmp_path, ToyData())
    assert "checkpoint-10.pt is damaged" in caplog.text
    assert_same_end(whole, tmp_path)


@pytest.mark.parametrize("to", ["process", "job"])
def test_sigterm_saves_and_exits_0(repo, tmp_path, whole, to):
    process = start(repo, tmp_path, data={"delay": 0.2, "num_workers": 2 if to == "job" else 0})
    wait_for_step(tmp_path, process, 5)
    if to == "job":  # a scheduler signals the loader's processes too
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    stopped = json.loads(out)
    assert not stopped["finished"] and 5 <= stopped["steps"] < STEPS
    assert (tmp_path / f"checkpoint-{stopped['steps']}.pt").exists()
    assert "run the same command again" in err
    run_toy(tmp_path, ToyData())
    assert_same_end(whole, tmp_path)


def test_sigusr2_to_a_job_leaves_its_loaders_alive(repo, tmp_path, whole):
    process = start(repo, tmp_path, data={"delay": 0.1, "num_workers": 2})
    wait_for_step(tmp_path, process, 5)
    os.killpg(process.pid, signal.SIGUSR2)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and json.loads(out)["finished"], err
    assert_same_end(whole, tmp_path)
