"""SIGKILL before seeded file operations, then the same line again: the same bytes as without a kill."""

import random
import shutil

import pytest
import torch

from icefall_kd.labels.store import LabelStore
from icefall_kd.runtime.files import read_json
from icefall_kd.train.checkpoint import load_checkpoint
from icefall_kd.train.metrics import read_metrics
from tests.faults import children

pytestmark = pytest.mark.timeout(900)


def kill_points(operations: int, count: int, seed: int) -> list[int]:
    """Return the first operations and some of the others."""
    assert operations > count
    return [0, *sorted(random.Random(seed).sample(range(1, operations), count - 1))]


def killed(*command, watch, at):
    ended = children.run(*command, watch=watch, kill_at=at)
    assert ended.code == -9, ended.err
    return ended


def finished(*command, watch):
    ended = children.run(*command, watch=watch)
    assert ended.code == 0, ended.err
    return ended


def leftovers(folder):
    return [p.name for p in folder.rglob("*") if p.name.startswith((".tmp-", ".split-", "part-"))]


def test_a_killed_quantizer_training_ends_in_the_same_file(line, tmp_path):
    whole = tmp_path / "whole"
    operations = finished(*line.quantizer(whole / "q.safetensors"), watch=whole).operations
    for at in kill_points(operations, 5, seed=1):
        folder = tmp_path / f"at{at}"
        command = line.quantizer(folder / "q.safetensors")
        killed(*command, watch=folder, at=at)
        finished(*command, watch=folder)
        assert sorted(p.name for p in folder.iterdir()) == [
            "q.report.json", "q.safetensors", "q.utterances.txt",
        ], at  # fmt: skip
        for name in ("q.safetensors", "q.utterances.txt"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), at


def test_a_killed_extraction_ends_in_the_same_shards_and_the_same_merged_set(line, tmp_path):
    def shards(folder):
        return {p.name: p.read_bytes() for p in folder.glob("shard-*")}

    whole, merged = tmp_path / "whole", tmp_path / "all/merged"
    first, second = (finished(*line.labels(whole, k, 2), watch=whole) for k in (0, 1))
    merge = ["local/label_sets.py", "merge", "--into"]
    merging = finished(*merge, merged, whole, watch=merged.parent)  # the temporary folder lies beside the target
    assert shards(merged) == shards(whole) and len(shards(whole)) == 2
    for at in kill_points(first.operations, 4, seed=2):
        folder = tmp_path / f"at{at}"
        killed(*line.labels(folder / "a", 0, 2), watch=folder / "a", at=at)
        finished(*line.labels(folder / "a", 0, 2), watch=folder / "a")
        killed(*line.labels(folder / "b", 1, 2), watch=folder / "b", at=min(at, second.operations - 1))
        finished(*line.labels(folder / "b", 1, 2), watch=folder / "b")
        target = folder / "all/merged"
        killed(*merge, target, folder / "a", folder / "b", watch=target.parent, at=at % merging.operations)
        if not target.exists():
            finished(*merge, target, folder / "a", folder / "b", watch=target.parent)
        assert shards(target) == shards(whole) and LabelStore(target).verify() == [], at
        assert leftovers(folder) == [], at


def test_a_killed_training_ends_in_the_same_weights_and_losses(line, tmp_path):
    expected = load_checkpoint(line.root / "exp/epoch-2.pt")
    summary = read_json(line.root / "exp/train_summary.json")
    records = [(r["kind"], r["step"], r["loss"]) for r in read_metrics(line.root / "exp/log/metrics.jsonl")]
    operations = finished(*line.train(tmp_path / "count"), watch=tmp_path / "count").operations
    for at in kill_points(int(0.9 * operations), 4, seed=3):
        exp_dir = tmp_path / f"at{at}"
        killed(*line.train(exp_dir, "--num-workers", 1), watch=exp_dir, at=at)
        finished(*line.train(exp_dir), watch=exp_dir)
        found = load_checkpoint(exp_dir / "epoch-2.pt")
        for part in ("model", "model_avg"):
            assert all(torch.equal(expected[part][k], found[part][k]) for k in expected[part]), at
        for a, b in zip(expected["optimizer"]["state"], found["optimizer"]["state"], strict=True):
            assert all(torch.equal(a[k], b[k]) for k in a), at
        again = read_json(exp_dir / "train_summary.json")
        assert all(again[k] == summary[k] for k in ("train_loss", "valid", "steps", "best_valid_epoch")), at
        assert [(r["kind"], r["step"], r["loss"]) for r in read_metrics(exp_dir / "log/metrics.jsonl")] == records, at
        assert leftovers(exp_dir) == [], at
        assert (exp_dir / "best-valid-loss.pt").exists()


def test_killed_features_end_in_the_same_files(line, tmp_path):
    def contents(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def prepared(name):
        folder = tmp_path / name / "data"  # stored cuts name their archives: every run needs the same path
        shutil.copytree(line.root / "manifests", folder / "manifests", dirs_exist_ok=True)
        (folder / "corpus.json").write_text('{"parts": {"train": {}, "dev": {}}}')
        return folder

    command = ["local/compute_features.py", "--data-dir", prepared("run"), "--nj", 1]
    operations = finished(*command, watch=tmp_path / "run").operations
    expected = contents(tmp_path / "run")
    for at in kill_points(operations, 4, seed=4):
        shutil.rmtree(tmp_path / "run")
        prepared("run")
        killed(*command, watch=tmp_path / "run", at=at)
        finished(*command, watch=tmp_path / "run")
        assert contents(tmp_path / "run") == expected, at
