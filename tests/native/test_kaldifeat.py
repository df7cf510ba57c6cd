"""kaldifeat's features are lhotse's."""

import pytest
import torch

from icefall_kd.data.features import FbankExtractor

pytest.importorskip("kaldifeat", exc_type=ImportError)


def test_auto_takes_it():
    assert FbankExtractor().backend == "kaldifeat"


@pytest.mark.parametrize("samples", [1, 80, 200, 399, 400, 401, 560, 16000, 16037, 160000])
def test_fbank_equals_lhotse(samples):
    g = torch.Generator().manual_seed(samples)
    seconds = torch.arange(samples) / 16000
    wave = 0.3 * torch.sin(2 * torch.pi * 440 * seconds) * torch.sin(seconds) + 0.05 * torch.randn(samples, generator=g)
    mine, theirs = (FbankExtractor(backend=name).extract(wave) for name in ("kaldifeat", "lhotse"))
    assert mine.shape == theirs.shape
    # float32: a bin of next to no energy beside strong ones is uncertain in either.
    difference = (mine - theirs).abs()
    assert not (difference >= 2e-3).any() and (difference > 1e-4).sum() <= 1e-3 * difference.numel()
