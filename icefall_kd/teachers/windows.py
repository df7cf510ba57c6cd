"""Utterances longer than a teacher's limit: overlapping windows on exact frame multiples, joined in the middle."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError
from icefall_kd.frames import FrameFormula
from icefall_kd.teachers.base import Teacher, TeacherOutput, tap


@dataclass(frozen=True)
class Window:
    """One window of a long utterance; frames are counted from the beginning of the utterance."""

    start_sample: int
    """First sample."""
    num_samples: int
    """Samples of the window."""
    start_frame: int
    """Frame of the utterance that is the window's frame 0."""
    keep_from: int
    """First frame of the utterance taken from this window."""
    keep_to: int
    """One past the last frame taken."""


def plan_windows(num_samples: int, max_samples: int, overlap_samples: int, formula: FrameFormula) -> list[Window]:
    """Cut an utterance into windows whose kept frames are exactly the utterance's frames.

    Every window but a single one is as long as possible; the last one is moved back to end with the utterance, so
    that its frames have context too.  Two neighbours meet in the middle of the frames that both have.

    Args:
        num_samples: Samples of the utterance.
        max_samples: Longest window.
        overlap_samples: Least overlap of two windows; rounded up to whole frames.
        formula: The teacher's frame formula.
    Returns:
        The windows in order; ``keep_to`` of the last one is ``formula.num_frames(num_samples)``.
    Raises:
        ConfigError: If the windows cannot overlap.
    """
    hop, total = formula.hop, formula.num_frames(num_samples)
    usable = max_samples // hop * hop
    step = (usable - overlap_samples) // hop * hop
    least = 0 if formula.right_pad else formula.receptive_field - hop
    if step < hop or overlap_samples < least:
        raise ConfigError(
            f"windows of {max_samples} samples cannot overlap by {overlap_samples}: "
            f"use between {least} and {usable - hop} samples"
        )
    if num_samples <= max_samples:
        return [Window(0, num_samples, 0, 0, total)]
    last = -(-(num_samples - usable) // hop) * hop
    starts = [*range(0, last, step), last]
    lengths = [usable] * (len(starts) - 1) + [num_samples - last]
    ends = [start // hop + formula.num_frames(n) for start, n in zip(starts, lengths, strict=True)]
    joins = [(end + start // hop) // 2 for end, start in zip(ends[:-1], starts[1:], strict=True)]
    bounds = [0, *joins, total]
    return [
        Window(start, n, start // hop, bounds[i], bounds[i + 1])
        for i, (start, n) in enumerate(zip(starts, lengths, strict=True))
    ]


class WindowedTeacher:
    """A teacher without a length limit, made of one that has a limit."""

    max_samples = None

    def __init__(self, teacher: Teacher, overlap_samples: int | None = None) -> None:
        """Wrap ``teacher``.

        Args:
            teacher: A teacher that states ``max_samples``.
            overlap_samples: Least overlap of two windows; None: a sixth of the window (5 s of Whisper's 30 s).
        Raises:
            ConfigError: If the teacher has no limit, or the overlap does not fit.
        """
        if teacher.max_samples is None:
            raise ConfigError("this teacher has no length limit; it needs no windows")
        hop = teacher.frame_formula.hop
        self.teacher = teacher
        self.overlap_samples = teacher.max_samples // 6 // hop * hop if overlap_samples is None else overlap_samples
        self.sampling_rate, self.dim, self.frame_formula = teacher.sampling_rate, teacher.dim, teacher.frame_formula
        self._plan(teacher.max_samples + 1)

    def _plan(self, num_samples: int) -> list[Window]:
        return plan_windows(num_samples, self.teacher.max_samples, self.overlap_samples, self.frame_formula)

    def num_frames(self, num_samples: int) -> int:
        """Return the exact number of frames of an utterance of any length."""
        return self.teacher.num_frames(num_samples)

    def tap(self, layers: Sequence[int]) -> list[str]:
        """Make one pass give several layers of the wrapped teacher."""
        return tap(self.teacher, layers)

    def provenance(self) -> dict:
        """Return the wrapped teacher's provenance and the windows."""
        windows = {"max_samples": self.teacher.max_samples, "overlap_samples": self.overlap_samples}
        return {**self.teacher.provenance(), "long_utterances": "window", "windows": windows}

    def extract(self, batch: Batch) -> TeacherOutput:
        """Return the embeddings of ``batch.audio``, utterances of any length; see ``Teacher.extract``."""
        if batch.audio is None or batch.audio_lens is None or int(batch.audio_lens.max()) <= self.teacher.max_samples:
            return self.teacher.extract(batch)
        plans = [self._plan(n) for n in batch.audio_lens.tolist()]
        pieces = [
            (row, window, batch.audio[row, window.start_sample : window.start_sample + window.num_samples])
            for row, plan in enumerate(plans)
            for window in plan
        ]
        out = self.teacher.extract(Batch.from_audio([p[2] for p in pieces], [batch.ids[p[0]] for p in pieces]))
        arrays, lens = {}, {}
        for name, values in out.arrays.items():
            rows: Sequence[list] = [[] for _ in plans]
            for (row, window, _), value in zip(pieces, values, strict=True):
                rows[row].append(value[window.keep_from - window.start_frame : window.keep_to - window.start_frame])
            joined = [torch.cat(parts) for parts in rows]
            arrays[name] = pad_sequence(joined, batch_first=True)
            lens[name] = torch.tensor([len(x) for x in joined], dtype=torch.int64, device=values.device)
        return TeacherOutput(arrays=arrays, lens=lens)
