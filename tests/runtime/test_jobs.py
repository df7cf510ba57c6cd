"""local/submit.py on this machine: commands, arrays, logs, failures, and what it remembers."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SUBMIT = Path(__file__).resolve().parents[2] / "local/submit.py"


def submit(cwd: Path, *words: object, code: int = 0) -> subprocess.CompletedProcess:
    line = [sys.executable, "-I", "-S", str(SUBMIT), *map(str, words)]
    result = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert result.returncode == code, result.stderr
    return result


def test_one_command_with_and_without_a_log(tmp_path):
    assert submit(tmp_path, "--", "echo", "a  b").stdout == "a  b\n"
    result = submit(tmp_path, "--log", "log/x.log", "--", "sh", "-c", "echo out; echo err >&2")
    assert result.stdout == result.stderr == ""
    assert (tmp_path / "log/x.log").read_text() == "out\nerr\n"
    assert submit(tmp_path, "--", "sh", "-c", "exit 4", code=4).stdout == ""


def test_an_array_runs_every_task_with_its_number(tmp_path):
    submit(tmp_path, "--log", "JOBS/JOB.log", "--array", "3-12%3", "--", "echo", "shard_JOB/13", "JOBS 1JOB éJOB")
    logs = {int(p.stem): p.read_text() for p in (tmp_path / "JOBS").iterdir()}
    assert logs == {n: f"shard_{n}/13 JOBS 1JOB éJOB\n" for n in range(3, 13)}


def test_only_so_many_tasks_run_at_the_same_time(tmp_path):
    # find, since ls names what ended between its two looks; one line of output a file.
    task = "touch run.JOB; find . -name run.\\* | wc -l; sleep 0.2; rm run.JOB"
    submit(tmp_path, "--log", "JOB.log", "--array", "0-5%2", "--", "sh", "-c", task)
    counts = [int((tmp_path / f"{n}.log").read_text()) for n in range(6)]
    assert max(counts) == 2


def test_a_failed_task_is_named_and_starts_no_others(tmp_path):
    task = "echo working; [ JOB != 1 ] || exit 7; touch done.JOB"
    result = submit(tmp_path, "--log", "log.JOB", "--array", "0-5%1", "--", "sh", "-c", task, code=7)
    assert result.stdout == ""
    assert "failed with exit code 7: task 1 of 0-5: sh -c" in result.stderr
    assert "its log log.1:\nworking\n" in result.stderr
    assert sorted(p.name for p in tmp_path.glob("done.*")) == ["done.0"]


def test_tasks_that_fail_differently_end_in_exit_code_1(tmp_path):
    result = submit(tmp_path, "--log", "JOB", "--array", "3-4%2", "--", "sh", "-c", "sleep 1; exit JOB", code=1)
    assert "exit code 3: task 3" in result.stderr and "exit code 4: task 4" in result.stderr
    assert "exit code 137: task 0" in submit(
        tmp_path, "--log", "JOB", "--array", "0-1%1", "--", "sh", "-c", "kill -9 $$", code=137
    ).stderr  # fmt: skip


def test_what_is_missing_alone_runs_again(tmp_path):
    task = "[ JOB != 1 ] || [ -e allowed ] || exit 7; echo JOB >> ran"
    words = ["--state", "state", "--log", "log.JOB", "--array", "0-2%1", "--", "sh", "-c", task]
    submit(tmp_path, *words, code=7)
    (tmp_path / "allowed").touch()
    assert "1 of 3 tasks were finished before" in submit(tmp_path, *words).stderr
    assert (tmp_path / "ran").read_text() == "0\n1\n2\n"
    submit(tmp_path, *words)
    assert (tmp_path / "ran").read_text() == "0\n1\n2\n"
    # Another command is other work, and so is another division of it.
    submit(tmp_path, *words[:-1], task + " ")
    words[words.index("0-2%1")] = "0-3%1"
    submit(tmp_path, *words)
    assert (tmp_path / "ran").read_text() == "0\n1\n2\n" * 2 + "0\n1\n2\n3\n"


def test_a_full_disk_is_named_and_no_bug(tmp_path):
    words = ["--state", "state", "--log", "JOB.log", "--array", "0-1%1", "--", "true"]
    line = shlex.join([sys.executable, "-I", "-S", str(SUBMIT), *words])
    result = subprocess.run(["bash", "-c", f"ulimit -f 0; {line}"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    file = next(tmp_path.glob("state/*/0.done"))
    assert f"error: cannot write {file}: File too large; make room and run this again" in result.stderr
    assert "1 of 2 tasks were finished before" in submit(tmp_path, *words).stderr  # the file is there, and says it


def test_a_dry_run_prints_and_does_nothing(tmp_path):
    result = submit(tmp_path, "--dry-run", "--log", "l/JOB", "--array", "0-1", "--", "touch", "a b", "JOB")
    assert result.stdout == "touch 'a b' 0 > l/0 2>&1\ntouch 'a b' 1 > l/1 2>&1\n"
    assert list(tmp_path.iterdir()) == []


def test_the_ranks_of_one_machine_are_started_by_torchrun(tmp_path):
    words = ["--dry-run", "--ranks", "--gpus", "4", "--", "python3", "train.py", "--seed", "1"]
    words_there = shlex.split(submit(tmp_path, *words).stdout)
    assert words_there[2:] == "--standalone --nproc-per-node 4 train.py --seed 1".split()
    assert words_there[0] == "python3" and Path(words_there[1]).is_file() and words_there[1].endswith("torchrun.py")
    words[3] = "1"
    assert submit(tmp_path, *words).stdout == "python3 train.py --seed 1\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--array 5-2 -- true", "--array is '5-2'"),
        ("--array 0-2%0 -- true", "--array is '0-2%0'"),
        ("--array 0-2 --log x -- true", "must hold the word JOB"),
        ("--array 0-2 -- true", "--array 0-2 needs --log"),
        ("--arry 0-2 -- true", "unrecognized arguments: --arry"),
        ("--ranks --nodes 0 -- true", "--nodes is 0"),
        ("--nodes 2 -- true", "only --ranks"),
        ("--ranks --nodes 2 -- true", "this machine is one node"),
        ("--", "there is no command"),
        ("-- /no/such/program", "cannot start /no/such/program"),
        ("--log x -- /no/such/program", "cannot start /no/such/program"),
    ],
)
def test_wrong_usage_is_exit_code_2(tmp_path, arguments, message):
    assert message in submit(tmp_path, *arguments.split(), code=2).stderr


def test_tasks_end_with_what_started_them_and_have_time_to_save(tmp_path):
    task = "trap 'sleep 1; touch saved.JOB; exit 0' TERM; echo $$ > pid.JOB; sleep 300 & wait; wait"
    line = [sys.executable, "-I", "-S", str(SUBMIT), "--array", "0-1%2", "--log", "log.JOB", "--", "bash", "-c", task]
    process = subprocess.Popen(line, cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 60
    while len([p for p in tmp_path.glob("pid.*") if p.read_text()]) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    pids = [int(p.read_text()) for p in tmp_path.glob("pid.*")]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert sorted(p.name for p in tmp_path.glob("saved.*")) == ["saved.0", "saved.1"]
    assert [pid for pid in pids if alive(pid)] == []


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # it may end between opening and reading
        return False
    return state != "Z"


def test_it_imports_nothing_heavy():
    code = (
        "import runpy, sys; sys.argv = ['submit.py', '--dry-run', '--', 'true']\n"
        f"try: runpy.run_path({str(SUBMIT)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'lhotse', 'yaml', 'logging'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]" and os.access(SUBMIT, os.X_OK)
