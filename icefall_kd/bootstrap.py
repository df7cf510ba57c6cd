"""Bootstrap confidence intervals of error rates, of one system or of the difference of two.

Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP
2004: utterances are drawn with replacement, and the error rate of each draw is pooled over its
utterances.  Two systems are always compared on the same draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from icefall_kd.errors import ConfigError

# Entries of the matrix of drawn counts that is held at a time.
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile interval, in per cent (or points, for a difference)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class PairedResult:
    """System b against system a on the same utterances."""

    a: Interval
    b: Interval
    difference: Interval
    """b - a in points: negative when b is better."""
    probability_of_improvement: float
    """Share of draws in which b has the lower error rate; draws without a difference count half."""


def _draws(num_utterances: int, num_samples: int, seed: int):
    """Yield matrices (draws, utterances) of how often each utterance was drawn."""
    if num_samples < 1:
        raise ConfigError(f"--bootstrap is {num_samples}; at least 1 sample is needed")
    rng = np.random.default_rng(seed)
    share = np.full(num_utterances, 1.0 / num_utterances)
    step = max(1, _CHUNK // max(1, num_utterances))
    for begin in range(0, num_samples, step):
        rows = min(step, num_samples - begin)
        yield rng.multinomial(num_utterances, share, size=rows).astype(np.float64)


def _rates(columns: np.ndarray, ref_lens: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Return error rates in per cent (num_samples, systems) of the drawn sets.

    Args:
        columns: errors of each utterance and system, (utterances, systems).
        ref_lens: reference units of each utterance, (utterances,).
        num_samples: number of draws.
        seed: of the draws.
    """
    out = []
    for counts in _draws(len(ref_lens), num_samples, seed):
        length = counts @ ref_lens
        # A draw of nothing but empty references says nothing about a rate.
        with np.errstate(divide="ignore", invalid="ignore"):
            rates = 100.0 * (counts @ columns) / length[:, None]
        out.append(rates[length > 0])
    return np.concatenate(out)


def _interval(value: float, samples: np.ndarray, level: float) -> Interval:
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(samples, [tail, 100.0 - tail])
    return Interval(float(value), float(low), float(high))


def confidence_interval(
    errors: Sequence[int], ref_lens: Sequence[int], num_samples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval | None:
    """Return the error rate in per cent with its percentile interval.

    Args:
        errors: errors of each utterance.
        ref_lens: reference units of each utterance.
        num_samples: bootstrap draws.
        seed: of the draws.
        level: of confidence.
    Returns:
        None when there is no reference unit, so that no rate is defined.
    """
    e, r = np.asarray(errors, dtype=np.float64), np.asarray(ref_lens, dtype=np.float64)
    if r.sum() == 0:
        return None
    return _interval(100.0 * e.sum() / r.sum(), _rates(e[:, None], r, num_samples, seed)[:, 0], level)


def paired_bootstrap(
    errors_a: np.ndarray,
    errors_b: np.ndarray,
    ref_lens: Sequence[int],
    num_samples: int = 10000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedResult:
    """Compare two systems, each trained with one or several seeds, on the same utterances.

    An utterance is drawn with the errors of all its decodings, since those are not independent; so the
    interval speaks of other utterances from the same source, for these very trainings.

    Args:
        errors_a: errors of system a, (utterances,) or (seeds, utterances).
        errors_b: the same of system b; the number of seeds may differ.
        ref_lens: reference units, (utterances,).
        num_samples: bootstrap draws.
        seed: of the draws.
        level: of confidence.
    Returns:
        Rates averaged over seeds, their difference, and how probable an improvement is.
    """
    a = np.atleast_2d(np.asarray(errors_a, dtype=np.float64)).mean(axis=0)
    b = np.atleast_2d(np.asarray(errors_b, dtype=np.float64)).mean(axis=0)
    r = np.asarray(ref_lens, dtype=np.float64)
    if not a.shape == b.shape == r.shape:
        raise ConfigError(f"paired systems need the same utterances, got {a.shape}, {b.shape} and {r.shape}")
    if r.sum() == 0:
        raise ConfigError("the references are empty: there is no error rate to compare")
    values = 100.0 * np.array([a.sum(), b.sum()]) / r.sum()
    samples = _rates(np.stack([a, b], axis=1), r, num_samples, seed)
    difference = samples[:, 1] - samples[:, 0]
    # Means over seeds are sums of fractions: differences of rounding size are ties.
    tie = np.abs(difference) < 1e-9
    better = float(np.mean(np.where(tie, 0.5, difference < 0)))
    return PairedResult(
        a=_interval(values[0], samples[:, 0], level),
        b=_interval(values[1], samples[:, 1], level),
        difference=_interval(values[1] - values[0], difference, level),
        probability_of_improvement=better,
    )
