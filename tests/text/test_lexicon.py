"""Words, their spellings, and the symbols that keep spellings apart."""

import pytest

from icefall_kd.errors import DataError
from icefall_kd.text.lexicon import Lexicon, disambiguate
from icefall_kd.text.tokenizer import SPACE, Tokenizer


def test_words_of_each_kind_of_tokens():
    bpe = Tokenizer.train_bpe(["THE CAT SAT", "A CAT"] * 10, 24)
    assert [word for word, _ in bpe.spell("THE CAT")] == ["THE", "CAT"]
    assert [p for _, pieces in bpe.spell("THE CAT") for p in pieces] == bpe.pieces("THE CAT")
    assert bpe.word_separator is None
    char = Tokenizer.train_char(["A CAT"])
    assert char.spell("A CAT") == [("A", ["A"]), ("CAT", ["C", "A", "T"])] and char.word_separator == SPACE
    hanzi = Tokenizer.train_char(["中国人"])
    assert hanzi.spell("中国") == [("中", ["中"]), ("国", ["国"])] and hanzi.word_separator is None
    pinyin = Tokenizer.train_pinyin(["银行 行走"])
    assert pinyin.spell("银行 行走") == [
        ("银", ["y", "in2"]) if "y" in pinyin.tokens else ("银", ["in2"]),
        ("行", ["h", "ang2"]), ("行", ["x", "ing2"]), ("走", ["z", "ou3"]),
    ]  # fmt: skip


def test_a_word_with_two_readings_has_two_entries():
    tokenizer = Tokenizer.train_pinyin(["银行", "行走"])
    spellings = [pieces for word, pieces in Lexicon.from_texts(["银行", "行走"], tokenizer).entries if word == "行"]
    assert spellings == [("h", "ang2"), ("x", "ing2")]


def test_words_that_the_tokens_cannot_spell_are_left_out_and_named(caplog):
    tokenizer = Tokenizer.train_char(["AB BA"])
    lexicon = Lexicon.from_texts(["AB", "AXE"], tokenizer)
    assert lexicon.entries == [("AB", ("A", "B"))] and "AXE" in caplog.text
    with pytest.raises(DataError, match="lexicon is empty"):
        Lexicon.from_texts(["XYZ"], tokenizer)


def test_files_come_back(tmp_path):
    tokenizer = Tokenizer.train_char(["AB BA"])
    lexicon = Lexicon.from_texts(["AB BA", "A"], tokenizer)
    lexicon.write(tmp_path)
    assert (tmp_path / "words.txt").read_text() == "<eps> 0\nA 1\nAB 2\nBA 3\n#0 4\n<s> 5\n</s> 6\n"
    assert Lexicon.read(tmp_path / "lexicon.txt", tokenizer) == lexicon
    (tmp_path / "given.txt").write_text("BAB\nAB A B\n<eps> A\nALPHA A\n")
    given = Lexicon.read(tmp_path / "given.txt", tokenizer)
    assert given.entries == [("AB", ("A", "B")), ("ALPHA", ("A",)), ("BAB", ("B", "A", "B"))]
    assert given.hash != lexicon.hash


def test_every_closed_spelling_is_unique_and_begins_no_other():
    spellings = [("a",), ("a",), ("a", "b"), ("b",), ("c", "d"), ("c", "d", "e"), ("b", "x")]
    marks = disambiguate(spellings)
    assert marks == [1, 2, 0, 1, 1, 0, 0]
    closed = [(*pieces, f"#{mark}") if mark else pieces for pieces, mark in zip(spellings, marks, strict=True)]
    assert len(set(closed)) == len(closed)
    assert not any(one != other and other[: len(one)] == one for one in closed for other in closed)
