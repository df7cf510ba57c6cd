"""Training of the quantizer: it learns, it is a function of the seed, and it survives being stopped."""

from dataclasses import replace

import pytest
import torch

from icefall_kd.config import QuantizerConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.quantization.init import allocate_components, k_means
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.quantization.trainer import (
    Moments,
    QuantizerTrainer,
    moments,
    split_rows,
    to_float16,
    unnormalize,
)

CONFIG = QuantizerConfig(num_codebooks=2, phase1_steps=6, phase2_steps=6, frames_per_step=64)


def frames(count: int = 1500, dim: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(count, 4, generator=generator)
    mixing = torch.randn(4, dim, generator=generator)
    return ((source @ mixing).relu() * 3 + 7).half()


def state(quantizer: Quantizer) -> dict:
    return quantizer.state_dict()


def equal(a: Quantizer, b: Quantizer) -> bool:
    return all(torch.equal(state(a)[name], state(b)[name]) for name in state(a))


@pytest.mark.parametrize("init", ["random", "data"])
def test_training_lowers_the_relative_error(init):
    config = replace(CONFIG, phase1_steps=60, phase2_steps=40, quantizer_init=init)
    trainer = QuantizerTrainer(frames(), config)
    valid = frames()[trainer.valid_rows].float()
    before = trainer.finish().relative_error(valid)
    quantizer = trainer.run()
    assert (quantizer.num_codebooks, quantizer.codebook_size) == (2, 256)
    after = quantizer.relative_error(valid)
    # Four sources at four bits each: Shannon's bound for the linear part alone would be 2^-8.
    assert after < 0.25 and after < (before if init == "data" else 0.5 * before)


def test_the_same_seed_gives_the_same_quantizer():
    torch.manual_seed(1)
    first = QuantizerTrainer(frames(), CONFIG).run()
    torch.manual_seed(2)
    assert equal(first, QuantizerTrainer(frames(), CONFIG).run())
    assert not equal(first, QuantizerTrainer(frames(), replace(CONFIG, quantizer_seed=7)).run())


@pytest.mark.parametrize("stop", [2, 6, 9])
def test_a_stopped_training_resumes_bit_by_bit(tmp_path, stop):
    expected = QuantizerTrainer(frames(), CONFIG).run()
    path = tmp_path / "state.safetensors"
    assert QuantizerTrainer(frames(), CONFIG, path).run(max_steps=stop) is None
    resumed = QuantizerTrainer(frames(), CONFIG, path)
    assert equal(resumed.run(), expected)
    assert resumed.step == 12


def test_a_training_killed_between_two_saves_gives_the_same_result(tmp_path):
    expected = QuantizerTrainer(frames(), CONFIG).run()
    path = tmp_path / "state.safetensors"

    def kill(step: int) -> None:
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        QuantizerTrainer(frames(), CONFIG, path, save_every=5).run(on_step=kill)
    assert equal(QuantizerTrainer(frames(), CONFIG, path, save_every=5).run(), expected)


def test_a_state_of_other_data_or_options_is_not_resumed(tmp_path, caplog):
    path = tmp_path / "state.safetensors"
    QuantizerTrainer(frames(), CONFIG, path).run(max_steps=3)
    other = QuantizerTrainer(frames() + 1, CONFIG, path)
    assert not other.resume() and other.step == 0
    assert not QuantizerTrainer(frames(), replace(CONFIG, entropy_scale=0.5), path).resume()
    assert "starts anew" in caplog.text


def test_unnormalize_takes_mean_and_scale_into_the_parameters():
    quantizer = Quantizer(10, 4, 16)
    x = torch.randn(80, 10)
    stats = Moments(torch.randn(10) * 5, 3.0)
    codes, decoded = quantizer.encode(x, 2), quantizer.decode(quantizer.encode(x, 2))
    logits = quantizer.logits(x)
    unnormalize(quantizer, stats)
    moved = x * stats.std + stats.mean
    assert torch.allclose(quantizer.logits(moved), logits, atol=1e-4)
    assert (quantizer.encode(moved, 2) == codes).all(dim=1).float().mean() > 0.95
    assert torch.allclose(quantizer.decode(codes), decoded * stats.std + stats.mean, atol=1e-4)


def test_moments_and_split():
    data = frames(1000, 16)
    train, valid = split_rows(1000, seed=1)
    assert len(valid) == 50 and sorted([*train.tolist(), *valid.tolist()]) == list(range(1000))
    assert len(split_rows(400_000, seed=1)[1]) == 10_000
    stats = moments(data, train)
    chosen = data[train].double()
    assert torch.allclose(stats.mean.double(), chosen.mean(dim=0), atol=1e-5)
    assert stats.std == pytest.approx((chosen - chosen.mean(dim=0)).square().mean().sqrt().item())


def test_batches_cycle_over_all_training_rows():
    trainer = QuantizerTrainer(frames(), CONFIG)
    seen = torch.cat([trainer.batch(step) for step in range(23)])
    count = len(trainer.train_rows)
    expected = trainer._normalize(trainer.frames[trainer.train_rows])
    assert torch.equal(seen[:count], expected)
    assert torch.equal(seen[count:], expected[: len(seen) - count])


def test_values_that_float16_cannot_hold_are_refused():
    with pytest.raises(DataError, match=r"channel 1 .*normalize-embeddings"):
        to_float16(torch.tensor([[1.0, 1e5]]))
    with pytest.raises(DataError, match="not finite"):
        to_float16(torch.tensor([[float("nan"), 1.0]]))
    with pytest.raises(DataError, match="no frames"):
        to_float16(torch.zeros(0, 4))


def test_bad_sizes_are_refused():
    with pytest.raises(ConfigError, match="num-codebooks is 3"):
        QuantizerTrainer(frames(), replace(CONFIG, num_codebooks=3))
    with pytest.raises(ConfigError, match="frames-per-step 0"):
        QuantizerTrainer(frames(), replace(CONFIG, frames_per_step=0))
    with pytest.raises(DataError, match="constant"):
        QuantizerTrainer(torch.ones(100, 4), CONFIG)


def test_components_are_dealt_evenly_and_k_means_finds_clusters():
    owned = allocate_components(torch.tensor([8.0, 4.0, 4.0, 2.0, 2.0, 1.0]), 2)
    assert sorted(i for part in owned for i in part) == list(range(6)) and {len(o) for o in owned} == {3}
    means = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = torch.cat([m + 0.1 * torch.randn(50, 2) for m in means])
    centers, error = k_means(x, 8, 10, torch.Generator().manual_seed(0))
    assert torch.cdist(means, centers).min(dim=1).values.max() < 0.5 and error < 0.05
