"""run_cmd of local/run_cmd.sh, through the cmd.sh of a recipe."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

CMD = Path(__file__).resolve().parents[2] / "egs/librispeech/cmd.sh"


def bash(command: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
    script = f"set -euo pipefail\n. {CMD}\n{command}\n"
    result = subprocess.run(["bash", "-c", script], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert result.returncode == code, result.stderr
    return result


def test_one_command_with_and_without_a_log(tmp_path):
    assert bash("run_cmd -- echo 'a  b'", tmp_path).stdout == "a  b\n"
    result = bash("run_cmd --log log/x.log -- sh -c 'echo out; echo err >&2'; echo after", tmp_path)
    assert result.stdout == "after\n"
    assert (tmp_path / "log/x.log").read_text() == "out\nerr\n"


def test_an_array_runs_every_task_with_its_number(tmp_path):
    bash("run_cmd --log log/JOB.log --array 3-12 --max-jobs 3 -- echo shard JOB/13", tmp_path)
    logs = {int(p.stem): p.read_text() for p in (tmp_path / "log").iterdir()}
    assert logs == {n: f"shard {n}/13\n" for n in range(3, 13)}


def test_at_most_max_jobs_tasks_run_at_the_same_time(tmp_path):
    # find, since ls names what ended between its two looks; one line of output a file.
    task = "touch run.JOB; find . -name run.\\* | wc -l; sleep 0.2; rm run.JOB"
    bash(f"run_cmd --log JOB.log --array 0-5 --max-jobs 2 -- sh -c '{task}'", tmp_path)
    counts = [int((tmp_path / f"{n}.log").read_text()) for n in range(6)]
    assert max(counts) == 2


def test_a_failed_task_is_named_and_stops_the_script(tmp_path):
    task = "echo working; [ JOB != 1 ] || exit 7; touch done.JOB"
    command = f"run_cmd --log log.JOB --array 0-5 --max-jobs 1 -- sh -c '{task}'; echo not reached"
    result = bash(command, tmp_path, code=1)
    assert result.stdout == ""
    assert "failed with exit code 7: task 1 of 0-5: sh -c" in result.stderr
    assert "its log log.1:\nworking\n" in result.stderr
    assert sorted(p.name for p in tmp_path.glob("done.*")) == ["done.0"]


def test_a_dry_run_prints_and_does_nothing(tmp_path):
    result = bash("run_cmd --dry-run --log l/JOB --array 0-1 -- touch 'a b' JOB", tmp_path)
    assert result.stdout == "touch a\\ b 0 > l/0 2>&1\ntouch a\\ b 1 > l/1 2>&1\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--array 5-2 -- true", "--array is '5-2'"),
        ("--array 0-2 --log x -- true", "must hold the word JOB"),
        ("--arry 0-2 -- true", "unknown option '--arry'"),
        ("--max-jobs 0 -- true", "--max-jobs N"),
        ("--", "a command after --"),
    ],
)
def test_wrong_usage_is_exit_code_2(tmp_path, arguments, message):
    assert message in bash(f"run_cmd {arguments}", tmp_path, code=2).stderr


def test_tasks_end_with_the_shell_that_started_them(tmp_path):
    task = f". {CMD}; run_cmd --array 0-1 --max-jobs 2 -- sh -c 'echo $$ > pid.JOB; exec sleep 60'"
    process = subprocess.Popen(["bash", "-c", task], cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("pid.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    pids = [int(p.read_text()) for p in tmp_path.glob("pid.*")]
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=20)
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [pid for pid in pids if alive(pid)] == []


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # it may end between opening and reading
        return False
    return state != "Z"
