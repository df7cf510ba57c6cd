"""Every command that the documentation shows exists and accepts the options that it is shown with."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
PAGES = ["README.md", "egs/librispeech/README.md", "egs/aishell/README.md", *sorted(
    str(p.relative_to(REPO)) for p in (REPO / "docs").glob("*.md")
)]  # fmt: skip
# Commands of ours: scripts of a recipe, and the tools in local/.
OURS = re.compile(r"^(\./(run_mvq|prepare)\.sh|\./(train|decode)\.py|(\.\./\.\./)?(local|benchmarks)/\w+\.py)\b")


def documented_commands() -> list[tuple[str, str]]:
    """Return (page, command) of all fenced lines and inline code that begin with one of our scripts."""
    found = []
    for page in PAGES:
        text = (REPO / page).read_text(encoding="utf-8")
        fenced = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S)
        lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        for line in [*lines, *inline]:
            command = line.split("  #")[0].strip()
            if OURS.match(command) and " " in command:
                found.append((page, command))
    return found


def test_the_pages_show_commands():
    assert len(documented_commands()) >= 10


@pytest.mark.parametrize(("page", "command"), documented_commands(), ids=lambda x: x[:60])
def test_documented_command_is_accepted(page: str, command: str):
    words = shlex.split(command)
    folder = REPO / Path(page).parent if page.startswith("egs/") else REPO / "egs/librispeech"
    if words[0].startswith(("local/", "benchmarks/")):
        folder = REPO
    script = (folder / words[0]).resolve()
    assert script.is_file(), f"{page} shows {words[0]}, which is not there"
    env = {**os.environ, "PYTHONPATH": str(REPO), "PYTHON": sys.executable}
    if script.suffix == ".sh":
        # --help comes last: every option before it has been parsed, and an unknown one is refused.
        command = ["bash", script, *words[1:], "--help"]
        run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return
    shown = subprocess.run([sys.executable, script, "--help"], cwd=folder, env=env, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for word in words[1:]:
        flag = word.split("=")[0]
        if flag.startswith("--") and "label_sets" not in script.name:
            assert flag in shown.stdout, f"{page}: {script.name} has no option {flag}"
