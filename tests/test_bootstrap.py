"""Intervals: reproducible, close to theory, paired on the same draws."""

import numpy as np
import pytest

from icefall_kd.bootstrap import confidence_interval, paired_bootstrap
from icefall_kd.errors import ConfigError

RNG = np.random.default_rng(0)
REF_LENS = RNG.integers(5, 30, size=400)
ERRORS = RNG.binomial(REF_LENS, 0.2)


def test_the_interval_is_seeded_and_holds_the_rate():
    a = confidence_interval(ERRORS, REF_LENS, 500, seed=1)
    assert a == confidence_interval(ERRORS, REF_LENS, 500, seed=1)
    assert a != confidence_interval(ERRORS, REF_LENS, 500, seed=2)
    assert a.value == pytest.approx(100 * ERRORS.sum() / REF_LENS.sum())
    assert a.low < a.value < a.high


def test_the_width_agrees_with_the_variance_of_a_ratio():
    interval = confidence_interval(ERRORS, REF_LENS, 4000)
    residual = ERRORS - ERRORS.sum() / REF_LENS.sum() * REF_LENS
    deviation = 100 * np.sqrt((residual**2).sum()) / REF_LENS.sum()
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * deviation, rel=0.06)


def test_percentiles_match_a_plain_resampling_loop():
    errors, lens = np.array([0, 3, 1, 0, 5, 2]), np.array([4, 6, 3, 8, 9, 5])
    rng = np.random.default_rng(9)
    rates = []
    for _ in range(20000):
        pick = rng.integers(6, size=6)
        rates.append(100 * errors[pick].sum() / lens[pick].sum())
    interval = confidence_interval(errors, lens, 20000)
    assert [interval.low, interval.high] == pytest.approx(np.percentile(rates, [2.5, 97.5]), abs=0.8)


def test_equal_systems_differ_by_nothing():
    result = paired_bootstrap(ERRORS, ERRORS, REF_LENS, 200)
    assert (result.difference.value, result.difference.low, result.difference.high) == (0, 0, 0)
    assert result.probability_of_improvement == 0.5


def test_pairing_finds_a_small_but_consistent_gain():
    better = np.maximum(ERRORS - (np.arange(400) % 5 == 0), 0)
    result = paired_bootstrap(ERRORS, better, REF_LENS, 1000)
    assert result.difference.high < 0
    assert result.probability_of_improvement == 1.0
    # Each system's own interval is wider than the gain: unpaired intervals overlap.
    assert result.b.high > result.a.low
    mirrored = paired_bootstrap(better, ERRORS, REF_LENS, 1000)
    assert mirrored.difference.low == pytest.approx(-result.difference.high)


def test_seeds_are_pooled_by_utterance():
    other = RNG.binomial(REF_LENS, 0.2)
    pooled = paired_bootstrap(np.stack([ERRORS, other]), np.stack([ERRORS, ERRORS]), REF_LENS, 500)
    assert pooled.a.value == pytest.approx(100 * (ERRORS.sum() + other.sum()) / (2 * REF_LENS.sum()))
    single = paired_bootstrap((ERRORS + other) / 2, ERRORS, REF_LENS, 500)
    assert pooled == single
    # The same decoding twice is one decoding: clusters are not counted as new evidence.
    twice = paired_bootstrap(np.stack([other, other]), np.stack([ERRORS, ERRORS]), REF_LENS, 500)
    assert twice == paired_bootstrap(other, ERRORS, REF_LENS, 500)


def test_undefined_rates_are_said_to_be_so():
    assert confidence_interval([1], [0]) is None
    with pytest.raises(ConfigError, match="references are empty"):
        paired_bootstrap([1], [0], [0])
    with pytest.raises(ConfigError, match="same utterances"):
        paired_bootstrap([1, 2], [0], [5])
    with pytest.raises(ConfigError, match="--bootstrap is 0"):
        confidence_interval([1], [4], 0)
