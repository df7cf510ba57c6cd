"""Regression of teacher embeddings."""

import pytest
import torch

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.losses.frame_kd import FrameKdLoss


@pytest.fixture
def case():
    mask = torch.ones(2, 5, 2, dtype=torch.bool)
    mask[1, 3, 1] = False  # the second joined teacher frame lies in the padding
    mask[1, 4] = False
    return torch.randn(2, 5, 8), torch.randn(2, 5, 6), mask


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_is_the_mean_over_dimensions_and_the_sum_over_frames(case, kind):
    x, embeddings, mask = case
    loss = FrameKdLoss(8, 3, 2, kind)
    result = loss(x, embeddings, mask)
    difference = (loss.output(x) - embeddings).unflatten(2, (2, 3)) * mask.unsqueeze(3)
    distance = difference.abs() if kind == "l1" else difference.square()
    torch.testing.assert_close(result.value, distance.sum() / 6)
    torch.testing.assert_close(result.per_utterance, distance.sum((1, 2, 3)) / 6)
    torch.testing.assert_close(result.per_target, distance.sum((0, 1, 3)) / 6)
    assert result.counts.tolist() == [9, 8] and result.num_frames == 9 and result.correct is None


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_masked_frames_have_no_loss_and_no_gradient_whatever_they_hold(case, kind):
    x, embeddings, mask = case
    loss = FrameKdLoss(8, 3, 2, kind)
    expected = loss(x, embeddings, mask).value
    embeddings[1, 3, 3:], embeddings[1, 4] = float("nan"), float("inf")
    x = x.requires_grad_()
    value = loss(x, embeddings, mask).value
    value.backward()
    assert torch.equal(value, expected)
    assert not x.grad[1, 4].any() and x.grad.isfinite().all() and loss.output.weight.grad.isfinite().all()


def test_a_mask_of_student_frames_and_no_labels_at_all(case):
    x, embeddings, _ = case
    loss = FrameKdLoss(8, 3)
    frames = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    result = loss(x, embeddings, frames)
    assert result.counts.tolist() == [7, 7]
    nothing = loss(x, embeddings, torch.zeros_like(frames))
    nothing.value.backward()
    assert nothing.value.item() == 0 and not loss.output.weight.grad.any()


def test_float32_under_autocast(case):
    loss = FrameKdLoss(8, 3)
    expected = loss(*case).value
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*case).value, expected)


def test_what_does_not_fit_is_refused(case):
    x, embeddings, mask = case
    with pytest.raises(DataError, match="do not fit"):
        FrameKdLoss(8, 4)(x, embeddings, mask)
    with pytest.raises(DataError, match="mask"):
        FrameKdLoss(8, 3)(x, embeddings, mask[:, :4])
    with pytest.raises(ConfigError, match="l1 or l2"):
        FrameKdLoss(8, 3, kind="l3")
