"""Atomic writes, checksums, fingerprints and locks.  Standard library only, so that shell stages start quickly.

A reader sees the old file or the whole new one, never a part: content goes to a temporary name in the same
folder, is flushed to the disk and then renamed over the target.
"""

import contextlib
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from icefall_kd.errors import DISK_FULL, ConfigError, DataError, KdError

TMP_PREFIX = ".tmp-"
# How a name from temporary_name begins; its two groups say where and which its process is.
TMP_PATTERN = re.escape(TMP_PREFIX) + r"([0-9a-f]{8})-(\d+)-\d+-"
# What another host left is removed when nobody wrote to it for so long.
FOREIGN_LEFTOVER_SECONDS = 24 * 3600
_counter = itertools.count()


def temporary_name(path: Path) -> Path:
    """Return a name beside ``path`` of this process alone, with its suffix: libraries choose formats by that."""
    return path.with_name(f"{TMP_PREFIX}{_host()}-{os.getpid()}-{next(_counter)}-{path.name}")


@functools.cache
def _host() -> str:
    """Return 8 digits that stand for this host and, in a container, for its process numbers: others have the same."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{os.uname().nodename} {namespace}".encode()).hexdigest()[:8]


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it replaces ``path``, on failure it is removed.

    Args:
        path: The target file; missing parent folders are created.

    Raises:
        ConfigError: The disk is full (or a quota, or a limit on the size of files).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = temporary_name(path)
    try:
        yield tmp
        with open(tmp, "rb") as written:
            os.fsync(written.fileno())
        os.replace(tmp, path)
    except BaseException as error:
        tmp.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}; what was saved before is intact. Make room and run the same "
                "command again"
            ) from error
        raise
    _fsync_folder(path.parent)


def remove_leftovers(folder: str | Path, name: str) -> None:
    """Delete what processes that were killed left in ``folder`` under temporary names.

    Of other hosts, whose processes are not seen from here, only what is a day old is deleted.

    Args:
        folder: Where they wrote.
        name: Pattern of the targets' names, as in glob.
    """
    for path in Path(folder).glob(f"{TMP_PREFIX}*-{name}"):
        writer = re.match(TMP_PATTERN, path.name)
        if writer is None or _is_in_use(path, *writer.groups()):
            continue
        if path.is_dir():
            import shutil  # here, since the check of a shell stage imports this module and must start quickly

            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_in_use(path: Path, host: str, pid: str) -> bool:
    if host == _host():
        return int(pid) != os.getpid() and _is_running(int(pid))
    try:
        return time.time() - path.stat().st_mtime < FOREIGN_LEFTOVER_SECONDS
    except FileNotFoundError:
        return True  # it was renamed meanwhile


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open ``path`` for an atomic write.

    Args:
        path: The target file; missing parent folders are created.
        mode: ``"wb"`` or ``"w"`` (UTF-8, newlines as given).

    Raises:
        ValueError: For any other mode.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode is {mode!r}; an atomic write takes 'wb' or 'w'")
    text_options = {} if mode == "wb" else {"encoding": "utf-8", "newline": ""}
    with atomic_path(path) as tmp, open(tmp, mode, **text_options) as stream:
        yield stream


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse to sync a folder; the rename itself is still atomic there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(path: str | Path, marker: str) -> Iterator[Path]:
    """Yield a new folder to fill; on success it replaces ``path``, on failure it is removed.

    Args:
        path: The target folder; missing parents are created.
        marker: A file that every such folder holds; one without it is somebody else's and stays.

    Raises:
        ConfigError: ``path`` is there, and neither empty nor one of ours, or it is the current folder.
    """
    import shutil  # as above

    path = Path(path).resolve()  # a link stays, what it points to is replaced
    if path == Path.cwd():
        raise ConfigError(f"{path} is the current folder, which cannot be replaced; name another one")
    if path.exists() and not (path / marker).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and holds no {marker}, so it is left as it is; name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp, old = temporary_name(path), temporary_name(path)
    tmp.mkdir()
    try:
        yield tmp
        if path.exists():
            os.rename(path, old)
        os.rename(tmp, path)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _fsync_folder(path.parent)
    # Only now: what a kill between the two renames left may be the one good folder there was.
    remove_leftovers(path.parent, glob.escape(path.name))


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path, "w") as stream:
        stream.write(text)


def write_json(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as indented JSON, atomically; key order is kept, NaN and infinity are refused."""
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    write_text(path, text + "\n")


def read_lines(path: str | Path) -> Iterator[str]:
    """Yield the lines of a text file, gzipped or not.

    Raises:
        DataError: the file is missing, damaged, or no UTF-8 text.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as stream:
            yield from stream
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged, or no UTF-8 text ({error})") from error


@contextlib.contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever the content of a damaged file leads to into a DataError; errors of ours pass.

    Args:
        what: the file, with its path.
        remedy: what to do.
    """
    try:
        yield
    except KdError:
        raise
    # A value of another type or size than was written fails where it is used first, in many ways.
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise DataError(f"{what} is damaged ({type(error).__name__}: {reason}); {remedy}") from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: If the file is missing or is no JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; run the stage that writes it") from None
    # ValueError: bytes that are no UTF-8, and integers of thousands of digits, too.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); delete it and run the stage that writes it") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


def read_record(path: str | Path, **wanted: type) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Args:
        path: the file.
        wanted: names that it must have, and the type of each value.
    Raises:
        DataError: as :func:`read_json`, or it holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not an object; run the stage that writes it again")
    for name, kind in wanted.items():
        if not isinstance(content.get(name), kind):
            found = f"{name} is {str(content[name])[:80]!r}" if name in content else f"it has no {name}"
            raise DataError(f"{path} is damaged: {found}; run the stage that writes it again")
    return content


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(obj: Any) -> str:
    """Return the SHA-256 of the canonical JSON of ``obj``: sorted keys, no spaces, paths as strings.

    Args:
        obj: Nested dicts, lists, tuples, strings, numbers, None, paths and dataclasses.

    Raises:
        ValueError: For NaN and infinity, which have no canonical form.
        TypeError: For any other type.
    """
    text = json.dumps(
        obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False, default=_plain
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(obj: Any) -> Any:
    if isinstance(obj, Path):
        return str(obj)
    # Not dataclasses.is_dataclass: that import is a third of what a stage's check costs.
    if hasattr(obj, "__dataclass_fields__") and not isinstance(obj, type):
        return {name: getattr(obj, name) for name in obj.__dataclass_fields__}
    raise TypeError(f"{type(obj).__name__} has no JSON form: {obj!r}")


@contextlib.contextmanager
def file_lock(path: str | Path, timeout: float | None = None) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` between processes; the kernel frees it when the holder dies.

    Args:
        path: The lock file; it is created, and stays.
        timeout: Seconds to wait; None waits for ever.

    Raises:
        TimeoutError: If another process holds the lock for longer than ``timeout``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = None if timeout is None else time.monotonic() + timeout
    with open(path, "a+b") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | (0 if deadline is None else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{path} is still locked by another process after {timeout} s") from None
                time.sleep(0.05)
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)
