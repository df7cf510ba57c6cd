import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime import files


def test_a_written_file_is_whole_and_leaves_no_temporary(tmp_path):
    target = tmp_path / "new" / "folder" / "x.bin"
    with files.atomic_write(target) as stream:
        stream.write(b"abc")
        assert not target.exists()
        assert str(os.getpid()) in next(iter(target.parent.iterdir())).name
    assert target.read_bytes() == b"abc"
    assert [p.name for p in target.parent.iterdir()] == ["x.bin"]


def test_a_failed_write_keeps_the_old_content_and_removes_the_temporary(tmp_path):
    target = tmp_path / "x.txt"
    files.write_text(target, "old\n")
    with pytest.raises(RuntimeError), files.atomic_write(target, "w") as stream:
        stream.write("half")
        raise RuntimeError
    assert target.read_text() == "old\n"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_a_killed_write_keeps_the_old_content(tmp_path):
    target = tmp_path / "x.txt"
    files.write_text(target, "old\n")
    code = (
        "import sys, time; from icefall_kd.runtime.files import atomic_write\n"
        "with atomic_write(sys.argv[1], 'w') as f:\n"
        "    f.write('half'); f.flush(); print('writing', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert target.read_text() == "old\n"


def test_the_temporary_path_keeps_the_suffix(tmp_path):
    with files.atomic_path(tmp_path / "cuts.jsonl.gz") as tmp:
        assert tmp.parent == tmp_path and tmp.name.endswith("cuts.jsonl.gz")
        tmp.write_bytes(b"1")
    assert (tmp_path / "cuts.jsonl.gz").read_bytes() == b"1"


def test_other_modes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'a'"), files.atomic_write(tmp_path / "x", "a"):
        pass


def test_json_round_trip_and_its_errors(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"z": 1, "a": [1.5, None, "汉"], "p": Path("d/e")})
    assert files.read_json(path) == {"z": 1, "a": [1.5, None, "汉"], "p": "d/e"}
    assert list(files.read_json(path)) == ["z", "a", "p"]
    with pytest.raises(ValueError):
        files.write_json(path, float("nan"))
    assert files.read_json(path)["z"] == 1
    path.write_text("{")
    with pytest.raises(DataError, match=r"x\.json"):
        files.read_json(path)
    with pytest.raises(DataError, match=r"none\.json does not exist"):
        files.read_json(tmp_path / "none.json")


def test_sha256_of_known_content(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")  # the example of FIPS 180
    assert files.sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_fingerprint_depends_on_values_and_not_on_key_order():
    @dataclass
    class Point:
        x: int
        y: Path

    one = files.fingerprint({"a": 1, "b": [1, 2]})
    assert one == files.fingerprint({"b": (1, 2), "a": 1})
    assert one != files.fingerprint({"a": 1, "b": [2, 1]})
    assert one != files.fingerprint({"a": "1", "b": [1, 2]})
    assert files.fingerprint(Point(1, Path("q"))) == files.fingerprint({"x": 1, "y": "q"})
    with pytest.raises(ValueError):
        files.fingerprint(float("inf"))
    with pytest.raises(TypeError):
        files.fingerprint(object())


def test_a_lock_excludes_other_processes_and_dies_with_its_holder(tmp_path):
    lock = tmp_path / "sub" / "lock"
    code = (
        "import sys, time; from icefall_kd.runtime.files import file_lock\n"
        "with file_lock(sys.argv[1]):\n    print('held', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="lock"), files.file_lock(lock, timeout=0.2):
        pass
    assert time.monotonic() - start < 5
    process.kill()
    process.wait()
    with files.file_lock(lock, timeout=5):
        pass


def test_a_folder_is_whole_or_what_it_was(tmp_path):
    target = tmp_path / "new" / "export"
    with files.atomic_folder(target, "mark.json") as folder:
        (folder / "mark.json").write_text("1")
        (folder / "old").write_text("x")
        assert not target.exists()
    with pytest.raises(RuntimeError), files.atomic_folder(target, "mark.json") as folder:
        (folder / "mark.json").write_text("2")
        raise RuntimeError
    assert (target / "mark.json").read_text() == "1"
    with files.atomic_folder(target, "mark.json") as folder:
        (folder / "mark.json").write_text("3")
    assert {p.name: p.read_text() for p in target.iterdir()} == {"mark.json": "3"}
    assert [p.name for p in target.parent.iterdir()] == ["export"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("x")
    (folder / "inside").mkdir(parents=True)
    for target in (file, folder):
        with pytest.raises(ConfigError, match=r"holds no mark\.json"), files.atomic_folder(target, "mark.json"):
            pass
    (folder / "inside").rmdir()
    with files.atomic_folder(folder, "mark.json") as new:  # an empty folder is nobody's
        (new / "mark.json").touch()
    assert file.read_text() == "x" and (folder / "mark.json").exists()


def test_the_current_folder_is_not_replaced_and_a_link_to_a_folder_stays(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "../here", tmp_path / "here"):
        with pytest.raises(ConfigError, match="is the current folder"), files.atomic_folder(name, "mark.json"):
            pass
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for text in "12":
        with files.atomic_folder(tmp_path / "link", "mark.json") as new:
            (new / "mark.json").write_text(text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "mark.json").read_text() == text
    assert {p.name for p in tmp_path.iterdir()} == {"here", "link", "real"}


def test_a_folder_that_cannot_be_put_into_place_leaves_the_old_one(tmp_path, monkeypatch):
    with files.atomic_folder(tmp_path / "a", "mark.json") as new:
        (new / "mark.json").write_text("1")
    rename = files.os.rename
    moves = []

    def fails_second(source, target):
        moves.append(source)
        if len(moves) == 2:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", fails_second)
    with pytest.raises(OSError, match="no"), files.atomic_folder(tmp_path / "a", "mark.json") as new:
        (new / "mark.json").write_text("2")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "mark.json").read_text() == "1"


def test_what_a_kill_between_the_two_renames_left_stays_until_a_new_folder_is_in_place(tmp_path, monkeypatch):
    target = tmp_path / "export"
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "getpid", lambda: 2**22 + 1)  # no process can have that number
        killed = files.temporary_name(target)
    killed.mkdir()
    (killed / "mark.json").write_text("the only good one")
    with pytest.raises(RuntimeError), files.atomic_folder(target, "mark.json"):
        raise RuntimeError
    assert (killed / "mark.json").read_text() == "the only good one"
    with files.atomic_folder(target, "mark.json") as folder:
        (folder / "mark.json").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
