"""The clean audio of a cut as teachers hear it (our design)."""

import os

import numpy as np
import torch
from lhotse.audio import AudioLoadingError, DurationMismatchError
from lhotse.cut import MonoCut
from torch import Tensor

from icefall_kd.errors import DataError

# Lhotse fills up to half a second of missing audio with a mirror image of what is there, and a file that was cut off
# would get labels and features of that.  25 ms, its earlier default, are more than any resampling rounds.
os.environ.setdefault("LHOTSE_AUDIO_DURATION_MISMATCH_TOLERANCE", "0.025")
# What reading a recording (or stored features) raises when the file is missing or damaged.
UNREADABLE = (OSError, RuntimeError, ValueError, AssertionError, AudioLoadingError, DurationMismatchError)


def clean_audio(cut: MonoCut, sampling_rate: int) -> Tensor:
    """Return the waveform (S,) float32 of a cut at ``sampling_rate`` (in Hz).

    Raises:
        DataError: it cannot be read, or holds non-finite samples; the caller knows the cut.
    """
    try:
        if cut.sampling_rate != sampling_rate:
            cut = cut.resample(sampling_rate)
        wave = torch.from_numpy(np.ascontiguousarray(cut.load_audio()[0], dtype=np.float32))
    except UNREADABLE as error:
        # The message of lhotse spans many lines, and the last one says what happened.
        lines = str(error).strip().splitlines() or [""]
        raise DataError(f"audio cannot be read: {type(error).__name__}: {lines[-1]}") from error
    if not bool(torch.isfinite(wave).all()):
        raise DataError("audio holds non-finite samples")
    return wave
