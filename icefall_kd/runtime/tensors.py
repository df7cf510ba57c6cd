"""Safetensors files as a whole: written atomically, and a damaged one is a DataError."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from icefall_kd.errors import DataError
from icefall_kd.runtime.files import atomic_write


def read_tensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a file, on the CPU.

    Raises:
        DataError: the file is missing or damaged; what to do is for the caller to add.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    except SafetensorError as error:
        raise DataError(f"{path} is damaged ({error})") from error


def stated(header: dict[str, str], path: str | Path, key: str = "metadata") -> dict:
    """Return the plain data that a file's metadata hold as JSON, under ``key``; {} where there are none.

    Raises:
        DataError: they are damaged.
    """
    try:
        found = json.loads(header.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: its metadata are no JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged: its metadata are {type(found).__name__}, not names and values")
    return found


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors (on any device) and metadata to a file, atomically.

    With one key of metadata equal content gives equal bytes; safetensors orders several at random.
    """
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as file:
        file.write(save(contents, metadata=metadata))
