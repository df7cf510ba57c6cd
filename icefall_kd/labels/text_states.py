"""States of a language model as rows of a label set (our design); all functions are pure.

A set's keys name texts: the SHA-256 of the normalised text, so that speed copies and equal texts share their rows.  A
row is a piece of the language model, uint16: the characters that it stands for (start, end), whether the model knows
them (0) or not (1), and the state as the bits of float16; the last row is the end of the text.  Rows know nothing of
the recogniser's tokens, with which they are aligned when a batch is made (labels/text_reading.py).
"""

import numpy as np
from torch import Tensor

from icefall_kd.errors import DataError

LEAD = 3
"""Numbers of a row in front of the state."""
_FLOAT16_MAX = 65504.0


def pack_states(spans: np.ndarray, unknown: np.ndarray, states: Tensor) -> np.ndarray:
    """Return the rows (P, 3 + C) uint16 of a text.

    Args:
        spans: (P, 2) characters of each piece; the last one is (L, L).
        unknown: (P,) bool.
        states: (P, C) float32.
    Raises:
        DataError: a state does not fit float16.
    """
    largest = float(states.abs().max())
    if not largest <= _FLOAT16_MAX:
        raise DataError(f"a state reaches {largest:.4g}, float16 holds {_FLOAT16_MAX}; choose another --plm-layer")
    bits = states.numpy().astype(np.float16).view(np.uint16)
    return np.concatenate([spans, unknown[:, None], bits], axis=1).astype(np.uint16)


def unpack_states(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the characters (P, 2) int64 and the states (P, C) float32 of rows."""
    states = np.ascontiguousarray(rows[:, LEAD:], np.uint16).view(np.float16).astype(np.float32)
    return rows[:, :2].astype(np.int64), states


def rows_problem(rows: np.ndarray) -> str | None:
    """Return what rows of a text say that cannot be, or None."""
    spans, states = unpack_states(rows)
    if not len(rows):
        return "no row for the end of the text"
    start, end = spans.T
    inside = (start[:-1] < end[:-1]) & (end[:-1] <= end[-1])
    if start[-1] != end[-1] or not inside.all() or (np.diff(start) < 0).any():
        return f"characters {spans.tolist()}, which are not spans in order with the end behind them"
    if not np.isfinite(states).all():
        return "states that are not finite"
    return None
