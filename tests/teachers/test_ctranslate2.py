import numpy as np
import pytest
import torch

from icefall_kd.errors import DataError
from icefall_kd.teachers import ctranslate2, hf
from tests.teachers.tiny_models import ALIASES, ct2_bytes, ct2_variables, whisper_model, write_ct2


def test_a_written_whisper_reads_back_as_the_same_model(tmp_path):
    model = whisper_model()
    folder = write_ct2(tmp_path / "whisper", model)
    assert ctranslate2.is_whisper_folder(folder)
    loaded = hf.whisper_model(folder)
    expected = model.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    mel = torch.randn(1, 80, 3000)
    ids = torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(mel, decoder_input_ids=ids).logits, model(mel, decoder_input_ids=ids).logits)
        encoder = hf.whisper_encoder(folder)
        assert torch.equal(encoder(mel).last_hidden_state, model.model.encoder(mel).last_hidden_state)


def test_every_truncation_is_a_data_error(tmp_path):
    variables = [("a/weight", np.ones((2, 3), np.float32)), ("b", np.array(4, "<i2"))]
    whole = ct2_bytes(variables, [("c", "b")])
    path = tmp_path / "model.bin"
    path.write_bytes(whole)
    assert ctranslate2.read_model(path).scalar("c") == 4
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            ctranslate2.read_model(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match="after its last alias"):
        ctranslate2.read_model(path)


def test_random_damage_is_a_data_error_or_changes_values_only(tmp_path):
    whole = bytearray(ct2_bytes([("a/weight", np.ones((2, 3), np.float32))], [("c", "a/weight")]))
    rng = np.random.default_rng(0)
    path = tmp_path / "model.bin"
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            model = ctranslate2.read_model(path)
        except DataError:
            continue
        assert sum(a.size for a in model.variables.values()) <= len(whole)


@pytest.mark.parametrize(("change", "message"), [({"version": 3}, "version 3"), ({"spec": "Other"}, "Other")])
def test_other_formats_are_named(tmp_path, change, message):
    path = tmp_path / "model.bin"
    path.write_bytes(ct2_bytes([("a", np.ones(2, np.float32))], **change))
    with pytest.raises(DataError, match=message):
        ctranslate2.whisper_config(ctranslate2.read_model(path))


def test_integer_weights_are_dequantized(tmp_path):
    weight = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    scale = (127 / np.abs(weight).max(axis=1)).astype(np.float32)
    rows = np.round(weight * scale[:, None]).astype("i1")
    whole = np.float32(1000.0)
    path = tmp_path / "model.bin"
    path.write_bytes(
        ct2_bytes(
            [
                ("a/weight", rows),
                ("a/weight_scale", scale),
                ("b/weight", np.round(weight * whole).astype("<i2")),
                ("b/weight_scale", np.array(whole)),
                ("c/weight", rows),
                ("d/weight", weight.astype("<f2")),
            ]
        )
    )
    model = ctranslate2.read_model(path)
    for name, tolerance in (("a", 0.5 / scale.min()), ("b", 0.5 / whole), ("d", 2e-3)):
        assert np.abs(model.tensor(f"{name}/weight").numpy() - weight).max() <= tolerance * 1.01, name
    with pytest.raises(DataError, match="c/weight_scale"):
        model.tensor("c/weight")


def test_bfloat16_variables_keep_their_values(tmp_path):
    value = torch.randn(3, 2).bfloat16()
    raw = bytearray(ct2_bytes([("a", value.view(torch.int16).numpy())]))
    name_end = raw.index(b"a\0") + 2
    raw[name_end + 1 + 8] = 5  # rank, two sizes, then the type
    (tmp_path / "model.bin").write_bytes(raw)
    assert torch.equal(ctranslate2.read_model(tmp_path / "model.bin").tensor("a"), value.float())


def test_a_biased_key_projection_is_refused(tmp_path):
    variables = dict(ct2_variables(whisper_model()))
    variables["encoder/layer_0/self_attention/linear_0/bias"] += 1
    (tmp_path / "model.bin").write_bytes(ct2_bytes(list(variables.items()), ALIASES))
    with pytest.raises(DataError, match="k_proj"):
        hf.whisper_encoder(tmp_path)


def test_a_missing_variable_is_named(tmp_path):
    variables = [v for v in ct2_variables(whisper_model()) if v[0] != "encoder/conv2/bias"]
    (tmp_path / "model.bin").write_bytes(ct2_bytes(variables, ALIASES))
    with pytest.raises(DataError, match="encoder/conv2/bias"):
        hf.whisper_encoder(tmp_path)
