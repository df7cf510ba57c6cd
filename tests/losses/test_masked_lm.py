"""Label smoothing and mask sampling."""

import math

import pytest
import torch

from icefall_kd.losses.masked_lm import draw_masks, smoothed_cross_entropy


def test_smoothing_is_the_divergence_from_the_smoothed_label():
    torch.manual_seed(0)
    logits, y, smoothing = torch.randn(5, 7), torch.tensor([0, 3, 6, 2, 2]), 0.1
    q = torch.full((5, 7), smoothing / 6).scatter(1, y.unsqueeze(1), 1 - smoothing)
    expected = (q * (q.log() - logits.log_softmax(1))).sum(1)
    torch.testing.assert_close(smoothed_cross_entropy(logits, y, smoothing), expected)
    plain = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(smoothed_cross_entropy(logits, y, 0.0), plain)
    # A prediction that is the target costs nothing.
    assert smoothed_cross_entropy(q.log(), y, smoothing).abs().max() < 1e-6


@pytest.mark.parametrize("sampling", ["without_replacement", "with_replacement"])
def test_masks_lie_inside_and_there_is_one_at_least(sampling):
    torch.manual_seed(0)
    lens = torch.tensor([1, 5, 0, 3]).repeat(500)
    masks = draw_masks(lens, 6, sampling)
    counts = masks.sum(1)
    assert ((counts >= 1) == (lens > 0)).all() and (counts <= lens).all()
    assert not (masks & (torch.arange(6) >= lens[:, None])).any()
    assert draw_masks(torch.tensor([0, 0]), 0, sampling).shape == (2, 0)


# Spec figures for L = 5, 14, 30: mean masked share, and how often everything is masked.
@pytest.mark.parametrize(
    ("sampling", "shares", "all_masked"),
    [
        ("with_replacement", {5: 0.46, 14: 0.40, 30: 0.38}, {5: 0.008, 14: 0.0, 30: 0.0}),
        ("without_replacement", {5: 0.60, 14: 0.53, 30: 0.52}, {5: 1 / 5, 14: 1 / 14, 30: 1 / 30}),
    ],
)
def test_the_statistics_of_both_samplings(sampling, shares, all_masked):
    torch.manual_seed(0)
    draws = 40000
    for length, share in shares.items():
        masks = draw_masks(torch.full((draws,), length), length, sampling)
        assert float(masks.float().mean()) == pytest.approx(share, abs=0.008)
        found = float(masks.all(1).float().mean())
        assert found == pytest.approx(all_masked[length], abs=4 * math.sqrt(max(all_masked[length], 1e-5) / draws))
        # Every position is equally likely.
        assert float((masks.float().mean(0) - masks.float().mean()).abs().max()) < 0.015
    if sampling == "without_replacement":
        counts = masks.sum(1)
        assert float(counts.float().mean()) == pytest.approx((30 + 1) / 2, abs=0.2)  # n is uniform in 1 ... L
        assert torch.bincount(counts, minlength=31)[1:].min() > draws / 30 * 0.85
