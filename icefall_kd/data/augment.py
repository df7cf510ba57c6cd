"""Augmentation of the student's input, seeded per utterance so that a resumed run repeats it exactly."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset.cut_transforms import CutMix
from lhotse.dataset.signal_transforms import SpecAugment
from torch import Tensor

from icefall_kd.config import AugmentConfig
from icefall_kd.data.filters import check_cuts
from icefall_kd.data.manifests import iterate_cuts
from icefall_kd.errors import DataError

# Shorter utterances stay as they are: a mask would hide too much of them.
MIN_FRAMES_FOR_MASKS = 20


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with the random, numpy and torch (CPU) generators seeded, and restore them after it."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # The CPU generator alone: torch.manual_seed would also touch CUDA's, which a forked worker must not.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


class FeatureAugment:
    """SpecAugment on single, unpadded utterances (our design: masks never depend on the batch's padding)."""

    def __init__(self, config: AugmentConfig) -> None:
        warp = config.spec_aug_time_warp_factor
        self.fraction = config.max_frames_mask_fraction
        self.transform = SpecAugment(
            time_warp_factor=warp if warp >= 1 else None,
            num_feature_masks=config.num_feature_masks,
            features_mask_size=config.features_mask_size,
            num_frame_masks=config.num_frame_masks,
            frames_mask_size=config.frames_mask_size,
            max_frames_mask_fraction=config.max_frames_mask_fraction,
            p=config.spec_aug_p,
        )

    def __call__(self, features: Tensor, seed: int) -> Tensor:
        """Mask one utterance.

        Args:
            features: (T, C) float32.
            seed: determines the masks.
        Returns:
            (T, C), a new tensor; the same one when it is too short for masks (below 20 frames with the default masks).
        """
        # lhotse draws mask widths from randint(0, fraction * T), which needs room for one frame.
        if features.size(0) < MIN_FRAMES_FOR_MASKS or self.fraction * features.size(0) < 1:
            return features
        with seeded(seed):
            return self.transform(features.unsqueeze(0)).squeeze(0)


class NoiseAugment:
    """Mix noise cuts (MUSAN) into the cuts of a batch; lengths, order and label keys stay as they are."""

    def __init__(self, config: AugmentConfig, features: str = "precomputed") -> None:
        """Read the noise cuts.

        Args:
            config: its ``musan_*`` options are used.
            features: "precomputed" mixes stored features, "on_the_fly" audio.
        Raises:
            DataError: no noise cuts, without features where these are mixed, or not at 16 kHz.
        """
        path = Path(config.musan_cuts)
        if not path.is_file():
            raise DataError(f"--musan-cuts {path} does not exist; run prepare.sh with --musan true")
        self.noises = CutSet.from_cuts(iterate_cuts(path))
        self.config = config
        if len(self.noises) == 0:
            raise DataError(f"--musan-cuts {path} holds no cuts")
        check_cuts(self.noises, features, f"--musan-cuts {path}")

    def __call__(self, cuts: CutSet, seed: int) -> list[Cut]:
        """Return the cuts in the same order, some of them with noise at a random SNR."""
        mix = CutMix(
            self.noises,
            snr=tuple(self.config.musan_snr),
            p=self.config.musan_p,
            pad_to_longest=False,
            preserve_id=True,
            seed=random.Random(seed),
        )
        with seeded(seed):
            mixed = list(mix(cuts))
        return [
            m.truncate(duration=c.duration) if m.duration > c.duration else m for m, c in zip(mixed, cuts, strict=True)
        ]
