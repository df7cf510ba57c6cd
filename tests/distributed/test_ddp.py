"""Two gloo processes under torchrun's environment: equal to one, skipping together, ending together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from hubert_toys import write_cmvn, write_teacher

from icefall_kd.runtime import dist
from icefall_kd.train.checkpoint import list_checkpoints, load_checkpoint
from icefall_kd.train.metrics import read_metrics


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(repo, exp_dir, world_size=2, launcher="env", script="tests/train/toy.py", **options):
    """Start the ranks of a toy training with the variables that torchrun (or srun) sets."""
    command = [sys.executable, str(repo / script), str(exp_dir), json.dumps({"config": {}, **options})]
    port = str(free_port())
    processes = []
    for rank in range(world_size):
        env = dict(os.environ)
        if launcher == "slurm":
            env |= {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(world_size), "SLURM_LOCALID": str(rank)}
            env |= {"SLURM_STEP_ID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        elif world_size > 1:
            env |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    return processes


def finish(processes, timeout=300):
    """Return (exit code, stdout, stderr) of every rank; kill them all when one does not end in time."""
    deadline = time.monotonic() + timeout
    results = []
    try:
        for p in processes:
            out, err = p.communicate(timeout=max(1, deadline - time.monotonic()))
            results.append((p.returncode, out, err))
    finally:
        for p in processes:
            p.kill()
    return results


@pytest.mark.parametrize("optimizer", ["scaled_adam", "adamw"])
def test_two_ranks_equal_one_large_batch(repo, tmp_path, optimizer):
    options = {"dropout": 0.0, "config": {"optimizer": optimizer, "num_epochs": 2}}
    one = start(repo, tmp_path / "one", 1, **options)
    two = start(repo, tmp_path / "two", 2, launcher="slurm" if optimizer == "adamw" else "env", **options)
    for code, _, err in finish([*one, *two]):
        assert code == 0, err
    a, b = (load_checkpoint(tmp_path / name / "epoch-2.pt") for name in ("one", "two"))
    for name, value in a["model"].items():
        torch.testing.assert_close(b["model"][name], value, rtol=1e-5, atol=1e-6)
    losses = [[r["loss"] for r in read_metrics(tmp_path / d / "log" / "metrics.jsonl")] for d in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert b["train"]["valid"]["accuracy"] == pytest.approx(a["train"]["valid"]["accuracy"])
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1  # rank 0 alone writes


def test_two_ranks_of_a_dual_mode_training_equal_one_and_have_equal_masks(repo, tmp_path):
    # One choice of chunks: ranks draw their own.
    options = {
        "config": {"asr": {"rnnt_backend": "torch"}, "model": {"chunk_size": [4], "left_context_frames": [8]}},
        "dual": {"sparsity": 0.5, "prune_end_step": 6, "mask_interval": 3},
        "script": "tests/dual_toys.py",
    }
    one, two = start(repo, tmp_path / "one", 1, **options), start(repo, tmp_path / "two", 2, **options)
    results = finish([*one, *two])
    assert [code for code, _, _ in results] == [0, 0, 0], results[0][2] + results[1][2] + results[2][2]
    a, b = (load_checkpoint(tmp_path / name / "epoch-2.pt")["model"] for name in ("one", "two"))
    masks = [name for name in a if name.endswith(".mask")]
    assert len(masks) == 16 and all(0.4 < float(a[name].float().mean()) < 0.6 for name in masks)
    assert json.loads(results[1][1])["equal_masks"]
    for name, value in a.items():
        # AdamW makes steps of the rounding errors of a gradient that is 0, as of a key's bias; eight steps are 0.016.
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=2e-4, msg=name)


def test_an_infinite_loss_in_the_second_pass_of_one_rank_throws_the_first_away_too(repo, tmp_path):
    options = {
        "config": {"asr": {"rnnt_backend": "torch"}, "model": {"chunk_size": [4], "left_context_frames": [8]}},
        "dual": {"sparsity": 0.5, "prune_end_step": 6, "mask_interval": 3},
        "script": "tests/dual_toys.py",
    }
    one = start(repo, tmp_path / "one", 1, inf_at=[2, 0, 1], **options)
    two = start(repo, tmp_path / "two", 2, inf_at=[2, 1, 1], **options)
    results = finish([*one, *two])
    assert [code for code, _, _ in results] == [0, 0, 0], results[0][2] + results[1][2] + results[2][2]
    assert [json.loads(results[i][1])["skipped_steps"] for i in (0, 1)] == [1, 1]
    a, b = (load_checkpoint(tmp_path / name / "epoch-2.pt")["model"] for name in ("one", "two"))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=2e-4, msg=name)


def test_two_ranks_of_self_supervised_training_exchange_what_both_passes_added_up(repo, tmp_path):
    results = []
    for lean in (True, False):
        dual = {"modes": "dual", "lean": lean, "dual_kd_scale": 0.5}
        results.append(finish(start(repo, tmp_path / str(lean), script="tests/ssl_toys.py", dual=dual)))
        assert [code for code, _, _ in results[-1]] == [0, 0], results[-1][0][2] + results[-1][1][2]
    lean, joint = (json.loads(result[0][1]) for result in results)
    assert lean["equal_weights"] and joint["equal_weights"] and lean["steps"] == 8
    for name, value in joint["valid"].items():
        assert lean["valid"][name] == pytest.approx(value, rel=2e-3, abs=1e-3), name
    assert lean["train_loss"] == pytest.approx(joint["train_loss"], rel=1e-4)


@pytest.mark.parametrize("objective", ["distil", "ssl"])
def test_two_ranks_of_a_training_of_hubert_equal_one(repo, tmp_path, objective):
    files = {}
    if objective == "distil":  # in two stages
        write_teacher(tmp_path / "teacher")
        files = {"teacher": str(tmp_path / "teacher"), "cmvn": str(write_cmvn(tmp_path / "cmvn.safetensors"))}
    results, metrics = [], []
    for world_size in (1, 2):
        run = start(
            repo,
            tmp_path / str(world_size),
            world_size,
            script="tests/hubert_toys.py",
            accum_grad=3 - world_size,
            **files,
        )
        found = finish(run)
        assert not any(code for code, _, _ in found), "".join(err for _, _, err in found)
        results.append(json.loads(found[0][1]))
        metrics.append(read_metrics(tmp_path / str(world_size) / "log" / "metrics.jsonl", "train"))
        assert ["frontend_loss" in m for m in metrics[-1]] == [objective == "distil"] * 3 + [False] * 3
    one, two = results
    assert one["steps"] == two["steps"] == 6 and two["equal_weights"]
    # Every step has the losses of one rank that had all batches.
    losses = [[{n: v for n, v in row.items() if n.endswith("_loss")} for row in rows] for rows in metrics]
    second = {"distil": {"rec_loss", "cos_loss", "disc_loss"}, "ssl": {"masked_loss", "unmasked_loss"}}
    assert losses[0][-1].keys() == second[objective]
    for a, b in zip(*losses, strict=True):
        assert b == pytest.approx(a, rel=1e-3)
    for name, value in one["valid"].items():
        assert two["valid"][name] == pytest.approx(value, rel=1e-3, abs=1e-3), name


def test_a_rank_that_fails_ends_all_within_a_bound(repo, tmp_path):
    begin, config = time.monotonic(), {"num_epochs": 1, "save_every_n": 2}
    runs = [start(repo, tmp_path / str(rank), config=config, data={"fail_at": (1, 5, rank)}) for rank in (0, 1)]
    for rank in (0, 1):
        ended(finish(runs[rank], timeout=60), 1, "RuntimeError: planted failure", by=rank)
    assert time.monotonic() - begin < 60
    for rank in (0, 1):
        resumes(repo, tmp_path / str(rank), **config)


def ended(results, code, cause, by=None):
    """Check the exit codes of all ranks, and that one of them (``by``) alone printed the cause."""
    errors = [err for _, _, err in results]
    assert [found for found, _, _ in results] == [code] * len(results), "\n".join(errors)
    printed = [rank for rank, err in enumerate(errors) for _ in range(err.count(cause))]
    assert len(printed) == 1 and (by is None or printed == [by]), "\n".join(errors)
    assert sum(err.count(" ERROR ") + err.count("Traceback") for err in errors) == 1, "\n".join(errors)


def resumes(repo, exp_dir, **config):
    """Check that every checkpoint can be read, and that a sound run goes on to the end of an undisturbed one."""
    for file in exp_dir.glob("*.pt"):
        load_checkpoint(file)
    results = finish(start(repo, exp_dir, config=config))
    assert [code for code, _, _ in results] == [0, 0], results[0][2]
    assert "continuing from" in results[0][2]
    assert [code for code, _, _ in finish(start(repo, exp_dir.with_name("whole"), config=config))] == [0, 0]
    a, b = (load_checkpoint(folder / "epoch-1.pt") for folder in (exp_dir, exp_dir.with_name("whole")))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    records = [read_metrics(d / "log/metrics.jsonl", "train") for d in (exp_dir, exp_dir.with_name("whole"))]
    assert [r["loss"] for r in records[0]] == [r["loss"] for r in records[1]]


def test_a_rank_that_stalls_is_named_and_all_end_within_the_timeout(repo, tmp_path):
    begin, config = time.monotonic(), {"num_epochs": 1, "dist_timeout": 10}
    results = finish(start(repo, tmp_path / "exp", config=config, data={"stall_at": (1, 5, 1)}), timeout=90)
    ended(results, 1, "rank 1 did not come to a collective operation within --dist-timeout 10 s", by=0)
    assert time.monotonic() - begin < 90
    resumes(repo, tmp_path / "exp", **config)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_missed_by_the_other(repo, tmp_path, rank):
    config = {"num_epochs": 1, "dist_timeout": 600}
    results = finish(start(repo, tmp_path / "exp", config=config, data={"die_at": (1, 5, rank)}), timeout=90)
    (code, _, _), other = results[rank], results[1 - rank]
    # Rank 0 holds the store of the rendezvous where nothing else started the ranks.
    cause = "rank 1 gave no sign of life" if rank else "rank 0, or what started the ranks, is gone"
    assert code == -signal.SIGKILL
    ended([other], 1, cause)


def test_ranks_that_do_not_meet_end(repo, tmp_path):
    alone, other = start(repo, tmp_path, config={"dist_timeout": 3})
    other.kill()
    ((code, _, err),) = finish([alone], timeout=60)
    assert code == 1 and err.count("RankError: the 2 ranks did not meet at 127.0.0.1:") == 1, err
    assert "within --dist-timeout 3 s" in err and "Traceback" not in err


@pytest.mark.parametrize("accum_grad", [1, 3])
def test_ranks_with_uneven_batches_end_with_code_4(repo, tmp_path, accum_grad):
    # Three batches a step: the ranks are both at their last step, one with a batch more.
    config = {"num_epochs": 1, "accum_grad": accum_grad, "save_every_n": 2}
    data = {"fewer": (1, 1), "num_batches": 8}
    results = finish(start(repo, tmp_path / "exp", config=config, data=data), timeout=60)
    step, counts = (6, "1, 1 and no more") if accum_grad == 1 else (2, "2 and no more, 1 and no more")
    ended(results, 4, f"in batches at step {step} of epoch 1: forward passes by rank are {counts};")
    assert list_checkpoints(tmp_path / "exp", "checkpoint")
    for file in (tmp_path / "exp").glob("*.pt"):
        load_checkpoint(file)


def test_the_exit_code_of_a_rank_goes_through_the_launcher(repo, tmp_path):
    options = {"config": {"num_epochs": 1, "max_skips": 1}, "data": {"inf_at": [(1, 3, 1), (1, 4, 1)]}}
    command = [sys.executable, str(repo / "local/torchrun.py"), "--standalone", "--nproc-per-node", "2"]
    for data, code in ((options["data"], 3), ({}, 0)):
        words = [str(repo / "tests/train/toy.py"), str(tmp_path), json.dumps({**options, "data": data})]
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
    assert "continuing from" in done.stderr


def test_an_infinite_loss_on_one_rank_is_skipped_by_both(repo, tmp_path):
    results = finish(start(repo, tmp_path, data={"inf_at": [(1, 2, 1)]}, config={"num_epochs": 1}))
    assert [code for code, _, _ in results] == [0, 0], results[0][2] + results[1][2]
    assert "step 2 skipped (1 in a row): ce_loss is nan in utt-1-2-1" in results[1][2]
    summary = json.loads(results[0][1])
    assert summary["skipped_steps"] == 1 and summary["steps"] == 7
    assert all(torch.isfinite(v).all() for v in load_checkpoint(tmp_path / "epoch-1.pt")["model"].values())


def test_infinite_losses_in_a_row_end_both_ranks_with_code_3(repo, tmp_path):
    data, config = {"inf_at": [(1, i, 1) for i in range(4, 8)]}, {"max_skips": 2, "save_every_n": 2, "num_epochs": 1}
    results = finish(start(repo, tmp_path / "exp", data=data, config=config))
    ended(results, 3, "NumericError: 3 steps in a row were not finite, the last at step 6: ce_loss is nan in", by=1)
    assert (tmp_path / "exp/nonfinite-step6-rank1.json").exists()
    # What was saved is sound, be it behind a step that was skipped; the same line without the cause goes on from there.
    for file in (tmp_path / "exp").glob("*.pt"):
        assert all(torch.isfinite(v).all() for v in load_checkpoint(file)["model"].values())
    results = finish(start(repo, tmp_path / "exp", config=config))
    assert [code for code, _, _ in results] == [0, 0] and "continuing from" in results[0][2], results[0][2]


@pytest.mark.parametrize("oom_scan", [True, False])
def test_parameters_without_gradient_are_named_once(repo, tmp_path, oom_scan):
    results = finish(start(repo, tmp_path, unused=True, config={"oom_scan": oom_scan, "accum_grad": 2}))
    ended(results, 2, "receive no gradient from any active loss: forgotten.weight, forgotten.bias")


def test_a_signal_to_one_rank_saves_on_all_and_they_go_on(repo, tmp_path):
    config = {"num_epochs": 2, "save_every_n": 100}
    processes = start(repo, tmp_path, config=config, data={"delay": 0.2})
    metrics = tmp_path / "log" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while len(read_metrics(metrics)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGUSR2)
    results = finish(processes)
    assert [code for code, _, _ in results] == [0, 0], results[0][2]
    assert json.loads(results[0][1])["finished"]
    (saved,) = list_checkpoints(tmp_path, "checkpoint")
    assert 3 <= saved < 14


def test_a_signal_to_one_rank_stops_all_and_resumes_bit_equal(repo, tmp_path):
    config = {"num_epochs": 2}
    whole = start(repo, tmp_path / "whole", config=config)
    processes = start(repo, tmp_path / "parts", config=config, data={"delay": 0.2})
    metrics = tmp_path / "parts" / "log" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while len(read_metrics(metrics)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGUSR1)
    stopped = finish(processes)
    assert [code for code, _, _ in stopped] == [0, 0], stopped[0][2]
    assert "run the same command again" in stopped[0][2]
    assert [code for code, _, _ in finish(whole)] == [0, 0]
    assert [code for code, _, _ in finish(start(repo, tmp_path / "parts", config=config))] == [0, 0]
    a, b = (load_checkpoint(tmp_path / name / "epoch-2.pt") for name in ("whole", "parts"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_a_training_that_stopped_at_its_last_step_is_left_alone_by_both_ranks(repo, tmp_path):
    for _ in range(2):
        results = finish(start(repo, tmp_path, config={"max_steps": 3}))
        assert [code for code, _, _ in results] == [0, 0], results[0][2] + results[1][2]
    again = json.loads(results[0][1])
    assert again["steps"] == 3 and again["finished"]
    assert again["train_loss"] == json.loads((tmp_path / "train_summary.json").read_text())["train_loss"]


def test_rank_info_reads_torchrun_and_srun():
    assert dist.rank_info({}) == dist.RankInfo(0, 1, 0)
    assert dist.rank_info({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == dist.RankInfo(3, 8, 1)
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
    assert dist.rank_info(slurm) == dist.RankInfo(5, 8, 1)
    # inside sbatch or salloc, but not under srun
    assert dist.rank_info({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == dist.RankInfo(0, 1, 0)
    with pytest.raises(ValueError, match=re.escape("rank 8 does not fit world size 8")):
        dist.rank_info({"RANK": "8", "WORLD_SIZE": "8"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("node1", "node1"), ("gpu[03-05,7],login1", "gpu03"), ("a,b", "a"), ("n[1-2]x", "n1x"), ("r1-n[09,11]", "r1-n09")],
)
def test_first_host(nodelist, host):
    assert dist.first_host(nodelist) == host


def test_collectives_of_a_single_rank():
    assert dist.all_reduce_sum([1, 2.5, True]) == [1.0, 2.5, 1.0]
    assert dist.any_rank(True) and not dist.any_rank(False)
    assert dist.gather_objects({"a": 1}) == [{"a": 1}]
    dist.barrier()
    dist.shutdown()
