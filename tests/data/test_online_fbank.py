"""Features of a stream are those of the recording, whatever pieces its samples come in."""

import pytest
import torch

from icefall_kd.data.features import FbankExtractor
from icefall_kd.data.online_fbank import OnlineFbank

torch.set_num_threads(1)


@pytest.mark.parametrize("num_samples", [0, 60, 160, 279, 280, 399, 1000, 16_001, 20_480])
@pytest.mark.parametrize("block", [37, 160, 1600, 100_000])
def test_pieces_give_the_features_of_the_whole(num_samples, block):
    if block == 37:
        num_samples = min(num_samples, 4000)
    torch.manual_seed(num_samples)
    wave = 0.1 * torch.randn(num_samples)
    online = OnlineFbank()
    pieces = [online.accept(piece) for piece in wave.split(block)]
    pieces.append(online.finish())
    whole = FbankExtractor().extract(wave) if num_samples else torch.zeros(0, 80)
    found = torch.cat(pieces)
    assert found.shape == whole.shape
    torch.testing.assert_close(found, whole, rtol=0, atol=2e-4)


def test_a_frame_comes_with_the_last_sample_of_its_window_and_memory_stays_small():
    online, count = OnlineFbank(), 0
    for n in range(1, 3000):
        count += len(online.accept(torch.randn(1)))
        # Frame t covers samples 160 t - 120 ... 160 t + 279.
        assert count == (0 if n < 280 else (n - 280) // 160 + 1), n
        assert len(online.samples) <= 280 + 2 * 160
