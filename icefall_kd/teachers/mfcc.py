"""MFCC as a teacher: what the clusters of HuBERT's first iteration are made of (arXiv 2106.07447, section IV-B)."""

import functools
import importlib.metadata

import torch
from torch import Tensor

from icefall_kd.config import TeacherConfig
from icefall_kd.data.batch import Batch
from icefall_kd.data.features import snipped_mfcc
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import FBANK_GLU
from icefall_kd.runtime.files import fingerprint
from icefall_kd.teachers.base import TeacherOutput

NAME = "mfcc"
# Half width of the regression that gives differences, as in Kaldi and HTK.
_WIDTH = 2


def differences(x: Tensor) -> Tensor:
    """Return the slope of (T, C) over the two frames on either side: sum_n n (x[t+n] - x[t-n]) / (2 sum_n n^2).

    The first and the last frame are repeated beyond the ends.
    """
    padded = torch.cat([x[:1].expand(_WIDTH, -1), x, x[-1:].expand(_WIDTH, -1)])
    frames = len(x)
    slope = sum(
        n * (padded[_WIDTH + n : _WIDTH + n + frames] - padded[_WIDTH - n : _WIDTH - n + frames])
        for n in range(1, _WIDTH + 1)
    )
    return slope / (2 * sum(n * n for n in range(1, _WIDTH + 1)))


class MfccTeacher:
    """13 MFCC with first and second differences, every second frame of 10 ms: as many as HuBERT's convolutions give."""

    sampling_rate = 16000
    dim = 39
    frame_formula = FBANK_GLU
    max_samples = None

    def __init__(self, normalize_embeddings: bool = False) -> None:
        self.normalize_embeddings = normalize_embeddings

    @classmethod
    def build(cls, cfg: TeacherConfig) -> "MfccTeacher":
        """Return the teacher that ``cfg`` describes; a ConfigError for a layer, of which MFCC have none."""
        if cfg.layer != -1:
            raise ConfigError(f"--layer {cfg.layer} with --teacher {NAME}: MFCC have no layers; leave it out")
        return cls(cfg.normalize_embeddings)

    def num_frames(self, num_samples: int) -> int:
        """Return the exact number of frames of an utterance."""
        return self.frame_formula.num_frames(int(num_samples))

    @torch.no_grad()
    def extract(self, batch: Batch) -> TeacherOutput:
        """Return ``embeddings`` (N, T, 39) float32 of ``batch.audio``, 0 in the padding, computed on the CPU.

        Raises:
            DataError: the batch has no audio.
        """
        if batch.audio is None or batch.audio_lens is None:
            raise DataError("teacher mfcc needs audio, and the batch holds none")
        lens = torch.tensor([self.num_frames(n) for n in batch.audio_lens.tolist()], dtype=torch.int64)
        out = torch.zeros(len(lens), int(lens.max()) if len(lens) else 0, self.dim)
        for row, samples, frames in zip(range(len(lens)), batch.audio_lens.tolist(), lens.tolist(), strict=True):
            if frames:
                # Alone, so that differences at the end do not see the padding.
                x = snipped_mfcc(batch.audio[row : row + 1, :samples].float().cpu())[0]
                first = differences(x)
                x = torch.cat([x, first, differences(first)], dim=1)[::2]
                out[row, :frames] = torch.nn.functional.layer_norm(x, x.shape[-1:]) if self.normalize_embeddings else x
        return TeacherOutput(arrays={"embeddings": out}, lens={"embeddings": lens})

    def provenance(self) -> dict:
        """Return plain data that identifies the labels of this teacher."""
        convention = "no layers: 13 MFCC, their first and second differences over 2 frames, every second frame"
        return {
            "family": NAME,
            "teacher": NAME,
            "source": "computed",
            "weights_sha256": _identity(convention),
            "layer": None,
            "layer_convention": convention,
            "input_normalization": "none",
            "normalization": "layer_norm_without_parameters" if self.normalize_embeddings else "none",
            "dim": self.dim,
            "frame_formula": self.frame_formula.to_dict(),
            "max_samples": None,
            "device": "cpu",
            "dtype": "float32",
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "lhotse")},
        }


@functools.cache
def _identity(convention: str) -> str:
    """Return what stands for the SHA-256 of weights: of what is computed, and of its values for one signal."""
    probe = torch.sin(torch.arange(1200) ** 1.5 / 40).unsqueeze(0)
    return fingerprint([convention, [round(v, 1) for v in snipped_mfcc(probe)[0, 0].tolist()]])
