"""Fast beam search against Python loops over one utterance."""

import itertools
import math
from collections import defaultdict

import pytest
import torch
from graph_toys import DIM, Model, sentence_score, write_lang

from icefall_kd.decode.base import Decoder
from icefall_kd.decode.k2_graph import FastBeamSearch, Paths
from icefall_kd.runtime.optional import require_k2
from icefall_kd.text.graphs import load_graph, token_graph

pytestmark = pytest.mark.k2
VOCAB = 6  # blank, sos, unknown, two letters, mask
WIDE = {"beam": 1e4, "max_contexts": 10000, "max_states": 10000}


def searched(model, x, lens, **options):
    graph = options.pop("graph", None) or token_graph(require_k2("a test"), [3, 4])
    return FastBeamSearch(model, graph, **options).decode(x, lens)


def ragged(seed, n=4, longest=9):
    g = torch.Generator().manual_seed(seed)
    lens = torch.randint(1, longest + 1, (n,), generator=g)
    lens[0], lens[-1] = longest, 0
    x = torch.randn(n, longest, DIM, generator=g)
    for i, length in enumerate(lens.tolist()):
        x[i, length:] = 1e3  # padding is never heard
    return x, lens


def start(model):
    return (-1,) * (model.decoder.context_size - 1) + (0,)


def viterbi(model, frames, tokens=(3, 4)):
    """Return (tokens, score, frames) of the best path of all: the best one into every context is enough."""
    states = {start(model): (0.0, (), ())}
    for t, frame in enumerate(frames):
        arcs = []
        for context, (score, ys, times) in states.items():
            row = model.log_probs(frame, context)
            arcs.append((score + row[0], ys, times, context))
            arcs += [(score + row[v], (*ys, v), (*times, t), (*context[1:], v)) for v in tokens]
        states = {}
        for score, ys, times, context in sorted(arcs, reverse=True):
            states.setdefault(context, (score, ys, times))
    score, ys, times = max(states.values())
    return list(ys), score, list(times)


@pytest.mark.parametrize("context_size", [1, 2, 3])
def test_one_best_equals_a_plain_loop(context_size):
    emitted = 0
    for seed in range(5):
        model = Model(VOCAB, context_size, seed)
        x, lens = ragged(seed)
        result = searched(model, x, lens, **WIDE)
        for i, length in enumerate(lens.tolist()):
            tokens, score, times = viterbi(model, x[i, :length])
            (hyp,) = result[i]
            assert (hyp.tokens, hyp.timestamps, hyp.text) == (tokens, times, None)
            assert hyp.score == pytest.approx(score, rel=1e-4, abs=1e-4)
            emitted += len(tokens)
    assert emitted > 20


def path_score(model, frames, hyp):
    """Return the log-probability of the path that a hypothesis names."""
    context, score, emitted = start(model), 0.0, dict(zip(hyp.timestamps, hyp.tokens, strict=True))
    for t, frame in enumerate(frames):
        symbol = emitted.get(t, 0)
        score += model.log_probs(frame, context)[symbol]
        context = (*context[1:], symbol) if symbol else context
    return score


@pytest.mark.parametrize("option", [{"beam": 0.5}, {"max_contexts": 1}, {"max_states": 2}])
def test_a_narrow_search_finds_less_and_scores_it_right(option):
    worse = 0
    for seed in range(10):
        model = Model(VOCAB, 2, seed)
        x, lens = ragged(seed)
        result = searched(model, x, lens, **{**WIDE, **option})
        for i, length in enumerate(lens.tolist()[:-1]):
            hyp, best = result[i][0], viterbi(model, x[i, :length])[1]
            assert hyp.score == pytest.approx(path_score(model, x[i, :length], hyp), rel=1e-4, abs=1e-4)
            assert hyp.score <= best + 1e-3
            worse += hyp.score < best - 1e-3
    assert worse  # else nothing was dropped


def all_paths(model, frames, tokens=(3, 4)):
    """Return the log-probability of every token sequence, summed over its alignments."""
    totals = defaultdict(float)
    for path in itertools.product((0, *tokens), repeat=len(frames)):
        context, score = start(model), 0.0
        for frame, symbol in zip(frames, path, strict=True):
            score += model.log_probs(frame, context)[symbol]
            context = (*context[1:], symbol) if symbol else context
        totals[tuple(s for s in path if s)] += math.exp(score)
    return {ys: math.log(p) for ys, p in totals.items()}


def test_nbest_scores_are_sums_over_all_alignments():
    for seed in range(3):
        model = Model(VOCAB, 2, seed)
        x = torch.randn(1, 5, DIM)
        expected = sorted(all_paths(model, x[0]).items(), key=lambda item: -item[1])
        paths = Paths(num_paths=2000, nbest_scale=0.1, nbest=4)
        result = searched(model, x, torch.tensor([5]), paths=paths, **WIDE)[0]
        assert [tuple(h.tokens) for h in result] == [ys for ys, _ in expected[:4]]
        assert [h.score for h in result] == pytest.approx([score for _, score in expected[:4]], rel=1e-4, abs=1e-4)
        assert all(len(h.timestamps) == len(h.tokens) and h.timestamps == sorted(h.timestamps) for h in result)


def spelt(words):
    """Return the token sequences of a sentence: characters, a space (5) between words, and perhaps one at the end."""
    letters = {"A": (3,), "AB": (3, 4), "BA": (4, 3)}
    tokens = tuple(t for i, word in enumerate(words) for t in ((5,) if i else ()) + letters[word])
    return [tokens, (*tokens, 5)] if words else [tokens]


def best_sentence(model, frames, scale):
    """Return the best sentence of up to three words, by its best alignment and its score in the language model."""
    best = {}
    for path in itertools.product((0, 3, 4, 5), repeat=len(frames)):
        context, score = start(model), 0.0
        for frame, symbol in zip(frames, path, strict=True):
            score += model.log_probs(frame, context)[symbol]
            context = (*context[1:], symbol) if symbol else context
        ys = tuple(s for s in path if s)
        best[ys] = max(best.get(ys, -math.inf), score)
    found = []
    for n in range(4):
        for words in itertools.product(("A", "AB", "BA"), repeat=n):
            for ys in spelt(words):
                if ys in best:
                    found.append((best[ys] + sentence_score(words, scale), " ".join(words)))
    return max(found)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_lg_lets_the_best_sentence_of_its_words_pass(tmp_path, scale):
    tokenizer = write_lang(tmp_path)
    graph = load_graph(tmp_path, "LG", tokenizer, "a test")
    graph.fsa.scores = graph.fsa.scores * scale
    texts = set()
    for seed in range(6):
        model = Model(tokenizer.vocab_size, 2, seed)
        x = torch.randn(1, 5, DIM)
        score, text = best_sentence(model, x[0], scale)
        (hyp,) = searched(model, x, torch.tensor([5]), graph=graph, **WIDE)[0]
        assert hyp.text == text and tokenizer.decode(hyp.tokens) == text
        assert hyp.score == pytest.approx(score, rel=1e-4, abs=1e-4)
        paths = Paths(num_paths=200, nbest=3)
        nbest = searched(model, x, torch.tensor([5]), graph=graph, paths=paths, **WIDE)[0]
        assert len({h.text for h in nbest}) == len(nbest) > 1
        assert all(tokenizer.decode(h.tokens) == h.text for h in nbest)
        assert nbest[0].score >= hyp.score - 1e-4  # a sum over paths, of which the best is one
        texts.add(text)
    assert len(texts) > 1


def test_the_scale_of_the_language_model_changes_the_choice(tmp_path):
    tokenizer = write_lang(tmp_path)
    texts = []
    for scale in (0.0, 20.0):
        graph = load_graph(tmp_path, "LG", tokenizer, "a test")
        graph.fsa.scores = graph.fsa.scores * scale
        model = Model(tokenizer.vocab_size, 2, 1)
        x = torch.randn(8, 6, DIM, generator=torch.Generator().manual_seed(5))
        texts.append([h[0].text for h in searched(model, x, torch.tensor([6] * 8), graph=graph, **WIDE)])
    assert texts[0] != texts[1]
    # A strong model says what it likes best itself.
    sentences = [s for n in range(4) for s in itertools.product(("A", "AB", "BA"), repeat=n)]
    assert set(texts[1]) == {" ".join(max(sentences, key=sentence_score))}


def test_an_empty_batch_of_frames_and_the_protocol():
    model = Model(VOCAB)
    search = FastBeamSearch(model, token_graph(require_k2("a test"), [3, 4]))
    assert isinstance(search, Decoder)
    assert [h[0].tokens for h in search.decode(torch.zeros(2, 3, DIM), torch.tensor([0, 0]))] == [[], []]
