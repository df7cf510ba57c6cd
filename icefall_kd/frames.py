"""All frame arithmetic of the project: samples to frames, frames to encoder frames.

Nothing else in the repository computes a number of frames.  Every formula is exact integer
arithmetic, is written into the provenance of a label set, and is read back from there.
"""

from dataclasses import dataclass

from icefall_kd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FrameFormula:
    """The exact number of frames of a stack of 1-D convolutions over samples.

    With ``right_pad`` the last, partly filled frame counts: this is how encoders count that see
    audio padded to a fixed window (Whisper).  Without it, frames are counted as by a stack of
    un-padded convolutions (HuBERT, wav2vec 2.0, WavLM).
    """

    kernels: tuple[int, ...]
    """Kernel sizes, first layer first, in samples of the layer's own input."""
    strides: tuple[int, ...]
    """Strides, first layer first."""
    right_pad: bool = False
    """Count ceil(num_samples / hop) frames instead of the un-padded convolution's."""
    pad: int = 0
    """Samples of padding, both ends together, that the first layer adds (Fbank extractors)."""

    def __post_init__(self) -> None:
        if not self.kernels or len(self.kernels) != len(self.strides):
            raise ConfigError(f"a frame formula needs one stride a kernel, got {self.kernels} and {self.strides}")
        if min(self.kernels) < 1 or min(self.strides) < 1:
            raise ConfigError(f"kernels and strides are at least 1, got {self.kernels} and {self.strides}")
        if self.pad < 0 or (self.pad and self.right_pad):
            raise ConfigError(f"pad is {self.pad}; it is at least 0, and 0 with right_pad")

    @property
    def hop(self) -> int:
        """Samples between two frames."""
        hop = 1
        for stride in self.strides:
            hop *= stride
        return hop

    @property
    def receptive_field(self) -> int:
        """Samples that one frame sees."""
        field, jump = 1, 1
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            field += (kernel - 1) * jump
            jump *= stride
        return field

    def num_frames(self, num_samples: int) -> int:
        """Return the exact number of frames of ``num_samples`` samples (0 when too short)."""
        if num_samples < 0:
            raise ConfigError(f"num_samples is {num_samples}; it cannot be negative")
        if self.right_pad:
            return -(-num_samples // self.hop)
        n = num_samples + self.pad
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            if n < kernel:
                return 0
            n = (n - kernel) // stride + 1
        return n

    def to_dict(self) -> dict:
        """Return the plain form stored in a label set's provenance."""
        return {
            "kernels": list(self.kernels),
            "strides": list(self.strides),
            "right_pad": self.right_pad,
            "pad": self.pad,
        }

    @classmethod
    def from_dict(cls, d: dict) -> "FrameFormula":
        """Read back what :meth:`to_dict` wrote."""
        return cls(
            kernels=tuple(d["kernels"]),
            strides=tuple(d["strides"]),
            right_pad=bool(d["right_pad"]),
            pad=int(d.get("pad", 0)),
        )


# The convolution stack shared by wav2vec 2.0, HuBERT and WavLM: hop 320, receptive field 400.
SSL_CONV = FrameFormula(kernels=(10, 3, 3, 3, 3, 2, 2), strides=(5, 2, 2, 2, 2, 2, 2))
# Kaldi's log-mel frames of whole windows, 25 ms every 10 ms, and every second of them: as many as SSL_CONV gives.
FBANK_SNIPPED = FrameFormula(kernels=(400,), strides=(160,))
FBANK_GLU = FrameFormula(kernels=(400, 1), strides=(160, 2))
# icefall's published codebook indexes: floor(num_samples / 320), at times one more than HuBERT's convolutions give.
ICEFALL_INDEXES = FrameFormula(kernels=(320,), strides=(320,))
# Whisper: one output frame is 320 samples; frames that lie wholly in the padding are dropped.
WHISPER_CONV = FrameFormula(kernels=(320,), strides=(320,), right_pad=True)
# Our own encoders: log-mel frames of 25 ms every 10 ms centred by padding (see fbank_num_frames), then two un-padded
# convolutions of kernel 3 and stride 2 (see conv2d_subsampled_len): hop 640.
FBANK_CONV2D = FrameFormula(kernels=(400, 3, 3), strides=(160, 2, 2), pad=320)
# Seconds between two frames of our encoders.
ENCODER_FRAME_SHIFT = FBANK_CONV2D.hop / 16000


def encoder_seconds(frame: int) -> float:
    """Return where an encoder frame (0-based) begins, in seconds: 0.04 a frame, as icefall counts.

    The frame lasts until the next begins; the convolutions in front of the encoder hear 17.5 ms more on the left of
    it and 47.5 ms more on the right, in a streaming model 7.5 and 57.5 ms.
    """
    return round(frame * ENCODER_FRAME_SHIFT, 6)


def fbank_num_frames(num_samples: int, hop: int = 160) -> int:
    """Return the frames of an Fbank extractor with ``snip_edges=False``: round half up of samples/hop."""
    return (num_samples + hop // 2) // hop


def fbank_complete_frames(num_samples: int) -> int:
    """Return how many Fbank frames at 16 kHz are certain when so many samples of a stream have been heard.

    Frame t covers the 400 samples from 160 t - 120 on (25 ms centred on a hop of 10 ms).
    """
    return max((num_samples + 120 - 400) // 160 + 1, 0)


def conv2d_subsampled_len(num_frames):
    """Return T' of two un-padded stride-2 convolutions, ``((T - 1) // 2 - 1) // 2``.

    Args:
        num_frames: an int or an integer tensor of input frames T (10 ms each).
    Returns:
        The same type, never negative: frames of 40 ms.
    """
    length = ((num_frames - 1) // 2 - 1) // 2
    return max(length, 0) if isinstance(length, int) else length.clamp(min=0)


def pooled_len(num_frames, num_pools: int = 2):
    """Return T' of one un-padded stride-2 convolution of kernel 3 and ``num_pools`` max pools over pairs of frames.

    The convolution's frames are of 20 ms, each pool doubles that: 80 ms behind two.  A last frame without a partner is
    a pair, too, so that what an utterance gives does not depend on the padding of its batch.

    Args:
        num_frames: an int or an integer tensor of input frames T (10 ms each).
        num_pools: pools behind the convolution.
    Returns:
        The same type, never negative.
    """
    length = (num_frames - 1) // 2
    length = max(length, 0) if isinstance(length, int) else length.clamp(min=0)
    for _ in range(num_pools):
        length = (length + 1) // 2
    return length


def pooled_seconds(frame: int, num_pools: int = 2) -> float:
    """Return where a frame (0-based) behind the convolution and pools of :func:`pooled_len` begins, in seconds."""
    return round(frame * 0.02 * 2**num_pools, 6)


def chunk_num_frames(chunk_size: int) -> int:
    """Return the Fbank frames that a streaming encoder needs for a chunk of ``chunk_size`` encoder frames.

    Encoder frame t sees Fbank frames 4t ... 4t + 8: three convolutions of kernel 3, the last two of stride 2, none
    padded on the left (models/subsampling.py).  The next chunk begins 4 * chunk_size frames later.
    """
    return 4 * chunk_size + 5


def chunk_num_samples(chunk_size: int) -> int:
    """Return the samples that the waveform front end needs for a chunk of ``chunk_size`` frames of 20 ms.

    Frame t sees samples 320 t ... 320 t + 399; the next chunk begins 320 * chunk_size samples later.
    """
    return SSL_CONV.hop * (chunk_size - 1) + SSL_CONV.receptive_field


def waveform_frames(num_frames: int) -> int:
    """Return the frames of 20 ms of an utterance of so many log-mel frames of 10 ms, at least."""
    return SSL_CONV.num_frames(max(num_frames * 160 - 80, 0))


def waveform_seconds(frame: int) -> float:
    """Return where a frame (0-based) of the waveform front end begins, in seconds."""
    return round(frame * SSL_CONV.hop / 16000, 6)


def front_end_latency(waveform: bool = False) -> float:
    """Return the seconds of audio behind an encoder frame's own 40 ms that it hears.

    Its last Fbank frame, 4t + 8, ends 17.5 ms after the frame's beginning at (4t + 8) * 10 ms (25 ms centred on 10 ms).

    Args:
        waveform: of the front end that hears samples: the frame's own are 20 ms, and it hears 25.
    """
    return (SSL_CONV.receptive_field - SSL_CONV.hop) / 16000 if waveform else (4 + 1) * 0.01 + 0.0075


def chunk_look_ahead(chunk_size: int, right_context: int, num_layers: int = 1) -> int:
    """Return the encoder frames behind a chunk that its output depends on.

    The last layer sees ``right_context`` frames, which lie in chunks whose own frames a layer below has to have seen
    to their ends, and so on: each further layer adds the whole chunks that the right context reaches into.

    Args:
        chunk_size: frames, -1: the whole utterance, behind which there is nothing.
        right_context: frames that one layer sees behind the chunk.
        num_layers: layers that look ahead one upon the other; 1 for copies of the frames.
    """
    if chunk_size < 1 or not right_context:
        return 0
    return right_context + (num_layers - 1) * -(-right_context // chunk_size) * chunk_size


def algorithmic_latency(chunk_size: int, look_ahead: int = 0, waveform: bool = False) -> float:
    """Return the seconds that the first frame of a chunk waits until the encoder can see it, computation left out.

    Args:
        chunk_size: encoder frames.
        look_ahead: encoder frames behind the chunk that are waited for (:func:`chunk_look_ahead`).
        waveform: frames are those of the front end that hears samples, 20 ms.
    """
    return (chunk_size + look_ahead) * (0.02 if waveform else 0.04) + front_end_latency(waveform)
