"""Mask-predict and its beam search against plain loops over one utterance (nothing batched, dictionaries, lists)."""

import itertools
import math

import pytest
import torch
from nar_search_toys import DIM, all_strings, nar_model, ragged_batch

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.base import Decoder
from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.decode.ctc_prefix import CtcPrefixBeamSearch
from icefall_kd.decode.ctc_string import collapse, ctc_string_scores, unknown_as_blank
from icefall_kd.decode.mask_ctc import MaskPredict, plan_passes
from icefall_kd.decode.nar_beam import NarBeamSearch
from icefall_kd.errors import ConfigError

BLANK, SOS, UNK = 0, 1, 2


def plain_collapse(probs):
    """Return [(token, highest probability of the run, first frame)] of (T', V) probabilities."""
    runs = []
    for t, row in enumerate(probs.tolist()):
        symbol = max(range(len(row)), key=row.__getitem__)
        if runs and runs[-1][0] == symbol:
            runs[-1][1] = max(runs[-1][1], row[symbol])
        else:
            runs.append([symbol, row[symbol], t])
    return [tuple(run) for run in runs if run[0] not in (BLANK, UNK)]


@torch.no_grad()
def ask(model, frames, y, rank_by):
    """Return log-probabilities (U lists of V) and how easy each position is."""
    memory = model.decoder.memory(frames.unsqueeze(0), torch.tensor([len(frames)]))
    logits = model.decoder(torch.tensor([y]), torch.tensor([len(y)]), memory)[0].float()
    lp = logits.log_softmax(-1)
    for special in (BLANK, SOS, UNK, model.mask_id):
        lp[:, special] = logits[:, special] = -math.inf
    return lp.tolist(), (lp if rank_by == "probability" else logits).amax(-1).tolist()


def begin(model, frames, threshold):
    runs = plain_collapse(model.ctc_log_probs(frames.unsqueeze(0))[0].exp()) if len(frames) else []
    return [model.mask_id if p < threshold else token for token, p, _ in runs]


def amounts(n, passes):
    count = passes if passes > 0 and n >= passes else n
    return [n - n // count * (count - 1) if k == count - 1 else n // count for k in range(count)]


def plain_mask_predict(model, frames, passes, threshold, rank_by="probability"):
    y, score = begin(model, frames, threshold), 0.0
    n = y.count(model.mask_id)
    for amount in amounts(n, passes):
        lp, ease = ask(model, frames, y, rank_by)
        open_ = [i for i, token in enumerate(y) if token == model.mask_id]
        for i in sorted(open_, key=lambda i: -ease[i])[:amount]:
            y[i] = max(range(model.vocab_size), key=lp[i].__getitem__)
            score += lp[i][y[i]]
    return y, score, n


def plain_beam(model, frames, passes, threshold, beam, rank_by="probability", y=None):
    y = begin(model, frames, threshold) if y is None else y
    hyps = {tuple(y): 0.0}
    for amount in amounts(y.count(model.mask_id), passes):
        pool = {}
        for string, score in hyps.items():
            lp, ease = ask(model, frames, list(string), rank_by)
            open_ = [i for i, token in enumerate(string) if token == model.mask_id]
            part = [(score, string)]
            for i in sorted(open_, key=lambda i: -ease[i])[:amount]:
                tokens = sorted(range(model.vocab_size), key=lambda v: -lp[i][v])[:beam]
                part = [(s + lp[i][v], (*z[:i], v, *z[i + 1 :])) for s, z in part for v in tokens]
                part = sorted(part, key=lambda x: -x[0])[:beam]
            for s, z in part:
                pool[z] = max(pool.get(z, -math.inf), s)
        hyps = dict(sorted(pool.items(), key=lambda x: -x[1])[:beam])
    return [(list(z), s) for z, s in hyps.items() if s > -math.inf]


def test_runs_collapse_with_the_maximum_of_their_probabilities():
    path, p = [3, 3, 0, 3, 4, 4, 0], [0.6, 0.9, 0.8, 0.5, 0.4, 0.7, 0.9]  # spec: frames [1,1,0,1,2,2,0]
    probs = torch.full((1, 7, 6), 0.01)
    for t, (symbol, value) in enumerate(zip(path, p, strict=True)):
        probs[0, t, symbol] = value
    found = collapse(probs.log(), torch.tensor([7]))
    assert found.tokens.tolist() == [[3, 3, 4]]
    assert found.frames.tolist() == [[0, 3, 4]]
    assert found.confidences[0].tolist() == pytest.approx([0.9, 0.5, 0.7])


def test_batched_collapse_equals_a_plain_loop_and_greedy_search():
    g = torch.Generator().manual_seed(1)

    class Model:
        ctc_output = torch.nn.Identity()

    for _ in range(10):
        x = 3 * torch.randn(6, 25, 6, generator=g)
        lens = torch.tensor([25, 3, 0, 17, 1, 24])
        found = collapse(x.log_softmax(-1), lens)
        for i, hyps in enumerate(CtcGreedySearch(Model()).decode(x, lens)):
            n = int(found.lens[i])
            runs = plain_collapse(x[i, : lens[i]].softmax(-1))
            assert found.tokens[i, :n].tolist() == hyps[0].tokens == [r[0] for r in runs]
            assert found.frames[i, :n].tolist() == hyps[0].timestamps == [r[2] for r in runs]
            assert found.confidences[i, :n].tolist() == pytest.approx([r[1] for r in runs])
            assert not found.tokens[i, n:].any() and not found.confidences[i, n:].any()


def test_each_pass_fills_the_same_number_and_the_last_what_is_left():
    assert plan_passes(0, 10) == []
    assert plan_passes(7, 0) == [1] * 7 == plan_passes(7, 10)  # K = 0, or fewer masks than passes: one a pass
    assert plan_passes(11, 4) == [2, 2, 2, 5]
    assert plan_passes(5, 1) == [5]
    assert plan_passes(10, 10) == [1] * 10


@pytest.mark.parametrize("rank_by", ["probability", "logit"])
@pytest.mark.parametrize("passes", [0, 1, 2, 3, 10])
def test_mask_predict_equals_the_plain_loop_on_ragged_batches(passes, rank_by):
    masked = []
    for seed in range(4):
        model = nar_model(seed)
        x, lens = ragged_batch(seed)
        search = MaskPredict(model, passes=passes, mask_threshold=0.7, rank_masks_by=rank_by)
        for (hyp,), frames, length in zip(search.decode(x, lens), x, lens.tolist(), strict=True):
            tokens, score, n = plain_mask_predict(model, frames[:length], passes, 0.7, rank_by)
            assert (hyp.tokens, hyp.masked) == (tokens, n)
            assert hyp.score == pytest.approx(score, abs=1e-4)
            masked.append(n)
    assert len(set(masked)) > 3 and 0 in masked  # utterances of one batch end after different numbers of passes


@pytest.mark.parametrize("passes", [0, 1, 2, 3])
@pytest.mark.parametrize("beam", [2, 3, 6])
def test_the_beam_equals_the_plain_search(passes, beam):
    more = 0
    for seed in range(4):
        model = nar_model(seed)
        x, lens = ragged_batch(seed, n=4, longest=11)
        search = NarBeamSearch(model, beam, nbest=beam, passes=passes, mask_threshold=0.8)
        for hyps, frames, length in zip(search.decode(x, lens), x, lens.tolist(), strict=True):
            expected = plain_beam(model, frames[:length], passes, 0.8, beam)
            assert [h.tokens for h in hyps] == [y for y, _ in expected]
            assert [h.score for h in hyps] == pytest.approx([s for _, s in expected], abs=1e-4)
            more += len(hyps) > 1
    assert more > 4


@pytest.mark.parametrize("rank_by", ["probability", "logit"])
def test_a_beam_of_one_is_mask_predict_to_the_bit(rank_by):
    for seed in range(6):
        model = nar_model(seed)
        x, lens = ragged_batch(seed, n=6)
        for passes in (0, 1, 2, 3, 10):
            options = {"passes": passes, "mask_threshold": 0.8, "rank_masks_by": rank_by}
            assert NarBeamSearch(model, 1, **options).decode(x, lens) == MaskPredict(model, **options).decode(x, lens)


def test_equal_scores_are_ordered_alike_by_every_search_and_in_every_batch():
    for vocab_size, seed in itertools.product((12, 300), range(3)):
        model = nar_model(seed, vocab_size)
        with torch.no_grad():  # every position expects the same tokens, many of them equally
            model.decoder.output.weight.zero_()
            model.decoder.output.bias.copy_(torch.randn(vocab_size).round())
        x, lens = ragged_batch(seed)
        for passes in (0, 1, 2):
            options = {"passes": passes, "mask_threshold": 0.9}
            assert NarBeamSearch(model, 1, **options).decode(x, lens) == MaskPredict(model, **options).decode(x, lens)
            search = NarBeamSearch(model, 5, nbest=5, **options)
            for i, hyps in enumerate(search.decode(x, lens)):
                (alone,) = search.decode(x[i : i + 1, : lens[i]], lens[i : i + 1])
                assert [h.tokens for h in hyps] == [h.tokens for h in alone]


def test_in_one_pass_every_beam_finds_the_best_token_of_each_position():
    for seed in range(4):
        model = nar_model(seed)
        x, lens = ragged_batch(seed)
        greedy = MaskPredict(model, passes=1, mask_threshold=0.8).decode(x, lens)
        for beam in (2, 5, 10):
            found = NarBeamSearch(model, beam, passes=1, mask_threshold=0.8).decode(x, lens)
            assert [hyps[0].tokens for hyps in found] == [hyps[0].tokens for hyps in greedy]


def test_the_nbest_is_unique_and_sorted_and_a_wider_beam_is_rarely_worse():
    better = worse = 0
    for seed in range(8):
        model = nar_model(seed)
        x, lens = ragged_batch(seed, longest=20)
        options = {"passes": 10, "mask_threshold": 0.9}
        greedy = MaskPredict(model, **options).decode(x, lens)
        for one, hyps in zip(greedy, NarBeamSearch(model, 5, nbest=5, **options).decode(x, lens), strict=True):
            assert len({tuple(h.tokens) for h in hyps}) == len(hyps)
            assert [h.score for h in hyps] == sorted((h.score for h in hyps), reverse=True)
            assert {len(h.tokens) for h in hyps} == {len(one[0].tokens)}  # the length is CTC's
            assert len(hyps) == 5 or one[0].masked == 0
            better += hyps[0].score > one[0].score + 1e-6
            worse += hyps[0].score < one[0].score - 1e-6
    assert better > 3 * worse and better > 0


@pytest.mark.parametrize("beam", [None, 4])
def test_batched_equals_single(beam):
    model = nar_model(3)
    x, lens = ragged_batch(3, n=6, shortest=0)
    search = MaskPredict(model) if beam is None else NarBeamSearch(model, beam, nbest=beam, rescore_ctc_weight=0.3)
    for i, hyps in enumerate(search.decode(x, lens)):
        (alone,) = search.decode(x[i : i + 1, : max(int(lens[i]), 1)], lens[i : i + 1])
        assert [(h.tokens, h.timestamps, h.masked) for h in hyps] == [(h.tokens, h.timestamps, h.masked) for h in alone]
        assert [h.score for h in hyps] == pytest.approx([h.score for h in alone], abs=1e-5)


@pytest.mark.parametrize("search", [MaskPredict, lambda m, **o: NarBeamSearch(m, 3, nbest=3, **o)])
def test_nothing_heard_nothing_masked_and_everything_masked(search):
    model = nar_model(0)
    x, lens = ragged_batch(0)
    lens[1] = 0
    greedy = CtcGreedySearch(model).decode(x, lens)
    # A threshold of 0 masks nothing: CTC greedy search, whose length no pass changes, with the score 0.
    for hyps, ctc in zip(search(model, mask_threshold=0.0).decode(x, lens), greedy, strict=True):
        assert [(h.tokens, h.score, h.timestamps, h.masked) for h in hyps] == [
            (ctc[0].tokens, 0.0, ctc[0].timestamps, 0)
        ]
    # A threshold of 1 masks every token.
    found = search(model, mask_threshold=1.0).decode(x, lens)
    assert [(h[0].tokens, h[0].score, h[0].masked) for h in found][1] == ([], 0.0, 0)
    for hyps, ctc in zip(found, greedy, strict=True):
        for h in hyps:
            assert len(h.tokens) == len(ctc[0].tokens) == h.masked
            assert not {BLANK, SOS, UNK, model.mask_id} & set(h.tokens)
            assert h.timestamps == ctc[0].timestamps
    assert search(model).decode(x[:0], lens[:0]) == []


def test_the_probability_of_a_string_is_the_sum_over_all_its_alignments():
    g = torch.Generator().manual_seed(0)
    lp = unknown_as_blank((2 * torch.randn(2, 5, 5, generator=g, dtype=torch.float64)).log_softmax(-1))
    lens = torch.tensor([5, 3])
    total = [all_strings(row[:length]) for row, length in zip(lp, lens.tolist(), strict=True)]
    for found in total:
        assert sum(found.values()) == pytest.approx(1.0)  # the unknown token's share has gone to the blank
        assert all(p == 0 for string, p in found.items() if UNK in string)
    strings = [(), (3,), (3, 3), (4, 3, 4), (1, 3, 3), (3, 3, 3, 3)]
    owners, strings = [i for i in (0, 1) for _ in strings], strings * 2
    for i, string, score in zip(owners, strings, ctc_string_scores(lp, lens, owners, strings), strict=True):
        assert math.exp(score) == pytest.approx(total[i].get(string, 0.0), abs=1e-9)


def test_rescoring_ranks_by_both_scores():
    model = nar_model(2)
    x, lens = ragged_batch(2, shortest=0)
    options = {"nbest": 6, "mask_threshold": 0.9, "passes": 2}
    plain = NarBeamSearch(model, 6, **options).decode(x, lens)
    lp = unknown_as_blank(model.ctc_log_probs(x))
    changed = 0
    for weight in (0.3, 1.0):
        found = NarBeamSearch(model, 6, rescore_ctc_weight=weight, **options).decode(x, lens)
        for i, (hyps, before) in enumerate(zip(found, plain, strict=True)):
            ctc = ctc_string_scores(lp, lens, [i] * len(before), [h.tokens for h in before])
            both = [(1 - weight) * h.score + weight * c for h, c in zip(before, ctc, strict=True)]
            order = sorted((k for k in range(len(before)) if both[k] > -math.inf), key=lambda k: -both[k])
            assert [h.tokens for h in hyps] == [before[k].tokens for k in order]
            assert [h.score for h in hyps] == pytest.approx([both[k] for k in order])
            changed += order != sorted(order)
    assert changed > 0


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_seeds_of_a_prefix_beam_are_searched_each_and_ranked_together(weight):
    more = 0
    for seed in range(3):
        model = nar_model(seed)
        with torch.no_grad():
            model.ctc_output.weight.div_(2)
        x, lens = ragged_batch(seed, n=4, shortest=0)
        options = {"passes": 2, "mask_threshold": 0.7}
        lp = model.ctc_log_probs(x).detach()
        strings, owners, ctc = CtcPrefixBeamSearch(model, 4).search(lp, lens, 4)
        found = NarBeamSearch(model, 4, nbest=4, seeds="prefix_beam", rescore_ctc_weight=weight, **options)
        found = found.decode(x, lens)
        for i, hyps in enumerate(found):
            pool = {}
            for r in (r for r, owner in enumerate(owners) if owner == i):
                n = int(strings.lens[r])
                pairs = zip(strings.tokens[r, :n].tolist(), strings.confidences[r, :n].tolist(), strict=True)
                y = [model.mask_id if p < 0.7 else token for token, p in pairs]
                for z, score in plain_beam(model, x[i, : lens[i]], 2, None, 4, y=y):
                    if weight:
                        whole = ctc_string_scores(unknown_as_blank(lp), lens, [i], [z])[0]
                        score = (1 - weight) * score + weight * whole
                    else:
                        score += ctc[r]
                    pool[tuple(z)] = max(pool.get(tuple(z), -math.inf), score)
            expected = sorted((x for x in pool.items() if x[1] > -math.inf), key=lambda x: -x[1])[:4]
            assert [tuple(h.tokens) for h in hyps] == [y for y, _ in expected]
            assert [h.score for h in hyps] == pytest.approx([s for _, s in expected], abs=1e-4)
            more += len({len(h.tokens) for h in hyps}) > 1
    assert more > 0  # lengths differ


def test_rescoring_leaves_a_list_alone_of_which_nothing_fits_in_the_frames():
    model = nar_model(0)
    with torch.no_grad():
        model.decoder.output.bias[5] += 100.0  # it says the same token everywhere, CTC heard one a frame
        model.ctc_output.weight.zero_()
        model.ctc_output.weight[3, 0], model.ctc_output.weight[4, 1] = 9.0, 9.0
    x = torch.zeros(1, 4, DIM, dtype=torch.float64)
    x[0, ::2, 0] = x[0, 1::2, 1] = 1.0
    options = {"mask_threshold": 1.0, "nbest": 3}
    plain = NarBeamSearch(model, 3, **options).decode(x, torch.tensor([4]))
    assert plain[0][0].tokens == [5, 5, 5, 5]  # needs seven frames
    found = NarBeamSearch(model, 3, rescore_ctc_weight=0.5, **options).decode(x, torch.tensor([4]))
    assert all(math.isfinite(h.score) for h in found[0])
    fits = {
        tuple(h.tokens) for h in plain[0] if len(h.tokens) == 4 and all(a != b for a, b in itertools.pairwise(h.tokens))
    }
    assert {tuple(h.tokens) for h in found[0]} == (fits or {tuple(h.tokens) for h in plain[0]})
    assert not fits


def test_options_reach_the_searches_and_a_teacher_is_refused():
    model = nar_model(0)
    config = DecodeConfig(
        decoding_method="nar_beam_search", passes=3, mask_threshold=0.5, rank_masks_by="logit", beam_size=7, nbest=9,
        nar_seeds="prefix_beam",
    )  # fmt: skip
    one, beam = MaskPredict.from_config(model, config), NarBeamSearch.from_config(model, config)
    assert isinstance(one, Decoder)
    for search in (one, beam):
        assert (search.passes, search.mask_threshold, search.rank_masks_by) == (3, 0.5, "logit")
    assert (beam.beam_size, beam.nbest) == (7, 7)  # no more than the beam holds
    assert beam.prefixes.beam_size == 7
    with pytest.raises(ConfigError, match="decode it with --decoding-method joint_beam_search"):
        MaskPredict(nar_model(0, decoder="ar"))


def test_logits_of_some_positions_are_those_of_all():
    model = nar_model(0)
    x, lens = ragged_batch(0, n=3)
    memory = model.decoder.memory(x, lens)
    y, at = torch.randint(3, 11, (6, 7)), torch.randint(0, 7, (6, 4))
    y_lens = torch.tensor([7, 6, 7, 3, 2, 7])
    logits = model.decoder(y, y_lens, memory)
    assert torch.allclose(model.decoder(y, y_lens, memory, at), logits.gather(1, at.unsqueeze(2).expand(-1, -1, 12)))
