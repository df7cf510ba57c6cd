"""Writing recordings of 16 bits; reading is lhotse's."""

import io
from pathlib import Path

import numpy as np


def write_pcm16(path: Path, wave: np.ndarray, sampling_rate: int) -> None:
    """Write a wave (S,) in [-1, 1] at ``sampling_rate`` (in Hz) as .flac or .wav.

    Raises:
        OSError: naming the file and what is wrong, as a full disk, of which libsndfile says nothing: it calls that a
            problem with the decoder.
    """
    import soundfile

    content = io.BytesIO()
    samples = np.round(wave * 32767).astype(np.int16)
    soundfile.write(content, samples, sampling_rate, format=path.suffix[1:].upper(), subtype="PCM_16")
    try:
        path.write_bytes(content.getbuffer())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
