"""fast_rnnt's pruned transducer loss behind our function: the same values and gradients as our own code."""

import pytest
from loss_toys import assert_equal_ours, random_batch

from icefall_kd.losses.rnnt_backends import load_backend

pytest.importorskip("fast_rnnt", exc_type=ImportError)


def test_it_works():
    assert load_backend("fast_rnnt").name == "fast_rnnt"


@pytest.mark.parametrize("seed", range(50))
def test_losses_and_gradients_equal_ours(seed):
    batch, rng = random_batch(seed, sharpness=3)
    options = {"prune_range": rng.randint(2, 6), "lm_scale": 0.25, "am_scale": rng.choice([0.0, 0.1])}
    assert_equal_ours("fast_rnnt", batch, options)
