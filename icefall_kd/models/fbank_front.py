"""The log-mel front end of HuBERT students: samples to vectors of 20 ms, as many as its convolutions would give.

Wang et al. 2022, "Exploring Effective Distillation of Self-Supervised Speech Models for Automatic Speech Recognition",
arXiv 2210.15631, section on the front end; its numbers are those of the co-author's code (docs/hubert.md).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.data.features import NUM_BINS, snipped_fbank
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import FBANK_GLU, FBANK_SNIPPED, waveform_seconds
from icefall_kd.models.dropout import Dropout
from icefall_kd.models.masks import make_pad_mask
from icefall_kd.models.waveform import frame_lens
from icefall_kd.runtime.tensors import read_tensors, stated
from icefall_kd.train.checkpoint import state_sha256


class FbankFrontEnd(nn.Module):
    """80 log-mel bins every 10 ms, global CMVN, one convolution of stride 2 with a gated unit, projection.

    Fbank frames are Kaldi's with whole windows only (25 ms every 10 ms), F = (S - 400) // 160 + 1, and every second one
    comes out, T' = (F - 1) // 2 + 1: for each number of samples what the seven convolutions give, so that frames of
    teacher and student correspond one to one.  Features get no gradient.  Padding is 0 behind the CMVN.

    Args:
        dim: channels C of the encoder.
        dropout: behind the projection.
    """

    hop = FBANK_GLU.hop
    frame_seconds = staticmethod(waveform_seconds)

    def __init__(self, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(NUM_BINS, 2 * dim, kernel_size=5, stride=2, padding=2)
        self.out = nn.Linear(dim, dim)
        nn.init.xavier_normal_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.dropout = Dropout(dropout)
        self.register_buffer("cmvn_mean", torch.zeros(NUM_BINS))
        self.register_buffer("cmvn_std", torch.ones(NUM_BINS))

    @staticmethod
    def output_lens(num_samples):
        """Return T' for S samples, an int or an integer tensor (N,)."""
        return frame_lens(FBANK_GLU, num_samples)

    def load_cmvn(self, path: Path) -> None:
        """Take the statistics of a training set, which local/compute_cmvn.py wrote.

        Raises:
            ConfigError: the file is not there.
            DataError: it does not hold a mean and a positive deviation of 80 bins.
        """
        if not path.is_file():
            raise ConfigError(f"--cmvn {path} does not exist; make it with local/compute_cmvn.py")
        try:
            header, found = read_tensors(path)
        except DataError as error:
            raise DataError(f"--cmvn {error}; make it again with local/compute_cmvn.py") from error
        for name in ("mean", "std"):
            x = found.get(name)
            if x is None or x.shape != (NUM_BINS,) or not x.isfinite().all() or (name == "std" and not (x > 0).all()):
                raise DataError(f"{path} holds no {name} of {NUM_BINS} bins; make it again with local/compute_cmvn.py")
        if stated(header, path).get("sha256") not in (None, state_sha256(found)):  # None: of an earlier version
            raise DataError(f"{path} is damaged: its checksum differs; make it again with local/compute_cmvn.py")
        self.cmvn_mean.copy_(found["mean"])
        self.cmvn_std.copy_(found["std"])

    def features(self, audio: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalised log-mel features.

        Args:
            audio: (N, S) float32 samples in [-1, 1].
            audio_lens: (N,) valid ones.
        Returns:
            (N, F, 80) float32, 0 in the padding, and (N,) valid frames of 10 ms.
        Raises:
            DataError: S is too short for one frame.
        """
        with torch.no_grad(), torch.autocast(audio.device.type, enabled=False):
            lens = frame_lens(FBANK_SNIPPED, audio_lens)
            return self.normalise(snipped_fbank(audio.float()), lens), lens

    def normalise(self, features: Tensor, lens: Tensor) -> Tensor:
        """Apply the CMVN to log-mel features (N, F, 80), of which (N,) frames are valid; the padding becomes 0."""
        features = (features - self.cmvn_mean) / self.cmvn_std
        return features.masked_fill(make_pad_mask(lens, features.shape[1]).unsqueeze(-1), 0.0)

    def project(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """Map :meth:`features` (N, F, 80) with (N,) valid frames to (N, T', C) and (N,) their lengths."""
        x = F.glu(self.conv(features.transpose(1, 2)), dim=1).transpose(1, 2)  # (N, T', C)
        return self.dropout(self.out(x)), (lens + 1) // 2

    def forward(self, audio: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Map samples (N, S) of which (N,) are valid to (N, T', C) vectors and (N,) their lengths."""
        return self.project(*self.features(audio, audio_lens))
