"""Prediction of codebook indexes."""

import math

import pytest
import torch
import torch.nn.functional as F

from icefall_kd.data.batch import IGNORE
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.losses.codebook import CodebookLoss


def labels(num=3, frames=12, codebooks=6, size=256):
    codes = torch.randint(0, size, (num, frames, codebooks))
    codes[1, 7:] = IGNORE
    codes[2, 4, codebooks // 2 :] = IGNORE  # the second joined teacher frame lies in the padding
    codes[2, 5:] = IGNORE
    return codes


def layer_output(*shape):
    return F.layer_norm(torch.randn(*shape), shape[-1:])


@pytest.mark.parametrize("joint, slack", [(False, 0.12), (True, 0.16)])
def test_initial_loss_is_near_chance(joint, slack):
    loss = CodebookLoss(64, 16, joint=joint)
    result = loss(layer_output(4, 50, 64), torch.randint(0, 256, (4, 50, 16)))
    per_frame = result.value.item() / result.num_frames
    # Unit-variance logits cost half a nat a codebook above chance; the joint term a little more.
    assert 16 * math.log(256) < per_frame < 16 * math.log(256) * (1 + slack)


def test_small_inputs_start_at_chance():
    result = CodebookLoss(64, 8)(0.05 * layer_output(4, 50, 64), torch.randint(0, 256, (4, 50, 8)))
    assert result.value.item() / result.num_frames == pytest.approx(8 * math.log(256), rel=0.005)


@pytest.mark.parametrize("joint", [False, True])
def test_ignored_labels_have_no_loss_and_no_gradient(joint):
    codes = labels()
    x = layer_output(3, 12, 16).requires_grad_()
    loss = CodebookLoss(16, 6, joint=joint, joint_dim=8)
    result = loss(x, codes)
    result.value.backward()
    assert not x.grad[1, 7:].any() and not x.grad[2, 5:].any()
    assert x.grad[0].abs().sum(1).all() and x.grad[2, 4].abs().sum() > 0
    changed = x.detach().clone()
    changed[1, 7:] = 1e4
    assert torch.equal(loss(changed, codes).value, result.value)


def test_a_half_labelled_frame_gives_no_gradient_to_the_missing_codebooks():
    loss = CodebookLoss(16, 6)
    codes = torch.full((1, 1, 6), IGNORE)
    codes[..., :3] = 7
    loss(layer_output(1, 1, 16), codes).value.backward()
    grad = loss.output.weight.grad.unflatten(0, (6, 256))
    assert grad[:3].abs().sum((1, 2)).all() and not grad[3:].any()


@pytest.mark.parametrize("joint", [False, True])
def test_no_labels_at_all_give_zero_and_zero_gradients(joint):
    loss = CodebookLoss(16, 6, joint=joint, joint_dim=8)
    result = loss(layer_output(2, 3, 16).requires_grad_(), torch.full((2, 3, 6), IGNORE))
    result.value.backward()
    assert result.value.item() == 0 and result.num_frames == 0
    assert all(p.grad is not None and not p.grad.any() for p in loss.parameters())


def test_independent_loss_is_the_sum_of_cross_entropies():
    loss, codes, x = CodebookLoss(16, 6), labels(), layer_output(3, 12, 16)
    result = loss(x, codes)
    logits = loss.output(x).unflatten(2, (6, 256))
    expected = F.cross_entropy(logits.permute(0, 3, 1, 2), codes, ignore_index=IGNORE, reduction="none")  # (N, T, M)
    torch.testing.assert_close(result.value, expected.sum())
    torch.testing.assert_close(result.per_utterance, expected.sum((1, 2)))
    torch.testing.assert_close(result.per_target, expected.sum((0, 1)))
    assert torch.equal(result.counts, (codes != IGNORE).sum((0, 1)).float())
    assert torch.equal(result.correct, (logits.argmax(3) == codes).sum((0, 1)).float())
    assert not result.per_utterance.requires_grad and not result.per_target.requires_grad


def test_joint_loss_follows_its_formula():
    loss = CodebookLoss(16, 3, codebook_size=8, joint=True, joint_dim=12)
    x, codes = layer_output(1, 1, 16), torch.tensor([[[5, 2, 7]]])
    scale = 0.5 * math.sqrt(12 / 3)
    expected = 0.0
    for m in range(3):
        earlier = sum((scale * loss.embedding.weight[8 * j + codes[0, 0, j]] for j in range(m)), torch.zeros(12))
        hidden = F.relu(loss.hidden(x[0, 0]) + earlier)
        logits = loss.output.weight[8 * m : 8 * m + 8] @ x[0, 0] + hidden @ loss.joint_weight[m]
        expected -= logits.log_softmax(0)[codes[0, 0, m]]
    torch.testing.assert_close(loss(x, codes).value, expected)


def test_joint_head_sees_earlier_codebooks_only():
    loss = CodebookLoss(16, 4, codebook_size=8, joint=True, joint_dim=12)
    h, codes = layer_output(1, 16), torch.tensor([[1, 2, 3, 4]])
    base = loss.logits(h, codes)
    codes[0, 2] = 6
    changed = (loss.logits(h, codes) - base).abs().sum(2)[0]
    assert not changed[:3].any() and changed[3] > 0


def test_only_used_parameters_exist():
    assert [name for name, _ in CodebookLoss(8, 4).named_parameters()] == ["output.weight", "output.bias"]
    for loss in (CodebookLoss(8, 4, joint=True, joint_dim=8), CodebookLoss(8, 1, joint=True, joint_dim=8)):
        loss(layer_output(1, 5, 8), torch.randint(0, 256, (1, 5, loss.num_codebooks))).value.backward()
        assert all(p.grad is not None for p in loss.parameters())


@pytest.mark.parametrize("joint", [False, True])
def test_recomputation_changes_nothing(joint):
    x, codes = layer_output(3, 12, 16).requires_grad_(), labels()
    loss = CodebookLoss(16, 6, joint=joint, joint_dim=8)
    loss(x, codes).value.backward()
    expected = [x.grad.clone()] + [p.grad.clone() for p in loss.parameters()]
    loss.recompute = True
    x.grad = None
    loss.zero_grad()
    loss(x, codes).value.backward()
    for a, b in zip([x.grad] + [p.grad for p in loss.parameters()], expected, strict=True):
        torch.testing.assert_close(a, b)


def test_logits_are_float32_under_autocast():
    loss, x, codes = CodebookLoss(16, 6), layer_output(3, 12, 16), labels()
    expected = loss(x, codes).value
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(x, codes).value
    assert value.dtype == torch.float32 and torch.equal(value, expected)


@pytest.mark.parametrize("bad", [256, -1])
def test_indexes_outside_the_codebook_are_refused(bad):
    codes = labels()
    codes[0, 3, 2] = bad
    with pytest.raises(DataError, match=f"codebook index {bad}"):
        CodebookLoss(16, 6)(layer_output(3, 12, 16), codes)


def test_bytes_as_the_store_holds_them_are_no_ignored_labels():
    # Among unsigned bytes -100 is 156, an index like any other.
    loss, x, codes = CodebookLoss(16, 6), layer_output(2, 3, 16), torch.full((2, 3, 6), 156)
    result = loss(x, codes.to(torch.uint8))
    assert result.counts.tolist() == [6] * 6 and torch.equal(result.value, loss(x, codes).value)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="do not fit"):
        CodebookLoss(16, 8)(layer_output(3, 12, 16), labels())
    with pytest.raises(DataError, match="do not fit"):
        CodebookLoss(16, 6)(layer_output(3, 11, 16), labels())
    with pytest.raises(DataError, match="a head for 16 channels"):
        CodebookLoss(16, 6)(layer_output(3, 12, 8), labels())
    with pytest.raises(ConfigError):
        CodebookLoss(16, 0)
