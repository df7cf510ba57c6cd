"""L, G, LG and HLG: what they accept, at which score, and the files they lie in."""

import dataclasses
import itertools
import json

import pytest
import torch
from graph_toys import ARPA, sentence_score, write_lang

from icefall_kd.decode.k2_graph import linear_with_loops
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.optional import require_k2
from icefall_kd.runtime.tensors import read_tensors, write_tensors
from icefall_kd.text.graphs import GraphConfig, graph_file, load_graph, make_graphs, save_graph
from icefall_kd.text.lexicon import Lexicon
from icefall_kd.text.tokenizer import Tokenizer

pytestmark = pytest.mark.k2


def best_path(fsa, labels, epsilons=True):
    """Return the score and the word ids of the best path of a label sequence; None where there is none.

    Without epsilons a 0 is a label like any other, as the blank is in CTC.
    """
    k2 = require_k2("a test")
    line = linear_with_loops(k2, [tuple(labels)]) if epsilons else k2.linear_fsa([labels])
    graphs = k2.arc_sort(k2.create_fsa_vec([fsa]))
    found = k2.intersect_device(graphs, line, b_to_a_map=torch.zeros(1, dtype=torch.int32), sorted_match_a=True)
    found = k2.top_sort(k2.connect(found))
    if found.num_arcs == 0:
        return None
    best = k2.shortest_path(found, use_double_scores=True)
    aux = best.aux_labels.tolist()
    words = [w for row in aux for w in (row if isinstance(row, list) else [row]) if w > 0]
    return best.get_tot_scores(True, False).item(), words


def spelt(tokenizer, words):
    ids = [tokenizer.encode(word) for word in words]
    gap = [tokenizer.encode(" ")[0]] if tokenizer.word_separator else []
    return list(itertools.chain.from_iterable((gap if i else []) + part for i, part in enumerate(ids)))


def sentences(words, most):
    return [s for n in range(most + 1) for s in itertools.product(words, repeat=n)]


def test_lg_scores_every_sentence_as_the_arpa_file_does(tmp_path):
    tokenizer = write_lang(tmp_path)
    graph = load_graph(tmp_path, "LG", tokenizer, "a test")
    assert not (graph.fsa.labels == 0).any()
    for words in sentences(("A", "AB", "BA"), 3):
        score, found = best_path(graph.fsa, spelt(tokenizer, words))
        assert graph.text(found) == " ".join(words)
        assert score == pytest.approx(sentence_score(words), abs=1e-4)
    a, b, gap = (tokenizer.encode(c)[0] for c in "AB ")
    for wrong in ([b], [a, a], [gap, a], [a, gap, gap, a], [b, a, b]):
        assert best_path(graph.fsa, wrong) is None


def test_l_maps_spellings_to_words(tmp_path):
    tokenizer = write_lang(tmp_path)
    graph = load_graph(tmp_path, "L", tokenizer, "a test")
    for words in sentences(("A", "AB", "BA"), 2):
        score, found = best_path(graph.fsa, spelt(tokenizer, words))
        assert (score, graph.text(found)) == (0.0, " ".join(words))


def test_hlg_takes_repeats_and_blanks(tmp_path):
    tokenizer = write_lang(tmp_path)
    graph = load_graph(tmp_path, "HLG", tokenizer, "a test")
    a, b, gap = (tokenizer.encode(c)[0] for c in "AB ")
    for frames, words in (([a, 0, b], ["AB"]), ([0, a, a, b, b, 0], ["AB"]), ([a, 0, gap, gap, b, a], ["A", "BA"])):
        score, found = best_path(graph.fsa, frames, epsilons=False)
        assert graph.text(found) == " ".join(words)
        assert score == pytest.approx(sentence_score(words), abs=1e-4)
    assert best_path(graph.fsa, [a, b, 0, b], epsilons=False) is None


def test_homophones_and_bpe_words_without_a_separator(tmp_path):
    """Two words of one spelling: the language model chooses."""
    texts = ["DO WE DO", "TO DO"]
    tokenizer = Tokenizer.train_bpe(texts * 20, 20)
    lexicon = Lexicon.from_texts(texts, tokenizer)
    pieces = dict(lexicon.entries)["TO"]
    arpa = "\\data\\\nngram 1=6\n\n\\1-grams:\n-9 <s>\n-1 </s>\n-0.5 DO\n-2 WE\n-0.8 TO\n-0.3 TWO\n\n\\end\\\n"
    folder = tmp_path / "bpe"
    folder.mkdir()
    tokenizer.save(folder)
    Lexicon(sorted([*lexicon.entries, ("TWO", pieces)])).write(folder)
    (folder / "lm.arpa").write_text(arpa)
    make_graphs(GraphConfig(lang_dir=folder, arpa=folder / "lm.arpa"))
    graph = load_graph(folder, "LG", tokenizer, "a test")
    score, found = best_path(graph.fsa, tokenizer.encode("TO DO TO"))
    assert graph.text(found) == "TWO DO TWO" and score == pytest.approx(-(0.3 + 0.5 + 0.3 + 1) * 2.302585, abs=1e-4)


def test_pinyin_becomes_hanzi(tmp_path):
    texts = ["中国", "中果", "果"]
    arpa = "\\data\\\nngram 1=5\n\n\\1-grams:\n-9 <s>\n-1 </s>\n-1 中\n-0.5 国\n-2 果\n\n\\end\\\n"
    tokenizer = write_lang(tmp_path, texts, "pinyin", arpa)
    graph = load_graph(tmp_path, "LG", tokenizer, "a test")
    _, found = best_path(graph.fsa, tokenizer.encode("中国"))
    assert graph.text(found) == "中国"
    _, found = best_path(graph.fsa, tokenizer.encode("果"))  # guo3, unlike guo2
    assert graph.text(found) == "果"


def test_a_graph_comes_back_as_it_was_written(tmp_path):
    tokenizer = write_lang(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.safetensors")}
    assert sorted(before) == [f"{n}.safetensors" for n in ("G", "HLG", "L", "LG", "L_disambig")]
    make_graphs(GraphConfig(lang_dir=tmp_path, arpa=tmp_path / "lm.arpa"))
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.safetensors")} == before
    metadata, tensors = read_tensors(tmp_path / "LG.safetensors")
    graph = load_graph(tmp_path, "LG", tokenizer, "a test")
    assert torch.equal(graph.fsa.arcs.values()[:, :4], tensors["arcs"])
    assert json.loads(metadata["graph"])["tokenizer_hash"] == tokenizer.hash
    info = json.loads(metadata["graph"])
    save_graph(tmp_path / "again.safetensors", graph.fsa, dataclasses.replace(_info(info)))
    assert (tmp_path / "again.safetensors").read_bytes() == before["LG.safetensors"]


def _info(content):
    from icefall_kd.text.graphs import GraphInfo

    return GraphInfo(**content)


def test_a_graph_of_another_tokenizer_or_word_list_is_refused(tmp_path):
    tokenizer = write_lang(tmp_path)
    with pytest.raises(ConfigError, match=r"LG\.safetensors was made for the tokenizer"):
        load_graph(tmp_path, "LG", Tokenizer.train_char(["AB CA"]), "a test")
    with pytest.raises(ConfigError, match=r"--decoding-method x needs .*HLG2\.safetensors; make it with prepare\.sh"):
        load_graph(tmp_path, "HLG2", tokenizer, "--decoding-method x")
    words = (tmp_path / "words.txt").read_text()
    (tmp_path / "words.txt").write_text(words.replace("AB 2", "AC 2"))
    with pytest.raises(DataError, match=r"another words\.txt"):
        load_graph(tmp_path, "LG", tokenizer, "a test")
    (tmp_path / "words.txt").write_text(words)
    write_tensors(tmp_path / "LG.safetensors", {"arcs": torch.zeros(1)}, {"graph": "{}"})
    with pytest.raises(DataError, match="not a graph of this project"):
        load_graph(tmp_path, "LG", tokenizer, "a test")


@pytest.mark.parametrize(
    "arpa, message",
    [
        (ARPA.replace(" A", " X").replace(" BA", " Y").replace("AB", "Z"), "no word of .* is in"),
        ("nonsense\n", "kaldilm cannot read .* is it a language model"),
    ],
)
def test_a_language_model_that_does_not_fit_is_refused(tmp_path, arpa, message):
    with pytest.raises(DataError, match=message):
        write_lang(tmp_path, arpa=arpa)
    assert not graph_file(tmp_path, "LG").exists()
