"""The losses of HuBERT's distillation against plain loops."""

import math

import pytest
import torch

from icefall_kd.losses.hubert_kd import cluster_choice, cluster_divergence, cosine_distance, distance
from icefall_kd.models.cluster_head import ClusterHead


def vectors(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def softmax(values):
    exps = [math.exp(v) for v in values]
    return [e / sum(exps) for e in exps]


def test_regression_is_that_of_loops():
    p, y = vectors(2, 3, 5), vectors(2, 3, 5, seed=1)
    for kind, power in (("l1", 1), ("l2", 2)):
        found = distance(p, y, kind)
        for n in range(2):
            for t in range(3):
                expected = sum(abs(a - b) ** power for a, b in zip(p[n, t].tolist(), y[n, t].tolist(), strict=True)) / 5
                assert found[n, t].item() == pytest.approx(expected, rel=1e-5)
    found = cosine_distance(p, y)
    for n in range(2):
        for t in range(3):
            expected = math.log(1 + math.exp(-cosine(p[n, t].tolist(), y[n, t].tolist())))
            assert found[n, t].item() == pytest.approx(expected, rel=1e-5)


def test_the_cosine_term_lies_between_its_bounds():
    y = vectors(40, 8)
    assert cosine_distance(3 * y, y).tolist() == pytest.approx([0.3133] * 40, abs=5e-5)
    assert cosine_distance(-3 * y, y).tolist() == pytest.approx([1.3133] * 40, abs=5e-5)
    found = cosine_distance(vectors(40, 8, seed=2), y)
    assert (found > 0.3132).all() and (found < 1.3133).all()


def test_large_half_precision_vectors_do_not_overflow():
    p, y = (100 * vectors(4, 768, seed=s).half() for s in (0, 1))
    assert not (p * p).sum(dim=-1).isfinite().any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [cosine_distance(p, y), distance(p, y, "l2")]
    for x, expected in zip(
        found, [cosine_distance(p.float(), y.float()), distance(p.float(), y.float(), "l2")], strict=True
    ):
        assert x.dtype == torch.float32 and torch.equal(x, expected)


def test_divergence_is_that_of_loops():
    student, teacher = vectors(4, 6), vectors(4, 6, seed=1)
    for row, s, t in zip(
        cluster_divergence(student, teacher).tolist(), student.tolist(), teacher.tolist(), strict=True
    ):
        q, p = softmax(t), softmax(s)
        assert row == pytest.approx(sum(a * math.log(a / b) for a, b in zip(q, p, strict=True)), rel=1e-5)


def test_divergence_is_0_of_equal_logits_and_trains_the_student_alone():
    head = ClusterHead(8, 6, 4)
    hidden = vectors(5, 8).requires_grad_()
    logits = vectors(5, 6, seed=3).requires_grad_()
    cluster_divergence(logits, head(hidden)).sum().backward()
    assert logits.grad.abs().sum() > 0
    assert hidden.grad is None and all(p.grad is None for p in head.parameters())
    same = head(hidden).detach().requires_grad_()
    loss = cluster_divergence(same, head(hidden))
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(same.grad, torch.zeros(5, 6), atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_choice_is_that_of_loops(temperature):
    projected, embeddings = vectors(5, 4), vectors(6, 4, seed=1)
    embeddings[4] = embeddings[2]  # of which one cannot be told from the other
    chosen = torch.tensor([0, 2, 4, 5, 1])
    found = cluster_choice(projected, embeddings, chosen, temperature)
    for row, e, k in zip(found.tolist(), projected.tolist(), chosen.tolist(), strict=True):
        positive = embeddings[k].tolist()
        negatives = [c for c in embeddings.tolist() if c != positive]
        logits = [cosine(e, c) / temperature for c in [positive, *negatives]]
        assert row == pytest.approx(-math.log(softmax(logits)[0]), rel=1e-4, abs=1e-5)


def test_choice_does_not_train_the_clusters():
    projected, embeddings = vectors(5, 4).requires_grad_(), vectors(6, 4, seed=1).requires_grad_()
    cluster_choice(projected, embeddings, torch.tensor([0, 1, 2, 3, 4])).sum().backward()
    assert projected.grad.abs().sum() > 0 and embeddings.grad is None
