"""The Teacher protocol: what a teacher model owes to extraction, quantizer and student."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError
from icefall_kd.frames import FrameFormula


@dataclass(frozen=True)
class TeacherOutput:
    """Named arrays of a batch, each with its lengths."""

    arrays: dict[str, Tensor]
    """For instance {"embeddings": (N, T, C) float32}; padding frames are 0.  Further layers: see :func:`tap`; of a
    recogniser also the rows of its labels, (N, R, W) int32 (teachers/recogniser.py)."""
    lens: dict[str, Tensor]
    """The valid frames of each array, (N,) int64, equal to ``num_frames(audio_lens)`` exactly; tokens of token
    posteriors, numbers of an n-best list."""


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


def tap(teacher: Teacher, layers: Sequence[int]) -> list[str]:
    """Make one pass of a teacher give several layers, and return the array of ``TeacherOutput`` that holds each.

    Args:
        teacher: it was built for the last of the layers; a teacher can do it that has a method ``tap`` like this.
        layers: 1-based blocks; -1 is the teacher's own, 0 the input of the first.
    Raises:
        ConfigError: the teacher gives one layer only, or has no such layer.
    """
    if not hasattr(teacher, "tap"):
        raise ConfigError(
            f"a {type(teacher).__name__} gives one layer in a pass, --layer asks for {', '.join(map(str, layers))}; "
            "extract each in a run of its own"
        )
    return teacher.tap(layers)
