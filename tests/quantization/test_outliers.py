"""Rare frames of huge energy, and a channel of large variance: training and report agree on what they cost."""

from dataclasses import replace

import pytest
import torch

from icefall_kd.config import QuantizerConfig
from icefall_kd.quantization.outliers import outlier_mask, place_outliers
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.quantization.report import quantizer_report
from icefall_kd.quantization.trainer import QuantizerTrainer

CONFIG = QuantizerConfig(
    num_codebooks=2, phase1_steps=60, phase2_steps=60, frames_per_step=256, quantizer_init="random"
)
OUTLIERS = torch.arange(0, 6000, 2000)


def frames(outliers: bool) -> torch.Tensor:
    """Return frames with one channel of 20 times the others' variance, and rarely with a huge value in another."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 4, generator=generator) @ torch.randn(4, 16, generator=generator) / 2
    x += 0.1 * torch.randn(6000, 16, generator=generator) + 5
    x[:, 3] = 20**0.5 * torch.randn(6000, generator=generator)
    if outliers:
        x[OUTLIERS, 7] += 150 + 3 * torch.randn(len(OUTLIERS), generator=generator)
    return x.half()


def train(outliers: bool, path) -> tuple[QuantizerTrainer, Quantizer]:
    trainer = QuantizerTrainer(frames(outliers), CONFIG)
    trainer.run().save(path)
    return trainer, Quantizer.load(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("quantizer")
    return {flag: train(flag, path / f"{flag}.safetensors") for flag in (False, True)}


def test_the_saved_quantizer_has_the_error_of_the_trainers_own(trained):
    trainer, loaded = trained[False]
    valid = trainer.frames[trainer.valid_rows]
    report = quantizer_report(loaded, valid.float())
    own = trainer.quantizer.relative_errors(trainer._normalize(valid), 5)
    assert list(report["relative_error"].values()) == pytest.approx(own, rel=5e-3)
    assert report["usual_error"] == report["relative_error"] and report["outlier_frames"] == 0
    last = [trainer.quantizer.losses(trainer.batch(step), 2).reconstruction.item() for step in range(100, 120)]
    # 512 entries on 5700 frames generalise nearly, not wholly.
    assert report["relative_error"]["2"] == pytest.approx(sum(last) / len(last), rel=0.5)


def test_outliers_neither_hurt_the_other_frames_nor_the_error_of_all(trained):
    trainer, loaded = trained[True]
    valid_outliers = torch.isin(trainer.valid_rows, OUTLIERS)
    assert len(trainer.outlier_rows) + int(valid_outliers.sum()) == len(OUTLIERS)
    assert torch.isin(trainer.outlier_rows, OUTLIERS).all() and not torch.isin(trainer.train_rows, OUTLIERS).any()
    clean = trained[False][1].relative_error(frames(False)[trainer.valid_rows].float())
    every = frames(True).float()
    usual = torch.ones(len(every), dtype=torch.bool)
    usual[OUTLIERS] = False
    assert loaded.relative_error(every[usual]) < 1.1 * clean + 0.005
    # The three outliers hold a quarter of the energy: left to the gradient alone they make this error 0.29.
    assert loaded.relative_error(every) < clean
    error = (loaded.decode(loaded.encode(every[OUTLIERS])) - every[OUTLIERS]).square().sum(dim=1)
    assert error.max() < 0.01 * 150**2
    # The classifier alone knows them too, and takes no other frame for one.
    codes = loaded.encode(every, 0)
    decoded = loaded.decode(codes)
    assert (decoded[OUTLIERS, 7] > 100).all() and (decoded[usual, 7] < 50).all()


def test_the_report_tells_errors_with_and_without_outliers():
    quantizer = QuantizerTrainer(frames(False), replace(CONFIG, quantizer_init="data", phase1_steps=5)).run()
    x = frames(True).float()
    report = quantizer_report(quantizer, x, max_refine=2)
    usual = x[~torch.isin(torch.arange(len(x)), OUTLIERS)]
    assert report["outlier_frames"] == len(OUTLIERS)
    assert list(report["usual_error"].values()) == pytest.approx(quantizer.relative_errors(usual, 2))
    energy = (x - x.mean(dim=0)).square().sum(dim=1)
    assert report["outlier_energy"] == pytest.approx((energy[OUTLIERS].sum() / energy.sum()).item(), rel=1e-4)
    assert any("3 outlier frames" in warning for warning in report["warnings"])


def test_many_far_frames_are_no_outliers_and_nothing_is_placed():
    x = frames(True)
    x[::50, 7] += 150
    assert not outlier_mask(x, torch.arange(len(x))).any()
    assert outlier_mask(x[:0], torch.arange(0)).shape == (0,)
    quantizer = Quantizer(16, 2, 256)
    before = quantizer.sha256
    assert place_outliers(quantizer, x[:0], x, 1) == 0 and quantizer.sha256 == before


def test_improbable_entries_leave_no_subnormal_gradients():
    quantizer = Quantizer(8, 2, 16)
    with torch.no_grad():
        quantizer.to_logits.bias.copy_(torch.linspace(-200, 0, 32))
        quantizer.to_logits.weight.mul_(1e-3)
    x = torch.randn(64, 8)
    quantizer.losses(x, 0).total(0.01).backward()
    # A column's bias gradient sums what reached the logits: either nothing or more than a subnormal number.
    gradients = quantizer.to_logits.bias.grad.abs()
    assert ((gradients == 0) | (gradients > 1e-31)).all() and (gradients == 0).any()
