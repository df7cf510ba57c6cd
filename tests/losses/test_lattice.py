"""The transducer's lattices against golden numbers, path enumeration and finite differences."""

import itertools
import math

import pytest
import torch

from icefall_kd.losses import lattice
from icefall_kd.losses.rnnt import pruned_loss, smoothed_simple_loss, windows

F64 = torch.float64


def golden1():
    """Three symbols, four frames, vocabulary 3, blank 2 (the example in k2's documentation)."""
    am = torch.tensor([[[0, 1, 2], [0, 0, 0], [0, 2, 4], [0, 3, 3]]], dtype=F64)
    lm = torch.tensor([[[0, 0, 1], [0, 1, 1], [1, 0, 1], [2, 2, 0]]], dtype=F64)
    return am, lm, torch.tensor([[0, 1, 0]]), torch.tensor([4]), torch.tensor([3]), 2


def golden2():
    t, s, v = torch.arange(12, dtype=F64), torch.arange(6, dtype=F64), torch.arange(8, dtype=F64)
    am = torch.sin(0.7 * t[:, None] + 1.3 * v)[None]
    lm = torch.cos(0.9 * s[:, None] - 0.4 * v)[None]
    return am, lm, torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([12]), torch.tensor([5]), 0


def prune_and_score(case, width, occupations, joiner):
    am, lm, y, x_lens, y_lens, blank = case
    starts = lattice.prune_starts(*occupations, y_lens, x_lens, width)
    am_window, lm_window, positions = windows(am, lm, starts, width)
    loss = pruned_loss(joiner(am_window, lm_window), y, starts, positions, x_lens, y_lens, blank)
    return starts, loss


def enumerate_paths(logprobs, y, blank):
    """Return the total of all paths of one utterance, logprobs (T, S+1, V), by listing them."""
    num_frames, num_symbols = logprobs.shape[0], len(y)
    totals = []
    # A path is the frame of each symbol, in order; blanks are what remains.
    for frames in itertools.combinations_with_replacement(range(num_frames), num_symbols):
        score = sum(logprobs[t, s, y[s]] for s, t in enumerate(frames))
        score += sum(logprobs[t, sum(f <= t for f in frames), blank] for t in range(num_frames))
        totals.append(score)
    return torch.logsumexp(torch.stack(totals), 0)


def random_ragged(num=4, frames=7, symbols=5, vocab=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    am = torch.randn(num, frames, vocab, generator=g, dtype=F64)
    lm = torch.randn(num, symbols + 1, vocab, generator=g, dtype=F64)
    y = torch.randint(1, vocab, (num, symbols), generator=g)
    x_lens = torch.tensor([frames, 4, 1, 5])[:num]
    y_lens = torch.tensor([symbols, 2, 1, 0])[:num]
    return am, lm, y, x_lens, y_lens, 0


@pytest.mark.parametrize(
    "lm_scale, am_scale, expected", [(0, 0, 7.504013356), (0.25, 0, 7.342213163), (0.1, 0.1, 7.297697046)]
)
def test_simple_loss_golden_1(lm_scale, am_scale, expected):
    am, lm, y, x_lens, y_lens, blank = golden1()
    loss, _, _ = smoothed_simple_loss(am, lm, y, x_lens, y_lens, lm_scale, am_scale, blank)
    assert loss.item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    "lm_scale, am_scale, expected", [(0, 0, 26.836505784), (0.25, 0, 26.567567577), (0.1, 0.1, 27.319846124)]
)
def test_simple_loss_golden_2(lm_scale, am_scale, expected):
    am, lm, y, x_lens, y_lens, blank = golden2()
    loss, _, _ = smoothed_simple_loss(am, lm, y, x_lens, y_lens, lm_scale, am_scale, blank)
    assert loss.item() == pytest.approx(expected, abs=1e-8)


def test_occupations_golden_1():
    am, lm, y, x_lens, y_lens, blank = golden1()
    _, px_grad, py_grad = smoothed_simple_loss(am, lm, y, x_lens, y_lens, 0, 0, blank)
    px = [[0.183978, 0.781186, 0.012907, 0.021929, 0], [0.054535, 0.544092, 0.091593, 0.309781, 0],
          [0.001514, 0.251063, 0.085907, 0.661516, 0]]  # fmt: skip
    py = [[0.816022, 0.034836, 0.021929, 0], [0.129444, 0.366538, 0.287852, 0],
          [0.05302, 0.346049, 0.351734, 0], [0.001514, 0.252577, 0.338484, 1]]  # fmt: skip
    torch.testing.assert_close(px_grad[0], torch.tensor(px, dtype=F64), atol=1e-6, rtol=0)
    torch.testing.assert_close(py_grad[0], torch.tensor(py, dtype=F64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "width, starts, expected",
    [(2, [0, 0, 1, 2], 10.147549888), (3, [0, 0, 1, 1], 7.842867467), (4, [0, 0, 0, 0], 7.504013356)],
)
def test_pruned_loss_golden_1(width, starts, expected):
    case = golden1()
    _, *occupations = smoothed_simple_loss(*case[:5], 0, 0, case[5])
    p, loss = prune_and_score(case, width, occupations, lambda a, b: a + b)
    assert p[0].tolist() == starts
    assert loss.item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    "lm_scale, width, starts, expected",
    [
        (0, 2, [0] * 7 + [1, 2, 3, 4, 4], 35.876234421),
        (0, 3, [0] * 10 + [1, 3], 31.107426608),
        (0, 4, [0] * 10 + [2, 2], 29.254836169),
        (0, 5, [0] * 10 + [1, 1], 27.480380292),
        (0, 6, [0] * 12, 27.087565406),
        (0.25, 2, [0] * 7 + [1, 2, 3, 4, 4], 35.876234421),
        (0.25, 3, [0] * 9 + [1, 3, 3], 31.505222787),
        (0.25, 4, [0] * 10 + [2, 2], 29.254836169),
        (0.25, 5, [0] * 10 + [1, 1], 27.480380292),
    ],
)
def test_pruned_loss_golden_2(lm_scale, width, starts, expected):
    case = golden2()
    _, *occupations = smoothed_simple_loss(*case[:5], lm_scale, 0, case[5])
    p, loss = prune_and_score(case, width, occupations, lambda a, b: 2 * torch.tanh(a + b))
    assert p[0].tolist() == starts
    assert loss.item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("num_symbols, num_frames", [(0, 1), (0, 3), (1, 1), (2, 1), (3, 4), (4, 3)])
def test_both_lattices_equal_path_enumeration(num_symbols, num_frames):
    vocab, blank = 5, 0
    am = torch.randn(1, num_frames, vocab, dtype=F64)
    lm = torch.randn(1, num_symbols + 1, vocab, dtype=F64)
    y = torch.randint(1, vocab, (1, num_symbols))
    x_lens, y_lens = torch.tensor([num_frames]), torch.tensor([num_symbols])
    expected = -enumerate_paths((am[0, :, None] + lm[0]).log_softmax(-1), y[0].tolist(), blank)
    simple, *occupations = smoothed_simple_loss(am, lm, y, x_lens, y_lens)
    assert simple.item() == pytest.approx(expected.item(), abs=1e-10)
    case = am, lm, y, x_lens, y_lens, blank
    _, full = prune_and_score(case, num_symbols + 1, occupations, lambda a, b: a + b)
    assert full.item() == pytest.approx(expected.item(), abs=1e-10)


def test_pruned_loss_equals_enumeration_of_the_paths_inside_the_windows():
    num_symbols, num_frames, vocab, width = 5, 6, 4, 3
    am, lm = torch.randn(1, num_frames, vocab, dtype=F64), torch.randn(1, num_symbols + 1, vocab, dtype=F64)
    y = torch.randint(1, vocab, (1, num_symbols))
    case = am, lm, y, torch.tensor([num_frames]), torch.tensor([num_symbols]), 0
    _, *occupations = smoothed_simple_loss(*case[:5])
    starts, loss = prune_and_score(case, width, occupations, lambda a, b: a + b)
    logprobs = (am[0, :, None] + lm[0]).log_softmax(-1)
    for t, start in enumerate(starts[0].tolist()):
        for s in range(num_symbols + 1):
            if not start <= s < start + width:
                logprobs[t, s] = -math.inf
            elif s == start + width - 1:
                logprobs[t, s, 1:] = -math.inf  # a symbol would leave the window upwards
    assert loss.item() == pytest.approx(-enumerate_paths(logprobs, y[0].tolist(), 0).item(), abs=1e-10)


def test_occupations_are_probabilities():
    am, lm, y, x_lens, y_lens, _ = random_ragged()
    _, px_grad, py_grad = smoothed_simple_loss(am, lm, y, x_lens, y_lens, 0.25, 0.1)
    for n, (num_frames, num_symbols) in enumerate(zip(x_lens, y_lens, strict=True)):
        each_symbol, each_frame = px_grad[n].sum(1), py_grad[n].sum(0)
        torch.testing.assert_close(each_symbol[:num_symbols], torch.ones(num_symbols, dtype=F64))
        torch.testing.assert_close(each_frame[:num_frames], torch.ones(num_frames, dtype=F64))
        assert not each_symbol[num_symbols:].any() and not each_frame[num_frames:].any()


@pytest.mark.parametrize("lm_scale, am_scale", [(0.0, 0.0), (0.25, 0.0), (0.2, 0.3)])
def test_simple_loss_gradient_is_that_of_finite_differences(lm_scale, am_scale):
    am, lm, y, x_lens, y_lens, _ = random_ragged(frames=5, symbols=3, vocab=4, num=3)
    x_lens = torch.tensor([5, 3, 1])
    y_lens = torch.tensor([3, 2, 0])

    def loss(am, lm):
        return smoothed_simple_loss(am, lm, y, x_lens, y_lens, lm_scale, am_scale)[0]

    assert torch.autograd.gradcheck(loss, (am.requires_grad_(), lm.requires_grad_()))


@pytest.mark.parametrize("width", [2, 3, 4])
def test_pruned_loss_gradient_is_that_of_finite_differences(width):
    am, lm, y, x_lens, y_lens, _ = random_ragged(frames=5, symbols=3, vocab=4)
    width = max(width, lattice.window_width(width, y_lens, x_lens, y.shape[1]))
    _, *occupations = smoothed_simple_loss(am, lm, y, x_lens, y_lens)
    starts = lattice.prune_starts(*occupations, y_lens, x_lens, width)
    am_window, lm_window, positions = windows(am, lm, starts, width)
    logits = (am_window + lm_window).clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pruned_loss(x, y, starts, positions, x_lens, y_lens), (logits,))


def test_ragged_batch_equals_single_utterances_and_padding_is_irrelevant():
    am, lm, y, x_lens, y_lens, blank = random_ragged()
    joiner = lambda a, b: torch.tanh(a + b)  # noqa: E731
    simple, *occupations = smoothed_simple_loss(am, lm, y, x_lens, y_lens, 0.25)
    _, pruned = prune_and_score((am, lm, y, x_lens, y_lens, blank), 3, occupations, joiner)
    for n in range(len(x_lens)):
        t, s = int(x_lens[n]), int(y_lens[n])
        one = (am[n : n + 1, :t], lm[n : n + 1, : s + 1], y[n : n + 1, :s], x_lens[n : n + 1], y_lens[n : n + 1], blank)
        simple_n, *occupations_n = smoothed_simple_loss(*one[:5], 0.25)
        _, pruned_n = prune_and_score(one, min(3, s + 1), occupations_n, joiner)
        assert simple[n].item() == pytest.approx(simple_n.item(), abs=1e-10)
        assert pruned[n].item() == pytest.approx(pruned_n.item(), abs=1e-10)
    for n in range(len(x_lens)):
        am[n, x_lens[n] :] = 1e3
        lm[n, y_lens[n] + 1 :] = -50.0
        y[n, y_lens[n] :] = 1
    again, *occupations = smoothed_simple_loss(am, lm, y, x_lens, y_lens, 0.25)
    _, pruned_again = prune_and_score((am, lm, y, x_lens, y_lens, blank), 3, occupations, joiner)
    torch.testing.assert_close(again, simple)
    torch.testing.assert_close(pruned_again, pruned)


def test_pruned_loss_is_at_least_the_full_one_and_shrinks_with_the_window():
    losses = torch.zeros(7)
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        am, lm = (torch.randn(1, n, 8, generator=g, dtype=F64) for n in (12, 8))
        y = torch.randint(1, 8, (1, 7), generator=g)
        case = am, lm, y, torch.tensor([12]), torch.tensor([7]), 0
        _, *occupations = smoothed_simple_loss(*case[:5])
        row = [prune_and_score(case, r, occupations, torch.add)[1].item() for r in range(2, 9)]
        assert all(loss >= row[-1] - 1e-9 for loss in row)
        losses += torch.tensor(row)
    assert (losses.diff() < 0).all()


def test_starts_obey_their_bounds():
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        symbols, frames = int(torch.randint(1, 12, (), generator=g)), int(torch.randint(1, 15, (), generator=g))
        px, py = torch.rand(3, symbols, frames + 1, generator=g), torch.rand(3, symbols + 1, frames, generator=g)
        x_lens = torch.randint(1, frames + 1, (3,), generator=g)
        y_lens = torch.randint(0, symbols + 1, (3,), generator=g)
        width = lattice.window_width(2, y_lens, x_lens, symbols)
        starts = lattice.prune_starts(px, py, y_lens, x_lens, width)
        jumps = starts.diff(dim=1)
        assert (starts[:, 0] == 0).all() and (jumps >= 0).all() and (jumps <= width - 1).all()
        last = starts[torch.arange(3), x_lens - 1]
        assert (last <= y_lens).all() and (last + width > y_lens).all()


def test_a_lattice_without_a_path_has_infinite_loss_and_zero_gradient():
    logits = torch.randn(2, 3, 2, 4, dtype=F64, requires_grad=True)
    starts = torch.zeros(2, 3, dtype=torch.int64)  # the second utterance needs position 3, the windows end at 1
    y, x_lens, y_lens = torch.ones(2, 3, dtype=torch.int64), torch.tensor([3, 3]), torch.tensor([1, 3])
    positions = starts.unsqueeze(2) + torch.arange(2)
    loss = pruned_loss(logits, y, starts, positions, x_lens, y_lens)
    loss.sum().backward()
    assert loss[0].isfinite() and loss[1] == math.inf
    assert logits.grad[0].abs().sum() > 0 and not logits.grad[1].any()


def test_very_unlikely_arcs_stay_exact():
    am, lm, y, x_lens, y_lens, _ = random_ragged(num=1)
    logits = (am[:, :, None] + lm[:, None]) * 200
    full = -enumerate_paths(logits[0].log_softmax(-1), y[0].tolist(), 0)
    starts = torch.zeros(1, am.shape[1], dtype=torch.int64)
    positions = torch.arange(6).expand(1, am.shape[1], 6)
    assert pruned_loss(logits, y, starts, positions, x_lens, y_lens).item() == pytest.approx(full.item(), rel=1e-12)
