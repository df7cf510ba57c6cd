"""k2's pruned transducer loss behind our function: the same values and gradients as our own code."""

import random

import pytest
import torch
from torch import nn

from icefall_kd.losses.rnnt import pruned_transducer_loss
from icefall_kd.losses.rnnt_backends import load_backend
from icefall_kd.models.transducer import Joiner, StatelessDecoder

pytestmark = pytest.mark.k2
DIM = 8


def losses_and_gradients(backend, modules, x, y, x_lens, y_lens, weights, **options):
    decoder, joiner, am, lm = modules
    losses = torch.stack(
        pruned_transducer_loss(
            x, decoder(decoder.add_sos(y)), joiner, am, lm, y, x_lens, y_lens, backend=backend, **options
        )
    )
    return losses.detach(), torch.autograd.grad((losses * weights).sum(), [x, *modules.parameters()])


def random_batch(seed, sharpness):
    """Return the arguments of losses_and_gradients for a ragged batch, and its random number generator."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    vocab, num, frames = rng.randint(3, 30), rng.randint(1, 5), rng.randint(1, 30)
    symbols = rng.randint(1, frames)  # k2 refuses more symbols than frames, and we do not ask it
    decoder, joiner = StatelessDecoder(vocab, DIM), Joiner(DIM, DIM, DIM, vocab)
    modules = nn.ModuleList([decoder, joiner, nn.Linear(DIM, vocab), nn.Linear(DIM, vocab)])
    with torch.no_grad():
        for parameter in modules[1:].parameters():
            parameter.mul_(sharpness)
    x = torch.randn(num, frames, DIM, requires_grad=True)
    x_lens = torch.tensor([frames, *(rng.randint(1, frames) for _ in range(num - 1))])
    y_lens = torch.tensor([symbols, *(rng.randint(1, symbols) for _ in range(num - 1))])
    y = torch.randint(1, vocab, (num, symbols))
    return (modules, x, y, x_lens, y_lens, torch.rand(2, num)), rng


def assert_equal_ours(batch, options):
    ours, theirs = (losses_and_gradients(name, *batch, **options) for name in ("torch", "k2"))
    assert ours[0].isfinite().all() and any(gradient.any() for gradient in ours[1])
    torch.testing.assert_close(theirs[0], ours[0], rtol=1e-4, atol=1e-4)
    for theirs_of_one, ours_of_one in zip(theirs[1], ours[1], strict=True):
        torch.testing.assert_close(theirs_of_one, ours_of_one, rtol=1e-4, atol=1e-4)


def test_k2_is_what_auto_takes():
    assert load_backend("auto").name == "k2"


@pytest.mark.parametrize("seed", range(200))
def test_losses_and_gradients_equal_ours(seed):
    batch, rng = random_batch(seed, sharpness=3)
    options = {"prune_range": rng.randint(2, 6), "lm_scale": 0.25, "am_scale": rng.choice([0.0, 0.1])}
    assert_equal_ours(batch, options)


@pytest.mark.parametrize("seed", range(200, 220))
def test_sharp_losses_equal_ours_where_no_window_has_to_be_chosen(seed):
    """With occupations of 0 and 1 several windows keep the same mass, and rounding decides between them.

    k2 rounds to float32 and we to float64, so that narrow windows, each as good as the other, may differ.
    """
    batch, _ = random_batch(seed, sharpness=5)
    assert_equal_ours(batch, {"prune_range": 31, "lm_scale": 0.25})
