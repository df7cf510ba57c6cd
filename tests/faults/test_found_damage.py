"""Damage that once ended in a traceback, in values that were wrong, or in an error without the file's name."""

import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from micro_corpus import label_info, write_labels, write_part

from icefall_kd.cli import config_from_dict, parse_config
from icefall_kd.config import TrainConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.labels.keys import label_key
from icefall_kd.labels.shard import Shard
from icefall_kd.models.fbank_front import NUM_BINS, FbankFrontEnd
from icefall_kd.models.lm import LmConfig, TokenLm, load_lm, save_lm
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.runtime.files import read_json, read_record, reading, write_json
from icefall_kd.runtime.tensors import read_tensors, write_tensors
from icefall_kd.teachers.ctranslate2 import read_model, whisper_config
from icefall_kd.teachers.state_dicts import convert
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.average import load_trained
from icefall_kd.train.checkpoint import load_checkpoint, load_newest, load_tensors, save_checkpoint, state_sha256
from tests.teachers.test_state_dicts import export, tiny
from tests.teachers.tiny_models import ct2_bytes, whisper_model, write_ct2


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, b"\xff\xfe", ""])
def test_json_that_python_cannot_hold(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=r"x\.json is not valid JSON"):
        read_json(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_json(tmp_path)


@pytest.mark.parametrize("content", [[], {}, {"parts": 3}, None])
def test_a_record_of_another_form(tmp_path, content):
    write_json(tmp_path / "corpus.json", content)
    with pytest.raises(DataError, match=r"corpus\.json .*run the stage"):
        read_record(tmp_path / "corpus.json", parts=dict)
    write_json(tmp_path / "corpus.json", {"parts": {}})
    assert read_record(tmp_path / "corpus.json", parts=dict) == {"parts": {}}


def test_errors_of_ours_pass_and_bugs_of_the_machine_too():
    with pytest.raises(ConfigError, match=r"^mine$"), reading("file", "do that"):
        raise ConfigError("mine")
    with pytest.raises(DataError, match=r"file is damaged \(KeyError: 'x'\); do that"), reading("file", "do that"):
        _ = {}["x"]
    with pytest.raises(MemoryError), reading("file", "do that"):
        raise MemoryError


def checkpoint(**changes):
    model = {"w": torch.ones(2, 3)}
    content = {"model": model, "model_avg": {"w": torch.ones(2, 3, dtype=torch.float64)}, "config": {}}
    content |= {"train": {"step": 4, "average_period": 2}, "tokenizer_hash": "t"}
    return {name: x for name, x in (content | changes).items() if x is not ...}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": [1]}, {"model": {"w": 3}}, {"model_avg": {"w": None}}, {"train": 3}, {"config": "x"},
        {"tokenizer_hash": 5},
    ],
)  # fmt: skip
def test_a_checkpoint_with_parts_of_other_types(tmp_path, changes):
    save_checkpoint(tmp_path / "epoch-1.pt", checkpoint(**changes))
    with pytest.raises(DataError, match=r"epoch-1\.pt is damaged: its"):
        load_checkpoint(tmp_path / "epoch-1.pt")


@pytest.mark.parametrize("train", [..., {}, {"step": None}, {"step": "x"}])
def test_a_checkpoint_without_its_step_is_passed_over(tmp_path, caplog, train):
    save_checkpoint(tmp_path / "epoch-1.pt", checkpoint())
    save_checkpoint(tmp_path / "epoch-2.pt", checkpoint(train=train))
    assert load_newest(tmp_path)[0].name == "epoch-1.pt"
    assert "epoch-2.pt is damaged" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"step": 4, "average_period": 0}}, {"train": {"step": 4}}, {"config": ...}, {"model": ...},
        {"model_avg": {"w": torch.ones(5)}}, {"model_avg": {"v": torch.ones(2, 3)}},
    ],
)  # fmt: skip
def test_an_average_of_damaged_checkpoints(tmp_path, changes):
    save_checkpoint(tmp_path / "epoch-1.pt", checkpoint())
    save_checkpoint(tmp_path / "epoch-2.pt", checkpoint(**{"train": {"step": 8, "average_period": 2}, **changes}))
    with pytest.raises(DataError, match=str(tmp_path)):
        load_trained(tmp_path)


def test_an_archive_that_claims_more_than_there_is(tmp_path):
    file = tmp_path / "epoch-1.pt"
    save_checkpoint(file, checkpoint())
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "new.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    with pytest.raises(DataError, match="or is compressed"):
        load_checkpoint(tmp_path / "new.pt", verify=False)


def test_a_changed_byte_of_a_foreign_state_dict(tmp_path):
    file = tmp_path / "hubert.pt"
    torch.save({"model": {"w": torch.arange(100.0)}}, file)
    content = bytearray(file.read_bytes())
    place = content.index(struct.pack("<4f", 50, 51, 52, 53))
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"hubert\.pt is damaged .*wrong checksum"):
        load_tensors(file)
    torch.save({"w": torch.ones(2)}, file, _use_new_zipfile_serialization=False)  # has no checksums
    assert load_tensors(file)["w"].tolist() == [1, 1]


def test_a_state_dict_with_a_layer_of_a_huge_number():
    state = export(tiny("base"), "fairseq", "base")
    name = "encoder.layers.1.self_attn.q_proj.weight"
    state["encoder.layers.99999999.self_attn.q_proj.weight"] = state.pop(name)
    with pytest.raises(DataError, match=r"encoder\.layers\.1\.attention\.q_proj\.weight"):
        convert(state, "hubert.pt")


@pytest.mark.parametrize("strides", [["x"] * 7, [0] * 7, [2.5] * 7, 3])
def test_strides_of_a_state_dict_that_are_no_numbers(strides):
    with pytest.raises(ConfigError, match="conv_stride is"):
        convert(export(tiny("base"), "fairseq", "base"), "hubert.pt", {"conv_stride": strides})


def test_a_scalar_of_a_ctranslate2_model_that_is_none(tmp_path):
    (tmp_path / "model.bin").write_bytes(ct2_bytes([("encoder/num_heads", torch.ones(2).numpy())]))
    with pytest.raises(DataError, match=r"model\.bin: encoder/num_heads is float32 \(2,\), not one integer"):
        read_model(tmp_path / "model.bin").scalar("encoder/num_heads")


@pytest.mark.parametrize("heads", [0, -1, 3, 514])
def test_heads_of_a_ctranslate2_model_that_do_not_divide_its_channels(tmp_path, heads):
    whisper = whisper_model(d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                            decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8)  # fmt: skip
    write_ct2(tmp_path, whisper)
    model = read_model(tmp_path / "model.bin")
    assert whisper_config(model)["decoder_attention_heads"] == 2
    model.variables["decoder/num_heads"] = np.array(heads)
    with pytest.raises(DataError, match=rf"model\.bin: decoder/num_heads is {heads}, which does not divide"):
        whisper_config(model)


@pytest.fixture
def labels(tmp_path):
    cuts = write_part(tmp_path / "corpus", "train", [0.5, 0.7], features=False)
    return write_labels(tmp_path / "labels", cuts, num_shards=1)


def rewrite(shard, change):
    """Change the header of a shard."""
    raw = shard.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize("size", [2.0, True])
def test_sizes_of_a_shard_that_only_equal_integers(labels, size):
    (shard,) = labels.glob("shard-*")

    def change(header):
        for name in ("key_hashes", "num_frames", "num_samples", "key_shared"):
            header[name]["shape"] = [size]

    rewrite(shard, change)
    with pytest.raises(DataError, match=r"shard-00000-of-00001\.safetensors is damaged"):
        Shard(shard)


@pytest.mark.parametrize("change", [{"num_shards": "1"}, {"kind": None}, {"rejects": {}}, {"fingerprint": 3}])
def test_metadata_of_a_shard_of_other_types(labels, change):
    (shard,) = labels.glob("shard-*")

    def damage(header):
        meta = json.loads(header["__metadata__"]["icefall_kd"])
        header["__metadata__"]["icefall_kd"] = json.dumps(meta | change)

    rewrite(shard, damage)
    with pytest.raises(DataError, match=f"its {next(iter(change))} is"):
        Shard(shard)


def test_keys_of_a_shard_that_are_no_text(labels):
    (shard,) = labels.glob("shard-*")
    raw = shard.read_bytes()
    shard.write_bytes(raw.replace(b"train0|", b"\xff\xffain0|"))
    with pytest.raises(DataError, match="is no text"):
        list(Shard(shard).keys())
    shard.write_bytes(raw[:-1] + b"x")  # the end of the last line
    with pytest.raises(DataError, match="it has 1 keys of 2"):
        list(Shard(shard).keys())


@pytest.mark.parametrize(
    "changes",
    [
        {"width": "2"}, {"extra": []}, {"layer": 0.5}, {"codebook_size": True}, {"extra": {"x": float("nan")}},
        {"frame_formula": []}, {"frame_formula": {"kernels": [1.5], "strides": [2], "right_pad": False}},
        {"frame_formula": {"kernels": [1, 2], "strides": [2], "right_pad": False}},
    ],
)  # fmt: skip
def test_a_description_of_a_label_set_with_values_of_other_types(tmp_path, changes):
    content = vars(label_info()) | changes
    (tmp_path / "label_set.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"label_set\.json is damaged"):
        LabelSetInfo.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"start": "x"}, {"speed": []}, {"speed": "0"}, {"recording_id": None}, {"native_rate": 0}, {"of": 3},
        {"of": {"speed": "1"}}, {"num_samples": float("inf")},
    ],
)  # fmt: skip
def test_a_stamp_of_another_form(tmp_path, change):
    (cut,) = write_part(tmp_path, "train", [0.5], features=False)
    cut.custom["source"] |= change
    with pytest.raises(DataError, match=f"cut {cut.id}: its stamp .*keys.stamp_source"):
        label_key(cut)


def test_statistics_and_language_models_have_checksums(tmp_path):
    statistics = {"mean": torch.zeros(NUM_BINS), "std": torch.ones(NUM_BINS)}
    file = tmp_path / "cmvn.safetensors"
    write_tensors(file, statistics, {"metadata": json.dumps({"sha256": state_sha256(statistics)})})
    FbankFrontEnd(8, 0.0).load_cmvn(file)
    write_tensors(file, {**statistics, "mean": torch.ones(NUM_BINS)}, read_tensors(file)[0])
    with pytest.raises(DataError, match=r"cmvn\.safetensors is damaged: its checksum differs"):
        FbankFrontEnd(8, 0.0).load_cmvn(file)
    file = tmp_path / "lm.safetensors"
    lm = TokenLm(LmConfig(lm_embedding_dim=4, lm_hidden_dim=4), 9)
    save_lm(file, lm, "t", {})
    metadata, tensors = read_tensors(file)
    assert all(torch.equal(x, tensors[name]) for name, x in load_lm(file, "t").state_dict().items())
    write_tensors(file, {**tensors, "output.bias": torch.ones(9)}, metadata)
    with pytest.raises(DataError, match=r"lm\.safetensors is not as it was written"):
        load_lm(file, "t")


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 2**40}, {"vocab_size": "x"}, {"model": None}, {"model": {"lm_hidden_dim": 2**30}},
        {"model": {"lm_hidden_dim": 0}},
    ],
)  # fmt: skip
def test_a_language_model_that_claims_other_sizes(tmp_path, changes):
    file = tmp_path / "lm.safetensors"
    save_lm(file, TokenLm(LmConfig(lm_embedding_dim=4, lm_hidden_dim=4), 9), "t", {})
    metadata, tensors = read_tensors(file)
    write_tensors(file, tensors, {"lm": json.dumps(json.loads(metadata["lm"]) | changes)})
    with pytest.raises(DataError, match=r"lm\.safetensors is damaged"):
        load_lm(file, "t")


def test_a_quantizer_whose_checksum_is_gone(tmp_path):
    """The name of the checksum is one letter from another; tensors may then be any."""
    file = tmp_path / "q.safetensors"
    Quantizer(4, 2, 4).save(file, {"teacher": {"layer": 3}})
    file.write_bytes(file.read_bytes().replace(b"sha256", b"shb256"))
    with pytest.raises(DataError, match=r"q\.safetensors is damaged: its header says sha256 None"):
        Quantizer.load(file)


@pytest.mark.parametrize("shape", [(2, 4, 0), (0, 4, 4), (3, 4, 4), (2, 5, 4)])
def test_centers_of_a_quantizer_of_impossible_sizes(tmp_path, shape):
    state = {**Quantizer(4, 2, 4).state_dict(), "centers": torch.zeros(shape)}
    write_tensors(tmp_path / "q.safetensors", state, {"x": "y"})
    with pytest.raises(DataError, match=r"q\.safetensors is no quantizer"):
        Quantizer.load(tmp_path / "q.safetensors")


@pytest.mark.parametrize("value", [None, float("nan"), 3, []])
def test_a_token_that_is_no_text(tmp_path, value):
    Tokenizer.train_char(["one two"]).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["tokens"][5] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"the tokenizer in {tmp_path}"):
        Tokenizer.load(tmp_path)


def test_yaml_that_grows_or_never_ends(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    for text in ("\n".join(lines), "train-parts: &a [*a]", "[" * 5000, "a: " + "{" * 5000):
        (tmp_path / "bomb.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"bomb\.yaml"):
            parse_config(TrainConfig, ["--config", str(tmp_path / "bomb.yaml")])


def test_options_of_a_file_name_it(tmp_path):
    (tmp_path / "train.yaml").write_text("chunk-size: [16, -9]\n")
    with pytest.raises(ConfigError, match=r"--chunk-size is .*with --config .*train\.yaml"):
        parse_config(TrainConfig, ["--config", str(tmp_path / "train.yaml")])
    for values in ({"num_epochs": "x"}, {"nonsense": 1}, {"num_epochs": 0}):
        with pytest.raises(ConfigError, match=r"^exp/config\.json: "):
            config_from_dict(TrainConfig, values, where="exp/config.json")
