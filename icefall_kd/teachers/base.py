"""The Teacher protocol: what a teacher model owes to extraction, quantizer and student."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from icefall_kd.data.batch import Batch
from icefall_kd.frames import FrameFormula


@dataclass(frozen=True)
class TeacherOutput:
    """Named arrays of a batch, each with its lengths."""

    arrays: dict[str, Tensor]
    """For instance {"embeddings": (N, T, C) float32}; padding frames are 0."""
    lens: dict[str, Tensor]
    """The valid frames of each array, (N,) int64, equal to ``num_frames(audio_lens)`` exactly."""


@runtime_checkable
class Teacher(Protocol):
    """Anything that turns clean 16 kHz audio into embeddings at a fixed, exactly known frame rate."""

    sampling_rate: int
    """Samples a second that ``extract`` expects (16000)."""
    dim: int
    """Channels C of the embeddings."""
    frame_formula: FrameFormula
    """The exact frame formula, stored in the provenance of every label set."""
    max_samples: int | None
    """The longest input; longer audio is windowed by teachers/windows.py (None: no limit)."""

    def num_frames(self, num_samples: int) -> int:
        """Return the exact number of frames of an utterance."""
        ...

    def extract(self, batch: Batch) -> TeacherOutput:
        """Return the embeddings of ``batch.audio`` (N, S), ``batch.audio_lens`` (N,).

        Extracting an utterance alone equals extracting it in a padded batch: frame counts exactly,
        embeddings to 1e-5 relative in float32.
        """
        ...

    def provenance(self) -> dict:
        """Return plain data that identifies the teacher: family, weights_sha256, layer, layer_convention,
        normalization, frame_formula, device, dtype, library versions."""
        ...
