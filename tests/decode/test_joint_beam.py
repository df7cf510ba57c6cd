"""Joint CTC/attention beam search against every token sequence of short utterances."""

import itertools
import math

import pytest
import torch
from nar_search_toys import all_strings, nar_model, ragged_batch

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.ctc_string import unknown_as_blank
from icefall_kd.decode.joint_beam import CtcPrefixScorer, JointBeamSearch
from icefall_kd.errors import ConfigError

V = 6  # blank, sos, unknown, two tokens, mask
TOKENS = range(3, V - 1)


@torch.no_grad()
def attention_score(model, frames, y):
    """Return log P(y, end) of one sequence by a whole forward call of the decoder."""
    memory = model.decoder.memory(frames.unsqueeze(0), torch.tensor([len(frames)]))
    logits = model.decoder(torch.tensor([[model.sos_id, *y]]), torch.tensor([len(y) + 1]), memory)[0]
    lp = logits.float().log_softmax(-1)
    return sum(float(lp[u, v]) for u, v in enumerate([*y, model.sos_id]))


def brute_force(model, frames, weight):
    """Return [(score, string)] of every string of at most T' tokens, best first."""
    with torch.no_grad():
        ctc = all_strings(unknown_as_blank(model.ctc_log_probs(frames)))
    found = []
    for length in range(len(frames) + 1):
        for y in itertools.product(TOKENS, repeat=length):
            p = ctc.get(y, 0.0)
            if weight and not p:
                continue
            score = weight * math.log(p) if weight else 0.0
            found.append((score + ((1 - weight) * attention_score(model, frames, y) if weight < 1 else 0.0), y))
    return sorted(found, reverse=True)


def toy(seed, vocab_size=V):
    model = nar_model(seed, vocab_size, decoder="ar", sharpness=1.5)
    with torch.no_grad():
        model.ctc_output.weight.div_(5)
    return model


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
def test_a_beam_that_is_wide_enough_finds_the_best_of_all_sequences(weight):
    for seed in range(3):
        model = toy(seed)
        x, lens = ragged_batch(seed, n=3, longest=4)
        found = JointBeamSearch(model, 16, nbest=9, ctc_weight=weight).decode(x, lens)
        for hyps, frames, length in zip(found, x, lens.tolist(), strict=True):
            expected = brute_force(model, frames[:length], weight)[:9]
            assert [tuple(h.tokens) for h in hyps] == [y for _, y in expected]
            assert [h.score for h in hyps] == pytest.approx([s for s, _ in expected], abs=1e-4)


def test_prefix_scores_are_sums_over_all_strings_that_begin_so():
    g = torch.Generator().manual_seed(0)
    lp = (2 * torch.randn(2, 5, 4, generator=g)).log_softmax(-1)
    lens = torch.tensor([5, 4])
    scorer = CtcPrefixScorer(lp, lens, 0)
    strings = [all_strings(row[:length]) for row, length in zip(lp, lens.tolist(), strict=True)]

    def begin_with(i, prefix):
        return sum(p for y, p in strings[i].items() if y[: len(prefix)] == prefix)

    paths = [[(1,), (2,)], [(1, 1), (2, 3)], [(2, 3, 3), (1, 1, 2)]]
    sources = [[0, 0], [0, 1], [1, 0]]
    before = [()]
    for prefixes, source in zip(paths, sources, strict=True):
        likely = scorer.continuations().exp()
        for i, (g, y) in itertools.product(range(2), enumerate(before)):
            for v in (1, 2, 3):
                assert float(likely[i, g, v]) == pytest.approx(begin_with(i, (*y, v)), rel=1e-4, abs=1e-7)
        new = torch.tensor([[y[-1] for y in prefixes]] * 2)
        scores = scorer.advance(torch.tensor([source] * 2), new)
        for i, g in itertools.product(range(2), range(2)):
            assert float(scores[i, g].exp()) == pytest.approx(begin_with(i, prefixes[g]), rel=1e-5)
            assert float(scorer.whole()[i, g].exp()) == pytest.approx(strings[i].get(prefixes[g], 0.0), rel=1e-5)
        before = prefixes


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_a_narrow_beam_equals_a_plain_search(weight):
    """The same search without caches or batches, with the prefix scores by brute force over alignments."""
    beam = 3
    for seed in range(2):
        model = toy(seed, vocab_size=7)
        x, lens = ragged_batch(seed, n=3, longest=5)
        found = JointBeamSearch(model, beam, nbest=2, ctc_weight=weight).decode(x, lens)
        for hyps, frames, length in zip(found, x, lens.tolist(), strict=True):
            frames = frames[:length]
            with torch.no_grad():
                strings = all_strings(unknown_as_blank(model.ctc_log_probs(frames)))
                memory = model.decoder.memory(frames.unsqueeze(0), torch.tensor([length]))

            def joint(y, end, model=model, frames=frames, memory=memory, strings=strings):
                some = strings.get(y, 0.0) if end else sum(p for z, p in strings.items() if z[: len(y)] == y)
                if weight and not some:
                    return -math.inf
                score = weight * math.log(some) if weight else 0.0
                if weight < 1:
                    asked = torch.tensor([[model.sos_id, *y]])
                    with torch.no_grad():
                        lp = model.decoder(asked, torch.tensor([asked.shape[1]]), memory)[0].float().log_softmax(-1)
                    path = [*y, model.sos_id] if end else y
                    score += (1 - weight) * sum(float(lp[u, v]) for u, v in enumerate(path))
                return score

            opened, ended = [()], []
            for size in range(length + 1):
                ended += [(joint(y, True), y) for y in opened]
                grown = [(joint((*y, v), False), (*y, v)) for y in opened for v in range(3, 6)]
                opened = [y for s, y in sorted(grown, reverse=True)[:beam] if s > -math.inf]
                if not opened or size == length:
                    break
            expected = sorted(((s, y) for s, y in ended if s > -math.inf), reverse=True)[:2]
            assert [tuple(h.tokens) for h in hyps] == [y for _, y in expected]
            assert [h.score for h in hyps] == pytest.approx([s for s, _ in expected], abs=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_batched_equals_single_and_the_nbest_is_unique_and_sorted(weight):
    model = nar_model(1, decoder="ar", sharpness=2.0)
    x, lens = ragged_batch(1, n=6, shortest=0)
    search = JointBeamSearch(model, 4, nbest=4, ctc_weight=weight)
    for i, hyps in enumerate(search.decode(x, lens)):
        (alone,) = search.decode(x[i : i + 1, : max(int(lens[i]), 1)], lens[i : i + 1])
        assert [h.tokens for h in hyps] == [h.tokens for h in alone]
        assert [h.score for h in hyps] == pytest.approx([h.score for h in alone], abs=1e-5)
        assert len({tuple(h.tokens) for h in hyps}) == len(hyps) and all(h.timestamps is None for h in hyps)
        assert [h.score for h in hyps] == sorted((h.score for h in hyps), reverse=True)
        assert not any({0, 1, 2, model.mask_id} & set(h.tokens) for h in hyps)
        assert all(len(h.tokens) <= length for h, length in zip(hyps, [int(lens[i])] * len(hyps), strict=True))
    assert search.decode(x[:0], lens[:0]) == []
    empty = search.decode(x[:2], torch.tensor([0, 0]))
    assert [[(h.tokens, h.score) for h in hyps] for hyps in empty] == [[([], 0.0)]] * 2


def test_options_reach_the_search_and_a_student_is_refused():
    config = DecodeConfig(beam_size=3, nbest=5, joint_ctc_weight=0.6)
    search = JointBeamSearch.from_config(toy(0), config)
    assert (search.beam_size, search.nbest, search.ctc_weight) == (3, 3, 0.6)
    with pytest.raises(ConfigError, match="decode it with --decoding-method mask_predict"):
        JointBeamSearch(nar_model(0))
