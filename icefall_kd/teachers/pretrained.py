"""What all our teachers share: choice of the layer, precision, finish of the embeddings, provenance."""

import importlib.metadata
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import FrameFormula
from icefall_kd.teachers.base import TeacherOutput

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Where a teacher runs, and the precision of its matrix products."""

    device: torch.device
    """Device of weights and embeddings."""
    dtype: torch.dtype = torch.float32
    """Anything but float32 runs under autocast, so that the residual stream stays in float32."""

    @classmethod
    def choose(cls, device: torch.device, name: str = "auto") -> "Precision":
        """Return the precision called ``name``; auto is bfloat16 on a GPU and float32 on a CPU."""
        if name == "auto":
            name = "float32" if device.type == "cpu" else "bfloat16"
        if name not in _DTYPES:
            raise ConfigError(f"teacher dtype {name!r} is not one of auto, {', '.join(_DTYPES)}")
        return cls(device=device, dtype=_DTYPES[name])

    def autocast(self) -> AbstractContextManager:
        """Return the context in which the teacher's forward pass runs."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def pick_layer(layer: int, num_layers: int, name: str = "the teacher") -> int:
    """Return the 1-based block that ``layer`` means; -1 is the last one.

    Raises:
        ConfigError: If the model has no such block.
    """
    if layer == -1:
        return num_layers
    if not 1 <= layer <= num_layers:
        raise ConfigError(f"layer {layer}: {name} has blocks 1 to {num_layers} (-1 means the last)")
    return layer


class PretrainedTeacher:
    """Base of the teachers that take one layer's output of a frozen model.

    A subclass sets ``family``, ``layer_convention`` and implements :meth:`_forward`.
    """

    family: str
    layer_convention: str
    input_normalization = "none"
    sampling_rate = 16000

    def __init__(
        self,
        *,
        dim: int,
        layer: int,
        frame_formula: FrameFormula,
        max_samples: int | None,
        normalize_embeddings: bool,
        precision: Precision,
        identity: dict,
    ) -> None:
        """Set the facts of the teacher.

        Args:
            dim: Channels C of the embeddings.
            layer: 1-based block.
            frame_formula: Exact frames of a number of samples.
            max_samples: Longest input, None for no limit.
            normalize_embeddings: Apply LayerNorm without parameters to every frame.
            precision: Device and dtype.
            identity: What names the weights: teacher, source, weights_sha256.
        """
        self.dim, self.layer = dim, layer
        self.frame_formula, self.max_samples = frame_formula, max_samples
        self.normalize_embeddings, self.precision, self.identity = normalize_embeddings, precision, identity

    @property
    def device(self) -> torch.device:
        """Device of the embeddings."""
        return self.precision.device

    def num_frames(self, num_samples: int) -> int:
        """Return the exact number of frames of an utterance."""
        return self.frame_formula.num_frames(int(num_samples))

    @torch.no_grad()
    def extract(self, batch: Batch) -> TeacherOutput:
        """Return the embeddings of ``batch.audio`` (N, S) with ``batch.audio_lens`` (N,).

        Returns:
            ``embeddings`` (N, T, C) float32, padding frames 0, and their lengths (N,) on the teacher's device.
        Raises:
            DataError: If the batch has no audio, or an utterance is longer than ``max_samples``.
        """
        if batch.audio is None or batch.audio_lens is None:
            raise DataError(f"teacher {self.identity.get('teacher')} needs audio, and the batch holds none")
        num_samples = batch.audio_lens.tolist()
        for utterance, samples in zip(batch.ids, num_samples, strict=True):
            if self.max_samples is not None and samples > self.max_samples:
                raise DataError(
                    f"utterance {utterance} has {samples} samples ({samples / self.sampling_rate:.2f} s), the teacher "
                    f"hears at most {self.max_samples}; use --long-utterances window"
                )
        frames = [self.num_frames(n) for n in num_samples]
        audio = batch.audio.to(self.device, torch.float32)
        audio_lens = torch.tensor(num_samples, device=self.device)
        audio = audio * (torch.arange(audio.shape[1], device=self.device) < audio_lens[:, None])
        lens = torch.tensor(frames, dtype=torch.int64, device=self.device)
        embeddings = audio.new_zeros(len(frames), max(frames, default=0), self.dim)
        for rows, values in self._forward(audio, num_samples, frames):
            width = min(values.shape[1], embeddings.shape[1])
            embeddings[rows, :width] = self._normalize(values[:, :width].float())
        valid = torch.arange(embeddings.shape[1], device=self.device) < lens[:, None]
        embeddings.masked_fill_(~valid[:, :, None], 0.0)
        return TeacherOutput(arrays={"embeddings": embeddings}, lens={"embeddings": lens})

    def _forward(self, audio: Tensor, num_samples: list[int], frames: list[int]):
        """Yield (rows, (n, T, C)) until all rows with frames are served; frames beyond a row's are dropped."""
        raise NotImplementedError

    def _normalize(self, values: Tensor) -> Tensor:
        return F.layer_norm(values, values.shape[-1:]) if self.normalize_embeddings else values

    def provenance(self) -> dict:
        """Return plain data that identifies the labels of this teacher."""
        return {
            "family": self.family,
            **self.identity,
            "layer": self.layer,
            "layer_convention": self.layer_convention,
            "input_normalization": self.input_normalization,
            "normalization": "layer_norm_without_parameters" if self.normalize_embeddings else "none",
            "dim": self.dim,
            "frame_formula": self.frame_formula.to_dict(),
            "max_samples": self.max_samples,
            "device": self.device.type,
            "dtype": str(self.precision.dtype).removeprefix("torch."),
            "versions": {name: _version(name) for name in ("torch", "transformers")},
        }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
