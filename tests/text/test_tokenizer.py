"""Tokens: fixed ids, round trips, files that cannot be mixed up."""

import json
import pickle

import pytest
from text_toys import halved_words

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.text.tokenizer import MASK, Tokenizer, pinyin_pieces

ENGLISH = ["THE CAT SAT ON THE MAT", "IT'S THE CAT'S HAT", "A HAT AND A MAT", "THAT CAT", "SIT ON IT"] * 3
HANZI = ["我们去北京", "中国很大", "他的书"]


def make(kind):
    texts = HANZI if kind == "pinyin" else ENGLISH
    if kind == "plm":
        return Tokenizer.of_word_pieces(halved_words(texts)), texts
    return (Tokenizer.train_bpe(texts, 40) if kind == "bpe" else getattr(Tokenizer, f"train_{kind}")(texts)), texts


@pytest.mark.parametrize("kind", ["bpe", "char", "pinyin", "plm"])
def test_special_ids_are_fixed_and_mask_is_the_last(kind):
    tokenizer, texts = make(kind)
    assert tokenizer.tokens[:3] == ["<blk>", "<sos/eos>", "<unk>"]
    assert (tokenizer.blank_id, tokenizer.sos_id, tokenizer.unk_id) == (0, 1, 2)
    assert tokenizer.mask_id == tokenizer.vocab_size - 1
    assert tokenizer.tokens[tokenizer.mask_id] == MASK
    used = {i for text in texts for i in tokenizer.encode(text)}
    assert used and not used & {0, 1, 2, tokenizer.mask_id}


@pytest.mark.parametrize("kind", ["bpe", "char", "plm"])
def test_text_survives_encoding(kind):
    tokenizer, texts = make(kind)
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([0, 1, *ids, tokenizer.mask_id, 0]) == text
        assert [tokenizer.tokens[i] for i in ids] == tokenizer.pieces(text)
    assert tokenizer.decode([]) == ""
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("kind", ["bpe", "char", "pinyin", "plm"])
def test_a_saved_tokenizer_is_the_same(kind, tmp_path):
    tokenizer, texts = make(kind)
    tokenizer.save(tmp_path / "lang")
    loaded = Tokenizer.load(tmp_path / "lang")
    assert loaded.hash == tokenizer.hash
    assert (loaded.kind, loaded.unit, loaded.vocab_size) == (tokenizer.kind, tokenizer.unit, tokenizer.vocab_size)
    assert [loaded.encode(t) for t in texts] == [tokenizer.encode(t) for t in texts]
    assert pickle.loads(pickle.dumps(loaded)).encode(texts[0]) == tokenizer.encode(texts[0])
    loaded.save(tmp_path / "again")
    for file in (tmp_path / "lang").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
        assert tokenizer.is_saved_in(tmp_path / "lang")
        (tmp_path / "again" / file.name).write_bytes(file.read_bytes()[:-3])
        assert not tokenizer.is_saved_in(tmp_path / "again"), file.name
        loaded.save(tmp_path / "again")


def test_training_twice_gives_the_same_hash_and_other_text_another():
    assert make("bpe")[0].hash == make("bpe")[0].hash
    assert Tokenizer.train_bpe([*ENGLISH, "MAT"] * 2, 41).hash != make("bpe")[0].hash
    assert Tokenizer.train_char(["AB"]).hash != Tokenizer.train_char(["AC"]).hash


@pytest.mark.parametrize("kind", ["bpe", "char", "plm"])
def test_a_changed_file_is_refused(kind, tmp_path):
    make(kind)[0].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["tokens"][3], content["tokens"][4] = content["tokens"][4], content["tokens"][3]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="was changed: its hash is"):
        Tokenizer.load(tmp_path)
    path.write_text(path.read_text()[:40])
    with pytest.raises(DataError, match="not valid JSON"):
        Tokenizer.load(tmp_path)


def test_a_damaged_or_missing_model_is_refused(tmp_path):
    make("bpe")[0].save(tmp_path)
    model = (tmp_path / "bpe.model").read_bytes()
    (tmp_path / "bpe.model").write_bytes(model[:-1] + bytes([model[-1] ^ 1]))
    with pytest.raises(DataError, match="was changed"):
        Tokenizer.load(tmp_path)
    (tmp_path / "bpe.model").unlink()
    with pytest.raises(DataError, match="damaged"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        Tokenizer.load(tmp_path / "nothing")


def test_too_large_a_vocabulary_is_clipped_with_a_message(caplog):
    tokenizer = Tokenizer.train_bpe(ENGLISH, 5000)
    assert 30 < tokenizer.vocab_size < 200
    assert f"gives {tokenizer.vocab_size} tokens" in caplog.text
    assert Tokenizer.train_bpe(ENGLISH, 40).vocab_size == 40


def test_too_small_a_vocabulary_and_no_text_are_refused():
    with pytest.raises(ConfigError, match="at least"):
        Tokenizer.train_bpe(ENGLISH, 10)
    for train in (Tokenizer.train_bpe, Tokenizer.train_char, Tokenizer.train_pinyin):
        with pytest.raises(DataError, match="no text"):
            train([])


def test_unknown_characters_become_the_unknown_token():
    for kind in ("bpe", "char"):
        assert 2 in make(kind)[0].encode("QUIZ")
    pinyin = make("pinyin")[0]
    assert pinyin.encode("我") == [pinyin.tokens.index(p) for p in pinyin_pieces("我")]
    assert set(pinyin.encode("龙")) & {2}


def test_ids_outside_of_the_table_are_refused():
    with pytest.raises(DataError, match="token ids run"):
        make("char")[0].decode([3, 999])


def test_scoring_units_follow_the_script():
    assert make("bpe")[0].unit == "word"
    assert make("char")[0].unit == "word"
    assert Tokenizer.train_char(HANZI).unit == "char"
    assert make("pinyin")[0].unit == "token"


def test_spaces_are_tokens_of_characters():
    tokenizer = make("char")[0]
    assert tokenizer.pieces("A HAT") == ["A", "\u2581", "H", "A", "T"]
    assert tokenizer.decode(tokenizer.encode("A HAT")) == "A HAT"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("中国", "zh ong1 g uo2"),
        ("一定", "i2 d ing4"),
        ("我们", "uo3 m en5"),
        ("绿色", "l v4 s e4"),
        ("银行 行走", "in2 h ang2 x ing2 z ou3"),
        ("卡拉OK", "k a3 l a1 O K"),
    ],
)
def test_pinyin_is_split_into_initials_and_toned_finals(text, expected):
    assert " ".join(pinyin_pieces(text)) == expected


def test_pinyin_decodes_to_tokens_separated_by_spaces():
    tokenizer = make("pinyin")[0]
    assert tokenizer.decode(tokenizer.encode("中国")) == "zh ong1 g uo2"


@pytest.mark.parametrize("kind", ["bpe", "char", "pinyin", "plm"])
def test_words_are_those_of_the_text_with_the_places_of_their_tokens(kind):
    tokenizer, texts = make(kind)
    for text in texts:
        ids = [tokenizer.blank_id, *tokenizer.encode(text), tokenizer.mask_id]
        words = tokenizer.words(ids)
        assert " ".join(word for word, _, _ in words) == tokenizer.decode(ids)
        assert [first for _, first, _ in words] == sorted(first for _, first, _ in words)
        for word, first, last in words:
            assert tokenizer.decode(ids[first : last + 1]) == word
    assert tokenizer.words([]) == []


def test_without_spaces_every_character_is_a_word():
    tokenizer = Tokenizer.train_char(["你好吗"])
    assert tokenizer.words(tokenizer.encode("好你")) == [("好", 0, 0), ("你", 1, 1)]
