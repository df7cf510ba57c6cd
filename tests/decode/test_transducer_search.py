"""Batched searches against plain loops over one utterance, on random models."""

import numpy as np
import pytest
import torch
from toy_search import DIM, VOCAB, Model, log_probs, ragged, total_log_prob

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.base import Decoder
from icefall_kd.decode.transducer import GreedySearch, ModifiedBeamSearch
from icefall_kd.errors import ConfigError


@torch.no_grad()
def greedy_reference(model, frames, blank_penalty=0.0, unk_id=2):
    context_size = model.decoder.context_size
    context = [-1] * (context_size - 1) + [0]
    tokens, times, score = [], [], 0.0
    for t, frame in enumerate(frames):
        row = log_probs(model, frame, context[-context_size:], blank_penalty)
        symbol = max(range(VOCAB), key=row.__getitem__)
        score += row[symbol]
        if symbol not in (0, unk_id):
            tokens.append(symbol)
            times.append(t)
            context.append(symbol)
    return tokens, score, times


@torch.no_grad()
def beam_reference(model, frames, beam, blank_penalty=0.0, temperature=1.0, unk_id=2):
    """Return [(tokens, log-probability)] by length-normalised score, with dicts of whole sequences."""
    c = model.decoder.context_size
    hyps = {(-1,) * (c - 1) + (0,): 0.0}
    for frame in frames:
        candidates = []
        for ys, score in hyps.items():
            row = log_probs(model, frame, list(ys[-c:]), blank_penalty, temperature)
            candidates += [(score + row[v], ys, v) for v in range(VOCAB)]
        candidates.sort(key=lambda x: -x[0])
        hyps = {}
        for score, ys, v in candidates[:beam]:
            ys = ys if v in (0, unk_id) else (*ys, v)
            hyps[ys] = float(np.logaddexp(hyps[ys], score)) if ys in hyps else score
    ranked = sorted(hyps.items(), key=lambda item: -item[1] / len(item[0]))
    return [(list(ys[c:]), score) for ys, score in ranked]


@pytest.mark.parametrize("context_size", [1, 2, 3])
@pytest.mark.parametrize("blank_penalty", [0.0, 1.5])
def test_batched_greedy_search_equals_a_plain_loop(context_size, blank_penalty):
    for seed in range(4):
        model = Model(context_size, seed)
        x, lens = ragged(seed)
        result = GreedySearch(model, blank_penalty=blank_penalty).decode(x, lens)
        for i, length in enumerate(lens.tolist()):
            tokens, score, times = greedy_reference(model, x[i, :length], blank_penalty)
            (hyp,) = result[i]
            assert (hyp.tokens, hyp.timestamps) == (tokens, times)
            assert hyp.score == pytest.approx(score, rel=1e-5, abs=1e-5)
        # The random models say something: a search that emits nothing would pass otherwise.
        assert any(hyps[0].tokens for hyps in result)


@pytest.mark.parametrize("context_size", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"blank_penalty": 1.5}, {"temperature": 2.0}, {"unk_id": None}])
def test_batched_beam_search_equals_a_plain_loop_with_scores_and_nbest(context_size, options):
    for seed in range(3):
        model = Model(context_size, seed)
        x, lens = ragged(seed)
        result = ModifiedBeamSearch(model, beam_size=4, nbest=4, **options).decode(x, lens)
        for i, length in enumerate(lens.tolist()):
            expected = beam_reference(model, x[i, :length], 4, **options)
            assert [h.tokens for h in result[i]] == [tokens for tokens, _ in expected]
            assert [h.score for h in result[i]] == pytest.approx([s for _, s in expected], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("search", [GreedySearch, lambda m: ModifiedBeamSearch(m, nbest=4)])
def test_a_batch_equals_its_utterances_alone(search):
    model = Model(seed=7)
    x, lens = ragged(7)
    together = search(model).decode(x, lens)
    for i, length in enumerate(lens.tolist()):
        (alone,) = search(model).decode(x[i : i + 1, :length], lens[i : i + 1])
        assert [(h.tokens, h.timestamps) for h in alone] == [(h.tokens, h.timestamps) for h in together[i]]
        assert [h.score for h in alone] == pytest.approx([h.score for h in together[i]], rel=1e-6)


def test_beam_one_equals_greedy_search():
    for seed in range(6):
        model = Model(seed=seed)
        x, lens = ragged(seed)
        greedy = GreedySearch(model).decode(x, lens)
        beam = ModifiedBeamSearch(model, beam_size=1).decode(x, lens)
        for a, b in zip(greedy, beam, strict=True):
            assert (a[0].tokens, a[0].timestamps) == (b[0].tokens, b[0].timestamps)
            assert a[0].score == pytest.approx(b[0].score, rel=1e-5, abs=1e-5)


def test_an_unpruned_beam_sums_all_alignments_of_each_hypothesis():
    model = Model(seed=3)
    x, lens = ragged(3, n=2, longest=4)
    lens[:] = 4
    # 9 symbols over 4 frames: 9**4 paths, so this beam drops nothing.
    hyps = ModifiedBeamSearch(model, beam_size=9**4, nbest=50).decode(x[:1, :4], lens[:1])[0]
    assert len(hyps) == 50
    for hyp in hyps:
        assert hyp.score == pytest.approx(total_log_prob(model, x[0, :4], hyp.tokens), rel=1e-4, abs=1e-4)


def test_a_wider_beam_never_finds_a_less_probable_sequence_than_exhaustive_search():
    model = Model(seed=5)
    x, _ = ragged(5, n=1, longest=5)
    lens = torch.tensor([5])
    x = x[:1, :5]
    best = ModifiedBeamSearch(model, beam_size=9**5).decode(x, lens)[0][0]
    narrow = ModifiedBeamSearch(model, beam_size=2).decode(x, lens)[0][0]
    assert narrow.score / (len(narrow.tokens) + 2) <= best.score / (len(best.tokens) + 2) + 1e-6


def test_an_utterance_of_blanks_or_without_frames_gets_the_empty_hypothesis():
    model = Model(blank_bias=100.0)
    x, lens = ragged(0, n=3)
    for search in (GreedySearch(model), ModifiedBeamSearch(model)):
        result = search.decode(x, lens)
        assert [r[0].tokens for r in result] == [[], [], []]
        assert [r[0].timestamps for r in result] == [[], [], []]
        assert result[2][0].score == 0.0
        assert search.decode(x[:0], lens[:0]) == []


def test_unk_is_not_emitted_unless_asked_for():
    model = Model()
    with torch.no_grad():
        model.joiner.output_linear.bias[2] += 1000.0
    x, lens = ragged(0, n=2)
    assert GreedySearch(model).decode(x, lens)[0][0].tokens == []
    assert GreedySearch(model, unk_id=None).decode(x, lens)[0][0].tokens == [2] * int(lens[0])


def test_timestamps_ascend_and_belong_to_the_tokens():
    model = Model(seed=2, blank_bias=0.0)
    x, lens = ragged(2)
    for hyps, length in zip(ModifiedBeamSearch(model, nbest=4).decode(x, lens), lens.tolist(), strict=True):
        for hyp in hyps:
            assert len(hyp.timestamps) == len(hyp.tokens)
            assert hyp.timestamps == sorted(set(hyp.timestamps))
            assert all(0 <= t < length for t in hyp.timestamps)


def test_searches_satisfy_the_protocol_and_read_the_options():
    model = Model()
    config = DecodeConfig(beam_size=7, nbest=3, blank_penalty=0.5, temperature=1.5)
    beam = ModifiedBeamSearch.from_config(model, config)
    assert isinstance(beam, Decoder)
    assert (beam.beam_size, beam.nbest, beam.blank_penalty, beam.temperature) == (7, 3, 0.5, 1.5)
    assert GreedySearch.from_config(model, config).blank_penalty == 0.5


def test_wrong_use_is_refused_with_its_values():
    model = Model()
    with pytest.raises(ConfigError, match="beam-size 0"):
        ModifiedBeamSearch(model, beam_size=0)
    with pytest.raises(ConfigError, match="temperature is 0"):
        ModifiedBeamSearch(model, temperature=0.0)
    with pytest.raises(ConfigError, match="do not fit in 5 frames"):
        GreedySearch(model).decode(torch.zeros(1, 5, DIM).double(), torch.tensor([6]))
    model.joiner = None
    with pytest.raises(ConfigError, match="no transducer"):
        GreedySearch(model)
