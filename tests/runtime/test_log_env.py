import json
import logging
import subprocess

import pytest
import torch

from icefall_kd.errors import ConfigError
from icefall_kd.runtime import env
from icefall_kd.runtime.env import environment, git_state, pick_device
from icefall_kd.runtime.log import Progress, format_seconds, setup_logging


@pytest.fixture(autouse=True)
def restore_root_logger():
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [h for h in root.handlers if h.get_name() == "icefall_kd"]:
        root.removeHandler(handler)
        handler.close()


def test_records_go_to_stderr_and_to_the_file_of_the_experiment_once(tmp_path, capsys):
    setup_logging(tmp_path, "train")
    log_file = setup_logging(tmp_path, "train")
    logging.getLogger("some.module").info("hello")
    out, err = capsys.readouterr()
    assert out == "" and err.count("hello") == 1
    assert log_file.parent == tmp_path / "log" and log_file.name.startswith("log-train-")
    assert log_file.read_text().count("[some.module] hello") == 1


def test_other_ranks_write_only_warnings_to_stderr(tmp_path, capsys):
    log_file = setup_logging(tmp_path, "train", rank=1)
    logging.getLogger("m").info("quiet")
    logging.getLogger("m").warning("loud")
    err = capsys.readouterr().err
    assert "quiet" not in err and "[rank 1]" in err and "loud" in err
    assert log_file.name.endswith("-1") and "quiet" in log_file.read_text()


def test_progress_logs_first_last_and_at_intervals(caplog, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("icefall_kd.runtime.log.time.monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO)
    progress = Progress(10, "utterances", interval=5, name="labels")
    for _ in range(10):
        clock[0] += 2.0
        progress.update(1, loss=1.23456, shard=3)
    # After 2 s (first), 8 s and 14 s (at least 5 s later), 20 s (last).
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "labels: 1/10 utterances, 0.5 utterances/s, 18.0 s left, loss 1.235, shard 3"
    assert [line.split("/")[0] for line in lines] == ["labels: 1", "labels: 4", "labels: 7", "labels: 10"]
    assert "0.0 s left" in lines[-1]


def test_progress_without_a_total_gives_no_time_left(caplog):
    caplog.set_level(logging.INFO)
    Progress(None, "steps").update(3)
    assert "left" not in caplog.text and "3 steps" in caplog.text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (7.25, "7.2 s"), (252, "4 min 12 s"), (11100, "3 h 05 min")]
)
def test_durations_are_for_people(seconds, text):
    assert format_seconds(seconds) == text


def test_the_environment_is_plain_and_names_no_machine(tmp_path):
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] == torch.__version__
    assert "/" not in json.dumps(found)
    assert env.package_version("no-such-distribution") is None


def test_git_state_tells_commit_and_changes(tmp_path):
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "x").write_text("1")
    subprocess.run([*git, "add", "x"], check=True)
    subprocess.run([*git, "commit", "-q", "--no-verify", "-m", "m"], check=True)
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "new").write_text("untracked files do not count")
    assert git_state(tmp_path)["dirty"] is False
    (tmp_path / "x").write_text("2")
    assert git_state(tmp_path) == {"commit": state["commit"], "dirty": True}


def test_devices_are_chosen_by_name():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "meta", "cuda:99"):
        with pytest.raises(ConfigError, match=name):
            pick_device(name)
