"""A night on a cluster: real Slurm, tasks that are killed, trainings that are requeued."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from icefall_kd.train.metrics import read_metrics

REPO = Path(__file__).resolve().parents[2]
SUBMIT = [sys.executable, "-I", "-S", str(REPO / "local/submit.py"), "--backend", "slurm"]
pytestmark = pytest.mark.timeout(7200)


def start(slurm, line: list, cwd: Path, **env: str) -> subprocess.Popen:
    out = open(cwd / "out", "w")
    process = subprocess.Popen(
        [str(word) for word in line], cwd=cwd, env={**slurm.env, **env}, stdout=out, stderr=out, start_new_session=True
    )
    out.close()
    slurm.started.append(process)
    return process


def end(process: subprocess.Popen, cwd: Path, code: int = 0) -> str:
    process.wait()
    text = (cwd / "out").read_text()
    assert process.returncode == code, text[-5000:]
    return text


def run(slurm, line: list, cwd: Path, code: int = 0, **env: str) -> str:
    return end(start(slurm, line, cwd, **env), cwd, code)


def test_words_and_logs_are_exact_and_arrays_may_be_longer_than_slurm_lets_them(slurm, tmp_path):
    words = ["a b", "it's", '"q"', "$HOME `id`", "a;b && c", "back\\slash", "", "new\nline", "JOB"]
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    array = ["--array", "9-22%2", "--log", 'lo gs/x JOB% "q".log']
    run(slurm, [*SUBMIT, *array, "--", sys.executable, "-S", "-c", show, *words], tmp_path)
    assert len(list((tmp_path / "lo gs").iterdir())) == 14
    for n in range(9, 23):
        line = (tmp_path / f'lo gs/x {n}% "q".log').read_text().splitlines()[-1]
        assert json.loads(line) == [*words[:-1], str(n)]


def test_a_job_that_is_cancelled_is_named_and_not_requeued(slurm, tmp_path):
    task = "trap 'touch saved; exit 0' USR1 TERM; touch started; while :; do sleep 0.1; done"
    line = [*SUBMIT, "--name", "endless", "--until", "complete", "--log", "log", "--", "bash", "-c", task]
    process = start(slurm, line, tmp_path)
    slurm.until((tmp_path / "started").exists, "the task", process=process)
    slurm.ask("scancel", slurm.job("endless"))
    assert "ended as CANCELLED in job" in end(process, tmp_path, code=1)
    assert (tmp_path / "saved").exists() and not slurm.job("endless", "PENDING")


def losses(exp_dir: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(exp_dir / "log/metrics.jsonl", "train")]


def requeue(slurm, name: str, exp_dir: Path, process: subprocess.Popen, step: int) -> None:
    """Warn the job of a training as Slurm does before the end of its time, and do not wait for the delay."""
    metrics = exp_dir / "log/metrics.jsonl"
    slurm.until(lambda: len(read_metrics(metrics)) >= step, f"step {step}", process=process, seconds=3600)
    job = slurm.job(name)
    slurm.ask("scancel", "--batch", "--signal=USR1", job)
    slurm.until(lambda: slurm.job(name, "PENDING") == job, "the requeued job", process=process)
    # What the delay is for: a node refuses a job that starts in the second in which it was told to end it.
    time.sleep(3)
    slurm.ask("scontrol", "update", f"JobId={job}", "StartTime=now")


def test_a_training_of_two_nodes_that_is_requeued_has_the_losses_of_an_undisturbed_one(slurm, tmp_path):
    def line(exp_dir: Path, delay: float) -> list:
        options = json.dumps({"config": {}, "data": {"delay": delay}})
        toy = [sys.executable, REPO / "tests/train/toy.py", exp_dir, options]
        place = ["--name", exp_dir.name, "--ranks", "--nodes", "2", "--until", exp_dir / "train_summary.json"]
        return [*SUBMIT, *place, "--", *toy]

    # The nodes are this machine, where their names are no hosts.
    env = {"PYTHONPATH": str(REPO), "MASTER_ADDR": "127.0.0.1"}
    run(slurm, line(tmp_path / "whole", 0.0), tmp_path, **env)
    process = start(slurm, line(tmp_path / "parts", 0.3), tmp_path, **env)
    requeue(slurm, "parts", tmp_path / "parts", process, 3)
    assert "the job is requeued and goes on" in end(process, tmp_path)
    summary = json.loads((tmp_path / "parts/train_summary.json").read_text())
    assert summary["finished"] and summary["world_size"] == 2
    assert len(losses(tmp_path / "whole")) > 10 and losses(tmp_path / "parts") == losses(tmp_path / "whole")


TINY = "--encoder-dim 16 --feedforward-dim 16 --num-heads 2 --num-encoder-layers 2 --num-workers 0 --num-threads 1"
MICRO = "--train-speakers 4 --train-utts 6 --dev-speakers 1 --dev-utts 2 --test-speakers 1 --test-utts 2"


def test_the_recipe_of_mvq_spends_a_night_on_the_cluster(slurm, tmp_path):
    """All stages as jobs; one task of the extraction is killed on purpose, one training is requeued."""
    made = [sys.executable, REPO / "local/prepare_demo.py", "--out-dir", tmp_path / "corpus", *MICRO.split()]
    subprocess.run([*made, "--snr", "20,20", "--reverb", "0.05,0.1"], check=True, capture_output=True)
    exp = tmp_path / "an exp"
    line = [REPO / "egs/librispeech/run_mvq.sh", "--corpus", "demo", "--corpus-dir", tmp_path / "corpus", "--nj", "1"]
    line += ["--data-dir", tmp_path / "data", "--exp-dir", exp, "--num-shards", "3", "--decode-args", "--avg 1"]
    line += ["--phase1-steps", "5", "--phase2-steps", "5", "--quantizer-utts", "4"]
    line += ["--decoding-methods", "greedy_search"]
    line += ["--train-args", f"{TINY} --log-interval 1 --average-period 1 --num-epochs 4 --max-duration 12"]
    folder = Path(sys.executable).parent
    python = {"PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder.parent)}
    cluster = {
        **python, "cmd_backend": "slurm", "cmd_cpu": "--cpus 1 --time 1:00:00", "cmd_gpu": "--cpus 1 --time 1:00:00",
        "cmd_train": "--cpus 1 --time 1:00:00",
    }  # fmt: skip
    # Labels: one task is killed, is named with its log, and it alone is submitted again.
    process = start(slurm, [*line, "--stop-stage", "3"], tmp_path, **cluster)
    slurm.until(lambda: slurm.job("3_labels.codebook_indexes"), "the extraction", 7000, process)
    job = slurm.job("3_labels.codebook_indexes")
    slurm.ask("scancel", f"{job}_1")
    text = end(process, tmp_path, code=1)
    assert f"ended as CANCELLED in job {job}: task 1 of 0-2: python3 ../../local/extract_labels.py" in text
    assert "/log/extract.1.log" in text and "stage 3 labels failed with exit code 1" in text
    text = run(slurm, [*line, "--stop-stage", "3"], tmp_path, **cluster)
    assert "2 of 3 tasks were finished before" in text and "(3_labels.codebook_indexes, tasks 1)" in text
    assert "in 3 shards, all sound" in text
    # Training: told to stop once, requeued, and complete.
    process = start(slurm, line, tmp_path, **cluster)
    requeue(slurm, "4_train.mvq-seed42", exp / "mvq-seed42", process, 3)
    text = end(process, tmp_path)
    assert "the job is requeued and goes on" in text
    assert "student with MVQ-KD" in text
    for system in ("none", "mvq"):
        found = sorted(p.name.split("-")[1] for p in (exp / f"{system}-seed42/greedy_search").glob("results-*.json"))
        assert found == ["dev", "test"]  # a task of an array for each part
    # The same, undisturbed and on this machine.
    other = tmp_path / "undisturbed"
    shutil.copytree(exp, other, ignore=shutil.ignore_patterns("*-seed42", "[4-9]_*"))
    only = ["--exp-dir", other, "--stage", "4", "--stop-stage", "4", "--systems", "mvq"]
    run(slurm, [*line, *only], tmp_path, **python)
    assert len(losses(other / "mvq-seed42")) > 8
    assert losses(exp / "mvq-seed42") == losses(other / "mvq-seed42")
    # Nothing is left to submit.
    assert "submitted job" not in run(slurm, line, tmp_path, **cluster)
