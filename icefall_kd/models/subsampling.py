"""Convolutional front end: log-mel frames of 10 ms to vectors of 40 ms."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import algorithmic_latency, chunk_num_frames, conv2d_subsampled_len, encoder_seconds
from icefall_kd.models.dropout import Dropout
from icefall_kd.models.masks import make_pad_mask

# Natural-log mel energies of speech in [-1, 1] lie near this mean and deviation (-5 to -7 and 3 to 5 on
# LibriSpeech, AISHELL-1 and synthetic speech).  Fixed numbers, so that nothing is estimated from (padded)
# batches and a stream sees what an utterance sees.
LOG_MEL_MEAN = -6.0
LOG_MEL_STD = 4.0


class Conv2dSubsampling(nn.Module):
    """Reduce the frame rate by four with three 3x3 convolutions, then project.

    Channels and strides are those of icefall's Conformer recipes (strides 1, 2, 2; the first convolution
    is padded by one, the others not at all).  Ours: fixed shift and scale of the input, ReLU, LayerNorm.

    A streaming front end looks at frames t ... t+2 where the other looks at t-1 ... t+1 (the padding stands at the
    end alone): as many frames come out, and a chunk needs no frame of the chunk before it.
    """

    def __init__(
        self,
        feature_dim: int,
        dim: int,
        channels: tuple[int, int, int] = (8, 32, 128),
        dropout: float = 0.1,
        streaming: bool = False,
    ) -> None:
        super().__init__()
        self.streaming = streaming
        if feature_dim < 7:
            raise ConfigError(f"--feature-dim is {feature_dim}; the subsampling needs at least 7 bins")
        c1, c2, c3 = channels
        self.conv1 = nn.Conv2d(1, c1, kernel_size=3, padding=(0 if streaming else 1, 1))
        self.conv2 = nn.Conv2d(c1, c2, kernel_size=3, stride=2)
        self.conv3 = nn.Conv2d(c2, c3, kernel_size=3, stride=2)
        # The bins shrink like the frames do.
        self.out = nn.Linear(c3 * conv2d_subsampled_len(feature_dim), dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, features: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Subsample a batch.

        Args:
            features: (N, T, F) log-mel frames.
            x_lens: (N,) valid frames.
        Returns:
            (N, T', C) vectors and (N,) their lengths, T' = frames.conv2d_subsampled_len(T).
        Raises:
            DataError: when T is too short for one output frame.
        """
        z, lens = self.project(features, x_lens)
        return self.finish(self.norm(z)), lens

    @property
    def channels(self) -> int:
        """Return the channels of :meth:`project`, which are the encoder's."""
        return self.out.out_features

    # Frame arithmetic of this front end; its input is counted in frames.
    hop = 4
    window = staticmethod(chunk_num_frames)
    output_lens = staticmethod(conv2d_subsampled_len)
    frame_seconds = staticmethod(encoder_seconds)
    latency = staticmethod(algorithmic_latency)

    def finish(self, z: Tensor) -> Tensor:
        """Map normalised vectors (N, T', C) to the encoder's input (N, T', C)."""
        return self.dropout(z)

    def project(self, features: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Run :meth:`forward` up to its LayerNorm, which self-supervised training looks at."""
        num_frames = features.shape[1]
        if conv2d_subsampled_len(num_frames) < 1:
            raise DataError(f"a batch of {num_frames} frames gives no encoder frame; utterances need at least 7 frames")
        # The last valid output sees one frame beyond the utterance: zero, as at the end of an unpadded one.
        if self.streaming:
            features = F.pad(features, (0, 0, 0, 2))
        return self._convolve(features, x_lens), conv2d_subsampled_len(x_lens)

    def forward_chunk(self, features: Tensor, x_lens: Tensor) -> Tensor:
        """Subsample the frames of one chunk, of a streaming front end.

        Args:
            features: (N, 4C + 5, F) log-mel frames, the first being frame 4p of the utterance for a chunk that starts
                at encoder frame p.
            x_lens: (N,) those of them that belong to the utterance.
        Returns:
            (N, C, C') vectors, equal to those of :meth:`forward` for the whole utterance.
        """
        return self.finish(self.norm(self._convolve(features, x_lens)))

    def _convolve(self, features: Tensor, x_lens: Tensor) -> Tensor:
        padding = make_pad_mask(x_lens, features.shape[1]).unsqueeze(-1)
        x = ((features - LOG_MEL_MEAN) * (1.0 / LOG_MEL_STD)).masked_fill(padding, 0.0)
        x = x.unsqueeze(1).to(memory_format=torch.channels_last)  # (N, 1, T, F)
        x = F.relu(self.conv1(x), inplace=True)
        x = F.relu(self.conv2(x), inplace=True)
        x = F.relu(self.conv3(x), inplace=True)  # (N, C3, T', F')
        x = x.permute(0, 2, 3, 1).flatten(2)  # (N, C3, T', F') -> (N, T', F' * C3): a view in channels-last memory
        return self.out(x)
