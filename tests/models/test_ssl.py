"""Masks, negatives, quantiser and contrastive task of wav2vec 2.0."""

import math

import pytest
import torch

from icefall_kd.errors import DataError
from icefall_kd.models.ssl import (
    GumbelQuantizer,
    contrastive_kd,
    contrastive_logits,
    contrastive_loss,
    gumbel_temperature,
    sample_negatives,
    sample_spans,
)
from icefall_kd.models.waveform import scale_gradient


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_utterance_has_equally_many_masked_frames_and_none_beyond_its_end():
    lens = torch.tensor([250, 200, 61, 12])
    for seed in range(20):
        mask = sample_spans(lens, 260, 0.65, 5, generator(seed))
        assert mask.shape == (4, 260) and len(set(mask.sum(dim=1).tolist())) == 1 and mask.any()
        for n, length in enumerate(lens.tolist()):
            assert not mask[n, length:].any()


@pytest.mark.parametrize(("length", "span"), [(500, 10), (250, 5)])
def test_the_masked_share_is_what_overlapping_spans_leave(length, span):
    # Starts without replacement: a frame is free when none of the `span` places that cover it is drawn.
    masked, draws = 0, 300
    for seed in range(draws):
        masked += int(sample_spans(torch.tensor([length]), length, 0.65, span, generator(seed)).sum())
    places, expected = length - span + 1, 0.0
    for count, weight in _span_counts(0.65 * length / span):
        for frame in range(length):
            covering = min(frame, places - 1) - max(frame - span + 1, 0) + 1
            free = math.comb(places - covering, count) / math.comb(places, count)
            expected += weight * (1 - free)
    share = masked / draws / length
    assert share == pytest.approx(expected / length, abs=0.005) and 0.46 < share < 0.51


def _span_counts(mean):
    """Return the counts of int(mean + u) and their probabilities."""
    low = int(mean)
    return (low, 1 - (mean - low)), (low + 1, mean - low)


def test_masks_are_spans_in_one_utterance():
    mask = sample_spans(torch.tensor([400]), 400, 0.2, 8, generator(3))[0]
    edges = torch.diff(mask.int(), prepend=torch.zeros(1), append=torch.zeros(1))
    lengths = (edges == -1).nonzero() - (edges == 1).nonzero()
    assert lengths.min() >= 8


def test_two_spans_at_least_and_too_short_an_utterance_is_refused():
    assert sample_spans(torch.tensor([40]), 40, 0.01, 5, generator()).sum() > 5
    with pytest.raises(DataError, match="5 encoder frames"):
        sample_spans(torch.tensor([40, 5]), 40, 0.65, 5, generator())


def test_negatives_are_all_other_frames_alike():
    drawn = sample_negatives(3, 4, 9000, generator(1))
    assert drawn.shape == (3, 4, 9000)
    for own in range(4):
        counts = torch.bincount(drawn[:, own].flatten(), minlength=4)
        assert counts[own] == 0 and counts.sum() == 27000
        assert all(abs(int(counts[other]) - 9000) < 450 for other in range(4) if other != own)
    assert (sample_negatives(2, 2, 5, generator()) == torch.tensor([1, 0]).view(1, 2, 1)).all()


def test_the_temperature_falls_to_its_floor():
    # 0.25^(1 / (0.7 n)): a half is reached at 70 % of n updates.
    decay = 0.25 ** (1 / 700)
    assert gumbel_temperature(0, 2.0, 0.5, decay) == 2.0
    assert gumbel_temperature(350, 2.0, 0.5, decay) == pytest.approx(1.0)
    assert gumbel_temperature(700, 2.0, 0.5, decay) == pytest.approx(0.5)
    assert gumbel_temperature(1000, 2.0, 0.5, decay) == 0.5


def test_logits_are_those_of_gathered_candidates():
    torch.manual_seed(0)
    context, targets = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    codes = torch.randint(2, (2, 6, 2))  # few codes: some negatives equal the target
    negatives = sample_negatives(2, 6, 5, generator())
    logits = contrastive_logits(context, targets, codes, negatives, 0.1)
    excluded = 0
    for n in range(2):
        for t in range(6):
            for k, other in enumerate([t, *negatives[n, t].tolist()]):
                cosine = torch.cosine_similarity(context[n, t], targets[n, other], dim=0) / 0.1
                if k and codes[n, t].equal(codes[n, other]):
                    cosine, excluded = torch.tensor(-math.inf), excluded + 1
                torch.testing.assert_close(logits[n, t, k], cosine, rtol=1e-5, atol=1e-5)
    assert 0 < excluded < 60


def test_the_loss_is_cross_entropy_and_wins_are_strict():
    logits = torch.tensor([[[2.0, 1.0, -math.inf], [1.0, 1.0, 0.0], [0.0, 3.0, 1.0]]])
    loss, wins = contrastive_loss(logits)
    expected = torch.nn.functional.cross_entropy(logits[0], torch.zeros(3, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(loss[0], expected)
    assert wins.tolist() == [[True, False, False]]


def test_an_untrained_quantiser_and_an_indifferent_context_cost_the_log_of_the_candidates():
    torch.manual_seed(0)
    quantized = GumbelQuantizer(32, 2, 320, 64)(torch.randn(2, 150, 32), 2.0)
    negatives = sample_negatives(2, 150, 100, generator())
    targets = torch.ones_like(quantized.targets)  # every candidate looks alike
    codes = torch.arange(150).view(1, 150, 1).expand(2, -1, 1)
    loss, wins = contrastive_loss(contrastive_logits(torch.randn(2, 150, 64), targets, codes, negatives, 0.1))
    torch.testing.assert_close(loss, torch.full((2, 150), math.log(101)), rtol=1e-5, atol=1e-5)
    assert not wins.any()
    loss, _ = contrastive_loss(
        contrastive_logits(torch.randn(2, 150, 64), quantized.targets, quantized.codes, negatives, 0.1)
    )
    assert abs(loss.mean().item() - math.log(101)) < 0.2


def test_perplexities_of_known_choices():
    quantizer = GumbelQuantizer(4, 2, 4, 6).eval().requires_grad_(False)
    with torch.no_grad():
        quantizer.choice.weight.copy_(torch.cat([torch.eye(4), torch.zeros(4, 4)]) * 50)
        quantizer.choice.bias.copy_(torch.tensor([0.0] * 4 + [50.0, 0.0, 0.0, 0.0]))
    quantized = quantizer(torch.eye(4).unsqueeze(0), 1.0)
    assert quantized.codes.tolist() == [[[0, 0], [1, 0], [2, 0], [3, 0]]]
    # The first codebook uses all 4 entries alike (perplexity 4), the second always one (1).
    assert quantized.code_perplexity == pytest.approx(5.0, abs=1e-4)
    assert quantized.perplexity == pytest.approx(5.0, abs=1e-4)
    assert quantized.diversity_loss == pytest.approx(3 / 8, abs=1e-4)
    books = quantizer.codebooks
    expected = quantizer.out(torch.cat([books[0], books[1, :1].expand(4, -1)], dim=1))
    torch.testing.assert_close(quantized.targets[0], expected)


def test_the_diversity_term_stays_in_zero_to_one_and_trains_towards_even_use():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(8, 2, 16, 8)
    with torch.no_grad():
        quantizer.choice.bias[0] += 6.0
    z = torch.randn(3, 50, 8)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.1)
    values = []
    for _ in range(60):
        loss = quantizer(z, 1.0).diversity_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert all(0 <= v <= 1 for v in values) and values[0] > 0.3 and values[-1] < 0.3 * values[0]


def test_gumbel_draws_follow_the_softmax_and_straight_through_reaches_the_choice():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(1, 1, 3, 3)
    with torch.no_grad():
        quantizer.choice.weight.zero_()
        quantizer.choice.bias.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
    quantized = quantizer(torch.zeros(1, 20000, 1), 0.7)
    shares = torch.bincount(quantized.codes.flatten(), minlength=3) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.02, rtol=0)
    torch.testing.assert_close(
        quantized.targets[0, :50], quantizer.out(quantizer.codebooks[0, quantized.codes[0, :50, 0]])
    )
    quantized.targets.square().sum().backward()
    assert quantizer.choice.bias.grad.abs().sum() > 0 and quantizer.codebooks.grad.abs().sum() > 0


def test_distillation_of_candidates_is_zero_for_equal_modes_and_never_moves_the_teacher():
    torch.manual_seed(0)
    teacher, student = (torch.randn(2, 5, 7, requires_grad=True) for _ in range(2))
    gone = torch.zeros(2, 5, 7, dtype=torch.bool)
    gone[..., 3] = True
    masked = [x.masked_fill(gone, -math.inf) for x in (teacher, student)]
    assert contrastive_kd(masked[0], masked[0]).abs().max() < 1e-6
    loss = contrastive_kd(*masked)
    p, q = (x.detach()[~gone].view(2, 5, 6).softmax(dim=-1) for x in (teacher, student))
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(dim=-1))
    loss.sum().backward()
    assert teacher.grad is None and student.grad.isfinite().all() and student.grad.abs().sum() > 0


def test_gradients_are_scaled_and_values_kept():
    x = torch.randn(5, requires_grad=True)
    y = scale_gradient(x, 0.1)
    assert torch.equal(x, y)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((5,), 0.1))
