"""What all our teachers share: choice of the layer, precision, finish of the embeddings, provenance."""

import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
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

    A subclass sets ``family``, ``layer_convention`` and implements :meth:`_forward` and :attr:`_blocks`.
    """

    family: str
    layer_convention: str
    layer_elsewhere = ""
    """What other code calls the layer's output; for people, no part of a label set's identity."""
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
        self._arrays = {layer: "embeddings"}

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
        shape = (len(frames), max(frames, default=0), self.dim)
        arrays = {name: audio.new_zeros(shape) for name in self._arrays.values()}
        with self._kept_outputs() as kept:
            for rows, last in self._forward(audio, num_samples, frames):
                for layer, name in self._arrays.items():
                    values = last if layer == self.layer else kept[layer]
                    width = min(values.shape[1], shape[1])
                    arrays[name][rows, :width] = self._normalize(values[:, :width].float())
        padding = torch.arange(shape[1], device=self.device) >= lens[:, None]
        for array in arrays.values():
            array.masked_fill_(padding[:, :, None], 0.0)
        return TeacherOutput(arrays=arrays, lens=dict.fromkeys(arrays, lens))

    def tap(self, layers: Sequence[int]) -> list[str]:
        """Make one pass give several layers, up to this teacher's own; see :func:`icefall_kd.teachers.base.tap`.

        Layer 0 is the input of the first block: of HuBERT, behind positional convolution and LayerNorm.
        """
        name = f"teacher {self.identity.get('teacher')}, cut there,"
        layers = [n if n == 0 else pick_layer(n, self.layer, name) for n in layers]
        self._arrays |= {n: f"layer{n}" for n in layers if n != self.layer}
        return [self._arrays[n] for n in layers]

    @contextmanager
    def _kept_outputs(self) -> Iterator[dict[int, Tensor]]:
        """Yield where the outputs (n, T, C) of the other layers are found after a forward pass."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int, output) -> None:
            kept[layer] = output if isinstance(output, Tensor) else output[0]

        others = [n for n in self._arrays if n not in (0, self.layer)]
        hooks = [self._blocks[n - 1].register_forward_hook(lambda _, __, out, n=n: keep(n, out)) for n in others]
        if 0 in self._arrays:
            hooks.append(self._blocks[0].register_forward_pre_hook(lambda _, args: keep(0, args)))
        try:
            yield kept
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def _blocks(self) -> Sequence[nn.Module]:
        """The blocks below the teacher's own at least; a block's output, or the first of its outputs, is (n, T, C)."""
        raise NotImplementedError

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
            **({"layer_elsewhere": self.layer_elsewhere} if self.layer_elsewhere else {}),
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
