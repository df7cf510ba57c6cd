import logging
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.files import remove_leftovers, temporary_name
from icefall_kd.train import checkpoint as ckpt


def write(exp_dir, name, step, **more):
    model = {"w": torch.full((2,), float(step))}
    ckpt.save_checkpoint(exp_dir / name, {"model": model, "train": {"step": step}, **more})


def test_round_trip_keeps_tensors_and_plain_containers(tmp_path):
    counters = {"step": 3, "x": [1, None, "a", (2.5, True)]}
    saved = {"model": {"w": torch.arange(3.0), "n": torch.tensor(4)}, "train": counters}
    ckpt.save_checkpoint(tmp_path / "epoch-1.pt", saved)
    loaded = ckpt.load_checkpoint(tmp_path / "epoch-1.pt")
    assert torch.equal(loaded["model"]["w"], saved["model"]["w"])
    assert loaded["train"] == saved["train"]
    assert loaded["format_version"] == ckpt.FORMAT_VERSION
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-1.pt"]


def test_only_plain_content_is_saved(tmp_path):
    class Custom:
        pass

    for value, where in ((Custom(), "['train']['x'][1]"), (tmp_path, "['train']['x'][1]")):
        with pytest.raises(TypeError, match=re.escape(where)):
            ckpt.save_checkpoint(tmp_path / "a.pt", {"train": {"x": [1, value]}})
    assert list(tmp_path.iterdir()) == []


def test_a_view_does_not_drag_its_storage_along(tmp_path):
    ckpt.save_checkpoint(tmp_path / "a.pt", {"model": {"w": torch.zeros(1_000_000)[:2]}})
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_files_are_ordered_by_number_and_odd_names_are_left_out(tmp_path):
    for name in ("epoch-10.pt", "epoch-2.pt", "epoch-1.pt", "epoch-3.pt.tmp", "epoch-x.pt", "init.pt", "epoch-.pt"):
        (tmp_path / name).write_bytes(b"")
    assert list(ckpt.list_checkpoints(tmp_path, "epoch")) == [1, 2, 10]
    assert ckpt.list_checkpoints(tmp_path / "nowhere", "epoch") == {}


def test_the_newest_is_the_one_with_most_steps(tmp_path):
    assert ckpt.load_newest(tmp_path) is None
    write(tmp_path, "epoch-2.pt", 20)
    write(tmp_path, "checkpoint-9.pt", 9)
    assert ckpt.load_newest(tmp_path)[0].name == "epoch-2.pt"
    write(tmp_path, "checkpoint-24.pt", 24)
    assert ckpt.load_newest(tmp_path)[0].name == "checkpoint-24.pt"


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.97])
def test_a_truncated_file_is_named_and_the_one_before_it_taken(tmp_path, caplog, keep):
    write(tmp_path, "checkpoint-8.pt", 8)
    write(tmp_path, "checkpoint-12.pt", 12)
    newest = tmp_path / "checkpoint-12.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with caplog.at_level(logging.WARNING):
        path, loaded = ckpt.load_newest(tmp_path)
    assert path.name == "checkpoint-8.pt" and loaded["train"]["step"] == 8
    assert "checkpoint-12.pt" in caplog.text


def test_a_flipped_byte_in_the_weights_is_found(tmp_path):
    ckpt.save_checkpoint(tmp_path / "epoch-1.pt", {"model": {"w": torch.zeros(100_000)}, "train": {"step": 1}})
    content = bytearray((tmp_path / "epoch-1.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "epoch-1.pt").write_bytes(content)
    with pytest.raises(DataError, match="every checkpoint"):
        ckpt.load_newest(tmp_path)


def test_a_newer_format_and_a_foreign_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt, "FORMAT_VERSION", 99)
    write(tmp_path, "epoch-1.pt", 1)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="format version 99"):
        ckpt.load_newest(tmp_path)
    with pytest.raises(DataError, match="no checkpoint"):
        ckpt.load_checkpoint(tmp_path / "absent.pt")


def test_keep_last_k(tmp_path):
    for step in (4, 8, 12, 100):
        write(tmp_path, f"checkpoint-{step}.pt", step)
    write(tmp_path, "epoch-1.pt", 5)
    assert [p.name for p in ckpt.remove_old(tmp_path, "checkpoint", 2)] == ["checkpoint-4.pt", "checkpoint-8.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-100.pt", "checkpoint-12.pt", "epoch-1.pt"]
    assert ckpt.remove_old(tmp_path, "epoch", None) == []


def test_a_copy_stays_when_its_source_is_replaced_or_removed(tmp_path):
    write(tmp_path, "epoch-1.pt", 1)
    ckpt.copy_as(tmp_path / "epoch-1.pt", "best-valid-loss.pt")
    write(tmp_path, "epoch-1.pt", 2)
    assert ckpt.load_checkpoint(tmp_path / "best-valid-loss.pt")["train"]["step"] == 1
    ckpt.copy_as(tmp_path / "epoch-1.pt", "best-valid-loss.pt")
    (tmp_path / "epoch-1.pt").unlink()
    assert ckpt.load_checkpoint(tmp_path / "best-valid-loss.pt")["train"]["step"] == 2


def test_only_what_dead_processes_left_is_removed(tmp_path):
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    host = temporary_name(tmp_path / "x").name.split("-")[1]
    other = "0" * 8
    for writer in (f"{host}-{dead.pid}", f"{host}-{os.getpid()}", f"{host}-{os.getppid()}", f"{other}-{dead.pid}"):
        (tmp_path / f".tmp-{writer}-0-epoch-1.pt").write_bytes(b"half")
    (tmp_path / f".tmp-{other}-{os.getppid()}-0-epoch-2.pt").write_bytes(b"half")
    yesterday = time.time() - 25 * 3600
    os.utime(tmp_path / f".tmp-{other}-{os.getppid()}-0-epoch-2.pt", (yesterday, yesterday))
    (tmp_path / ".tmp-notes.pt").write_bytes(b"a user's")
    remove_leftovers(tmp_path, "*.pt")
    # A number of our own is that of a dead namesake; the processes of another host cannot be seen, only what is old.
    kept = {f".tmp-{host}-{os.getppid()}-0-epoch-1.pt", f".tmp-{other}-{dead.pid}-0-epoch-1.pt", ".tmp-notes.pt"}
    assert {p.name for p in tmp_path.iterdir()} == kept


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path):
    write(tmp_path, "epoch-1.pt", 1)
    code = (
        "import resource, sys, torch; from icefall_kd.errors import run_main; from icefall_kd.train import checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "content = {f'w{i}': torch.randn(100_000) for i in range(3)}\n"
        "run_main(lambda: checkpoint.save_checkpoint(sys.argv[1] + '/epoch-2.pt', {'model': content}))"
    )
    for limit in (500_000, 1_201_000):  # within a tensor, and at the very end
        done = subprocess.run([sys.executable, "-c", code, tmp_path, str(limit)], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "epoch-2.pt: File too large; what was saved before is intact" in done.stderr
        assert "Traceback" not in done.stderr
        assert [p.name for p in tmp_path.iterdir()] == ["epoch-1.pt"]


def test_another_tokenizer_is_refused_with_both_hashes(tmp_path):
    ckpt.check_tokenizer({"tokenizer_hash": "aaa"}, "aaa", "x.pt")
    ckpt.check_tokenizer({"tokenizer_hash": "aaa"}, "", "x.pt")
    with pytest.raises(ConfigError, match=r"x\.pt.*aaa.*bbb"):
        ckpt.check_tokenizer({"tokenizer_hash": "aaa"}, "bbb", "x.pt")


def test_loading_is_strict_and_reports(tmp_path):
    model = nn.Linear(3, 2)
    good = {k: torch.ones_like(v) for k, v in model.state_dict().items()}
    assert "loaded 2 tensors" in str(ckpt.load_model(model, good))
    bad = {"weight": torch.zeros(5, 3), "head": torch.zeros(1)}
    with pytest.raises(ConfigError, match=r"missing: bias.*unexpected: head.*weight \(5, 3\) in the file, \(2, 3\)"):
        ckpt.load_model(model, bad, source="x.pt")
    report = ckpt.load_model(model, bad, strict=False)
    assert report.missing == ["bias"] and report.unexpected == ["head"] and report.loaded == []
    assert torch.equal(model.weight, torch.ones(2, 3))
