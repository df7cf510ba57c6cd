"""Dropout by random bytes."""

import pytest
import torch

from icefall_kd.errors import ConfigError
from icefall_kd.models.dropout import Dropout


def test_rate_scale_and_gradient():
    x = torch.ones(300, 1001, requires_grad=True)
    y = Dropout(0.1)(x)
    rate = 26 / 256
    assert (y == 0).float().mean().item() == pytest.approx(rate, abs=0.003)
    assert y.max().item() == pytest.approx(1 / (1 - rate)) and y.mean().item() == pytest.approx(1, abs=0.003)
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_seeded_identity_in_evaluation_and_dtype_kept():
    dropout, x = Dropout(0.5), torch.randn(7, 3, dtype=torch.bfloat16)
    torch.manual_seed(3)
    first = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first) and first.dtype == x.dtype
    assert dropout.eval()(x) is x and Dropout(0.0)(x) is x


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_probabilities_out_of_range_are_refused(p):
    with pytest.raises(ConfigError):
        Dropout(p)


def test_a_mask_shared_over_time():
    y = Dropout(0.25, shared_over_time=True)(torch.ones(50, 6, 200))
    assert torch.equal(y, y[:, :1].expand_as(y)) and y.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
