"""Tokens and pieces meet by their characters, whichever way each side cuts a text up."""

import random
from itertools import pairwise

import numpy as np
import pytest
from text_toys import halved_words

from icefall_kd.text.alignment import Alignment, Misaligned, align, close_gaps, token_spans
from icefall_kd.text.tokenizer import Tokenizer

ENGLISH = ["THE CAT SAT ON THE MAT", "IT'S THE CAT'S HAT", "A HAT AND A MAT", "SIT ON IT"] * 3
HANZI = ["我们去北京", "今天5G网络AB", "他的书"]


def tokenizers():
    return {
        "bpe": Tokenizer.train_bpe(ENGLISH, 40),
        "char": Tokenizer.train_char(ENGLISH),
        "plm": Tokenizer.of_word_pieces(halved_words(ENGLISH)),
    }


def random_pieces(text, draw):
    """Cut the words of a text anywhere; return the pieces and the end."""
    spans, start = [], 0
    for word in text.split(" "):
        cuts = sorted({0, len(word), *(draw.randrange(len(word)) for _ in range(draw.randint(0, 3)))})
        spans += [(start + a, start + b) for a, b in pairwise(cuts)]
        start += len(word) + 1
    return np.array([*spans, (len(text), len(text))])


def counted(unit_texts, text, pieces):
    """Count shared characters of units, given as the characters of each, one by one."""
    weights = np.zeros((len(unit_texts), len(pieces) - 1))
    for m, places in enumerate(unit_texts):
        for i in places:
            for p, (a, b) in enumerate(pieces[:-1]):
                weights[m, p] += a <= i < b
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["bpe", "char", "plm"])
def test_weights_are_the_shares_of_characters_counted_one_by_one(kind):
    tokenizer, draw = tokenizers()[kind], random.Random(1)
    for text in ENGLISH[:4] * 10:
        pieces, places, said = random_pieces(text, draw), [], tokenizer.pieces(text)
        at = -said[0].startswith("▁")
        for token in said:  # a space belongs to what follows it
            here = [i for i in range(max(at, 0), at + len(token)) if text[i] != " "]
            places.append(here or [at + 1])
            at += len(token)
        tokens = align(tokenizer, text, pieces)
        assert isinstance(tokens, Alignment)
        np.testing.assert_allclose(tokens.weights[:-1, :-1], counted(places, text, pieces), atol=1e-6)
        assert tokens.weights[-1].tolist() == [0] * (len(pieces) - 1) + [1] and not tokens.weights[:-1, -1].any()
        assert tokens.owner.tolist() == list(range(len(tokenizer.encode(text)) + 1))
        words = align(tokenizer, text, pieces, "word")
        starts = [0, *(i + 1 for i, c in enumerate(text) if c == " ")]
        of_words = [list(range(s, s + len(w))) for s, w in zip(starts, text.split(), strict=True)]
        np.testing.assert_allclose(words.weights[:-1, :-1], counted(of_words, text, pieces), atol=1e-6)
        # Every token belongs to the word of its characters.
        wanted = [next(w for w, chars in enumerate(of_words) if set(p) <= set(chars)) for p in places]
        assert words.owner.tolist() == [*wanted, len(of_words)]


def test_the_same_cuts_on_both_sides_are_one_to_one():
    tokenizer = tokenizers()["plm"]
    for text in ENGLISH:
        spans = token_spans(tokenizer, text)
        found = align(tokenizer, text, np.array([*spans, (len(text), len(text))]))
        assert np.array_equal(found.weights, np.eye(len(spans) + 1)) and found.one_to_one.all()


def test_characters_of_mandarin_with_latin_words_that_the_language_model_joins():
    tokenizer, text = Tokenizer.train_char(HANZI), "今天5G网络AB"
    pieces = np.array([(0, 1), (1, 2), (2, 4), (4, 5), (5, 6), (6, 8), (8, 8)])
    for unit in ("token", "word"):  # without spaces a character is a word
        found = align(tokenizer, text, pieces, unit)
        assert found.weights.argmax(axis=1).tolist() == [0, 1, 2, 2, 3, 4, 5, 5, 6]
        assert found.weights.max(axis=1).tolist() == [1.0] * 9
        assert found.one_to_one.tolist() == [True, True, False, False, True, True, False, False, True]


def test_initials_and_finals_share_the_piece_of_their_character():
    pytest.importorskip("pypinyin")
    tokenizer, text = Tokenizer.train_pinyin(HANZI), "北京"
    assert tokenizer.pieces(text) == ["b", "ei3", "j", "ing1"]
    pieces = np.array([(0, 1), (1, 2), (2, 2)])
    assert align(tokenizer, text, pieces).weights.argmax(axis=1).tolist() == [0, 0, 1, 1, 2]
    words = align(tokenizer, text, pieces, "word")
    assert words.owner.tolist() == [0, 0, 1, 1, 2] and np.array_equal(words.weights, np.eye(3))


def test_what_cannot_be_aligned_says_why():
    tokenizer, text = tokenizers()["bpe"], "THE CAT SAT"
    dropped = np.array([(0, 3), (8, 11), (11, 11)])  # the language model left CAT out
    found = align(tokenizer, text, dropped, "word")
    assert found == Misaligned("word 2, 'CAT', has no piece of the language model")
    assert "CA" in align(tokenizer, text, dropped).reason or "CAT" in align(tokenizer, text, dropped).reason
    assert align(tokenizer, "THE  CAT", dropped) == Misaligned("its tokens do not spell it")
    assert align(tokenizer, "", np.array([(0, 0)])) == Misaligned("its tokens do not spell it")
    joined = Tokenizer.train_bpe(["A B A B"] * 9, 9)
    joined.pieces = lambda text: ["▁A▁B"]
    across = align(joined, "A B", np.array([(0, 1), (2, 3), (3, 3)]), "word")
    assert across == Misaligned("token 1 is of no word, or of several")


def test_gaps_inside_of_a_word_belong_to_the_piece_before_them():
    text = "A éXY ZW"
    given = [(0, 1), (1, 3), (4, 5), (6, 7)]  # the second holds its space, X is dropped, and so is W
    assert close_gaps(given, text).tolist() == [[0, 1], [2, 4], [4, 5], [6, 8]]
    assert close_gaps([(0, 1), (7, 8)], text).tolist() == [[0, 1], [7, 8]]  # no word lends its characters to another
    assert close_gaps([(1, 2)], text).tolist() == [[2, 2]]
    assert close_gaps([(0, 1), (0, 1), (0, 1)], "한").tolist() == [[0, 1]] * 3
