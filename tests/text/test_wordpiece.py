"""WordPiece in the recogniser's spelling: the language model's cuts, and every text can be written and read back."""

import numpy as np
import pytest
from text_toys import random_texts, write_bert

from icefall_kd.errors import ConfigError
from icefall_kd.teachers.language_model import encode, load_tokenizer, word_pieces
from icefall_kd.text.alignment import token_spans
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.text.wordpiece import WordPieces, split_words


@pytest.mark.parametrize("spaced", [True, False])
def test_thousands_of_texts_are_cut_as_transformers_cuts_them(tmp_path, spaced):
    folder, texts = write_bert(tmp_path / "bert"), random_texts(3000, spaced)
    tokenizer = Tokenizer.of_word_pieces(word_pieces(str(folder), texts))
    tokenizer.save(tmp_path / "lang")
    tokenizer = Tokenizer.load(tmp_path / "lang")
    assert tokenizer.unit == ("word" if spaced else "char")
    for text, theirs in zip(texts, encode(load_tokenizer(str(folder)), texts), strict=True):
        assert not theirs.unknown.any()
        ours = token_spans(tokenizer, text)
        ours[:, 0] += [text[start] == " " for start in ours[:, 0]]  # a token holds the space before it
        assert np.array_equal(ours, theirs.spans), text
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.unk_id not in ids
        if spaced:
            assert [word for word, _, _ in tokenizer.words(ids)] == text.split()


def test_what_the_training_lacks_is_spelled_with_characters_and_strange_ones_are_unknown():
    texts = ["CATS SAT", "CAT'S MAT"]
    # The language model cuts CATS into CAT and S, and CAT'S into CAT, ' and S.
    pieces = [
        [(0, 3, True), (3, 4, True), (5, 8, True)],
        [(0, 3, True), (3, 4, True), (4, 5, True), (6, 9, True)],
    ]
    tokenizer = Tokenizer.of_word_pieces(WordPieces.collect(texts, pieces))
    assert tokenizer.pieces("CATS SAT") == ["▁CAT", "S", "▁SAT"]
    assert tokenizer.pieces("CAT'S") == ["▁CAT", "'", "S"]
    assert tokenizer.pieces("TAM") == ["▁T", "A", "M"] and tokenizer.decode(tokenizer.encode("TAM")) == "TAM"
    ids = tokenizer.encode("CAT ZAT")
    assert ids.count(tokenizer.unk_id) == 1 and tokenizer.decode(ids) == "CAT<unk>AT"
    assert "".join(tokenizer.pieces("CAT ZAT")) == "▁CAT▁ZAT"
    assert tokenizer.spell("CATS TAM") == [("CATS", ["▁CAT", "S"]), ("TAM", ["▁T", "A", "M"])]


def test_rare_pieces_are_spelled_with_shorter_ones():
    texts, spans = ["CAT", "CAT", "MAT"], [[(0, 3, True)]] * 3
    pieces = WordPieces.collect(texts, spans, min_count=2)
    assert pieces.split("CAT MAT") == ["CAT", "M", "A", "T"]
    assert WordPieces.collect(texts, spans).split("CATMAT") == ["CAT", "M", "A", "T"]  # MAT begins words only


def test_pieces_of_words_that_the_language_model_does_not_cut_cleanly_are_not_taken():
    text = "ABC DEF GHI"
    unknown, doubled, short = (0, 3, False), [(4, 5, True), (4, 6, True), (6, 7, True)], [(8, 10, True)]
    pieces = WordPieces.collect([text], [[unknown, *doubled, *short]])
    assert all(len(p.replace("▁", "")) == 1 for p in pieces.first | pieces.inner)


def test_words_are_those_of_bert():
    text = "IT'S 5G网络 A-B"
    assert [text[a:b] for a, b in split_words(text)] == ["IT", "'", "S", "5G", "网", "络", "A", "-", "B"]


def test_pieces_of_another_kind_are_refused_with_the_way_out(tmp_path):
    from text_toys import write_gpt2

    with pytest.raises(ConfigError, match=r"is BPE with ByteLevel; .*Use --token-kind bpe or char"):
        word_pieces(str(write_gpt2(tmp_path / "gpt2")), ["THE CAT"])
