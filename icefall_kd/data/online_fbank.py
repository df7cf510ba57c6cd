"""The features of audio that is still coming: the same frames as those of the whole, as soon as they are certain."""

import torch
from torch import Tensor

from icefall_kd.data.features import FbankExtractor
from icefall_kd.frames import fbank_complete_frames, fbank_num_frames

# Samples at 16 kHz between two frames.
HOP = 160
# Frames computed again in front of the new ones: the first of a piece has a reflected edge.
_AGAIN = 2


class OnlineFbank:
    """80-bin log-mel features of a stream of 16 kHz samples.

    A frame comes out when all samples of its window are there; the last ones, whose windows reach behind the end,
    when the stream ends.  What comes out equals the features of the whole recording.
    """

    def __init__(self, extractor: FbankExtractor | None = None) -> None:
        self.extractor = extractor or FbankExtractor()
        self.samples = torch.zeros(0)
        """What is still needed of the stream, from the beginning of frame ``self._begin`` on."""
        self._begin = 0
        self._done = 0
        self.num_samples = 0
        """Samples accepted so far."""

    def accept(self, samples: Tensor) -> Tensor:
        """Return the frames (T, 80) that the next samples (S,) in [-1, 1] complete; T may be 0."""
        self.samples = torch.cat([self.samples, samples.float()])
        self.num_samples += len(samples)
        return self._frames(fbank_complete_frames(self.num_samples))

    def finish(self) -> Tensor:
        """Return the frames (T, 80) that were waiting for samples that will not come."""
        return self._frames(fbank_num_frames(self.num_samples))

    def _frames(self, end: int) -> Tensor:
        """Return frames from the first that did not come out yet to ``end``."""
        if end <= self._done:
            return torch.zeros(0, 80)
        frames = self.extractor.extract(self.samples)[self._done - self._begin : end - self._begin]
        self._done = end
        keep = max(end - _AGAIN, 0)
        self.samples = self.samples[(keep - self._begin) * HOP :]
        self._begin = keep
        return frames


class OnlineSamples:
    """The samples of a stream as they are, for a front end that hears them."""

    def __init__(self) -> None:
        self.num_samples = 0
        """Samples accepted so far."""

    def accept(self, samples: Tensor) -> Tensor:
        """Return the next samples (S,)."""
        self.num_samples += len(samples)
        return samples.float()

    def finish(self) -> Tensor:
        """Return what was kept back: nothing."""
        return torch.zeros(0)
