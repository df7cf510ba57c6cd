"""Divergence from top-k posteriors, and weights of n-best lists."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from icefall_kd.errors import DataError
from icefall_kd.losses.posterior_kd import nbest_weights, posterior_kd

V = 9


def top_k(probs, k):
    values, ids = probs.topk(k, dim=1)
    return ids, values, 1 - values.sum(1)


def toy(m=6):
    torch.manual_seed(0)
    return torch.randn(m, V, dtype=torch.float64), torch.randn(m, V, dtype=torch.float64).softmax(1)


def full_kl(p, logits):
    return (p * (p.log() - logits.log_softmax(1))).sum(1)


def test_all_classes_give_the_plain_divergence_and_the_gradient_of_cross_entropy():
    logits, p = toy()
    logits.requires_grad_()
    found = posterior_kd(logits, *top_k(p, V))
    torch.testing.assert_close(found, full_kl(p, logits).float())
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(gradient, logits.softmax(1) - p, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_what_top_k_leaves_out_is_the_rest_times_the_divergence_inside_it(k):
    logits, p = toy()
    ids, probs, rest = top_k(p, k)
    inside_p, inside_q = p.scatter(1, ids, 0), logits.softmax(1).scatter(1, ids, 0)
    inside_p, inside_q = (x / x.sum(1, keepdim=True) for x in (inside_p, inside_q))
    left_out = rest * torch.where(inside_p > 0, inside_p * (inside_p / inside_q).log(), 0.0).sum(1)
    found = posterior_kd(logits, ids, probs, rest)
    torch.testing.assert_close(found + left_out.float(), full_kl(p, logits).float(), atol=1e-5, rtol=1e-4)
    assert (left_out >= 0).all()


def test_equal_sides_cost_nothing_and_pull_nowhere():
    _, p = toy()
    logits = p.log().requires_grad_()
    for k in (2, V):
        for temperature in (1.0, 2.0) if k == V else (1.0,):
            loss = posterior_kd(logits, *top_k(p, k), temperature)
            assert loss.abs().max() < 1e-6
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            assert gradient.abs().max() < 1e-6


def test_a_sure_teacher_is_an_ordinary_label():
    logits, _ = toy()
    y = torch.tensor([0, 1, 2, 3, 4, 5])
    loss = posterior_kd(logits, y.unsqueeze(1), torch.ones(6, 1), torch.zeros(6))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, y, reduction="none").float())


def test_a_temperature_softens_both_sides_and_keeps_the_size_of_the_gradient():
    logits, p = toy()
    teacher = p.log() / 2
    expected = 4 * (teacher.softmax(1) * (teacher.log_softmax(1) - (logits / 2).log_softmax(1))).sum(1)
    torch.testing.assert_close(posterior_kd(logits, *top_k(p, V), 2.0), expected.float(), atol=1e-5, rtol=1e-4)
    # With a rest: spread evenly over the classes that it is of.
    ids, probs, rest = top_k(p, 3)
    spread = (rest / (V - 3)).unsqueeze(1).expand(-1, V).scatter(1, ids, probs)
    tempered = spread.sqrt() / spread.sqrt().sum(1, keepdim=True)
    log_q = (logits / 2).log_softmax(1)
    top = (tempered * (tempered.log() - log_q)).gather(1, ids).sum(1)
    p_rest, q_rest = (x.scatter(1, ids, 0).sum(1) for x in (tempered, log_q.exp()))
    torch.testing.assert_close(
        posterior_kd(logits, ids, probs, rest, 2.0), 4 * (top + p_rest * (p_rest / q_rest).log()).float()
    )


def test_gradients_are_finite_where_probabilities_are_zero_and_classes_missing():
    logits = torch.randn(3, V)
    logits[:, [0, 1, V - 1]] = -math.inf
    logits.requires_grad_()
    ids = torch.tensor([[2, 3, 0], [4, 5, 6], [2, 3, 4]])
    probs = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.2, 0.2], [1.0, 0.0, 0.0]])
    loss = posterior_kd(logits, ids, probs, 1 - probs.sum(1))
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()
    assert (logits.grad[:, [0, 1, V - 1]] == 0).all()


def test_the_gradient_is_the_losses():
    logits, p = toy(3)
    ids, probs, rest = top_k(p, 3)

    def loss(x):
        # Float64 all the way: the function itself computes in float32.
        q = x.log_softmax(1)
        top = (probs * (probs.log() - q.gather(1, ids))).sum(1)
        return top + rest * (rest.log() - q.scatter(1, ids, -math.inf).logsumexp(1))

    logits.requires_grad_()
    assert gradcheck(loss, (logits,))
    (expected,) = torch.autograd.grad(loss(logits).sum(), logits)
    (found,) = torch.autograd.grad(posterior_kd(logits, ids, probs, rest).sum(), logits)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_is_refused():
    logits, p = toy()
    ids, probs, rest = top_k(p, 2)
    with pytest.raises(DataError, match="do not fit logits"):
        posterior_kd(logits[:5], ids, probs, rest)
    with pytest.raises(DataError, match="class 9; the student has 9"):
        posterior_kd(logits, ids.clone().fill_(9), probs, rest)


def test_weights_of_hypotheses():
    scores = torch.tensor([[-1.0, -2.0, -math.inf], [-math.inf] * 3, [-5.0, -math.inf, -math.inf]])
    weights = nbest_weights(scores, 2.0)
    e = math.exp(-0.5)
    assert weights[0].tolist() == pytest.approx([1 / (1 + e), e / (1 + e), 0])
    assert weights[1].tolist() == [0, 0, 0] and weights[2].tolist() == [1, 0, 0]
