"""CTC prefix beam search against all alignments of short utterances."""

import math

import pytest
import torch
from nar_search_toys import all_strings, nar_model, ragged_batch

from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.decode.ctc_prefix import CtcPrefixBeamSearch
from icefall_kd.decode.ctc_string import collapse, ctc_string_scores, unknown_as_blank

V = 6  # blank, sos, unknown, two tokens, mask


def brute_force(model, frames):
    """Return {string: log-probability} of the strings that the search may emit."""
    lp = unknown_as_blank(model.ctc_log_probs(frames))
    found = all_strings(lp) if len(frames) else {(): 1.0}
    return {string: math.log(p) for string, p in found.items() if p > 0 and set(string) <= {3, 4}}


@pytest.mark.parametrize("seed", range(4))
def test_a_beam_that_holds_all_prefixes_finds_every_string_with_its_probability(seed):
    model = nar_model(seed, vocab_size=V)
    with torch.no_grad():
        model.ctc_output.weight.div_(5)
    x, lens = ragged_batch(seed, n=4, longest=5)
    lens[1] = 0
    for hyps, frames, length in zip(CtcPrefixBeamSearch(model, 80, nbest=80).decode(x, lens), x, lens, strict=True):
        expected = brute_force(model, frames[:length])
        found = {tuple(h.tokens): h.score for h in hyps}
        assert len(found) == len(hyps) and set(found) == set(expected)
        assert found == pytest.approx(expected, abs=1e-4)
        assert [h.score for h in hyps] == sorted(found.values(), reverse=True)


@pytest.mark.parametrize("beam", [1, 2, 3, 5])
def test_the_beam_equals_a_plain_prefix_search(beam):
    """The recursion of Hannun et al. 2014 with dictionaries, one utterance at a time."""
    for seed in range(4):
        model = nar_model(seed, vocab_size=9)
        with torch.no_grad():
            model.ctc_output.weight.div_(4)
        x, lens = ragged_batch(seed, longest=14, shortest=0)
        for hyps, frames, length in zip(
            CtcPrefixBeamSearch(model, beam, nbest=beam).decode(x, lens), x, lens.tolist(), strict=True
        ):
            beams = {(): (1.0, 0.0)}
            for row in unknown_as_blank(model.ctc_log_probs(frames[:length])).double().exp().tolist():
                new: dict = {}

                def add(y, blank, token, new=new):
                    old = new.get(y, (0.0, 0.0))
                    new[y] = (old[0] + blank, old[1] + token)

                for y, (blank, token) in beams.items():
                    add(y, (blank + token) * row[0], token * row[y[-1]] if y else 0.0)
                    for v in range(3, 8):
                        add((*y, v), 0.0, (blank if y and y[-1] == v else blank + token) * row[v])
                beams = dict(sorted(new.items(), key=lambda x: -sum(x[1]))[:beam])
            assert [tuple(h.tokens) for h in hyps] == list(beams)
            assert [math.exp(h.score) for h in hyps] == pytest.approx([sum(p) for p in beams.values()], rel=1e-4)


def test_confidences_and_frames_of_the_greedy_string_are_those_of_its_runs():
    compared = 0
    for seed in range(6):
        model = nar_model(seed)
        x, lens = ragged_batch(seed, n=6)
        lp = model.ctc_log_probs(x)
        greedy = collapse(lp, lens)
        strings, owners, scores = CtcPrefixBeamSearch(model, 8).search(lp, lens, 8)
        assert owners == sorted(owners)
        for r, i in enumerate(owners):
            n, m = int(strings.lens[r]), int(greedy.lens[i])
            y = strings.tokens[r, :n].tolist()
            assert scores[r] <= ctc_string_scores(unknown_as_blank(lp), lens, [i], [y])[0] + 1e-4
            if y == greedy.tokens[i, :m].tolist():
                assert strings.frames[r, :n].tolist() == greedy.frames[i, :m].tolist()
                assert strings.confidences[r, :n].tolist() == pytest.approx(greedy.confidences[i, :m].tolist())
                compared += n > 0
    assert compared > 10


def test_batched_equals_single_and_unknown_acts_like_the_blank():
    model = nar_model(1)
    with torch.no_grad():
        model.ctc_output.bias[2] += 10
    x, lens = ragged_batch(1, n=6, shortest=0)
    search = CtcPrefixBeamSearch(model, 5, nbest=5)
    for i, hyps in enumerate(search.decode(x, lens)):
        (alone,) = search.decode(x[i : i + 1, : max(int(lens[i]), 1)], lens[i : i + 1])
        assert [(h.tokens, h.timestamps) for h in hyps] == [(h.tokens, h.timestamps) for h in alone]
        assert [h.score for h in hyps] == pytest.approx([h.score for h in alone], abs=1e-5)
        assert not any({0, 1, 2, model.mask_id} & set(h.tokens) for h in hyps)
    assert search.decode(x[:0], lens[:0]) == []
    sharp = nar_model(2, sharpness=1.0)
    with torch.no_grad():
        sharp.ctc_output.weight.mul_(50)  # one path has nearly all probability: both searches find its string
    x, lens = ragged_batch(2)
    greedy = [hyps[0].tokens for hyps in CtcGreedySearch(sharp).decode(x, lens)]
    assert [hyps[0].tokens for hyps in CtcPrefixBeamSearch(sharp, 4).decode(x, lens)] == greedy
