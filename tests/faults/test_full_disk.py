"""A disk that is full: exit code 2, the file is named, what was there is intact, and the same line goes on later."""

import os
import subprocess

import pytest
import torch

from icefall_kd.labels.store import LabelStore
from icefall_kd.train.checkpoint import load_checkpoint, load_newest
from tests.faults import children

pytestmark = pytest.mark.timeout(900)


class Disk:
    """A folder that takes little: a small tmpfs, or a limit on the size of files."""

    def __init__(self, folder, kind):
        self.folder, self.kind, self.limit = folder, kind, None
        folder.mkdir()

    def make_room(self, size, mount="mount"):
        if self.kind == "tmpfs":
            options = f"{'remount,' if os.path.ismount(self.folder) else ''}size={size}"
            done = subprocess.run([mount, "-t", "tmpfs", "-o", options, "tmpfs", self.folder], capture_output=True)
            if done.returncode:
                pytest.skip("no file system can be mounted here")
        self.limit = size

    def run(self, command):
        return children.run(*command, watch=self.folder, max_file=self.limit if self.kind == "limit" else None)


@pytest.fixture(params=["tmpfs", "limit"])
def disk(request, tmp_path):
    made = Disk(tmp_path / "disk", request.param)
    yield made
    if os.path.ismount(made.folder):
        subprocess.run(["umount", "--lazy", made.folder], check=True)


INTACT = "what was saved before is intact. Make room and run the same command again"


def full(disk, command, *names, says=INTACT):
    """Run a command that runs out of room; return the file that it names."""
    ended = disk.run(command)
    assert ended.code == 2 and "Traceback" not in ended.err, ended.err
    assert says in ended.message
    assert any(name in ended.message for name in names), ended.message
    assert not [p for p in disk.folder.rglob(".tmp-*")]


def test_an_extraction_on_a_full_disk(line, disk):
    disk.make_room(16_384 if disk.kind == "tmpfs" else 1500)
    folder = disk.folder / "set"
    full(disk, line.labels(folder), "part-0", "shard-00000", "label_set.json")
    disk.make_room(1_000_000)
    ended = disk.run(line.labels(folder))
    assert ended.code == 0, ended.err
    (shard,) = folder.glob("shard-*")
    assert shard.read_bytes() == (line.root / "labels" / shard.name).read_bytes()
    assert LabelStore(folder).verify() == []


def test_a_quantizer_training_on_a_full_disk(line, disk):
    disk.make_room(100_000)
    out = disk.folder / "q.safetensors"
    full(disk, line.quantizer(out), "q.state.safetensors", "q.frames.safetensors")
    disk.make_room(10_000_000)
    ended = disk.run(line.quantizer(out))
    assert ended.code == 0, ended.err
    assert out.read_bytes() == (line.root / "quantizer/q.safetensors").read_bytes()


def test_a_training_on_a_full_disk(line, disk):
    exp_dir = disk.folder / "exp"
    disk.make_room(5_000_000 if disk.kind == "tmpfs" else 1_000_000)
    full(disk, line.train(exp_dir), "checkpoint-", "epoch-")
    if disk.kind == "tmpfs":
        assert load_newest(exp_dir)[1]["train"]["step"] >= 2, "what was saved before is intact"
    disk.make_room(100_000_000)
    ended = disk.run(line.train(exp_dir))
    assert ended.code == 0, ended.err
    found, expected = (load_checkpoint(folder / "epoch-2.pt") for folder in (exp_dir, line.root / "exp"))
    assert all(torch.equal(expected["model"][k], found["model"][k]) for k in expected["model"])


def test_features_on_a_full_disk(line, disk):
    disk.make_room(40_000 if disk.kind == "tmpfs" else 20_000)
    manifests = disk.folder / "manifests"
    manifests.mkdir()
    for part in ("train", "dev"):
        (manifests / f"cuts_{part}.jsonl.gz").write_bytes((line.root / f"manifests/cuts_{part}.jsonl.gz").read_bytes())
    command = ["local/compute_features.py", "--data-dir", disk.folder, "--nj", 1, "--parts", "train,dev"]
    full(disk, command, "feats_train", "feats_dev")
    assert not list((disk.folder / "fbank").glob("cuts_*"))
    disk.make_room(10_000_000)
    ended = disk.run(command)
    assert ended.code == 0, ended.err
    found = sorted(p.name for p in (disk.folder / "fbank").iterdir())
    assert found == ["cuts_dev.jsonl.gz", "cuts_train.jsonl.gz", "feats_dev-1-of-1.lca", "feats_train-1-of-1.lca",
                     "feature_extractor.json"]  # fmt: skip


def test_a_demo_corpus_on_a_full_disk(disk):
    """Recordings are written by other processes, and libsndfile does not say that a disk is full."""
    pytest.importorskip("espeakng_loader")
    disk.make_room(200_000 if disk.kind == "tmpfs" else 2000)
    sizes = [f"--{part}-{what}" for part in ("train", "dev", "test") for what in ("speakers", "utts")]
    options = [word for name in sizes for word in (name, 2)]
    command = ["local/prepare_demo.py", "--out-dir", disk.folder / "corpus", "--nj", 2, *options]
    full(disk, command, ".flac", says="make room and run this again")
    assert list(disk.folder.iterdir()) == []
    disk.make_room(10_000_000)
    ended = disk.run(command)
    assert ended.code == 0, ended.err
    assert len(list((disk.folder / "corpus").rglob("*.flac"))) == 12
