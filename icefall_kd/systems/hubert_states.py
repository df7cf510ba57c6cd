"""Where the states of a HuBERT teacher come from in distillation: the teacher in training, or stored label sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from icefall_kd.config import KdConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import SSL_CONV
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.models.masks import make_pad_mask
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.systems.base import LabelSpec
from icefall_kd.teachers.hubert import HubertTeacher


@dataclass(frozen=True)
class States:
    """Teacher states of a batch, on the student's device."""

    layers: dict[int, Tensor]
    """i -> H[i], (N, T', D) float32, 0 beyond ``lens``."""
    lens: Tensor
    """(N,) frames of each utterance: the student's, or 0 where the label sets lack it."""


class StateSource(Protocol):
    """What makes the states of a batch."""

    dim: int
    """Channels D of the teacher."""

    def states(self, batch: Batch, lens: Tensor, num_frames: int) -> States:
        """Return the states of a batch.

        Args:
            batch: its audio, or its labels.
            lens: (N,) the student's frames.
            num_frames: T' of the student, at least the largest of them.
        Raises:
            DataError: an utterance has other frames than the student's.
        """
        ...


class OnlineStates:
    """The teacher runs in training, in float32, without the student's autocast; it holds no trained parameters."""

    def __init__(self, teacher: HubertTeacher, layers: Sequence[int]) -> None:
        """Tap ``layers`` of ``teacher``, which was built for the last of them."""
        self.teacher, self.dim = teacher, teacher.dim
        self.arrays = dict(zip(layers, teacher.tap(layers), strict=True))

    @torch.no_grad()
    def states(self, batch: Batch, lens: Tensor, num_frames: int) -> States:
        """Return the states of the clean audio; see :class:`StateSource`."""
        with torch.autocast(batch.audio.device.type, enabled=False):
            output = self.teacher.extract(batch)
        found = next(iter(output.lens.values())).to(lens.device)
        _check(batch.ids, found, lens)
        arrays = {i: _to_frames(output.arrays[name].to(lens.device), num_frames) for i, name in self.arrays.items()}
        return States(arrays, found)


class StoredStates:
    """The label sets of --label-dir, one a layer; codes are decoded by the quantizer that made them.

    Args:
        sets: folder and provenance of the label set of each layer.
        quantizers: by their SHA-256.
        teacher_sha256: of the weights that the sets must be of; None: of whatever all of them are.
    """

    def __init__(
        self,
        sets: dict[int, tuple[Path, LabelSetInfo]],
        quantizers: dict[str, Quantizer],
        teacher_sha256: str | None = None,
    ) -> None:
        self.sets, self.quantizers = sets, quantizers
        self.sha256 = teacher_sha256 or next(info.teacher_sha256 for _, info in sets.values())
        (self.dim,) = {info.dim for _, info in sets.values()}

    @classmethod
    def open(cls, kd: KdConfig, quantizers: Sequence[Path], teacher_sha256: str | None) -> "StoredStates":
        """Open the label sets that the options name.

        Raises:
            ConfigError: there is none, two are of one layer, one is neither states nor codes, or codes lack their
                quantizer.
        """
        by_hash = {}
        with torch.random.fork_rng(devices=[]):  # loading initialises first; the student must not depend on that
            for path in quantizers:
                quantizer = Quantizer.load(path).eval().requires_grad_(False)
                by_hash[quantizer.sha256] = quantizer
        sets: dict[int, tuple[Path, LabelSetInfo]] = {}
        for path in kd.label_dir:
            info = LabelSetInfo.load(path)
            if info.kind not in ("embeddings", "codebook_indexes") or info.layer is None:
                raise ConfigError(
                    f"--label-dir {path} holds {info.kind} of layer {info.layer}; states of a HuBERT teacher are label "
                    "sets of kind embeddings (or codebook_indexes) of a known layer (local/extract_labels.py --layer)"
                )
            if info.layer in sets:
                raise ConfigError(
                    f"--label-dir: {sets[info.layer][0]} and {path} are both of layer {info.layer}; name one of them"
                )
            if info.kind == "codebook_indexes" and info.quantizer_sha256 not in by_hash:
                raise ConfigError(
                    f"--label-dir {path} holds codes of quantizer {info.quantizer_sha256}, which --kd-quantizers does "
                    "not name: codes alone are no states"
                )
            sets[info.layer] = (Path(path), info)
        if not sets:
            raise ConfigError(
                "--objective distil needs --label-dir (one label set a layer), or --teacher-labels online"
            )
        if len(dims := {info.dim for _, info in sets.values()}) > 1:
            raise ConfigError(f"the label sets of --label-dir have {sorted(dims)} channels; they are of one teacher")
        return cls(dict(sorted(sets.items())), by_hash, teacher_sha256)

    def specs(self, layers: Sequence[int]) -> list[LabelSpec]:
        """Return what training batches must hold for these layers; every set must be of the one teacher."""
        found = []
        for layer in layers:
            path, info = self.sets[layer]
            expect = {"teacher_sha256": self.sha256, "layer": layer, "normalization": "none", "frame_formula": SSL_CONV}
            found.append(LabelSpec(name=f"H{layer}", kind=info.kind, path=str(path), expect=expect))
        return found

    @torch.no_grad()
    def states(self, batch: Batch, lens: Tensor, num_frames: int) -> States:
        """Return the stored states; see :class:`StateSource`."""
        arrays, counts = {}, []
        for name, labels in batch.labels.items():
            if not name.startswith("H"):
                continue
            layer = int(name.removeprefix("H"))
            _check(batch.ids, labels.lens, lens, missing_ok=True)
            counts.append(labels.lens)
            values = labels.values
            if not values.is_floating_point():
                values = self._decode(layer, values, labels.lens)
            arrays[layer] = _to_frames(values, num_frames)
        found = torch.stack(counts).amin(dim=0)  # an utterance that one of the sets lacks has no states
        return States(arrays, found)

    def _decode(self, layer: int, codes: Tensor, lens: Tensor) -> Tensor:
        quantizer = self.quantizers[self.sets[layer][1].quantizer_sha256].to(codes.device)
        valid = ~make_pad_mask(lens, codes.shape[1])
        states = torch.zeros(*codes.shape[:2], self.dim, device=codes.device)
        with torch.autocast(codes.device.type, enabled=False):
            states[valid] = quantizer.decode(codes[valid])
        return states


def _to_frames(states: Tensor, num_frames: int) -> Tensor:
    """Return (N, T', D) float32 of (N, T, D), whose rows beyond the utterances' lengths are 0; lengths are checked."""
    found = states.new_zeros(len(states), num_frames, states.shape[2], dtype=torch.float32)
    common = min(num_frames, states.shape[1])
    found[:, :common] = states[:, :common]
    return found


def _check(ids: Sequence[str], found: Tensor, lens: Tensor, missing_ok: bool = False) -> None:
    """Refuse teacher frames that are not exactly the student's."""
    for utterance, there, due in zip(ids, found.tolist(), lens.tolist(), strict=True):
        if there != due and not (missing_ok and there == 0):
            raise DataError(
                f"utterance {utterance}: the teacher has {there} frames, the student {due}; both count those of seven "
                "convolutions over samples (frames.SSL_CONV), so their audio differs"
            )
