"""Read CTranslate2 Whisper folders (the format of faster-whisper models) without CTranslate2.

``model.bin`` is little endian: u32 version, name of the specification, u32 revision, u32 number of variables;
each variable is its name, u8 rank, u32 sizes, u8 type, u32 number of bytes and the data; at the end come the
aliases as pairs of names.  A name is a u16 length that counts the final NUL, and the bytes.  The file is mapped
into memory and only the variables that are asked for are copied.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from icefall_kd.errors import DataError

SPEC_NAME = "WhisperSpec"
_VERSIONS = (4, 5, 6)
# Type codes of the format; 5 is bfloat16, which numpy lacks.
_DTYPES = {0: np.dtype("<f4"), 1: np.dtype("i1"), 2: np.dtype("<i2"), 3: np.dtype("<i4"), 4: np.dtype("<f2")}
_BFLOAT16 = 5
_MAX_RANK = 8


@dataclass(frozen=True)
class CTranslate2Model:
    """The variables of one ``model.bin``."""

    spec: str
    """Name of the specification, for instance ``WhisperSpec``."""
    variables: dict[str, np.ndarray]
    """Read-only views of the mapped file, by name; bfloat16 is kept as its uint16 bits."""
    bfloat16: frozenset[str]
    """Names of the variables whose bits are bfloat16."""
    path: Path
    """The file, for messages."""

    def tensor(self, name: str) -> Tensor:
        """Return one variable as float32, de-quantized when it is stored in 8 or 16 bit integers.

        Raises:
            DataError: If there is no such variable, or an integer variable has no scale.
        """
        array = self.array(name)
        if name in self.bfloat16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float()
        values = torch.from_numpy(array.astype(np.float32))
        if array.dtype.kind == "i":
            scale = torch.from_numpy(self.array(f"{name}_scale").astype(np.float32))
            # Integers are round(scale * w), with one scale a row, or one for the whole matrix.
            values = values / scale.reshape(scale.shape + (1,) * (values.ndim - scale.ndim))
        return values

    def array(self, name: str) -> np.ndarray:
        """Return one variable as it is stored.

        Raises:
            DataError: If there is no such variable.
        """
        if name not in self.variables:
            raise DataError(f"{self.path} has no variable {name!r}; is it a {SPEC_NAME} of another converter?")
        return self.variables[name]

    def scalar(self, name: str) -> int:
        """Return a variable that holds one integer.

        Raises:
            DataError: If there is no such variable, or it holds something else.
        """
        array = self.array(name)
        if array.size != 1 or array.dtype.kind not in "iu":
            raise DataError(f"{self.path}: {name} is {array.dtype} {array.shape}, not one integer; fetch it again")
        return int(array.item())


class _Reader:
    """Bounds-checked reading from a mapped file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.offset = path, data, 0

    def take(self, size: int, what: str) -> int:
        """Advance by ``size`` bytes and return where they start."""
        start = self.offset
        if start + size > len(self.data):
            raise DataError(
                f"{self.path} ends inside {what}: {size} bytes wanted at byte {start} of {len(self.data)}; "
                "the file is cut short or no CTranslate2 model, fetch it again"
            )
        self.offset = start + size
        return start

    def number(self, code: str, what: str) -> int:
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(f"<{code}"), what))[0]

    def name(self, what: str) -> str:
        size = self.number("H", f"the length of {what}")
        start = self.take(size, what)
        raw = self.data[start : start + size]
        if not raw.endswith(b"\0"):
            raise DataError(f"{self.path}: {what} at byte {start} does not end in NUL; the file is damaged")
        return raw[:-1].decode("utf-8", errors="replace")

    def variable(self) -> tuple[str, np.ndarray, bool]:
        name = self.name("a variable's name")
        rank = self.number("B", f"the rank of {name}")
        if rank > _MAX_RANK:
            raise DataError(f"{self.path}: {name} claims rank {rank}, more than {_MAX_RANK}; the file is damaged")
        shape = tuple(self.number("I", f"the shape of {name}") for _ in range(rank))
        code = self.number("B", f"the type of {name}")
        dtype = np.dtype("<u2") if code == _BFLOAT16 else _DTYPES.get(code)
        if dtype is None:
            raise DataError(f"{self.path}: {name} has type code {code}; known are 0 to {_BFLOAT16}")
        size = self.number("I", f"the size of {name}")
        count = 1
        for length in shape:
            count *= length
        if size != count * dtype.itemsize:
            raise DataError(
                f"{self.path}: {name} of shape {shape} and type {dtype} needs {count * dtype.itemsize} bytes "
                f"but states {size}; the file is damaged"
            )
        start = self.take(size, f"the data of {name}")
        return name, np.frombuffer(self.data, dtype, count, start).reshape(shape), code == _BFLOAT16


def read_model(path: str | Path) -> CTranslate2Model:
    """Map a CTranslate2 ``model.bin``.

    Args:
        path: The file.
    Returns:
        Its variables as read-only views, aliases resolved.
    Raises:
        DataError: If the file is missing, cut short, of an unknown version or inconsistent.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; a CTranslate2 folder holds a model.bin")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; fetch it again")
    with open(path, "rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Reader(path, data)
    version = reader.number("I", "the version")
    if version not in _VERSIONS:
        raise DataError(f"{path}: binary version {version} is not one of {_VERSIONS}; is it a CTranslate2 model.bin?")
    spec = reader.name("the specification's name")
    reader.number("I", "the revision")
    variables: dict[str, np.ndarray] = {}
    bfloat16 = set()
    for _ in range(reader.number("I", "the number of variables")):
        name, array, is_bfloat16 = reader.variable()
        variables[name] = array
        if is_bfloat16:
            bfloat16.add(name)
    for _ in range(reader.number("I", "the number of aliases")):
        alias, target = reader.name("an alias"), reader.name("an alias' target")
        if target not in variables:
            raise DataError(f"{path}: alias {alias!r} names {target!r}, which is no variable")
        variables[alias] = variables[target]
        if target in bfloat16:
            bfloat16.add(alias)
    if reader.offset != len(data):
        raise DataError(f"{path} has {len(data) - reader.offset} bytes after its last alias; the file is damaged")
    return CTranslate2Model(spec, variables, frozenset(bfloat16), path)


def is_whisper_folder(folder: str | Path) -> bool:
    """Tell whether a folder holds a CTranslate2 Whisper model (reads only the head of ``model.bin``)."""
    path = Path(folder) / "model.bin"
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        head = stream.read(6 + len(SPEC_NAME))
    return head[6:] == SPEC_NAME.encode()


def whisper_config(model: CTranslate2Model) -> dict:
    """Return the sizes of a CTranslate2 Whisper as keyword arguments of transformers' ``WhisperConfig``.

    Raises:
        DataError: If the model is no Whisper, or its sizes do not fit each other.
    """
    if model.spec != SPEC_NAME:
        raise DataError(f"{model.path} holds a {model.spec}, not a {SPEC_NAME}; name a Whisper folder as teacher")

    def num_layers(side: str) -> int:
        found = {int(n.split("/")[1][len("layer_") :]) for n in model.variables if n.startswith(f"{side}/layer_")
                 and "/self_attention/" in n}
        if not found or found != set(range(len(found))):
            raise DataError(f"{model.path}: the {side} layers {sorted(found)} are not 0 to n-1; the file is damaged")
        return len(found)

    conv1, embeddings = model.array("encoder/conv1/weight"), model.array("decoder/embeddings/weight")
    heads = {side: model.scalar(f"{side}/num_heads") for side in ("encoder", "decoder")}
    for side, count in heads.items():
        if count < 1 or conv1.shape[0] % count:
            raise DataError(f"{model.path}: {side}/num_heads is {count}, which does not divide the {conv1.shape[0]} "
                            "channels; the file is damaged, fetch it again")  # fmt: skip
    return {
        "d_model": conv1.shape[0],
        "num_mel_bins": conv1.shape[1],
        "vocab_size": embeddings.shape[0],
        "encoder_layers": num_layers("encoder"),
        "decoder_layers": num_layers("decoder"),
        "encoder_attention_heads": heads["encoder"],
        "decoder_attention_heads": heads["decoder"],
        "encoder_ffn_dim": model.array("encoder/layer_0/ffn/linear_0/weight").shape[0],
        "decoder_ffn_dim": model.array("decoder/layer_0/ffn/linear_0/weight").shape[0],
        "max_source_positions": model.array("encoder/position_encodings/encodings").shape[0],
        "max_target_positions": model.array("decoder/position_encodings/encodings").shape[0],
    }


def encoder_state_dict(model: CTranslate2Model, num_layers: int) -> dict[str, Tensor]:
    """Map the encoder onto the parameter names of transformers' ``WhisperEncoder``.

    Args:
        model: What :func:`read_model` returned.
        num_layers: Blocks wanted, counted from the input.
    Returns:
        float32 tensors by name; the key projections have no bias there (it is zero in Whisper).
    """
    state = {
        "embed_positions.weight": model.tensor("encoder/position_encodings/encodings"),
        **_norm(model, "encoder/layer_norm", "layer_norm"),
    }
    for conv in ("conv1", "conv2"):
        state[f"{conv}.weight"] = model.tensor(f"encoder/{conv}/weight")
        state[f"{conv}.bias"] = model.tensor(f"encoder/{conv}/bias")
    for i in range(num_layers):
        state.update(_self_attention(model, f"encoder/layer_{i}/self_attention", f"layers.{i}"))
        state.update(_feed_forward(model, f"encoder/layer_{i}/ffn", f"layers.{i}"))
    return state


def decoder_state_dict(model: CTranslate2Model, num_layers: int) -> dict[str, Tensor]:
    """Map the decoder onto the parameter names of transformers' ``WhisperDecoder``.

    Args:
        model: What :func:`read_model` returned.
        num_layers: All blocks of the decoder.
    Returns:
        float32 tensors by name; the output projection is the embedding.
    """
    state = {
        "embed_tokens.weight": model.tensor("decoder/embeddings/weight"),
        "embed_positions.weight": model.tensor("decoder/position_encodings/encodings"),
        **_norm(model, "decoder/layer_norm", "layer_norm"),
    }
    for i in range(num_layers):
        source, target = f"decoder/layer_{i}", f"layers.{i}"
        state.update(_self_attention(model, f"{source}/self_attention", target))
        state.update(_feed_forward(model, f"{source}/ffn", target))
        state.update(_norm(model, f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm"))
        state.update(_linear(model, f"{source}/attention/linear_0", f"{target}.encoder_attn.q_proj"))
        stacked = _linear(model, f"{source}/attention/linear_1", "kv")
        state.update(_split(stacked, "kv", [f"{target}.encoder_attn.{x}_proj" for x in "kv"], model.path))
        state.update(_linear(model, f"{source}/attention/linear_2", f"{target}.encoder_attn.out_proj"))
    return state


def _norm(model: CTranslate2Model, source: str, target: str) -> dict[str, Tensor]:
    return {f"{target}.weight": model.tensor(f"{source}/gamma"), f"{target}.bias": model.tensor(f"{source}/beta")}


def _linear(model: CTranslate2Model, source: str, target: str) -> dict[str, Tensor]:
    return {f"{target}.weight": model.tensor(f"{source}/weight"), f"{target}.bias": model.tensor(f"{source}/bias")}


def _self_attention(model: CTranslate2Model, source: str, target: str) -> dict[str, Tensor]:
    stacked = _linear(model, f"{source}/linear_0", "qkv")
    return {
        **_norm(model, f"{source}/layer_norm", f"{target}.self_attn_layer_norm"),
        **_split(stacked, "qkv", [f"{target}.self_attn.{x}_proj" for x in "qkv"], model.path),
        **_linear(model, f"{source}/linear_1", f"{target}.self_attn.out_proj"),
    }


def _feed_forward(model: CTranslate2Model, source: str, target: str) -> dict[str, Tensor]:
    return {
        **_norm(model, f"{source}/layer_norm", f"{target}.final_layer_norm"),
        **_linear(model, f"{source}/linear_0", f"{target}.fc1"),
        **_linear(model, f"{source}/linear_1", f"{target}.fc2"),
    }


def _split(stacked: dict[str, Tensor], name: str, targets: list[str], path: Path) -> dict[str, Tensor]:
    """Cut projections that lie row-wise in one matrix; a key projection's bias must be zero and is dropped."""
    state = {}
    weights, biases = stacked[f"{name}.weight"].chunk(len(targets)), stacked[f"{name}.bias"].chunk(len(targets))
    for target, weight, bias in zip(targets, weights, biases, strict=True):
        state[f"{target}.weight"] = weight.contiguous()
        if not target.endswith(".k_proj"):
            state[f"{target}.bias"] = bias.contiguous()
        elif bias.abs().max() > 0:
            raise DataError(f"{path}: {target} has a bias, and Whisper's key projections have none")
    return state
