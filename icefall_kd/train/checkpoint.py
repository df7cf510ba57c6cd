"""Checkpoints: the only reader and writer of .pt files.

A checkpoint is one dict of tensors and plain containers, so that ``weights_only`` loading suffices:
model, model_avg, optimizer, scheduler, grad_scaler, train (counters), config, tokenizer_hash, format_version.
"""

import hashlib
import inspect
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.files import atomic_path, atomic_write, reading
from icefall_kd.runtime.tensors import read_tensors

FORMAT_VERSION = 1
# What the parts of a checkpoint are.
_KINDS = {
    **dict.fromkeys(("model", "model_avg", "optimizer", "scheduler", "grad_scaler"), (dict, type(None))),
    **{"train": dict, "config": dict, "tokenizer_hash": str},
}
_PLAIN = (str, int, float, bool, bytes, type(None))


def _plain_copy(value: Any, where: str) -> Any:
    """Return ``value`` ready to be saved; refuse whatever is not a tensor or a plain container."""
    if isinstance(value, Tensor):
        tensor = value.detach()
        # A view would drag its whole storage into the file.
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
    if type(value) in _PLAIN:
        return value
    if isinstance(value, dict):  # OrderedDict of state_dict() becomes a dict
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"checkpoint{where}: key {key!r} is a {type(key).__name__}, not a str or an int")
        return {key: _plain_copy(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain_copy(item, f"{where}[{i}]") for i, item in enumerate(value))
    raise TypeError(f"checkpoint{where} is a {type(value).__name__}; only tensors and plain containers are saved")


def save_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write ``checkpoint`` atomically: a reader sees the old file or the whole new one.

    Raises:
        TypeError: naming the entry that is neither a tensor nor a plain container.
        ConfigError: the disk does not take the file (full, quota, permissions).
    """
    plain = _plain_copy({**checkpoint, "format_version": FORMAT_VERSION}, "")
    try:
        with atomic_write(path, "wb") as f:
            try:
                torch.save(plain, f)
            except RuntimeError as error:
                # torch turns an OSError of the stream into an error of its own.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
    except ConfigError as error:
        raise ConfigError(f"{error} (smaller --keep-last-k and --keep-epochs need less room)") from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; what was saved before is intact") from error


def load_checkpoint(path: str | Path, mmap: bool = False, verify: bool = True) -> dict[str, Any]:
    """Read one checkpoint to the CPU.

    Args:
        path: the file.
        mmap: map the tensors instead of reading all of them.
        verify: compare the checksums in the file first (one more read); False for a look at the counters.
    Raises:
        DataError: the file is missing or damaged.
        ConfigError: a newer version of the project wrote it, or this torch is too old for any.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no checkpoint {path}")
    if "mmap" not in inspect.signature(torch.load).parameters:  # before 2.1
        raise ConfigError(
            f"torch {torch.__version__} does not read {path}: write its weights with local/average.py --out "
            "NAME.safetensors where it was trained, and decode with --weights NAME.safetensors"
        )
    try:
        _check_archive(path, verify)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged zip archives end in errors of many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"checkpoint {path} is damaged and cannot be read ({reason}); copy it again or delete it"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("format_version"), int):
        raise DataError(f"{path} is not a checkpoint of this project: it has no format_version")
    if checkpoint["format_version"] > FORMAT_VERSION:
        raise ConfigError(
            f"{path} has format version {checkpoint['format_version']}, this code reads up to {FORMAT_VERSION}; "
            "update the code"
        )
    for name, kind in _KINDS.items():
        if name in checkpoint and not isinstance(checkpoint[name], kind):
            raise DataError(f"checkpoint {path} is damaged: its {name} is a {type(checkpoint[name]).__name__}")
    for name in ("model", "model_avg"):
        if not all(isinstance(x, Tensor) for x in (checkpoint.get(name) or {}).values()):
            raise DataError(f"checkpoint {path} is damaged: its {name} holds more than tensors")
    return checkpoint


def _check_archive(path: Path, verify: bool) -> None:
    """Raise a BadZipFile unless a file is an archive as torch writes it, by its checksums where ``verify`` says so.

    torch writes a CRC-32 of every tensor into the archive but does not look at it when it reads, and asks for as much
    memory as the archive says that it needs.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                raise zipfile.BadZipFile(f"{entry.filename} claims {entry.file_size} bytes of {size}, or is compressed")
        damaged = archive.testzip() if verify else None
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}")


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file that another toolkit wrote, to the CPU.

    Args:
        path: ``.safetensors``, or what torch saved: a state dict, or a dict that holds one as ``model`` or
            ``state_dict``.  Entries that are no tensors are left out.
    Raises:
        DataError: the file is missing or damaged, or holds no tensors.
        ConfigError: it holds objects of other classes, which would have to be unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return read_tensors(path)[1]
    try:
        if zipfile.is_zipfile(path):  # what torch wrote before 1.6 has no checksums
            _check_archive(path, verify=True)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # as in load_checkpoint
        if "Unsupported" in str(error):
            raise ConfigError(
                f"{path} holds more than tensors ({_foreign_class(error)}), and unpickling it would run its code. "
                "Where fairseq is installed, and only if you trust the file, save its tensors alone: python3 -c "
                f"\"import torch as t; t.save(t.load('{path.name}', map_location='cpu', weights_only=False)['model'], "
                f"'{path.stem}_tensors.pt')\", and name that file"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is damaged and cannot be read ({reason})") from error
    for name in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise DataError(f"{path} holds a {type(content).__name__} without tensors; a state dict is wanted")
    return tensors


def _foreign_class(error: Exception) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found.group(1) if found else "objects of other classes"


def list_checkpoints(exp_dir: str | Path, kind: str) -> dict[int, Path]:
    """Return ``<kind>-N.pt`` of ``exp_dir`` by N, ascending (kind: "epoch" or "checkpoint").

    Only the number orders them: times of modification change when files are copied.
    """
    pattern = re.compile(rf"{re.escape(kind)}-(\d+)\.pt")
    exp_dir = Path(exp_dir)
    found = {}
    if exp_dir.is_dir():
        for path in exp_dir.iterdir():
            match = pattern.fullmatch(path.name)
            if match:
                found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def load_newest(exp_dir: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the readable checkpoint with the most steps, or None when there is none to begin with.

    A damaged file is named in the log and the one before it is taken.

    Raises:
        DataError: checkpoints exist, but every one of them is damaged.
    """
    best: tuple[Path, dict[str, Any]] | None = None
    damaged = []
    for kind in ("epoch", "checkpoint"):
        for path in reversed(list_checkpoints(exp_dir, kind).values()):
            try:
                checkpoint = load_checkpoint(path)
                with reading(f"checkpoint {path}", "copy it again or delete it"):
                    step = int(checkpoint["train"]["step"])
            except DataError as error:
                logging.getLogger(__name__).warning("%s; falling back to the file before it", error)
                damaged.append(path.name)
                continue
            if best is None or step > best[1]["train"]["step"]:
                best = (path, checkpoint)
            break
    if best is None and damaged:
        raise DataError(f"every checkpoint of {exp_dir} is damaged: {', '.join(damaged)}; remove them to start anew")
    return best


def remove_old(exp_dir: str | Path, kind: str, keep: int | None, spare: Collection[int] = ()) -> list[Path]:
    """Delete all but the ``keep`` highest-numbered files of ``kind`` and those numbered in ``spare``.

    Returns:
        What was deleted; nothing when ``keep`` is None.
    """
    if keep is None:
        return []
    old = [path for number, path in list(list_checkpoints(exp_dir, kind).items())[:-keep] if number not in spare]
    for path in old:
        path.unlink(missing_ok=True)
    return old


def copy_as(source: str | Path, name: str) -> Path:
    """Make ``name`` beside ``source`` the same file, atomically (a hard link where the disk allows)."""
    source = Path(source)
    target = source.with_name(name)
    if target.exists() and target.samefile(source):
        return target
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
    return target


def check_tokenizer(checkpoint: dict[str, Any], tokenizer_hash: str, path: str | Path) -> None:
    """Refuse a checkpoint that was trained with another tokenizer."""
    saved = checkpoint.get("tokenizer_hash", "")
    if saved and tokenizer_hash and saved != tokenizer_hash:
        raise ConfigError(
            f"{path} was trained with tokenizer {saved}, this run uses {tokenizer_hash}; "
            "use the tokenizer in its exp_dir, or another --exp-dir"
        )


@dataclass(frozen=True)
class LoadReport:
    """What became of the entries of a state dict."""

    loaded: list[str] = field(default_factory=list)
    """Entries that were copied."""
    missing: list[str] = field(default_factory=list)
    """Entries of the model that the file lacks."""
    unexpected: list[str] = field(default_factory=list)
    """Entries of the file that the model lacks."""
    mismatched: list[str] = field(default_factory=list)
    """Entries of another shape, with both shapes."""

    def lines(self) -> list[str]:
        """Return the number of loaded entries, and a line for every other one."""
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.mismatched))
        return [f"loaded {len(self.loaded)} tensors", *(f"{kind}: {name}" for kind, names in kinds for name in names)]

    def __str__(self) -> str:
        parts = [f"loaded {len(self.loaded)} tensors"]
        for title, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.mismatched),
        ):
            if names:
                parts.append(f"{len(names)} {title}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")
        return "; ".join(parts)


def load_model(model: nn.Module, state_dict: dict[str, Tensor], strict: bool = True, source: str = "") -> LoadReport:
    """Copy a state dict into ``model`` and report on every entry.

    Args:
        model: receives the parameters and buffers.
        state_dict: name -> tensor.
        strict: refuse anything missing, unexpected or of another shape.
        source: where the state dict is from, for the message.
    Raises:
        ConfigError: in strict mode, naming the entries.
    """
    own = model.state_dict()
    matching = {k: v for k, v in state_dict.items() if k in own and own[k].shape == v.shape}
    report = LoadReport(
        loaded=list(matching),
        missing=[k for k in own if k not in state_dict],
        unexpected=[k for k in state_dict if k not in own],
        mismatched=[
            f"{k} {tuple(v.shape)} in the file, {tuple(own[k].shape)} in the model"
            for k, v in state_dict.items()
            if k in own and own[k].shape != v.shape
        ],
    )
    if strict and (report.missing or report.unexpected or report.mismatched):
        raise ConfigError(f"the weights of {source or 'the checkpoint'} do not fit the model: {report}")
    model.load_state_dict(matching, strict=False)
    return report


def state_sha256(state: dict[str, Tensor]) -> str:
    """Return a SHA-256 over names, shapes, types and values of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
