"""The quantizer encodes and learns on a GPU as on the CPU.  Without a GPU the comparisons run on the CPU alone."""

import copy

import pytest
import torch

from icefall_kd.config import QuantizerConfig
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.quantization.trainer import QuantizerTrainer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONFIG = QuantizerConfig(num_codebooks=4, phase1_steps=2, phase2_steps=2, frames_per_step=256)


def frames(count: int = 3000, dim: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(count, 6, generator=generator) @ torch.randn(6, dim, generator=generator)
    return (source.relu() * 3 + 7 + 0.1 * torch.randn(count, dim, generator=generator)).half()


def check_codes(quantizer: Quantizer, x: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that codes agree on 99.9 % of the frames and that the others are near ties (1e-3 relative)."""
    differ = (found != expected).any(dim=1)
    assert differ.double().mean() <= 1e-3
    errors = [(quantizer.decode(codes[differ]) - x[differ]).double().square().sum(dim=1) for codes in (found, expected)]
    torch.testing.assert_close(*errors, rtol=1e-3, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("refine_iters", [0, 5])
def test_encoding(device, refine_iters):
    quantizer, x = QuantizerTrainer(frames(), CONFIG).run(), frames().float()
    expected = quantizer.encode(x, refine_iters)
    moved = copy.deepcopy(quantizer).to(device)
    found = moved.encode(x.to(device), refine_iters)
    assert found.device.type == device and moved.encode(x[:9], refine_iters).device.type == "cpu"
    check_codes(quantizer, x, found.cpu(), expected)
    # In chunks of a few frames, which the default for a GPU never makes of so few.
    check_codes(quantizer, x, moved.encode(x.to(device), refine_iters, chunk_bytes=2**24).cpu(), expected)
    torch.testing.assert_close(moved.decode(found).cpu(), quantizer.decode(found.cpu()), rtol=1e-5, atol=1e-4)
    errors, expected_errors = moved.relative_errors(x, 5), quantizer.relative_errors(x, 5)
    assert errors == pytest.approx(expected_errors, rel=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("phase", [1, 2])
def test_a_training_step(device, phase):
    trainers = [QuantizerTrainer(frames(), CONFIG, device=d) for d in ("cpu", device)]
    if phase == 2:
        for trainer in trainers:
            trainer._switch()
            trainer.step = CONFIG.phase1_steps + 1  # a step at the boundary would switch once more
    cpu, other = (trainer.quantizer for trainer in trainers)
    x, gradients = trainers[0].batch(0), []
    for quantizer, batch in ((cpu, x), (other, trainers[1].batch(0))):
        losses = quantizer.losses(batch, 2)
        losses.total(0.01).backward()
        gradients.append((losses, [p.grad.cpu() for p in quantizer.parameters()]))
    (expected, expected_gradients), (found, found_gradients) = gradients
    # A near tie in a batch of 256 frames is one frame; its losses and gradients are nearly those of the other choice.
    assert (found.codes.cpu() != expected.codes).any(dim=1).sum() <= 1
    for name in ("reconstruction", "logprob", "entropy"):
        assert getattr(found, name).item() == pytest.approx(getattr(expected, name).item(), rel=1e-3, abs=1e-6)
    for a, b in zip(found_gradients, expected_gradients, strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()
    # After Adam's step, which takes a gradient's sign for its size where it is nearly zero, losses stay close.
    after = []
    for trainer in trainers:
        trainer._train_step()
        after.append(trainer._train_step())
    assert after[1].reconstruction.item() == pytest.approx(after[0].reconstruction.item(), rel=2e-2)
    assert after[1].logprob.item() == pytest.approx(after[0].logprob.item(), rel=2e-2)


@pytest.mark.gpu
def test_chunks_bound_the_memory_of_encoding():
    quantizer, x = Quantizer(64, 8, 256).cuda(), torch.randn(20_000, 64, device="cuda")
    quantizer.encode(x[:10])
    for budget in (2**26, 2**28):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        quantizer.encode(x, 2, chunk_bytes=budget)
        assert torch.cuda.max_memory_allocated() - before < 2 * budget + 2**23
