"""N-gram models: by hand, by the definition, and through ARPA files."""

import gzip
import itertools
import math
import random
import re
import string
from collections import Counter

import pytest
from lhotse import MonoCut
from micro_corpus import WORDS, write_corpus
from run_script import script

from icefall_kd.data.manifests import write_cuts
from icefall_kd.decode.fusion import load_ngram
from icefall_kd.errors import DataError
from icefall_kd.runtime.files import read_json, read_lines
from icefall_kd.text.corpus import transcripts
from icefall_kd.text.ngram import BOS, EOS, UNK, estimate, read_arpa
from icefall_kd.text.tokenizer import Tokenizer


def random_text(seed: int, sentences: int = 60, words: str = "abcde"):
    rng = random.Random(seed)
    return [rng.choices(words, weights=range(1, len(words) + 1), k=rng.randint(1, 7)) for _ in range(sentences)]


def prob(lm, history, word):
    """Return p(word | history) by walking there from the begin of a sentence."""
    state = lm.start
    for w in history:
        _, state = lm.score(state, w)
    return math.exp(lm.score(state, word)[0])


def test_a_bigram_model_of_two_sentences_computed_by_hand():
    lm = estimate([["a", "b"], ["a", "c"]], 2)
    # Too few counts, so the discounts are 0.5, 1, 1.5.  Distinct left neighbours: a 1, b 1, c 1, </s> 2; their five
    # lose 0.5 + 0.5 + 0.5 + 1, half of the mass, to five words (a, b, c, </s>, <unk>) of 0.1 each.
    unigrams = {"a": 0.2, "b": 0.2, "c": 0.2, EOS: 0.3, UNK: 0.1}
    for word, p in unigrams.items():
        assert 10 ** lm.ngrams[(word,)][0] == pytest.approx(p)
    assert prob(lm, [], "a") == pytest.approx((2 - 1) / 2 + 1 / 2 * 0.2)
    assert prob(lm, ["a"], "b") == pytest.approx((1 - 0.5) / 2 + (0.5 + 0.5) / 2 * 0.2)
    assert prob(lm, ["a", "b"], EOS) == pytest.approx((1 - 0.5) / 1 + 0.5 * 0.3)
    assert prob(lm, ["a"], "a") == pytest.approx(0.5 * 0.2)
    assert prob(lm, ["a"], "never seen") == pytest.approx(0.5 * 0.1)


def kneser_ney(text, order, vocabulary):
    """Return p(word, history) straight from the definition, recursive, with counts by looking."""
    padded = [(BOS, *s, EOS) for s in text]

    found_at = Counter(p[i : i + n] for p in padded for n in range(1, order + 2) for i in range(len(p) - n + 1))

    def occurrences(gram):
        return found_at[gram]

    def count(gram):
        if len(gram) == order or gram[0] == BOS:
            return occurrences(gram)
        return sum(occurrences((v, *gram)) > 0 for v in (BOS, *vocabulary))

    def grams(n):
        return {p[i : i + n] for p in padded for i in range(len(p) - n + 1)} - {(BOS,)}

    def discount(n):
        t = Counter(count(g) for g in grams(n))
        y = t[1] / (t[1] + 2 * t[2])
        return [0.0] + [k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3)]

    discounts = {n: discount(n) for n in range(1, order + 1)}

    def p(word, history):
        if len(history) >= order:
            history = history[len(history) - order + 1 :]
        d = discounts[len(history) + 1]
        found = {w: count((*history, w)) for w in (*vocabulary, EOS) if occurrences((*history, w))}
        total = sum(found.values())
        below = p(word, history[1:]) if history else 1 / (len(vocabulary) + 2)
        if not total:
            return below
        mass = sum(d[min(c, 3)] for c in found.values()) / total
        c = found.get(word, 0)
        return (c - d[min(c, 3)]) / total + mass * below

    return p


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_are_those_of_the_definition(order, caplog):
    rng, letters = random.Random(5), string.ascii_lowercase
    text = [rng.choices(letters, [1 / (i + 1) ** 2 for i in range(26)], k=rng.randint(1, 6)) for _ in range(100)]
    lm, p = estimate(text, order), kneser_ney(text, order, sorted({w for s in text for w in s}))
    assert "too few" not in caplog.text  # the discounts are those of the counts
    for history in itertools.chain.from_iterable(itertools.product("abf", repeat=n) for n in range(3)):
        for word in ("a", "b", "f", EOS, "unknown"):
            expected = p(word, (BOS, *history)[-order + 1 :] if order > 1 else ())
            assert prob(lm, history, word) == pytest.approx(expected, rel=1e-9), (history, word)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_probabilities_after_every_history_sum_to_one(order, seed):
    lm = estimate(random_text(seed), order, vocabulary=["in no sentence", "z"])
    words = [w for w in lm.words if w != BOS]
    assert set(words) == {*"abcde", "in no sentence", "z", EOS, UNK}
    for length in range(4):
        for history in itertools.product(["a", "c", "e", "z", "?"], repeat=length):
            assert sum(prob(lm, history, w) for w in words) == pytest.approx(1.0, abs=1e-9)


def test_states_are_equal_where_the_model_cannot_tell_histories_apart():
    lm = estimate(random_text(0), 3)
    for history in itertools.product("abe", repeat=4):
        state = lm.start
        for w in history:
            state = lm.score(state, w)[1]
        assert len(state) <= 2 and state == history[len(history) - len(state) :]
        assert hash(state) is not None
        for w in (*"abcde", EOS):  # the state says all: it scores as the full history does
            assert lm.score(state, w)[0] == pytest.approx(lm.score(history[-2:], w)[0], abs=1e-12)


def test_an_arpa_file_gives_the_model_back(tmp_path):
    lm = estimate(random_text(1), 3)
    lm.write(tmp_path / "x.arpa")
    text = (tmp_path / "x.arpa").read_text()
    back = read_arpa(tmp_path / "x.arpa")
    assert back.order == 3 and back.ngrams.keys() == lm.ngrams.keys()
    for ngram, values in lm.ngrams.items():
        assert back.ngrams[ngram] == pytest.approx(values, abs=1e-6)
    header = [line for line in text.splitlines() if line.startswith("ngram ")]
    assert header == [f"ngram {n}={sum(len(g) == n for g in lm.ngrams)}" for n in (1, 2, 3)]
    # What other tools rely on: the begin and end of a sentence, unknown words, prefixes of every n-gram.
    assert {(BOS,), (EOS,), (UNK,)} <= lm.ngrams.keys()
    assert all(ngram[:-1] in lm.ngrams and ngram[1:] in lm.ngrams for ngram in lm.ngrams if len(ngram) > 1)
    assert text.rstrip().endswith("\\end\\")


def test_a_foreign_arpa_file_backs_off_as_the_format_says(tmp_path):
    (tmp_path / "f.arpa").write_text(
        "\n\\data\\\nngram 1=4\nngram 2=2\n\n\\1-grams:\n-1.0 a -0.5\n-99 <s> -0.25\n-0.7 b\n-0.4 </s>\n\n"
        "\\2-grams:\n-0.1 <s> a\n-0.2\ta b\n\n\\end\\\n"
    )
    lm, ln10 = read_arpa(tmp_path / "f.arpa"), math.log(10)
    score, state = lm.score(lm.start, "a")
    assert (score, state) == (pytest.approx(-0.1 * ln10), ("a",))
    assert lm.score(state, "a")[0] == pytest.approx((-0.5 - 1.0) * ln10)
    assert lm.score(lm.start, "b")[0] == pytest.approx((-0.25 - 0.7) * ln10)
    assert lm.score(state, "x") == (pytest.approx(-100 * ln10), ())  # no <unk> in the file


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: t.removesuffix("\n\\end\\\n"), "is no whole ARPA file"),
        (lambda t: t.replace("ngram 2=", "ngram 2=1"), "is no whole ARPA file"),
        (lambda t: t.replace("\\2-grams:\n-", "\\2-grams:\nx"), "is no line of an ARPA file"),
        (lambda t: re.sub(r"\n-[\d.]+\t</s>", "\nnan\t</s>", t), "a logarithm of a probability is finite"),
        (lambda t: re.sub(r"\n-[\d.]+\t</s>", "\ninf\t</s>", t), "a logarithm of a probability is finite"),
        (lambda t: "hello\n", "is no whole ARPA file"),
    ],
)
def test_a_damaged_arpa_file_is_refused(tmp_path, damage, message):
    file = tmp_path / "x.arpa"
    estimate(random_text(1), 2).write(file)
    file.write_text(damage(file.read_text()))
    with pytest.raises(DataError, match=message):
        read_arpa(file)


def test_text_that_cannot_be_estimated_is_refused():
    with pytest.raises(DataError, match="no sentence"):
        estimate([], 2)
    with pytest.raises(DataError, match="holds <s> or </s>: a </s>"):
        estimate([["a", EOS]], 2)


def test_the_script_counts_copies_at_another_speed_once_and_knows_all_tokens(tmp_path):
    write_corpus(tmp_path, num_train=8, speeds=("1", "9/10"))
    cuts = tmp_path / "manifests/cuts_train.jsonl.gz"
    out = tmp_path / "lm/tokens.arpa"
    tokenizer = Tokenizer.load(tmp_path / "lang_char")
    for extra in (["--lang-dir", tmp_path / "lang_char"], []):
        script("make_ngram.py", "--cuts", cuts, "--order", 2, "--out", out, *extra)
        record = read_json(f"{out}.json")
        if extra:
            lm = read_arpa(out)
            expected = estimate([tokenizer.pieces(w) for w in WORDS], 2, tokenizer.tokens[3:-1])
            assert lm.ngrams == {g: pytest.approx(v, abs=1e-6) for g, v in expected.ngrams.items()}
            assert (record["units"], record["tokenizer_hash"]) == ("tokens", tokenizer.hash)
    assert set(read_arpa(out).words) == {"one", "two", "three", "four", BOS, EOS, UNK}
    assert record["units"] == "words"


def test_text_that_the_tokens_cannot_write_becomes_the_unknown_word(tmp_path):
    (tmp_path / "text").write_text("one two\nxyz one\n")
    out = tmp_path / "x.arpa"
    for kind in (Tokenizer.train_char(["one two"]), Tokenizer.train_bpe(["one two", "two one"], 14)):
        kind.save(tmp_path / "lang")
        script("make_ngram.py", "--text", tmp_path / "text", "--lang-dir", tmp_path / "lang", "--out", out)
        lm = load_ngram(out, kind, 1.0).lm
        assert any(g[-1] == UNK for g in lm.ngrams if len(g) > 1)


@pytest.mark.parametrize("name, content", [("a.txt", b"\xe9\xff\n"), ("b.txt.gz", b"plain"), ("c.txt.gz", b"")])
def test_files_that_are_no_text_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content or gzip.compress(b"one two\n" * 99)[:-12])
    with pytest.raises(DataError, match=f"{name} is damaged, or no UTF-8 text"):
        list(read_lines(tmp_path / name))


def test_cuts_without_transcripts_have_no_sentences(tmp_path):
    write_cuts(tmp_path / "cuts.jsonl.gz", [MonoCut("a", 0, 1, 0)])
    assert list(transcripts([tmp_path / "cuts.jsonl.gz"])) == []
