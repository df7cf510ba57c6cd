"""Libraries that may be absent or broken: imported once, and a broken one is named in a warning, once.

k2, fast_rnnt and kaldilm are imported here alone (by name), so that whoever lacks them meets one explanation.
"""

import importlib
import logging
import sys
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from icefall_kd.errors import ConfigError

K2_HASH = "sha256:5b5f709b12b9cd092b583984d0b7d940c9f898101259c998d68d1f4adefa48d4"
"""Of PyPI's k2 1.23.4 for Python 3.11 and torch 1.13.1; its wheels for other Pythons carry the same tags."""


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
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return Probe(None, "it is not installed", installed=False)
        return broken(name, f"{type(error).__name__}: {error}".splitlines()[0])


def broken(name: str, reason: str) -> Probe:
    """Name a broken library in the log."""
    logging.getLogger(__name__).warning("%s is installed but broken (%s); it is passed over", name, reason)
    return Probe(None, reason)


def k2_remedy() -> str:
    """Return what to type for a working k2, in one line."""
    version = torch.__version__.split("+")[0]
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return (
        "local/make_k2_env.sh makes an environment .venv-k2 with k2 1.23.4 and torch 1.13.1 (Python 3.11); for this "
        f"one, torch {version}, pip install a wheel from https://k2-fsa.github.io/k2/ whose name holds "
        f"+cpu.torch{version} (or +cudaN.torch{version}) and {tag}"
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
