"""Slurm jobs without Slurm: the script that sbatch gets, run by a real bash, and stand-ins for Slurm's commands."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from icefall_kd.cli import parse_config
from icefall_kd.config import TrainConfig
from icefall_kd.runtime.slurm import chunks_of, ranges

REPO = Path(__file__).resolve().parents[2]
SUBMIT = REPO / "local/submit.py"
# sbatch runs each task at once, with the variables of a job, in the background; squeue lists what still runs.
SLURM = {
    "sbatch": r"""
import json, os, pathlib, re, subprocess, sys
root = pathlib.Path(os.environ["FAKE_SLURM"])
script = sys.stdin.read()
job = str(1 + len(list(root.glob("*.sh"))))
(root / f"{job}.sh").write_text(script)
(root / f"{job}.words").write_text(json.dumps(sys.argv[1:]))
found = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script, re.M))
indexes = []
for part in found.get("array", "").partition("%")[0].split(",") if "array" in found else []:
    first, _, last = part.partition("-")
    indexes += range(int(first), int(last or first) + 1)
for index in indexes or [None]:
    log = re.sub(r"%(\d*)a", lambda m: str(index).zfill(int(m[1] or 0)), found["output"].strip('"')).replace("%%", "%")
    variables = {"SLURM_JOB_ID": job if index is None else f"{job}{index}"}
    if index is not None:
        variables["SLURM_ARRAY_TASK_ID"] = str(index)
    with open(log, "a") as stream:
        process = subprocess.Popen(
            ["bash", str(root / f"{job}.sh")], env={**os.environ, **variables}, start_new_session=True,
            cwd=found["chdir"].strip('"'), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
    (root / f"{job}.{'N/A' if index is None else index}.task".replace("/", "-")).write_text(str(process.pid))
print(job)
""",
    "squeue": r"""
import os, pathlib
root = pathlib.Path(os.environ["FAKE_SLURM"])
for task in root.glob("*.task"):
    job, index, _ = task.name.split(".")
    try:
        alive = pathlib.Path(f"/proc/{task.read_text()}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        alive = False
    if alive:
        print(job, index.replace("-", "/"), "RUNNING", "None")
    elif (root / "states").exists():
        print(job, index.replace("-", "/"), (root / "states").read_text().strip(), "None")
""",
    "scontrol": r"""
import os, pathlib, sys
root = pathlib.Path(os.environ["FAKE_SLURM"])
with open(root / "scontrol", "a") as stream:
    print(*sys.argv[1:], file=stream)
if sys.argv[1:] == ["show", "config"]:
    print("MaxArraySize            = 11")
elif "job" in sys.argv:
    print("JobId=1 JobState=" + os.environ.get("JOB_STATE", "RUNNING") + " Reason=None")
""",
    "scancel": r"""
import os, pathlib, signal, sys
root = pathlib.Path(os.environ["FAKE_SLURM"])
(root / "cancelled").write_text(" ".join(sys.argv[1:]))
for task in root.glob("*.task"):
    if task.name.split(".")[0] in sys.argv[1:]:
        os.killpg(int(task.read_text()), signal.SIGTERM)
""",
}


class Cluster:
    """A folder with the commands of Slurm in front of PATH."""

    def __init__(self, root: Path) -> None:
        self.root, self.work = root / "slurm", root / "a folder"
        self.work.mkdir()
        (root / "bin").mkdir()
        self.root.mkdir()
        for name, code in SLURM.items():
            program = root / "bin" / name
            program.write_text(f"#!{sys.executable} -IS\n{code}")
            program.chmod(0o755)
        self.env = {**os.environ, "PATH": f"{root / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(self.root)}
        self.env["SLURM_NTASKS"] = "7"  # as if the one who submits were in a job

    def start(self, *words: object) -> subprocess.Popen:
        line = [sys.executable, "-I", "-S", str(SUBMIT), "--backend", "slurm", *map(str, words)]
        return subprocess.Popen(
            line, cwd=self.work, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    def submit(self, *words: object, code: int = 0) -> tuple[str, str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=240)
        assert process.returncode == code, err
        return out, err

    def scripts(self) -> list[str]:
        return [p.read_text() for p in sorted(self.root.glob("*.sh"), key=lambda p: int(p.stem))]

    def arrays(self) -> list[str]:
        return [re.search("--array=(.*)", script)[1] for script in self.scripts()]


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize("size", [2, 7, 11, 100, 1001])
@pytest.mark.parametrize("numbers", [[0], [3, 4, 9], list(range(37)), [5, 999, 1000, 1001, 2345]])
def test_chunks_hold_every_task_once_below_the_largest_index(numbers, size):
    if size < 10 and max(numbers) >= size:
        with pytest.raises(ValueError, match="MaxArraySize of this cluster is"):
            chunks_of(numbers, size)
        return
    chunks = chunks_of(numbers, size)
    assert sorted(n for chunk in chunks for n in chunk.numbers) == numbers
    for chunk in chunks:
        for number in chunk.numbers:
            index = number - chunk.base
            assert 0 <= index < size
            # What Slurm makes of the log's pattern, e.g. 12%3a.
            shown = f"{chunk.base // 10**chunk.digits}{index:0{chunk.digits}d}" if chunk.base else str(index)
            assert shown == str(number)


def test_numbers_are_written_as_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


WORDS = ["a b", "it's", '"quoted"', "$HOME `id` $(id)", "semi;colon && true", "back\\slash", "*", "", "-n", "é"]
WORDS.append("tab\tnew\nline")


def test_every_word_arrives_as_it_was_given(cluster):
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    cluster.submit("--log", "one.log", "--", sys.executable, "-c", show, *WORDS)
    assert json.loads((cluster.work / "one.log").read_text().splitlines()[-1]) == WORDS
    numbered = ["JOB of JOB", "it's JOB", "JOBS"]
    cluster.submit("--log", "logs/x JOB%.log", "--array", "8-9", "--", sys.executable, "-c", show, *WORDS, *numbered)
    for number in (8, 9):
        line = (cluster.work / f"logs/x {number}%.log").read_text().splitlines()[-1]
        assert json.loads(line) == [*WORDS, f"{number} of {number}", f"it's {number}", "JOBS"]


def test_a_dry_run_prints_the_script_and_needs_no_slurm(tmp_path):
    line = [sys.executable, "-I", "-S", str(SUBMIT), "--backend", "slurm", "--dry-run", "--name", "train", "--ranks"]
    line += ["--nodes", "2", "--gpus", "4", "--cpus", "32", "--mem", "64G", "--time", "1-0", "--partition", "big"]
    line += ["--until", "exp/done", "--warning", "300", "--", "python3", "./train.py", "--lr", "0.1 "]
    env = {**os.environ, "PATH": "/usr/bin:/bin"}
    text = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    options = set(re.findall("^#SBATCH --(.*)$", text, re.M))
    assert options == {
        "job-name=train", "nodes=2", "ntasks-per-node=4", "cpus-per-task=8", "gres=gpu:4", "mem=64G", "time=1-0",
        "partition=big", "signal=B:USR1@300", f"chdir={tmp_path}", f"output={tmp_path}/log/train.log",
        "open-mode=append", "export=ALL", "requeue",
    }  # fmt: skip
    assert "\ncommand=(\n  srun\n  --kill-on-bad-exit=0\n  --wait=120\n  --cpus-per-task=8\n  python3\n" in text
    assert list(tmp_path.iterdir()) == []
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_without_sbatch_the_message_says_what_to_do(tmp_path):
    line = [sys.executable, "-I", "-S", str(SUBMIT), "--backend", "slurm", "--", "true"]
    done = subprocess.run(line, cwd=tmp_path, env={"PATH": "/nowhere"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sbatch is not in PATH" in done.stderr and "cmd_backend=local" in done.stderr


def test_what_a_single_job_prints_is_printed_here(cluster):
    task = "echo one; sleep 1; echo two >&2; echo $SLURM_NTASKS"
    out, err = cluster.submit("--name", "toy", "--", "bash", "-c", task)
    assert "\none\ntwo\n\n" in out  # and the variables of an outer job do not get there
    assert "submitted job 1 (toy), log" in err
    assert "one\ntwo\n" in (cluster.work / "log/toy.log").read_text()
    assert not list(cluster.work.glob(".jobs-*"))


def test_a_failed_task_is_named_with_its_log_and_alone_submitted_again(cluster):
    task = "echo task JOB; [ JOB != 1 ] || [ -e allowed ] || exit 7; echo JOB >> ran"
    words = ["--state", "state", "--log", "log/JOB.log", "--array", "0-3%4", "--", "bash", "-c", task]
    _, err = cluster.submit(*words, code=7)
    assert "failed with exit code 7: task 1 of 0-3: bash -c" in err and "its log log/1.log:" in err
    assert "\ntask 1\n" in err and "task 2\n" not in err
    (cluster.work / "allowed").touch()
    _, err = cluster.submit(*words)
    assert "3 of 4 tasks were finished before" in err
    assert sorted((cluster.work / "ran").read_text().split()) == ["0", "1", "2", "3"]
    assert cluster.arrays() == ["0-3%4", "1%4"]
    cluster.submit(*words)
    assert len(cluster.arrays()) == 2  # nothing is missing


def test_more_tasks_than_an_array_may_have_are_several_arrays(cluster):
    words = ["--log", "log/JOB.log", "--array", "5-23%2", "--", "bash", "-c", "echo number JOB"]
    cluster.submit(*words)
    assert cluster.arrays() == ["5-9%2", "0-9%2", "0-3%2"]
    for n in range(5, 24):
        assert (cluster.work / f"log/{n}.log").read_text().splitlines()[-1] == f"number {n}"
    # No more than two at the same time: one array after the other.
    submitted = [json.loads((cluster.root / f"{n}.words").read_text()) for n in (1, 2, 3)]
    assert [words[1:] for words in submitted] == [[], ["--dependency=afterany:1"], ["--dependency=afterany:2"]]


def test_a_task_that_slurm_ended_is_named_with_its_state(cluster):
    (cluster.root / "states").write_text("OUT_OF_MEMORY")
    words = ["--log", "x.log", "--", "bash", "-c", "kill -9 $PPID; sleep 1"]
    assert "ended as OUT_OF_MEMORY in job 1: bash -c" in cluster.submit(*words, code=1)[1]


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def test_jobs_outlive_who_submitted_them_and_are_not_submitted_twice(cluster):
    task = "touch started; while [ ! -e go ]; do sleep 0.1; done; echo JOB >> ran"
    words = ["--state", "state", "--log", "log.JOB", "--array", "0-1", "--", "bash", "-c", task]
    first = cluster.start(*words)
    wait_for(cluster.work / "started")
    first.send_signal(signal.SIGHUP)
    first.communicate(timeout=60)
    again = cluster.start(*words)
    while "still there in job 1" not in again.stderr.readline():
        assert again.poll() is None
    (cluster.work / "go").touch()
    again.communicate(timeout=120)
    assert again.returncode == 0 and cluster.arrays() == ["0-1"]
    assert sorted((cluster.work / "ran").read_text().split()) == ["0", "1"]


def test_ctrl_c_cancels_the_jobs(cluster):
    process = cluster.start("--state", "state", "--log", "x.log", "--", "bash", "-c", "touch started; exec sleep 300")
    wait_for(cluster.work / "started")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert (cluster.root / "cancelled").read_text() == "1"


# A command that goes on where it was: it counts to 3, saves at a signal, and writes the file when it is complete.
RESUMES = """
n=$(cat count 2> /dev/null || echo 0)
trap 'echo $n > count; exit 0' USR1
touch started.$n
while [ ! -e go ] && [ $n -lt 3 ]; do sleep 0.1; done
[ -e go ] && touch complete
"""


def job(cluster: Cluster, *words: str, **env: str) -> subprocess.Popen:
    text = f'. "{REPO}/local/job.sh"\nrun_task "$@"\n'
    line = ["bash", "-c", text, "job", *words]
    return subprocess.Popen(
        line, cwd=cluster.work, env={**cluster.env, "SLURM_JOB_ID": "5", **env}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_command_that_is_told_to_stop_saves_and_its_job_is_requeued(cluster, number):
    process = job(cluster, "--until", "complete", "--left", "left", "--", "bash", "-c", RESUMES)
    wait_for(cluster.work / "started.0")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and (cluster.work / "count").read_text() == "0\n", err
    assert (cluster.root / "scontrol").read_text().splitlines() == ["--oneliner show job 5", "requeue 5"]
    assert not list(cluster.work.glob("left*"))  # neither finished nor failed
    (cluster.work / "go").touch()
    process = job(cluster, "--until", "complete", "--left", "left", "--", "bash", "-c", RESUMES)
    assert process.wait(timeout=60) == 0
    assert (cluster.work / "left.done").exists()


def test_the_file_of_an_earlier_run_does_not_speak_for_a_command_that_a_signal_ended(cluster):
    """A training that is extended removes its old summary late: a signal may come first."""
    complete = cluster.work / "complete"
    complete.touch()
    words = ["--until", "complete", "--left", "left", "--", "bash", "-c"]
    process = job(cluster, *words, "touch started; exec sleep 99")
    wait_for(cluster.work / "started")
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "requeue 5" in (cluster.root / "scontrol").read_text(), err
    assert not list(cluster.work.glob("left*"))
    # Without a signal it is an error, and a command that had nothing to do is complete.
    assert job(cluster, *words, "exit 3").wait(timeout=60) == 3
    assert (cluster.work / "left.failed").read_text() == "3\n"
    assert job(cluster, *words, "true").wait(timeout=60) == 0
    assert (cluster.work / "left.done").exists()


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_a_cancelled_job_is_not_requeued(cluster, state):
    process = job(cluster, "--until", "complete", "--left", "left", "--", "bash", "-c", RESUMES, JOB_STATE=state)
    wait_for(cluster.work / "started.0")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and "requeue" not in (cluster.root / "scontrol").read_text()
    assert not (cluster.work / "left.done").exists()


def test_a_command_that_ends_without_its_file_was_told_to_stop_behind_our_back(cluster):
    process = job(cluster, "--until", "complete", "--", "true")
    assert process.wait(timeout=60) == 0
    assert "requeue 5" in (cluster.root / "scontrol").read_text()


def test_an_error_is_no_reason_to_requeue(cluster):
    process = job(cluster, "--until", "complete", "--left", "left", "--", "bash", "-c", "exit 3")
    assert process.wait(timeout=60) == 3
    assert (cluster.work / "left.failed").read_text() == "3\n" and not (cluster.root / "scontrol").exists()


def test_the_end_of_a_command_that_dies_with_the_signal_is_known(cluster):
    for n in range(12):
        process = job(cluster, "--left", f"left{n}", "--", "bash", "-c", f"touch s{n}; exec sleep 99")
        wait_for(cluster.work / f"s{n}")
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 143
        assert (cluster.work / f"left{n}.failed").read_text() == "143\n"


def test_sigterm_reaches_a_command_that_cannot_go_on(cluster):
    task = "trap 'touch told; exit 9' TERM; touch s; sleep 99 & wait"
    process = job(cluster, "--left", "left", "--", "bash", "-c", task)
    wait_for(cluster.work / "s")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 9 and (cluster.work / "told").exists()


@pytest.mark.parametrize("recipe", ["librispeech", "aishell"])
def test_the_example_starts_a_training_that_its_options_allow(cluster, monkeypatch, recipe):
    folder = REPO / "egs" / recipe
    srun = cluster.root.parent / "bin/srun"
    srun.write_text(f"#!{sys.executable} -IS\nimport json, os, sys\n"
                    'json.dump(sys.argv[1:], open(os.environ["WORDS"], "w"))\n')  # fmt: skip
    srun.chmod(0o755)
    script = folder / "slurm/train.sh"
    env = {**cluster.env, "WORDS": str(cluster.work / "words"), "SLURM_JOB_ID": "5"}
    done = subprocess.run(["bash", str(script)], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert "sbatch --nodes=2 slurm/train.sh" in script.read_text()  # options of the command line count more
    # It came back without its summary: requeued.
    assert done.returncode == 0 and "requeue 5" in (cluster.root / "scontrol").read_text(), done.stderr
    words = json.loads((cluster.work / "words").read_text())
    assert words[:3] == ["--kill-on-bad-exit=0", "--wait=120", "--cpus-per-task=8"]
    assert words[3:5] == ["python3", "./train.py"]
    monkeypatch.chdir(folder)
    config = parse_config(TrainConfig, words[5:])
    assert f"\nexp_dir={config.loop.exp_dir}\n" in script.read_text()
    directives = set(re.findall("^#SBATCH --(.*)$", script.read_text(), re.M))
    assert {"nodes=1", "signal=B:USR1@120", "requeue", "open-mode=append", "cpus-per-task=8"} <= directives
