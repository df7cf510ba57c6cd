"""What a run depended on (versions, git state), and the choice of the device."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icefall_kd.errors import ConfigError

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "lhotse", "transformers", "k2", "numpy", "safetensors", "sentencepiece", "kaldialign")


def environment() -> dict[str, Any]:
    """Return the versions and the git state of this installation, without paths or host names.

    Versions come from the packages' metadata: nothing is imported, so a broken package does no harm.

    Returns:
        ``{"python": str, "packages": {name: version or None}, "git": {"commit": str, "dirty": bool} or None}``
    """
    return {
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "git": git_state(Path(__file__).resolve().parent),
    }


def measured_on(device: "torch.device | None" = None) -> dict[str, Any]:
    """Return what goes with figures of a benchmark: date, command, device, versions, git state.

    Args:
        device: where it ran; None: the CPU.
    """
    name = "cpu"
    if device is not None and device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "device": name,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "environment": environment(),
    }


def package_version(name: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(folder: str | Path) -> dict[str, Any] | None:
    """Return the commit of the checkout that holds ``folder`` and whether tracked files were changed.

    Returns:
        None outside a git checkout, before its first commit, or where git is missing.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(status)}


def _git(folder: str | Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def pick_device(name: str) -> "torch.device":
    """Return the torch device for an option's value.

    Args:
        name: "auto" (the GPU when there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: For an unknown name, or a GPU that is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device is {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {name!r}; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device is {name!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here; "
            "use --device cpu, or run python -m icefall_kd.doctor"
        )
    return device
