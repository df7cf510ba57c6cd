"""Damaged files before the readers of this project: each case must end in an error of ours, or be read correctly.

A case is a kind of file and a seed, and is repeated alone by ``python -m tests.faults.fuzz KIND SEED`` (with ``tests``
on PYTHONPATH).  Cases run in a child with limits on memory and time, so that a crash has a name as well.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icefall_kd.errors import KdError
from tests.faults.mutate import LAYERS

CPU_SECONDS = 5.0
"""What a case may take."""
MEMORY = 256 << 20
"""Bytes by which a case may make the process larger, used or not: what asks for more is refused them."""


class TooLong(BaseException):
    """A case took too long; no ``except Exception`` stops it."""


@dataclass(frozen=True)
class Kind:
    """Files of one kind and how they are read."""

    files: dict[str, bytes]
    """Content by name; all lie in one folder."""
    layers: dict[str, tuple[str, ...]]
    """Names of the files that are damaged, and at which layers (mutate.LAYERS)."""
    read: Callable[[Path], Any]
    """Read the folder; what it returns must be equal (digest) where nothing is wrong."""
    covered: tuple[str, ...] = ()
    """Layers at which a checksum or fingerprint tells every change."""
    may_ask: bool = False
    """Whether the reader, which is not ours, may ask for as much memory as the file says, if it uses none of it."""


@dataclass(frozen=True)
class Case:
    """One damaged file."""

    kind: str
    seed: int
    file: str
    layer: str
    content: bytes
    told: str

    def __str__(self) -> str:
        return f"{self.kind} {self.seed}: {self.file} ({self.layer}): {self.told}"


@dataclass
class Report:
    """What became of many cases."""

    outcomes: dict[str, Counter] = field(default_factory=dict)
    """By kind: refused, same, other."""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """CPU time of the children."""


def digest(value: Any) -> str:
    """Return a hash of nested plain data, arrays and tensors."""
    found = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            found.update(f"{item.dtype} {tuple(item.shape)}".encode())
            found.update(item.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, np.ndarray):
            found.update(f"{item.dtype} {item.shape}".encode() + item.tobytes())
        elif isinstance(item, dict):
            for name in sorted(item, key=str):
                found.update(repr(name).encode())
                add(item[name])
        elif isinstance(item, list | tuple):
            found.update(f"[{len(item)}".encode())
            for one in item:
                add(one)
        else:
            found.update(repr(item).encode())

    add(value)
    return found.hexdigest()


def make_case(kinds: dict[str, Kind], name: str, seed: int) -> Case:
    """Return a case; the same for the same files."""
    rng = random.Random(f"{name} {seed}")
    kind = kinds[name]
    file = rng.choice(sorted(kind.layers))
    if rng.random() < 0.04:
        other = rng.choice(sorted(kinds))
        theirs = rng.choice(sorted(kinds[other].files))
        content, layer, told = kinds[other].files[theirs], "swap", f"{theirs} of {other} in its place"
    else:
        layer = rng.choice(kind.layers[file])
        content, told = LAYERS[layer](kind.files[file], rng)
    return Case(name, seed, file, layer, content, told)


def judge(kind: Kind, case: Case, folder: Path, sound: str) -> str:
    """Read a damaged file; return "refused", "same" or "other".

    Raises:
        AssertionError: it was read as if nothing had happened, or the error names no file of the folder.
        BaseException: what a reader should not have raised.
    """
    try:
        found = digest(kind.read(folder))
    except KdError as error:
        assert str(folder) in str(error), f"an error that does not name the file: {error}"
        chain: BaseException | None = error
        while chain is not None:
            said = f"{type(chain).__name__}: {chain}"
            memory = ("MemoryError", "bad_alloc", "can't allocate memory", "Unable to allocate")
            assert kind.may_ask or not any(word in said for word in memory), f"it asked for huge memory: {said}"
            chain = chain.__cause__ or chain.__context__
        return "refused"
    if found == sound:
        return "same"
    assert case.layer not in kind.covered, "changed content was read as if nothing had happened"
    return "other"


def _place(kind: Kind, case: Case, folder: Path) -> None:
    """Write the damaged file; by a rename, since the sound one may be mapped."""
    (folder / "new").write_bytes(case.content)
    os.replace(folder / "new", folder / case.file)


def _limit_memory(more: int | None) -> None:
    """Let this process grow by so many bytes of addresses, or as it likes."""
    soft = hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if more is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        soft = used + more if hard == resource.RLIM_INFINITY else min(used + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_long(*_: object) -> None:
    raise TooLong(f"it took more than {CPU_SECONDS} s")


def run_cases(kinds: dict[str, Kind], cases: list[tuple[str, int]], done, results) -> None:
    """Run cases in this process, which is a child; ``done`` counts them, ``results`` takes what became of them."""
    torch.set_num_threads(1)
    logging.disable()  # what is passed over is told there
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _too_long)
    sound: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as root:
        for name, seed in cases:
            folder, kind = Path(root) / name, kinds[name]
            if name not in sound:
                folder.mkdir()
                for file, content in kind.files.items():
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    (folder / file).write_bytes(content)
                sound[name] = digest(kind.read(folder))
            case = make_case(kinds, name, seed)
            _place(kind, case, folder)
            _limit_memory(MEMORY)
            outcome, failure = "failed", None
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            try:
                outcome = judge(kind, case, folder, sound[name])
            except BaseException as error:
                signal.setitimer(signal.ITIMER_PROF, 0)
                where = traceback.extract_tb(error.__traceback__)[-1]
                failure = f"{case}: {type(error).__name__}: {str(error)[:300]} ({where.filename}:{where.lineno})"
            signal.setitimer(signal.ITIMER_PROF, 0)
            _limit_memory(None)
            if case.file in kind.files:
                (folder / "old").write_bytes(kind.files[case.file])
                os.replace(folder / "old", folder / case.file)
            results.send((name, outcome, failure))
            done.value += 1
    results.send(("", "seconds", time.process_time()))


def fuzz(kinds: dict[str, Kind], cases: Iterable[tuple[str, int]], silent: float = 120.0) -> Report:
    """Run cases in children, and a new child behind every crash and every hang.

    Args:
        kinds: by name.
        cases: names and seeds.
        silent: seconds of the clock without a finished case that are a hang.
    """
    context, report, todo = multiprocessing.get_context("fork"), Report(), list(cases)
    while todo:
        done, (results, ours) = context.Value("i", 0), context.Pipe(duplex=False)
        child = context.Process(target=run_cases, args=(kinds, todo, done, ours))
        child.start()
        ours.close()
        hung = False
        try:
            while True:
                if not results.poll(silent):
                    hung = True
                    child.kill()
                    break
                name, outcome, failure = results.recv()
                if outcome == "seconds":
                    report.seconds += failure
                    continue
                report.outcomes.setdefault(name, Counter())[outcome] += 1
                if failure is not None:
                    report.failures.append(failure)
        except EOFError:
            pass
        child.join()
        finished = done.value
        if child.exitcode != 0:
            case = make_case(kinds, *todo[finished]) if finished < len(todo) else "the end"
            report.failures.append(f"{case}: {'hung' if hung else f'the process ended with {child.exitcode}'}")
            finished += 1
        todo = todo[finished:]
    return report


def repeat(kinds: dict[str, Kind], name: str, seed: int) -> str:
    """Run one case here, without limits, with its traceback; return what became of it."""
    case = make_case(kinds, name, seed)
    print(case, file=sys.stderr)
    with tempfile.TemporaryDirectory() as root:
        for file, content in kinds[name].files.items():
            (Path(root) / file).parent.mkdir(parents=True, exist_ok=True)
            (Path(root) / file).write_bytes(content)
        sound = digest(kinds[name].read(Path(root)))
        _place(kinds[name], case, Path(root))
        return judge(kinds[name], case, Path(root), sound)


def main(line: list[str]) -> None:
    """Repeat a case, or run cases A to B of all kinds or of some: KIND SEED, or --range A B [KIND ...]."""
    from tests.faults.fuzz_kinds import make_kinds

    root = Path(tempfile.mkdtemp())
    try:
        kinds = make_kinds(root)
        if line[0] != "--range":
            print(repeat(kinds, line[0], int(line[1])))
            return
        seeds = range(int(line[1]), int(line[2]))
        report = fuzz(kinds, [(name, seed) for name in line[3:] or kinds for seed in seeds])
        print("\n".join(report.failures))
        print(json.dumps(report.outcomes), f"{len(report.failures)} failures, {report.seconds:.1f} s")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main(sys.argv[1:])
