"""Demo corpora of a few utterances, made once for all recipe tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MICRO = (
    "--train-speakers 3 --train-utts 4 --dev-speakers 1 --dev-utts 2 --test-speakers 1 --test-utts 2 "
    "--snr 20,20 --reverb 0.05,0.1"
)


@pytest.fixture(scope="session")
def demo_corpus(repo, tmp_path_factory):
    """Return a function that gives the folder of a micro demo corpus in a language; callers must not change it."""
    pytest.importorskip("espeakng_loader")
    made: dict[str, Path] = {}

    def make(language: str) -> Path:
        if language not in made:
            made[language] = tmp_path_factory.mktemp("demo") / language
            line = [sys.executable, repo / "local" / "prepare_demo.py", "--out-dir", made[language]]
            subprocess.run([*line, "--language", language, *MICRO.split()], check=True, capture_output=True)
        return made[language]

    return make


@pytest.fixture(scope="session")
def recipe_env() -> dict[str, str]:
    """The environment of recipe scripts: this Python, one thread."""
    folder = Path(sys.executable).parent
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder.parent)}
