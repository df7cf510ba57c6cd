"""State dicts of fairseq and torchaudio: real names, written down here on their own, give the same embeddings."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

from icefall_kd.config import TeacherConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.teachers import build_teacher
from icefall_kd.teachers.pretrained import Precision
from icefall_kd.teachers.speech_ssl import SpeechSslTeacher
from tests.teachers.tiny_models import ssl_model

LAYERS = 2
# (family, norm of the convolutions, pre-norm blocks): base, large, data2vec.
MODELS = {
    "base": ("hubert", "group", False),
    "large": ("wav2vec2", "layer", True),
    "data2vec": ("data2vec-audio", "layer", False),
}


# Names in transformers, fairseq and torchaudio, of weights and biases.
FRONT = [
    ("feature_projection.layer_norm", "layer_norm", "encoder.feature_projection.layer_norm"),
    ("feature_projection.projection", "post_extract_proj", "encoder.feature_projection.projection"),
    ("encoder.layer_norm", "encoder.layer_norm", "encoder.transformer.layer_norm"),
]
BLOCK = [
    ("attention.k_proj", "self_attn.k_proj", "attention.k_proj"),
    ("attention.v_proj", "self_attn.v_proj", "attention.v_proj"),
    ("attention.q_proj", "self_attn.q_proj", "attention.q_proj"),
    ("attention.out_proj", "self_attn.out_proj", "attention.out_proj"),
    ("layer_norm", "self_attn_layer_norm", "layer_norm"),
    ("feed_forward.intermediate_dense", "fc1", "feed_forward.intermediate_dense"),
    ("feed_forward.output_dense", "fc2", "feed_forward.output_dense"),
    ("final_layer_norm", "final_layer_norm", "final_layer_norm"),
]
POSITIONS = [
    ("conv.bias", "encoder.pos_conv.0.bias", "encoder.transformer.pos_conv_embed.conv.bias"),
    (
        "conv.parametrizations.weight.original0",
        "encoder.pos_conv.0.weight_g",
        "encoder.transformer.pos_conv_embed.conv.weight_g",
    ),
    (
        "conv.parametrizations.weight.original1",
        "encoder.pos_conv.0.weight_v",
        "encoder.transformer.pos_conv_embed.conv.weight_v",
    ),
]


def names(toolkit: str, model: str, conv_bias: bool = False) -> dict[str, str]:
    """Return name in transformers -> name in the toolkit, of every weight of a model without wrappers."""
    pick = ("fairseq", "torchaudio").index(toolkit)
    blocks = ("encoder.layers", "encoder.transformer.layers")[pick]
    group_norm = model == "base"
    modules = {ours: theirs[pick] for ours, *theirs in FRONT}
    for i in range(7):
        ours = f"feature_extractor.conv_layers.{i}"
        norm = ("2" if group_norm else "2.1", "layer_norm")[pick]
        if i == 0 or not group_norm:
            modules[f"{ours}.layer_norm"] = f"{ours}.{norm}"
    for i in range(LAYERS):
        for ours, *theirs in BLOCK:
            modules[f"encoder.layers.{i}.{ours}"] = f"{blocks}.{i}.{theirs[pick]}"
    if model == "data2vec":
        for i in range(3):
            modules[f"encoder.pos_conv_embed.layers.{i}.conv"] = f"encoder.pos_conv.{i}.0"
    found = {f"{ours}.{end}": f"{theirs}.{end}" for ours, theirs in modules.items() for end in ("weight", "bias")}
    for i in range(7):
        for end in ("weight", "bias") if conv_bias else ("weight",):
            ours = f"feature_extractor.conv_layers.{i}"
            found[f"{ours}.conv.{end}"] = f"{ours}.{('0', 'conv')[pick]}.{end}"
    if model != "data2vec":
        found |= {f"encoder.pos_conv_embed.{ours}": theirs[pick] for ours, *theirs in POSITIONS}
    return found


def tiny(model: str, **options):
    family, norm, stable = MODELS[model]
    # Two heads of 64 channels, so that the convention holds.
    options = {"hidden_size": 128, "num_attention_heads": 2, **options}
    module = ssl_model(family, feat_extract_norm=norm, stable=stable, num_layers=LAYERS, **options)
    with torch.no_grad():  # norms and biases away from their initial 1 and 0
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def export(module, toolkit: str, model: str, prefix: str = "", conv_bias: bool = False) -> dict[str, torch.Tensor]:
    state = module.state_dict()
    state.pop("masked_spec_embed")
    renamed = {prefix + theirs: state.pop(ours).clone() for ours, theirs in names(toolkit, model, conv_bias).items()}
    assert not state, f"the list of this test lacks {list(state)}"
    return renamed


def embeddings(teacher) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    waves = [0.3 * torch.randn(n, generator=generator) + 0.05 for n in (6000, 9000)]
    return teacher.extract(Batch.from_audio(waves)).arrays["embeddings"]


def expected(module, model: str, layer: int = -1) -> torch.Tensor:
    identity = {"teacher": "reference", "source": "memory", "weights_sha256": "0"}
    precision = Precision(device=torch.device("cpu"))
    normalize = MODELS[model][1] == "layer"
    return embeddings(
        SpeechSslTeacher(module, layer=layer, normalize_audio=normalize, precision=precision, identity=identity)
    )


def load(path, layer=-1):
    return build_teacher(TeacherConfig(teacher=str(path), layer=layer, teacher_device="cpu"))


# Toolkit, model, what wraps it, and the shapes of weights that a teacher does without.
FORMS = [
    ("fairseq", "base", "", {"mask_emb": (128,), "final_proj.weight": (4, 128), "label_embs_concat": (9, 4)}),
    ("fairseq", "base", "w2v_encoder.w2v_model.", {"w2v_encoder.proj.weight": (5, 128), "w2v_encoder.proj.bias": (5,)}),
    ("fairseq", "large", "", {"quantizer.vars": (1, 4, 8), "quantizer.weight_proj.bias": (4,), "project_q.bias": (8,)}),
    ("fairseq", "large", "w2v_model.", {"w2v_model.mask_emb": (128,), "proj.weight": (5, 128)}),
    ("fairseq", "data2vec", "", {"mask_emb": (128,), "final_proj.0.weight": (128, 128)}),
    ("torchaudio", "base", "", {"aux.weight": (29, 128), "aux.bias": (29,)}),
    ("torchaudio", "large", "", {}),
    ("torchaudio", "base", "wav2vec2.", {
        "mask_generator.mask_embedding": (128,),
        "logit_generator.final_proj.bias": (4,),
        "logit_generator.label_embeddings": (9, 4),
    }),
]  # fmt: skip


@pytest.mark.parametrize(("toolkit", "model", "prefix", "unused"), FORMS)
def test_a_state_dict_gives_the_embeddings_of_its_model(tmp_path, toolkit, model, prefix, unused):
    module = tiny(model)
    state = export(module, toolkit, model, prefix) | {name: torch.randn(shape) for name, shape in unused.items()}
    torch.save({"model": state, "args": None, "cfg": {"model": {"encoder_layers": LAYERS}}}, tmp_path / "model.pt")
    teacher = load(tmp_path / "model.pt")
    assert torch.equal(embeddings(teacher), expected(module, model))
    stated = teacher.provenance()
    assert stated["state_dict_of"] == toolkit and stated["source"] == "file"
    assert stated["conventions"]["num_attention_heads"] == 2
    assert ("pre-norm" in stated["layer_convention"]) == (model == "large")


def test_the_other_forms_of_the_file_are_read_too(tmp_path):
    module = tiny("base")
    state, wanted = export(module, "fairseq", "base"), None
    torch.save(state, tmp_path / "plain.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state}, tmp_path / "wrapped.bin")
    save_file(state, tmp_path / "same.safetensors")
    # A model saved since PyTorch 2 has other names for the weight norm, one saved in half precision other values.
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        state[f"encoder.pos_conv.0.parametrizations.weight.{new}"] = state.pop(f"encoder.pos_conv.0.{old}")
    torch.save(state, tmp_path / "new_names.pt")
    wanted = expected(module, "base", layer=1)
    for path in sorted(tmp_path.iterdir()):
        assert torch.equal(embeddings(load(path, layer=1)), wanted), path.name
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.pt")
    assert torch.allclose(embeddings(load(tmp_path / "half.pt", layer=1)), wanted, atol=0.05)


def test_biases_of_the_convolutions_are_read_from_their_names(tmp_path):
    module = tiny("large", conv_bias=True)
    torch.save(export(module, "fairseq", "large", conv_bias=True), tmp_path / "model.pt")
    assert torch.equal(embeddings(load(tmp_path / "model.pt")), expected(module, "large"))


def test_what_the_tensors_do_not_tell_is_stated_and_can_be_overridden(tmp_path):
    module = tiny("large", num_attention_heads=8, do_stable_layer_norm=False)
    torch.save(export(module, "fairseq", "large"), tmp_path / "model.pt")
    by_convention = load(tmp_path / "model.pt")
    assert by_convention.provenance()["conventions"] == {
        "num_attention_heads": 2,
        "conv_stride": [5, 2, 2, 2, 2, 2, 2],
        "do_normalize": True,
        "do_stable_layer_norm": True,
    }
    wanted = expected(module, "large")
    assert not torch.allclose(embeddings(by_convention), wanted, atol=1e-3)
    options = {"num_attention_heads": 8, "do_stable_layer_norm": False}
    (tmp_path / "model.json").write_text(json.dumps(options))
    teacher = load(tmp_path / "model.pt")
    assert torch.equal(embeddings(teacher), wanted)
    assert options.items() <= teacher.provenance()["conventions"].items()
    for wrong, message in (
        ({"num_attention_heads": 3}, "num_attention_heads is 3; it must divide the 128 channels"),
        ({"conv_stride": [5, 2]}, "there are 7 convolutions"),
        ({"hidden_size": 64}, "hidden_size cannot be set there"),
        (["do_normalize"], r"model\.json is no object of options; write"),
    ):
        (tmp_path / "model.json").write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / "model.pt")


def test_every_name_that_does_not_fit_is_named(tmp_path):
    state = export(tiny("base"), "fairseq", "base")
    path = tmp_path / "model.pt"

    def refused(changed: dict) -> str:
        torch.save(changed, path)
        with pytest.raises(DataError) as caught:
            load(path)
        return str(caught.value)

    # WavLM's relative positions are not HuBERT's.
    foreign = {f"encoder.layers.{i}.self_attn.grep_a": torch.ones(1) for i in range(LAYERS)}
    message = refused({**state, **foreign})
    assert all(name in message for name in foreign) and "2 of" in message
    gone = ["encoder.layers.1.fc2.bias", "encoder.layers.0.self_attn.k_proj.weight"]
    message = refused({name: tensor for name, tensor in state.items() if name not in gone})
    assert "no weights for encoder.layers.1.feed_forward.output_dense.bias" in message
    assert "no weights for encoder.layers.0.attention.k_proj.weight" in message
    message = refused({name: tensor for name, tensor in state.items() if not name.startswith("post_extract_proj")})
    assert "no tensor 'feature_projection.projection.weight'" in message
    message = refused({**state, "encoder.layers.1.fc1.bias": torch.ones(7)})
    assert "encoder.layers.1.feed_forward.intermediate_dense.bias has shape (7,)" in message
    assert "without tensors" in refused({"epoch": 3})


def test_a_file_with_objects_of_other_classes_names_the_remedy(tmp_path):
    path = tmp_path / "hubert.pt"
    torch.save({"model": export(tiny("base"), "fairseq", "base"), "args": argparse.Namespace(arch="hubert")}, path)
    with pytest.raises(ConfigError, match=r"argparse.Namespace.*only if you trust.*\['model'\].*hubert_tensors.pt"):
        load(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"hubert\.pt is damaged"):
        load(path)
    (tmp_path / "model.onnx").write_text("x")
    with pytest.raises(ConfigError, match=r"files of tensors end in .pt"):
        load(tmp_path / "model.onnx")
