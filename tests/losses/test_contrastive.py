"""Contrastive distillation against the form that gathers negatives; text states against loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from icefall_kd.data.batch import TextStates
from icefall_kd.errors import DataError
from icefall_kd.losses import contrastive
from icefall_kd.losses.contrastive import contrastive_loss
from icefall_kd.losses.text_states import Standardise, TextUnits


def vectors(rows, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator), torch.randn(rows, dim, generator=generator)


def gathered(p, e, drawn, temperature):
    """Return the loss of every row with its negatives gathered; a row that drew itself gets -1e9 in its place."""
    losses = []
    for i, others in enumerate(drawn):
        positive = F.cosine_similarity(p[i], e[i], dim=0) / temperature
        negative = F.cosine_similarity(p[i].expand(len(others), -1), e[others], dim=1) / temperature
        negative = negative.masked_fill(others == i, -1e9)
        losses.append(-torch.cat([positive[None], negative]).log_softmax(0)[0])
    return torch.stack(losses)


@pytest.mark.parametrize(("negatives", "drawn"), [(7, 7), (20, 16), (500, 16), (None, 19)])
def test_the_masked_matrix_is_the_gather_form(monkeypatch, negatives, drawn):
    """Of 20 rows; where there are not more of them than negatives, 80 % are drawn."""
    p, e = vectors(20)
    seen = []
    draw = contrastive._drawn
    monkeypatch.setattr(contrastive, "_drawn", lambda *args: seen.append(draw(*args)) or seen[-1])
    torch.manual_seed(1)
    loss, right = contrastive_loss(p, e, 0.1, negatives)
    if negatives is None:
        indexes = [torch.tensor([j for j in range(20) if j != i]) for i in range(20)]
    else:
        indexes = [row.nonzero().squeeze(1) for row in seen[0]]
        assert 0 < sum(i in row for i, row in enumerate(indexes)) < 20  # some drew themselves
    assert {len(row) for row in indexes} == {drawn}
    torch.testing.assert_close(loss, gathered(p, e, indexes, 0.1), rtol=0, atol=1e-5)
    for i, row in enumerate(indexes):
        scores = F.cosine_similarity(p[i].expand(20, -1), e, dim=1)
        assert right[i] == all(scores[j] <= scores[i] for j in row)


def test_draws_are_uniform_and_without_replacement():
    torch.manual_seed(2)
    kept = sum(contrastive._drawn(10, 4, torch.device("cpu")).double() for _ in range(2000)) / 2000
    assert (kept - 0.4).abs().max() < 5 * math.sqrt(0.4 * 0.6 / 2000)
    assert contrastive._drawn(10, 4, torch.device("cpu")).sum(1).tolist() == [4] * 10


def test_aligned_vectors_are_found_and_random_ones_are_not():
    p, e = vectors(200)
    loss, right = contrastive_loss(3.7 * e, e, 0.02, 100)
    assert right.all() and loss.max() < 1e-3
    loss, right = contrastive_loss(p, e, 1.0, 100)
    assert loss.mean().item() == pytest.approx(math.log(101), abs=0.1) and right.float().mean() < 0.1


def test_equal_teacher_vectors_are_no_negatives():
    p, e = vectors(6)
    e = e[[0, 1, 2, 0, 1, 2]]  # the same text twice
    loss, _ = contrastive_loss(p, e, 0.1)
    indexes = [torch.tensor([j for j in range(6) if j % 3 != i % 3]) for i in range(6)]
    torch.testing.assert_close(loss, gathered(p, e, indexes, 0.1))
    # Nearly equal ones are.
    other = e.clone()
    other[3:] *= 1 + 1e-6
    assert (contrastive_loss(p, other, 0.1)[0] > loss).all()


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    p, e = vectors(rows)
    p.requires_grad_()
    loss, right = contrastive_loss(p, e, 0.02, 700)
    loss.sum().backward()
    assert loss.tolist() == [0.0] * rows and right.tolist() == [True] * rows and p.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_at_a_low_temperature_stays_finite(dtype):
    p, e = vectors(30)
    with torch.autocast("cpu", dtype=dtype):
        loss, _ = contrastive_loss(p.to(dtype), e, 0.02, 10)
    assert loss.dtype == torch.float32 and loss.isfinite().all()


def words():
    """Two texts of 4 and 3 tokens with their ends, of 3 and 2 units; a third without states."""
    values = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(3))
    owner = torch.tensor([[0, 0, 1, 2], [0, 1, 1, -100], [-100] * 4])
    return TextStates(values, torch.tensor([3, 2, 0]), owner)


def test_units_pool_their_tokens_and_know_the_last():
    text, x = words(), torch.arange(3 * 4 * 2.0).view(3, 4, 2)
    units = TextUnits(text, text.lens, 4)
    tokens = [(0, [0, 1]), (0, [2]), (0, [3]), (1, [0]), (1, [1, 2])]
    assert len(units) == 5 and units.rows.tolist() == [n for n, _ in tokens]
    torch.testing.assert_close(units.mean(x), torch.stack([x[n, t].mean(0) for n, t in tokens]))
    assert torch.equal(units.last(x), torch.stack([x[n, t[-1]] for n, t in tokens]))
    expected = [text.values[n, m] for n, m in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]]
    assert torch.equal(units.values, torch.stack(expected))
    # An utterance may be left out, or all of them.
    assert TextUnits(text, torch.tensor([0, 2, 0]), 4).rows.tolist() == [1, 1]
    none = TextUnits(text, torch.zeros(3, dtype=torch.int64), 4)
    assert none.mean(x).shape == none.last(x).shape == (0, 2) and none.values.shape == (0, 5)
    # A batch of none may bring no row at all.
    bare = TextStates(torch.zeros(3, 0, 5), torch.zeros(3, dtype=torch.int64), torch.full((3, 4), -100))
    assert TextUnits(bare, bare.lens, 4).values.shape == (0, 5)


def test_states_of_other_texts_are_refused():
    with pytest.raises(DataError, match="for 4 tokens meet texts of 6"):
        TextUnits(words(), words().lens, 6)


def test_channels_are_standardised_over_all_that_was_seen():
    layer, rows = Standardise(4).train(), 5 + 3 * torch.randn(60, 4, generator=torch.Generator().manual_seed(4))
    for some in rows.split([1, 20, 0, 39]):
        found = layer(some)
    expected = (rows - rows.mean(0)) / rows.var(0, correction=0).sqrt()
    torch.testing.assert_close(found, expected[21:], rtol=1e-4, atol=1e-4)
    layer.eval()
    torch.testing.assert_close(layer(rows), expected, rtol=1e-4, atol=1e-4)
    assert layer.count == 60
