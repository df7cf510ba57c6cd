"""CTC decoding over the topology and HLG against all alignments of short utterances."""

import itertools
import math
from collections import defaultdict

import pytest
import torch
from graph_toys import DIM, Model, log_sum, sentence_score, write_lang

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.base import Decoder
from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.decode.k2_graph import CtcGraphSearch, FastBeamSearch, Paths
from icefall_kd.runtime.optional import require_k2
from icefall_kd.text.graphs import Graph, load_graph

pytestmark = pytest.mark.k2
WIDE = {"beam": 1e4, "output_beam": 1e4}


def collapse(path):
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)


@torch.no_grad()
def sentences(model, frames, tokenizer, scale):
    """Return {text: (best, sum)} of the log-probabilities of all alignments of all sentences of the three words."""
    rows = model.ctc_output(frames).log_softmax(-1).tolist()
    best, total = defaultdict(lambda: -math.inf), defaultdict(float)
    for path in itertools.product((0, 3, 4, 5), repeat=len(frames)):
        words = tokenizer.decode(collapse(path)).split(" ")
        words = [] if words == [""] else words
        spelt = " ".join(words)
        written = tokenizer.decode(collapse(path)) if collapse(path)[:1] != (5,) else None
        doubled = (5, 5) in zip(collapse(path), collapse(path)[1:], strict=False)
        if written != spelt or doubled or not set(words) <= {"A", "AB", "BA"}:
            continue
        score = sum(row[s] for row, s in zip(rows, path, strict=True))
        best[spelt] = max(best[spelt], score + sentence_score(words, scale))
        total[spelt] += math.exp(score + sentence_score(words, scale, log_sum))
    return {text: (best[text], math.log(total[text])) for text in best}


@pytest.mark.parametrize("scale", [0.0, 0.6, 3.0])
def test_hlg_finds_the_best_alignment_and_nbest_sums_them(tmp_path, scale):
    tokenizer = write_lang(tmp_path)
    graph = load_graph(tmp_path, "HLG", tokenizer, "a test")
    graph.fsa.scores = graph.fsa.scores * scale
    texts = set()
    for seed in range(6):
        model = Model(tokenizer.vocab_size, seed=seed)
        x = torch.randn(1, 6, DIM)
        expected = sentences(model, x[0], tokenizer, scale)
        text = max(expected, key=lambda t: expected[t][0])
        (hyp,) = CtcGraphSearch(model, graph, **WIDE).decode(x, torch.tensor([6]))[0]
        assert hyp.text == text and tokenizer.decode(hyp.tokens) == text
        assert hyp.score == pytest.approx(expected[text][0], rel=1e-4, abs=1e-4)
        paths = Paths(num_paths=1000, nbest_scale=0.2, nbest=2)
        nbest = CtcGraphSearch(model, graph, paths=paths, **WIDE).decode(x, torch.tensor([6]))[0]
        ranked = sorted(expected, key=lambda t: -expected[t][1])
        assert [h.text for h in nbest] == ranked[:2]
        assert [h.score for h in nbest] == pytest.approx([expected[t][1] for t in ranked[:2]], rel=1e-4, abs=1e-4)
        assert all(len(h.timestamps) == len(h.tokens) for h in nbest)
        texts.add(text)
    assert len(texts) > 1 or scale == 3.0  # a strong language model has its own way


def ragged(seed):
    g = torch.Generator().manual_seed(seed)
    lens = torch.tensor([4, 0, 11, 1, 7])
    x = torch.randn(5, 11, DIM, generator=g)
    for i, length in enumerate(lens.tolist()):
        x[i, length:] = 1e3
    return x, lens


def test_the_topology_alone_is_greedy_search():
    k2 = require_k2("a test")
    for seed in range(4):
        model = Model(6, seed=seed)
        search = CtcGraphSearch(model, Graph(k2.arc_sort(k2.ctc_topo(5))))
        assert isinstance(search, Decoder)
        x, lens = ragged(seed)
        for mine, greedy in zip(search.decode(x, lens), CtcGreedySearch(model).decode(x, lens), strict=True):
            assert (mine[0].tokens, mine[0].timestamps) == (greedy[0].tokens, greedy[0].timestamps)
            assert mine[0].score == pytest.approx(greedy[0].score, rel=1e-4, abs=1e-4)


def test_a_batch_equals_its_utterances_alone(tmp_path):
    tokenizer = write_lang(tmp_path)
    model = Model(tokenizer.vocab_size, seed=3)
    x, lens = ragged(3)
    for search in (
        CtcGraphSearch(model, load_graph(tmp_path, "HLG", tokenizer, "a test"), paths=Paths(num_paths=100)),
        FastBeamSearch(model, load_graph(tmp_path, "LG", tokenizer, "a test"), paths=Paths(num_paths=100)),
    ):
        together = search.decode(x, lens)
        assert together[1][0].tokens == [] and together[1][0].score == 0
        for i, length in enumerate(lens.tolist()):
            alone = search.decode(x[i : i + 1, :length], lens[i : i + 1])[0]
            assert [(h.tokens, h.text, h.timestamps) for h in alone] == [
                (h.tokens, h.text, h.timestamps) for h in together[i]
            ]
            assert alone[0].score == pytest.approx(together[i][0].score, rel=1e-4, abs=1e-4)


def test_an_utterance_that_ends_inside_a_word(caplog):
    k2 = require_k2("a test")
    arcs = [[0, 1, 3, 0], [1, 2, 4, 0], [2, 3, 3, 0], [3, 4, -1, 0]]  # one word of three letters, without a repeat
    fsa = k2.Fsa(torch.tensor(arcs, dtype=torch.int32))
    fsa.aux_labels = torch.tensor([1, 0, 0, -1], dtype=torch.int32)
    words = ["<eps>", "ABA"]
    model, x = Model(6), torch.randn(2, 5, DIM)
    lens = torch.tensor([2, 5])
    for paths in (Paths(), Paths(num_paths=20)):
        short, whole = FastBeamSearch(model, Graph(fsa, words), beam=1e3, paths=paths).decode(x, lens)
        assert (whole[0].text, whole[0].tokens) == ("ABA", [3, 4, 3])
        assert short[0].tokens == [3, 4, 3][: len(short[0].tokens)] and len(short[0].tokens) <= 2
        assert short[0].score > -100 and short[0].text in ("", "ABA")
    topology = k2.ctc_topo(5)
    hlg = k2.arc_sort(k2.connect(k2.compose(topology, k2.arc_sort(fsa))))
    short, whole = CtcGraphSearch(model, Graph(hlg, words), **WIDE).decode(x, lens)
    assert whole[0].text == "ABA" and (short[0].tokens, short[0].text) == ([], "")
    assert short[0].score == -math.inf and "1 of 2 utterances end inside a word" in caplog.text


def test_the_methods_build_their_searches_from_the_options(tmp_path):
    tokenizer = write_lang(tmp_path / "lang")
    tokenizer.save(tmp_path / "exp/tokenizer")
    model = Model(tokenizer.vocab_size)
    made = {"exp_dir": tmp_path / "exp", "lang_dir": tmp_path / "lang"}
    for method, kind, words, num_paths in (
        ("fast_beam_search", FastBeamSearch, False, None),
        ("fast_beam_search_nbest", FastBeamSearch, False, 7),
        ("fast_beam_search_LG", FastBeamSearch, True, None),
        ("fast_beam_search_nbest_LG", FastBeamSearch, True, 7),
        ("ctc_decoding", CtcGraphSearch, False, None),
        ("ctc_decoding_HLG", CtcGraphSearch, True, None),
        ("ctc_decoding_nbest_HLG", CtcGraphSearch, True, 7),
    ):
        search = kind.from_config(model, DecodeConfig(decoding_method=method, num_paths=7, **made))
        assert ((search.graph.words is not None), search.paths.num_paths) == (words, num_paths)
        if words:
            name, scale = ("LG", 0.01) if method.endswith("LG") and "HLG" not in method else ("HLG", 0.6)
            plain = load_graph(tmp_path / "lang", name, tokenizer, "a test").fsa.scores.sum().item()
            assert search.graph.fsa.scores.sum().item() == pytest.approx(scale * plain, rel=1e-4)
