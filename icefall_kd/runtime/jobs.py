"""Commands and arrays of tasks: what they are, what they leave, and how they run on this machine.

Standard library only, so that local/submit.py starts quickly.  ``runtime/slurm.py`` runs the same on a cluster.
"""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from icefall_kd.errors import ConfigError

# torchrun that keeps the exit code of a rank.
_TORCHRUN = Path(__file__).resolve().parents[2] / "local/torchrun.py"

# The word of a command and of its log's name that becomes the number of a task: between letters or digits, as in a
# folder JOBS, it is none.
NUMBER = "JOB"
NUMBER_WORD = re.compile(rf"(?<![^\W_]){NUMBER}(?![^\W_])")
# Seconds that tasks have to save and end after SIGTERM, before they are killed.
TERM_GRACE = 120
_LAST_LINES = 20


@dataclass(frozen=True)
class Array:
    """The numbers of an array's tasks, and how many of these run at the same time."""

    first: int
    last: int
    at_once: int | None = None
    """None: as many as the machine has cores, or the cluster has room for."""

    @classmethod
    def parse(cls, text: str) -> "Array":
        """Read ``FIRST-LAST`` or ``FIRST-LAST%AT_ONCE``.

        Raises:
            ConfigError: it is something else.
        """
        match = re.fullmatch(r"(\d+)-(\d+)(?:%([1-9]\d*))?", text)
        if match is None or int(match[1]) > int(match[2]):
            raise ConfigError(f"--array is {text!r}; it must be FIRST-LAST or FIRST-LAST%AT_ONCE, as in 0-31%8")
        return cls(int(match[1]), int(match[2]), int(match[3]) if match[3] else None)

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


@dataclass(frozen=True, kw_only=True)
class Work:
    """A command, or an array of tasks with one."""

    command: tuple[str, ...]
    array: Array | None = None
    log: str | None = None
    """File of stdout and stderr, with NUMBER for a task's; None: the terminal."""
    name: str = "job"
    log_dir: Path = Path("log")
    """Folder of the log of a job that has no ``log``."""
    state: Path | None = None
    """Folder that remembers finished tasks and submitted jobs from one run to the next; None: nothing does."""
    until: Path | None = None
    """A file that the command writes when it is complete: ended without it, it was told to stop, and goes on when it
    is started again."""
    ranks: bool = False
    """Start the command once for each GPU of each node (once on a node without), as the ranks of one training."""
    nodes: int = 1
    gpus: int = 0
    """On each node."""
    cpus: int = 1
    """Cores on each node."""
    mem: str | None = None
    time: str | None = None
    partition: str | None = None
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, word by word."""
    warning: int = 120
    """Seconds before the end of the time limit at which a command with ``until`` is told to stop."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ConfigError: no command, or numbers out of range, or tasks that would share a log.
        """
        if not self.command:
            raise ConfigError("there is no command; it stands behind --")
        for name, least in (("nodes", 1), ("gpus", 0), ("cpus", 1), ("warning", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be at least {least}")
        if self.nodes > 1 and not self.ranks:
            raise ConfigError(f"--nodes is {self.nodes}, but only --ranks starts the command on more than one")
        if self.array is not None and self.array.first < self.array.last:
            if self.log is None:
                raise ConfigError(f"--array {self.array} needs --log FILE with the word {NUMBER} in it")
            if not NUMBER_WORD.search(self.log):
                raise ConfigError(f"--log is {self.log!r}; with --array it must hold the word {NUMBER}")
            if self.until is not None:
                raise ConfigError("--until is of one command, and not of an array")

    @property
    def numbers(self) -> list[int]:
        """The numbers of all tasks; 0 for a single command."""
        return [0] if self.array is None else list(range(self.array.first, self.array.last + 1))

    @property
    def ranks_per_node(self) -> int:
        """Processes on each node."""
        return max(1, self.gpus) if self.ranks else 1

    def words(self, number: int) -> list[str]:
        """Return the command of a task."""
        if self.array is None:
            return list(self.command)
        return [NUMBER_WORD.sub(str(number), word) for word in self.command]

    def log_of(self, number: int) -> Path | None:
        """Return the log of a task."""
        if self.log is None or self.array is None:
            return None if self.log is None else Path(self.log)
        return Path(NUMBER_WORD.sub(str(number), self.log))

    def describe(self, number: int) -> str:
        """Return a task as messages name it."""
        task = "" if self.array is None else f"task {number} of {self.array}: "
        return task + shlex.join(self.words(number))


class State:
    """What the tasks of one command left: which ones finished, how others failed, and the jobs that were submitted."""

    def __init__(self, work: Work, folder: Path) -> None:
        # Another command, or another division into tasks, is other work.
        text = json.dumps([work.command, str(work.array) if work.array else None, str(work.until)])
        self.folder = (folder / hashlib.sha256(text.encode()).hexdigest()[:16]).absolute()

    def done_file(self, number: int) -> Path:
        """The file whose presence says that a task finished."""
        return self.folder / f"{number}.done"

    def failed_file(self, number: int) -> Path:
        """The file that holds the exit code of a failed task."""
        return self.folder / f"{number}.failed"

    def is_done(self, number: int) -> bool:
        """Did this task finish?"""
        return self.done_file(number).exists()

    def record(self, number: int, code: int) -> None:
        """Note how a task ended."""
        file = (self.done_file if code == 0 else self.failed_file)(number)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{code}\n")
        except OSError as error:
            error.filename = str(file)  # a write that fails names none
            raise

    def failure(self, number: int) -> int | None:
        """Return the exit code of a failed task; None: it has not failed."""
        try:
            return int(self.failed_file(number).read_text() or 1)
        except FileNotFoundError:
            return None

    def forget_failure(self, number: int) -> None:
        """A failed task runs again."""
        self.failed_file(number).unlink(missing_ok=True)

    @property
    def jobs_file(self) -> Path:
        """Submitted jobs, one JSON line each."""
        return self.folder / "jobs.jsonl"

    def jobs(self) -> list[dict]:
        """Return what :meth:`add_job` noted."""
        try:
            return [json.loads(line) for line in self.jobs_file.read_text().splitlines()]
        except FileNotFoundError:
            return []

    def add_job(self, job: dict) -> None:
        """Note a submitted job."""
        with open(self.jobs_file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(job) + "\n")


def say(message: str) -> None:
    """Write a line to stderr as the stage engine does."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} (submit) {message}", file=sys.stderr, flush=True)


def report_failures(work: Work, failures: dict[int, tuple[str, int]], logs: dict[int, Path | None]) -> int:
    """Name each failed task, its log and the last lines of it; return the exit code of the whole.

    Args:
        work: what ran.
        failures: how (in words, as "failed with exit code 7") and the exit code, by number.
        logs: the log of each task.
    """
    for number, (how, _) in sorted(failures.items()):
        say(f"{how}: {work.describe(number)}")
        log = logs.get(number)
        if log is None:
            continue
        try:
            with open(log, "rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096))
                lines = stream.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
        except OSError as error:
            say(f"its log {log} cannot be read: {error.strerror}")
            continue
        print("\n".join([f"the last lines of its log {log}:", *lines]), file=sys.stderr, flush=True)
    codes = {code for _, code in failures.values()}
    return codes.pop() if len(codes) == 1 else 1


class Ended(Exception):
    """A signal that ends this process arrived."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.exit_code = number, 128 + number


class Ending:
    """Signals that end this process, at the places alone where it may end: not between a start and its note."""

    def __init__(self) -> None:
        self.arrived: int | None = None
        self.open = False

    @classmethod
    @contextmanager
    def by(cls, *signals: signal.Signals) -> Iterator["Ending"]:
        """Note these signals."""
        ending = cls()
        before = {number: signal.signal(number, ending._note) for number in signals}
        try:
            yield ending
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.arrived = number
        if self.open:
            raise Ended(number)

    @contextmanager
    def here(self) -> Iterator[None]:
        """Raise :class:`Ended` in this block, if a signal has arrived or does so now."""
        self.open = True
        try:
            if self.arrived is not None:
                raise Ended(self.arrived)
            yield
        finally:
            self.open = False


def run_here(work: Work) -> int:
    """Run the work on this machine and return its exit code; a single command takes this process's place.

    Raises:
        ConfigError: the work asks for several nodes, or the command does not exist.
    """
    if work.nodes > 1:
        raise ConfigError(f"--nodes is {work.nodes}, but the backend is local: this machine is one node")
    if work.array is None and work.log is None:
        _take_over(words_here(work, 0))
    return _Pool(work).run()


def words_here(work: Work, number: int) -> list[str]:
    """Return the command of a task as it is started on this machine: under torchrun where it has several ranks."""
    words = work.words(number)
    if work.ranks_per_node == 1:
        return words
    script = words[1:] if Path(words[0]).name in ("python", "python3") else words  # torchrun starts Python itself
    launch = ["python3", str(_TORCHRUN), "--standalone", "--nproc-per-node", str(work.ranks_per_node)]
    return [*launch, *script]


def _take_over(words: list[str]) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    try:
        os.execvp(words[0], words)
    except OSError as error:
        raise ConfigError(f"cannot start {words[0]}: {error.strerror}") from error


class _Pool:
    """Tasks side by side on this machine, each with its log, in sessions of their own."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.state = State(work, work.state) if work.state is not None and work.array is not None else None
        self.running: dict[int, tuple[int, subprocess.Popen]] = {}  # by process id
        self.failures: dict[int, tuple[str, int]] = {}

    def run(self) -> int:
        work, waiting = self.work, list(self.work.numbers)
        if self.state is not None:
            waiting = [number for number in waiting if not self.state.is_done(number)]
            if len(waiting) < len(work.numbers):
                say(f"{len(work.numbers) - len(waiting)} of {len(work.numbers)} tasks were finished before")
        at_once = (work.array.at_once if work.array else 1) or os.cpu_count() or 1
        try:
            with Ending.by(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as ending:
                while waiting or self.running:
                    while waiting and len(self.running) < at_once and not self.failures:
                        self._start(waiting.pop(0))
                    if not self.running:
                        break  # a failed task lets the running ones end, and starts no more
                    with ending.here():
                        pid, status = os.wait()
                    self._note(pid, status)
        except Ended as ended:
            return ended.exit_code
        finally:
            self._end()
        if not self.failures:
            return 0
        return report_failures(work, self.failures, {number: work.log_of(number) for number in self.failures})

    def _start(self, number: int) -> None:
        log = self.work.log_of(number)
        if self.state is not None:
            self.state.forget_failure(number)
        stream = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            stream = open(log, "wb")
        try:
            process = subprocess.Popen(
                words_here(self.work, number),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=None if stream is None else subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(f"cannot start {self.work.words(number)[0]}: {error.strerror}") from error
        finally:
            if stream is not None:
                stream.close()
        self.running[process.pid] = number, process

    def _note(self, pid: int, status: int) -> None:
        if pid not in self.running:
            return
        number, process = self.running.pop(pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        if code:
            self.failures[number] = f"failed with exit code {code}", code
        if self.state is not None:
            self.state.record(number, code)

    def _end(self) -> None:
        """End what still runs: with time to save, then by force."""
        for signum, seconds in ((signal.SIGTERM, TERM_GRACE), (signal.SIGKILL, 10)):
            for pid in list(self.running):
                try:
                    os.killpg(pid, signum)
                except ProcessLookupError:  # it ended when the signal came
                    del self.running[pid]
            deadline = time.monotonic() + seconds
            while self.running and time.monotonic() < deadline:
                try:
                    pid, _ = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:  # the signal came between the end of the last and its note
                    self.running.clear()
                    return
                self.running.pop(pid, None)
                if pid == 0:
                    time.sleep(0.05)
