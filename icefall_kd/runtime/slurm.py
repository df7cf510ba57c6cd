"""Commands and arrays of tasks as Slurm jobs: the script, its submission, and waiting for it.  Standard library only.

A job that was submitted is noted in the state folder (``jobs.State``), and each task leaves a file there when it
ends.  So whoever waits may be killed: started again, it submits what is missing and waits for what is still there.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from icefall_kd.errors import ConfigError
from icefall_kd.runtime.jobs import NUMBER_WORD, Ended, Ending, State, Work, report_failures, say

JOB_SH = Path(__file__).resolve().parents[2] / "local" / "job.sh"
# Slurm's own default, for a dry run where there is no Slurm.
DEFAULT_MAX_ARRAY_SIZE = 1001
# Seconds between two looks at the queue; they grow, since the controller serves everybody.
FIRST_POLL, LAST_POLL = 1.0, 30.0
# Seconds until a file that another node wrote is seen here: NFS remembers that there was none.
FILE_DELAY = 90.0
_OVER = set("COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL OUT_OF_MEMORY BOOT_FAIL DEADLINE REVOKED".split())
_TICK = 0.5


@dataclass(frozen=True)
class Chunk:
    """The tasks of one submission: an array's indexes must be below the cluster's MaxArraySize."""

    numbers: tuple[int, ...]
    base: int = 0
    """The number of index 0."""
    digits: int = 0
    """Digits of an index where ``base`` stands before it."""


def chunks_of(numbers: Sequence[int], max_array_size: int) -> list[Chunk]:
    """Divide tasks into arrays with indexes below ``max_array_size``.

    Where that takes several, an array has a power of ten of them: a number then is the digits of the base with those
    of the index behind them, which is how Slurm can name the log of a task by its number.
    """
    if max(numbers) < max_array_size:
        return [Chunk(tuple(numbers))]
    digits = len(str(max_array_size)) - 1
    size = 10**digits
    if digits == 0:
        raise ConfigError(f"MaxArraySize of this cluster is {max_array_size}: it has no job arrays")
    bases = sorted({number // size * size for number in numbers})
    return [Chunk(tuple(n for n in numbers if n // size * size == base), base, digits) for base in bases]


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as Slurm writes them: ``0-3,7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _directive(option: str, value: object) -> str:
    text = str(value)
    if not re.fullmatch(r"[\w@%+=:,./-]+", text):
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{option}={text}"


def _output(work: Work, chunk: Chunk) -> str:
    """Return the pattern by which Slurm names the log of a task."""
    log = os.path.abspath(work.log if work.log is not None else default_log(work)).replace("%", "%%")
    if work.array is None:
        return log
    number = f"{chunk.base // 10**chunk.digits}%{chunk.digits}a" if chunk.base else "%a"
    return NUMBER_WORD.sub(number, log)


def default_log(work: Work) -> Path:
    """Return the log of a job that has none of its own."""
    return work.log_dir / f"{work.name}.log"


def script(work: Work, chunk: Chunk, state: State) -> str:
    """Return the script that sbatch gets for the tasks of a chunk."""
    ranks = work.ranks_per_node
    options: list[tuple[str, object]] = [("job-name", work.name)]
    if work.array is not None:
        throttle = f"%{work.array.at_once}" if work.array.at_once else ""
        options.append(("array", ranges([number - chunk.base for number in chunk.numbers]) + throttle))
    options += [("nodes", work.nodes), ("ntasks-per-node", ranks), ("cpus-per-task", max(1, work.cpus // ranks))]
    if work.gpus:
        options.append(("gres", f"gpu:{work.gpus}"))
    options += [(name, value) for name in ("mem", "time", "partition") if (value := getattr(work, name)) is not None]
    if work.until is not None:
        options.append(("signal", f"B:USR1@{work.warning}"))
    options += [("chdir", os.getcwd()), ("output", _output(work, chunk)), ("open-mode", "append"), ("export", "ALL")]
    lines = ["#!/usr/bin/env bash", *(_directive(name, value) for name, value in options), "#SBATCH --requeue"]
    # A rank that fails tells the others, which end with its exit code: no reason to kill them at once.  The number of
    # cores is no longer inherited from the job since Slurm 22.05.
    launch = ["srun", "--kill-on-bad-exit=0", "--wait=120", f"--cpus-per-task={max(1, work.cpus // ranks)}"]
    command = [*(launch if work.nodes * ranks > 1 else []), *work.command]
    number, quoted = "0", [shlex.quote(word) for word in command]
    if work.array is not None:
        number = '"$number"'
        quoted = [number.join(part and shlex.quote(part) for part in NUMBER_WORD.split(w)) or "''" for w in command]
        lines.append(f"number=$((SLURM_ARRAY_TASK_ID + {chunk.base}))")
    lines += ["command=(", *(f"  {word}" for word in quoted), ")", f". {shlex.quote(str(JOB_SH))}"]
    until = "" if work.until is None else f"--until {shlex.quote(str(work.until))} "
    lines.append(f'run_task {until}--left {shlex.quote(str(state.folder))}/{number} -- "${{command[@]}}"')
    return "\n".join(lines) + "\n"


def _environment() -> dict[str, str]:
    """Return the environment without what describes a job that this process itself may be in."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}


def _ask(*command: str) -> str | None:
    """Return what a command of Slurm prints; None: it failed, as when the controller is away for a while."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=_environment())
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        say(f"{command[0]}: {done.stderr.strip()}")
        return None
    return done.stdout


def max_array_size() -> int:
    """Return the cluster's MaxArraySize."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config") or "", re.MULTILINE)
    return int(found[1]) if found else DEFAULT_MAX_ARRAY_SIZE


@dataclass(frozen=True)
class Seen:
    """A task in the queue."""

    state: str
    reason: str


def queue() -> dict[tuple[str, int], Seen] | None:
    """Return this user's tasks, those that ended minutes ago included, by job id and index (0 without an array)."""
    listed = _ask("squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%F %K %T %r")
    if listed is None:
        return None
    tasks = {}
    for line in listed.splitlines():
        job, index, state, reason = line.split(maxsplit=3)
        tasks[job, int(index) if index.isdigit() else 0] = Seen(state, reason)
    return tasks


def run(work: Work, dry_run: bool = False) -> int:
    """Submit what is missing of the work, wait for all of it, and return its exit code.

    Raises:
        ConfigError: there is no Slurm here, or it refuses the job.
    """
    if dry_run:
        state = State(work, work.state or Path(".jobs"))
        size = max_array_size() if shutil.which("scontrol") else DEFAULT_MAX_ARRAY_SIZE
        print("\n".join(script(work, chunk, state) for chunk in chunks_of(work.numbers, size)), end="")
        return 0
    for program in ("sbatch", "squeue", "scontrol", "scancel"):
        if shutil.which(program) is None:
            raise ConfigError(
                f"the backend is slurm, but {program} is not in PATH: start this where jobs are submitted (perhaps "
                "after `module load slurm`), or with the backend local (cmd_backend=local in cmd.sh)"
            )
    if work.state is not None:
        return _Submission(work, State(work, work.state)).run()
    # Beside the work, since nodes may share no other folder with this one.
    with tempfile.TemporaryDirectory(prefix=".jobs-", dir=".") as folder:
        return _Submission(work, State(work, Path(folder))).run()


class _Submission:
    def __init__(self, work: Work, state: State) -> None:
        self.work, self.state = work, state
        self.followed = default_log(work).absolute() if work.log is None else None
        self.position = 0
        self.waiting: dict[int, tuple[str, int]] = {}  # job id and index by number
        self.failures: dict[int, tuple[str, int]] = {}
        self.gone: dict[int, float] = {}  # since when a task is no longer in the queue
        self.told = ""

    def run(self) -> int:
        missing = [number for number in self.work.numbers if not self.state.is_done(number)]
        if len(missing) < len(self.work.numbers):
            say(f"{len(self.work.numbers) - len(missing)} of {len(self.work.numbers)} tasks were finished before")
        self._find_old(missing)
        if self.followed is not None and self.followed.exists():
            self.position = self.followed.stat().st_size
        missing = [number for number in missing if number not in self.waiting]
        try:
            with Ending.by(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as ending:
                if missing:
                    self._submit(missing)
                self._wait(ending)
        except Ended as ended:
            ids = sorted({job for job, _ in self.waiting.values()})
            if ended.number != signal.SIGHUP:
                say(f"cancelling {', '.join(ids)}")
                _ask("scancel", *ids)
            else:  # the terminal was closed
                say(f"{', '.join(ids)} go on; the same command waits for them")
            return ended.exit_code
        if not self.failures:
            return 0
        return report_failures(self.work, self.failures, {number: self._log(number) for number in self.failures})

    def _log(self, number: int) -> Path | None:
        return self.work.log_of(number) or self.followed

    def _find_old(self, missing: list[int]) -> None:
        """Wait for tasks of an earlier submission that are still in the queue, instead of starting them twice."""
        jobs = self.state.jobs()
        if not jobs:
            return
        while (tasks := queue()) is None:
            time.sleep(LAST_POLL)
        for job in jobs:
            for number in missing:
                seen = tasks.get((job["id"], number - job["base"]))
                if seen is not None and seen.state not in _OVER:
                    self.waiting[number] = job["id"], number - job["base"]
        if self.waiting:
            ids = ", ".join(sorted({job for job, _ in self.waiting.values()}))
            say(f"{len(self.waiting)} tasks are still there in job {ids}: waiting for them")

    def _submit(self, missing: list[int]) -> None:
        self.state.folder.mkdir(parents=True, exist_ok=True)
        for number in missing:
            self.state.forget_failure(number)
            log = self._log(number)
            log.parent.mkdir(parents=True, exist_ok=True)
            if self.followed is None and self.work.until is None:
                log.unlink(missing_ok=True)
        previous = None
        in_turn = self.work.array is not None and self.work.array.at_once is not None
        for chunk in chunks_of(missing, max_array_size() if self.work.array else DEFAULT_MAX_ARRAY_SIZE):
            text = script(self.work, chunk, self.state)
            words = ["sbatch", "--parsable", *self.work.sbatch]
            if in_turn and previous is not None:
                words.append(f"--dependency=afterany:{previous}")
            # In a session of its own, so that Ctrl-C cannot come between the submission and its note.
            done = subprocess.run(
                words, input=text, capture_output=True, text=True, env=_environment(), start_new_session=True
            )
            if done.returncode:
                raise ConfigError(f"sbatch refused the job: {done.stderr.strip()}; the script was\n{text}")
            previous = done.stdout.strip().partition(";")[0]
            self.state.add_job({"id": previous, "base": chunk.base})
            self.waiting |= {number: (previous, number - chunk.base) for number in chunk.numbers}
            tasks = f", tasks {ranges(chunk.numbers)}" if self.work.array else ""
            say(f"submitted job {previous} ({self.work.name}{tasks}), log {self.work.log or self.followed}")

    def _wait(self, ending: Ending) -> None:
        interval, next_look = FIRST_POLL, time.monotonic()
        while self.waiting:
            for number in [number for number in self.waiting if self.state.is_done(number)]:
                del self.waiting[number]
            if self.waiting and time.monotonic() >= next_look:
                self._look()
                next_look, interval = time.monotonic() + interval, min(1.5 * interval, LAST_POLL)
            self._follow()
            with ending.here():
                time.sleep(_TICK if self.waiting else 0)

    def _look(self) -> None:
        """See in the queue which tasks are over; those that left no word of success have failed."""
        tasks = queue()
        if tasks is None:
            return
        counts: Counter[str] = Counter()
        for number, key in list(self.waiting.items()):
            seen = tasks.get(key)
            if seen is not None and seen.state not in _OVER:
                counts[seen.state.lower() + (f" ({seen.reason})" if seen.state == "PENDING" else "")] += 1
                self.gone.pop(number, None)
                continue
            code = self.state.failure(number)
            ended = None if seen is None else seen.state
            since = self.gone.setdefault(number, time.monotonic())
            if ended not in (None, "COMPLETED", "FAILED"):  # it says more than the exit code of what was killed
                self.failures[number] = f"ended as {ended} in job {key[0]}", 1
            elif code is not None:
                self.failures[number] = f"failed with exit code {code}", code
            elif time.monotonic() > since + FILE_DELAY and not self.state.is_done(number):
                self.failures[number] = f"left job {key[0]} without a word (squeue: {ended})", 1
            if number in self.failures:
                del self.waiting[number]
        told = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
        if told and told != self.told:
            say(f"{self.work.name}: {told}")
            self.told = told

    def _follow(self) -> None:
        """Print what the log of a single job has got."""
        if self.followed is None:
            return
        try:
            with open(self.followed, "rb") as stream:
                stream.seek(self.position)
                new = stream.read()
        except FileNotFoundError:
            return
        self.position += len(new)
        if new:
            os.write(1, new)
