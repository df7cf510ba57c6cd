"""Commands in forks of one warm process: quick to start, killed at chosen file operations, limited in file size."""

import multiprocessing
import os
import resource
import runpy
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
# File operations behind which a kill leaves something else than before it.
_OPERATIONS = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "open"}
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.preload"])


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code; negative: the signal that killed it."""
    err: str
    """What it printed on both streams."""
    operations: int
    """File operations that it did below the watched folder."""

    @property
    def message(self) -> str:
        """The one error that it ended with; an AssertionError when there is none, several, or a traceback."""
        assert "Traceback" not in self.err, self.err
        _, found = self.err.split(" ERROR [icefall_kd] ")
        return found


def run(script: str, *args: object, watch: Path, kill_at: int | None = None, max_file: int | None = None) -> Ended:
    """Run a script of the repository as its command line does.

    Args:
        script: relative to the repository.
        args: of its command line.
        watch: folder whose file operations count; the command's output goes to a file beside it.
        kill_at: the operation, from 0, before which its whole process group gets SIGKILL.
        max_file: bytes that a file may have (RLIMIT_FSIZE): more is what a full disk does.
    """
    log = watch.with_name(f"{watch.name}.output")
    log.parent.mkdir(parents=True, exist_ok=True)
    count = _context.Value("i", 0)
    line = [script, *map(str, args)]
    process = _context.Process(target=_child, args=(line, str(watch), str(log), count, kill_at, max_file))
    process.start()
    process.join(240)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{line} did not end: {log.read_text()[-2000:]}")
    return Ended(process.exitcode, log.read_text(errors="replace"), count.value)


def _child(line: list[str], watch: str, log: str, count, kill_at: int | None, max_file: int | None) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in a command of its own
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)
    if max_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file, max_file))
    parent = os.getpid()

    def hook(event: str, args: tuple) -> None:
        if event not in _OPERATIONS or os.getpid() != parent:
            return
        writes = event != "open" or (len(args) > 2 and args[2] is not None and args[2] & (os.O_WRONLY | os.O_RDWR))
        if not writes or not str(args[0]).startswith(watch):
            return
        if count.value == kill_at:
            if event == "os.rename" and os.path.isfile(args[0]):  # in the middle of a write, rather than behind it
                os.truncate(args[0], os.path.getsize(args[0]) // 2)
            os.killpg(0, signal.SIGKILL)
        count.value += 1

    sys.addaudithook(hook)
    sys.argv = [str(REPO / line[0]), *line[1:]]
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

