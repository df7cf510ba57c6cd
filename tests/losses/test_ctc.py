"""CTC against path enumeration."""

import itertools
import math

import pytest
import torch

from icefall_kd.errors import DataError
from icefall_kd.losses.ctc import ctc_loss


def enumerate_ctc(logprobs, y):
    totals = []
    for path in itertools.product(range(logprobs.shape[1]), repeat=logprobs.shape[0]):
        if [k for k, _ in itertools.groupby(path) if k != 0] == y:
            totals.append(sum(logprobs[t, k] for t, k in enumerate(path)))
    return -torch.logsumexp(torch.stack(totals), 0).item()


def test_equals_enumeration_for_ragged_utterances():
    logits = torch.randn(3, 5, 4, dtype=torch.float64)
    y = torch.tensor([[1, 1, 2], [3, 0, 0], [0, 0, 0]])
    x_lens, y_lens = torch.tensor([5, 4, 2]), torch.tensor([3, 1, 0])
    loss = ctc_loss(logits, y, x_lens, y_lens)
    for n in range(3):
        expected = enumerate_ctc(logits[n, : x_lens[n]].log_softmax(-1), y[n, : y_lens[n]].tolist())
        assert loss[n].item() == pytest.approx(expected, abs=1e-10)


def test_float32_under_autocast_and_padding_irrelevant():
    logits, y, lens = torch.randn(2, 6, 5), torch.tensor([[1, 2], [3, 0]]), (torch.tensor([6, 3]), torch.tensor([2, 1]))
    expected = ctc_loss(logits, y, *lens)
    logits[1, 3:], y[1, 1] = 40.0, 4
    with torch.autocast("cpu", torch.bfloat16):
        again = ctc_loss(logits, y, *lens)
    assert again.dtype == torch.float32 and torch.equal(again, expected)


def test_too_many_tokens_are_infinite_and_seen():
    # Repeats need a blank between them: four frames do not hold 1 1 1.
    loss = ctc_loss(torch.randn(1, 4, 3), torch.tensor([[1, 1, 1]]), torch.tensor([4]), torch.tensor([3]))
    assert loss.item() == math.inf


@pytest.mark.parametrize("x_len, y_len", [(7, 1), (0, 1), (3, 4)])
def test_lengths_that_do_not_fit_are_refused(x_len, y_len):
    y = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(DataError):
        ctc_loss(torch.randn(1, 6, 3), y, torch.tensor([x_len]), torch.tensor([y_len]))


@pytest.mark.parametrize("token", [3, -1])
def test_tokens_outside_the_vocabulary_are_refused(token):
    y = torch.tensor([[1, token, 2]])
    with pytest.raises(DataError, match=f"token {token} lies outside the vocabulary of 3"):
        ctc_loss(torch.randn(1, 6, 3), y, torch.tensor([6]), torch.tensor([2]))
    assert ctc_loss(torch.randn(1, 6, 3), y, torch.tensor([6]), torch.tensor([1])).isfinite().all()  # padding is free


def test_no_text_at_all_is_the_score_of_blanks():
    logits = torch.randn(2, 6, 5)
    loss = ctc_loss(logits, torch.zeros(2, 0, dtype=torch.int64), torch.tensor([6, 3]), torch.tensor([0, 0]))
    blanks = -logits.log_softmax(2)[..., 0]
    torch.testing.assert_close(loss, torch.stack([blanks[0].sum(), blanks[1, :3].sum()]))
