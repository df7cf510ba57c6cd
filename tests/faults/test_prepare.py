"""prepare.sh, its whole process group killed at seeded moments, and the same line again."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from micro_corpus import write_trans

pytestmark = pytest.mark.timeout(900)


def start(repo, *options):
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder.parent)}
    line = [repo / "egs/librispeech/prepare.sh", "--corpus", "trans", "--nj", 2, "--token-kind", "char", *options]
    return subprocess.Popen(
        list(map(str, line)), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def contents(folder):
    """Return what was made: not the markers of stages, nor the logs of jobs, which hold times."""
    files = [p for p in folder.rglob("*") if p.is_file() and not {".done", "log"} & set(p.relative_to(folder).parts)]
    return {p.relative_to(folder): p.read_bytes() for p in files}


def test_prepare_killed_at_random_ends_in_the_same_files(repo, tmp_path):
    corpus = write_trans(tmp_path / "corpus", num=4)
    options = ["--corpus-dir", corpus, "--speed-perturb", "true", "--data-dir"]
    data = tmp_path / "data"  # the same for all: stored cuts name their archives
    began = time.monotonic()
    whole = start(repo, *options, data)
    _, log = whole.communicate()
    assert whole.returncode == 0, log
    duration, expected = time.monotonic() - began, contents(data)
    data.rename(tmp_path / "whole")
    rng = random.Random(5)
    kills = 0
    for _ in range(4):  # each goes on where the one before it was killed
        process = start(repo, *options, data)
        time.sleep(duration * (0.1 + 0.3 * rng.random()))
        kills += process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert kills, "none of the runs was alive when it was to be killed"
    last = start(repo, *options, data)
    _, log = last.communicate()
    assert last.returncode == 0, log
    found = contents(data)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not list(data.rglob("*.pending"))
