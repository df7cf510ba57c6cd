"""Random ragged batches of the pruned transducer loss, for the backends that other libraries compute."""

import random

import torch
from torch import nn

from icefall_kd.losses.rnnt import pruned_transducer_loss
from icefall_kd.models.transducer import Joiner, StatelessDecoder

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


def assert_equal_ours(backend, batch, options):
    """Compare values and gradients of a backend with our own code's, to 1e-4."""
    ours, theirs = (losses_and_gradients(name, *batch, **options) for name in ("torch", backend))
    assert ours[0].isfinite().all() and any(gradient.any() for gradient in ours[1])
    torch.testing.assert_close(theirs[0], ours[0], rtol=1e-4, atol=1e-4)
    for theirs_of_one, ours_of_one in zip(theirs[1], ours[1], strict=True):
        torch.testing.assert_close(theirs_of_one, ours_of_one, rtol=1e-4, atol=1e-4)
