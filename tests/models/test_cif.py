"""Integrate-and-fire against a loop over frames and against prefix sums; lengths, tails, padding, gradients."""

import pytest
import torch

from icefall_kd.models.cif import (
    TAIL_THRESHOLD,
    Cif,
    cif_weights,
    fired_tokens,
    integrate_and_fire,
    token_frames,
)


def by_loop(h, alpha, eps=1e-9):
    """Fire one utterance frame by frame, several times in a frame if it holds so much: vectors, and what is left."""
    fired, acc, state = [], 0.0, torch.zeros_like(h[0])
    for x, weight in zip(h, alpha, strict=True):
        while (acc + weight).item() >= 1 - eps:
            used = 1 - acc
            fired.append(state + used * x)
            weight, acc, state = weight - used, 0.0, torch.zeros_like(x)
        acc, state = acc + weight, state + weight * x
    return fired, acc, state


def by_prefix_sums(h, alpha):
    """Fire one utterance of weights of at most one token a frame, by differences of sums at the frames that fire."""
    total = alpha.cumsum(0)
    before = torch.cat([total.new_zeros(1), total[:-1]])
    fires = (total.floor() > before.floor()).nonzero().squeeze(1)
    sums = (alpha[:, None] * h).cumsum(0)
    done, vectors = torch.zeros_like(h[0]), []
    for t in fires.tolist():
        upto = sums[t] - (total[t] - total[t].floor()) * h[t]
        vectors.append(upto - done)
        done = upto
    return vectors


def frames(n, t, c=3, seed=0, dtype=torch.float32):
    return torch.randn(n, t, c, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def combine(*weights):
    return torch.tensor(weights)


def test_the_written_out_example_without_scaling():
    alpha = torch.tensor([[0.2, 0.9, 0.6, 0.6, 0.1]])
    expected = combine([0.2, 0.8, 0, 0, 0], [0, 0.1, 0.6, 0.3, 0])
    out = integrate_and_fire(frames(1, 5), alpha, tail_threshold=0.5)
    assert out.lens.tolist() == [2] and out.quantity.tolist() == pytest.approx([2.4])
    torch.testing.assert_close(out.weights[0], expected)
    torch.testing.assert_close(out.c[0], expected @ frames(1, 5)[0])
    # With a lower threshold the tail of 0.4 is a third token, of weight 1.
    out = integrate_and_fire(frames(1, 5), alpha, tail_threshold=0.3)
    torch.testing.assert_close(out.weights[0, 2], torch.tensor([0, 0, 0, 0.75, 0.25]))


def test_the_written_out_example_scaled_to_three_tokens():
    alpha = torch.tensor([[0.2, 0.9, 0.6, 0.6, 0.1]])
    out = integrate_and_fire(frames(1, 5), alpha, torch.tensor([3]))
    expected = combine([0.25, 0.75, 0, 0, 0], [0, 0.375, 0.625, 0, 0], [0, 0, 0.125, 0.75, 0.125])
    torch.testing.assert_close(out.weights[0], expected)
    assert out.lens.tolist() == [3] and out.quantity.tolist() == pytest.approx([2.4])
    assert token_frames(out.weights).tolist() == [[1, 2, 3]]


def test_a_frame_may_fire_twice():
    out = integrate_and_fire(frames(1, 3), torch.tensor([[1.5, 2.0, 0.5]]))
    expected = combine([1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5])
    torch.testing.assert_close(out.weights[0], expected)


def test_the_overlap_matrix_is_its_formula():
    alpha = 1.7 * torch.rand(5, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = cif_weights(alpha, 18, torch.float64)
    for n in range(5):
        for u in range(18):
            begin = 0.0
            for t in range(20):
                end = begin + alpha[n, t].item()
                overlap = max(0.0, min(end, u + 1) - max(begin, u))
                assert found[n, u, t].item() == pytest.approx(overlap, abs=1e-12)
                begin = end


@pytest.mark.parametrize("scaled", [False, True])
def test_loop_overlaps_and_prefix_sums_agree(scaled):
    generator = torch.Generator().manual_seed(2)
    for case in range(60):
        t = int(torch.randint(4, 60, (), generator=generator))
        h = torch.randn(1, t, 4, generator=generator)
        alpha = torch.rand(1, t, generator=generator)
        target = max(int(alpha.sum() * (0.9 if scaled else 1)), 1)
        if scaled:  # a factor below 1: no frame holds more than a token, as prefix sums need
            alpha = alpha * 0.98
            out = integrate_and_fire(h, alpha, torch.tensor([target]))
            # A little more than U tokens, so that neither reference loses the last one to rounding.
            weights = alpha[0].double() * ((target + 1e-7) / alpha[0].double().sum())
            assert weights.max() <= 1, case
        else:
            out = integrate_and_fire(h, alpha, tail_threshold=1.0)
            weights = alpha[0].double()
        loop = torch.stack(by_loop(h[0].double(), weights)[0])
        prefix = torch.stack(by_prefix_sums(h[0].double(), weights))
        assert len(loop) == len(prefix) == out.lens[0]
        torch.testing.assert_close(out.c[0].double(), loop, rtol=0, atol=1e-4)
        torch.testing.assert_close(prefix, loop, rtol=0, atol=1e-5)


def test_frames_of_more_than_a_token_agree_with_the_loop():
    generator = torch.Generator().manual_seed(3)
    for _ in range(40):
        alpha = 3 * torch.rand(1, 12, generator=generator, dtype=torch.float64)
        h = torch.randn(1, 12, 4, generator=generator, dtype=torch.float64)
        out = integrate_and_fire(h, alpha, tail_threshold=1.0)
        fired, left, _ = by_loop(h[0], alpha[0])
        assert len(fired) == out.lens[0] and out.quantity[0] - len(fired) == pytest.approx(float(left))
        torch.testing.assert_close(out.c[0], torch.stack(fired))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ten_thousand_lengths_are_those_of_the_texts(dtype):
    """With as many fires as tokens, each of mass 1, whatever the type of the input."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(10):
        lens = torch.randint(1, 60, (1000,), generator=generator)
        x_lens = torch.randint(4, 61, (1000,), generator=generator)
        scale = 10 ** (-3 * torch.rand(1000, 1, generator=generator))
        alpha = scale * torch.rand(1000, 60, generator=generator)
        alpha = alpha.masked_fill(torch.arange(60) >= x_lens[:, None], 0.0).to(dtype)
        out = integrate_and_fire(torch.randn(1000, 60, 2, generator=generator).to(dtype), alpha, lens)
        assert torch.equal(out.lens, lens) and out.c.shape == (1000, int(lens.max()), 2) and out.c.dtype == dtype
        inside = torch.arange(out.c.shape[1]) < lens[:, None]
        assert (out.weights.sum(2) - inside.float()).abs().max() < 1e-4
        # Every frame is given away whole.
        given = alpha.double() * (lens / alpha.double().sum(1))[:, None]
        assert (out.weights.double().sum(1) - given).abs().max() < 1e-4


def test_the_tail_just_below_and_above_its_threshold():
    h = frames(2, 4)
    for threshold in (TAIL_THRESHOLD, 0.5, 0.05):
        rest = torch.tensor([threshold - 0.01, threshold + 0.01])
        alpha = torch.stack([torch.tensor([0.5, 0.5, 0.0, float(r)]) for r in rest])
        out = integrate_and_fire(h, alpha, tail_threshold=threshold)
        assert out.lens.tolist() == [1, 2] == fired_tokens(out.quantity, threshold).tolist()
        torch.testing.assert_close(out.weights.sum(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        torch.testing.assert_close(out.c[1, 1], h[1, 3])


def test_a_sum_that_rounding_left_below_a_whole_number_is_whole():
    alpha = torch.full((1, 10), 0.1)  # which float32 adds up to less, or more, than 1
    out = integrate_and_fire(frames(1, 10), alpha - 2e-6)
    assert out.lens.tolist() == [1] and out.weights.sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("target", [False, True])
def test_no_weight_at_all(target):
    alpha = torch.zeros(2, 5, requires_grad=True)
    lens = torch.tensor([2, 3])
    out = integrate_and_fire(frames(2, 5), alpha, lens if target else None)
    assert out.lens.tolist() == ([2, 3] if target else [0, 0])
    assert out.c.shape == (2, 3 if target else 1, 3) and not out.c.any() and not out.weights.any()
    out.c.sum().backward()
    assert alpha.grad.isfinite().all()


def test_the_factor_may_be_limited():
    alpha = torch.tensor([[0.1, 0.1, 0.1], [0.5, 0.5, 0.5]])
    lens = torch.tensor([3, 3])
    out = integrate_and_fire(frames(2, 3), alpha, lens, max_factor=5.0)
    assert out.lens.tolist() == [1, 3]  # 0.3 * 5 is one token and a half
    torch.testing.assert_close(out.weights.sum(2), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))


def test_gradients_are_the_loops():
    generator = torch.Generator().manual_seed(5)
    for scaled in (False, True):
        h = torch.randn(1, 9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        alpha = (0.1 + 0.8 * torch.rand(1, 9, generator=generator, dtype=torch.float64)).requires_grad_()
        lens = torch.tensor([7]) if scaled else None  # about 4.5 before
        out = integrate_and_fire(h, alpha, lens, tail_threshold=1.0)
        side = torch.randn(out.c.shape[1], 3, generator=generator, dtype=torch.float64)
        found = torch.autograd.grad((out.c[0] * side).sum(), (h, alpha))
        weights = alpha[0] * (7 / (alpha[0].sum() + 1e-8)) if scaled else alpha[0]
        fired = torch.stack(by_loop(h[0], weights, eps=1e-6)[0])
        assert fired.shape == side.shape
        expected = torch.autograd.grad((fired * side).sum(), (h, alpha))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7 if scaled else 1e-10)


def make(dim=8, **options):
    torch.manual_seed(6)
    return Cif(dim, **options).eval()


@pytest.mark.parametrize("target", [False, True])
def test_an_utterance_alone_is_what_it_is_in_a_batch(target):
    cif, h, lens = make(), 3 * frames(4, 30, 8), torch.tensor([30, 21, 9, 2])
    targets = torch.tensor([9, 4, 5, 1])
    whole = cif(h, lens, targets if target else None)
    assert len(set(whole.lens.tolist())) > 2
    for n, length in enumerate(lens.tolist()):
        one = cif(h[n : n + 1, :length], lens[n : n + 1], targets[n : n + 1] if target else None)
        count = int(one.lens)
        assert count == whole.lens[n]
        torch.testing.assert_close(one.c[0, :count], whole.c[n, :count], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.quantity[0], whole.quantity[n])
        assert not whole.c[n, count:].any() and not whole.alpha[n, length:].any()


def test_the_tail_does_not_depend_on_padding():
    """The longest utterance of a batch, which has no frame of padding, gets its tail like any other."""
    h = frames(2, 6)
    alpha = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.2, 0.3], [0.5, 0.5, 0.2, 0.3, 0.0, 0.0]])
    assert integrate_and_fire(h, alpha).lens.tolist() == [2, 2]
    assert integrate_and_fire(h[:1], alpha[:1]).lens.tolist() == [2]


@pytest.mark.parametrize("rate", [0.1, 0.27])
def test_an_untrained_model_fires_at_the_expected_rate(rate):
    cif = make(initial_rate=rate)
    out = cif(0.1 * frames(3, 200, 8), torch.full((3,), 200))
    assert out.quantity.tolist() == pytest.approx([200 * rate] * 3, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_weights_and_sums_in_float32(dtype):
    cif, h, lens = make(), frames(2, 50, 8), torch.tensor([50, 31])
    targets = torch.tensor([13, 7])
    with torch.autocast("cpu", dtype=dtype):
        out = cif(h, lens, targets)
    plain = cif(h, lens, targets)
    for name in ("alpha", "quantity", "weights", "c"):
        assert getattr(out, name).dtype == torch.float32
        assert torch.equal(getattr(out, name), getattr(plain, name)), name
