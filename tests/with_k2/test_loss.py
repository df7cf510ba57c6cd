"""k2's pruned transducer loss behind our function: the same values and gradients as our own code."""

import pytest
from loss_toys import assert_equal_ours, random_batch

from icefall_kd.losses.rnnt_backends import load_backend

pytestmark = pytest.mark.k2


def test_k2_is_what_auto_takes():
    assert load_backend("auto").name == "k2"


@pytest.mark.parametrize("seed", range(200))
def test_losses_and_gradients_equal_ours(seed):
    batch, rng = random_batch(seed, sharpness=3)
    options = {"prune_range": rng.randint(2, 6), "lm_scale": 0.25, "am_scale": rng.choice([0.0, 0.1])}
    assert_equal_ours("k2", batch, options)


@pytest.mark.parametrize("seed", range(200, 220))
def test_sharp_losses_equal_ours_where_no_window_has_to_be_chosen(seed):
    """With occupations of 0 and 1 several windows keep the same mass, and rounding decides between them.

    k2 rounds to float32 and we to float64, so that narrow windows, each as good as the other, may differ.
    """
    batch, _ = random_batch(seed, sharpness=5)
    assert_equal_ours("k2", batch, {"prune_range": 31, "lm_scale": 0.25})
