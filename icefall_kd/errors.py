"""The project's error types, and the exit code that each one ends a command with.

Exit codes: 0 fine, 1 a bug, 2 usage or configuration, 3 numeric failure, 4 data or label integrity.
This module imports nothing but the standard library.
"""

import errno
import sys
from collections.abc import Callable
from typing import NoReturn

# What a system call says when a disk, a quota or a limit on the size of files is exhausted.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class KdError(ValueError):
    """An error that the user can act on: its message says what, where, the value and the remedy."""

    exit_code = 1
    elsewhere = False
    """Another rank of a distributed training knows the cause, and is to tell it."""


class ConfigError(KdError):
    """Wrong usage or configuration (exit code 2)."""

    exit_code = 2


class NumericError(KdError):
    """Non-finite losses or parameters (exit code 3)."""

    exit_code = 3


class DataError(KdError):
    """Damaged, missing or inconsistent data or labels (exit code 4)."""

    exit_code = 4


class RankError(KdError):
    """Another rank of a distributed training is gone or late; what ails it is known there alone (exit code 1)."""


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a command that ``error`` ends, as :func:`run_main` leaves it."""
    if isinstance(error, KdError):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return ConfigError.exit_code if isinstance(error, OSError) and error.errno in DISK_FULL else 1


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and leave the process with the exit code of its outcome.

    A :class:`KdError` ends in its message alone, and so does a full disk (exit code 2); anything else is a bug and
    keeps its traceback.
    """
    try:
        code = main()
    except KdError as error:
        _leave(f"{type(error).__name__}: {error}", exit_code_of(error))
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _leave(no_room(error), exit_code_of(error))
    sys.exit(code or 0)


def no_room(error: OSError) -> str:
    """Return what to say of a full disk."""
    return f"cannot write {error.filename or 'a file'}: {error.strerror}; make room and run this again"


def _leave(message: str, code: int) -> NoReturn:
    import logging  # here, since the check of a shell stage imports this module and must start quickly

    logging.getLogger("icefall_kd").error("%s", message)
    sys.exit(code)
