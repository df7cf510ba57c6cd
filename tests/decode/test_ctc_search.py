"""CTC greedy search against a plain loop."""

import pytest
import torch

from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.errors import ConfigError


class Model:
    """A model whose CTC head passes its input through: encoder_out are logits."""

    ctc_output = torch.nn.Identity()


def reference(logits, unk_id=2):
    rows = logits.log_softmax(-1)
    tokens, times, score, last = [], [], 0.0, None
    for t, row in enumerate(rows):
        symbol = int(row.argmax())
        score += float(row[symbol])
        if symbol not in (0, last, unk_id):
            tokens.append(symbol)
            times.append(t)
        last = symbol
    return tokens, times, score


def test_batched_search_equals_a_plain_loop_on_ragged_batches():
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        x = 4 * torch.randn(5, 20, 5, generator=g)
        x[..., 0] += 1
        lens = torch.tensor([20, 13, 1, 7, 0])
        for hyps, row, length in zip(CtcGreedySearch(Model()).decode(x, lens), x, lens.tolist(), strict=True):
            tokens, times, score = reference(row[:length])
            assert (hyps[0].tokens, hyps[0].timestamps) == (tokens, times)
            assert hyps[0].score == pytest.approx(score, abs=1e-4)


def test_repeats_are_merged_unless_a_blank_stands_between():
    path = [0, 3, 3, 0, 3, 4, 4, 3]
    x = 50.0 * torch.nn.functional.one_hot(torch.tensor([path]), 6)
    (hyp,) = CtcGreedySearch(Model()).decode(x, torch.tensor([8]))[0]
    assert hyp.tokens == [3, 3, 4, 3]
    assert hyp.timestamps == [1, 4, 5, 7]
    assert hyp.score == pytest.approx(0.0, abs=1e-6)


def test_a_model_without_a_ctc_head_is_refused():
    class Bare:
        ctc_output = None

    with pytest.raises(ConfigError, match="no CTC head"):
        CtcGreedySearch(Bare())
