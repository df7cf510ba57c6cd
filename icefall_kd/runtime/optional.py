"""Libraries that may be absent or broken: imported once, and a broken one is named in a warning, once.

k2, fast_rnnt and kaldilm are imported here alone (by name), so that whoever lacks them meets one explanation.
"""

import importlib
import logging
import sys
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from icefall_kd.errors import ConfigError
from icefall_kd.runtime.env import package_version


@dataclass(frozen=True)
class Probe:
    """The outcome of importing a library."""

    module: ModuleType | None
    """The library when it works."""
    reason: str = ""
    """Why it does not."""
    installed: bool = True
    """False when there is nothing of that name to import."""


@cache
def probe_import(name: str) -> Probe:
    """Import a library; whatever it raises is a reason, and all but its absence a warning."""
    try:
        return Probe(importlib.import_module(name))
    except Exception as error:  # a binary wheel for another torch raises anything: ImportError, OSError, AttributeError
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            return Probe(None, "it is not installed", installed=False)
        return broken(name, f"{type(error).__name__}: {error}".splitlines()[0])


def broken(name: str, reason: str) -> Probe:
    """Name a broken library in the log."""
    logging.getLogger(__name__).warning("%s is installed but broken (%s); it is passed over", name, reason)
    return Probe(None, reason)


def wheel_name() -> str:
    """Return what the name of a k2 or kaldifeat wheel holds that fits this Python and this torch."""
    version = (package_version("torch") or "X.Y.Z").split("+")[0]
    return f"+cpu.torch{version} (or +cudaN.torch{version}) and cp{sys.version_info.major}{sys.version_info.minor}"


def k2_remedy() -> str:
    """Return what to type for a working k2, in one line."""
    return (
        "local/make_k2_env.sh makes .venv-k2, with k2 1.23.4, torch 1.13.1 and Python 3.11; or pip install here a "
        f"wheel from https://k2-fsa.github.io/k2/ whose name holds {wheel_name()}"
    )


def require(name: str, purpose: str, remedy: str) -> ModuleType:
    """Return a library that something cannot do without.

    Args:
        name: of the library.
        purpose: what needs it, as the subject of a sentence ("--decoding-method x").
        remedy: what to type.
    Raises:
        ConfigError: in one line, when it is absent or broken.
    """
    found = probe_import(name)
    if found.module is None:
        raise ConfigError(f"{purpose} needs {name}, but {found.reason}: {remedy}")
    return found.module


def require_k2(purpose: str) -> ModuleType:
    """Return k2, or say in one line what needs it and how it is installed (:func:`require`)."""
    return require("k2", purpose, k2_remedy())
