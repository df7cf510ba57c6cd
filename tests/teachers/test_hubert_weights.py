"""HuBERT's weights from transformers, fairseq, torchaudio and our own trainings become one encoder and head."""

import json

import pytest
import torch
import transformers

from icefall_kd.cli import config_to_dict
from icefall_kd.config import LoopConfig, ModelConfig, TrainConfig
from icefall_kd.config.hubert import HubertConfig
from icefall_kd.config.ssl import SslConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.models.hubert import HubertEncoder
from icefall_kd.teachers.hubert_weights import _from_transformers, load_hubert_weights
from icefall_kd.train.checkpoint import save_checkpoint
from tests.teachers.test_state_dicts import export, tiny

HEADS = {
    "fairseq": ("final_proj.weight", "final_proj.bias", "label_embs_concat"),
    "torchaudio": (
        "logit_generator.final_proj.weight",
        "logit_generator.final_proj.bias",
        "logit_generator.label_embeddings",
    ),
}


def states(weights, audio):
    with torch.no_grad():
        out = weights.new_encoder().eval()(audio, torch.tensor([audio.shape[1]] * len(audio)), taps=(0, 1, 2))
    return [out.taps[i] for i in (0, 1, 2)]


def check_states(weights, module):
    audio = 0.3 * torch.randn(2, 6000, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        due = module(audio, output_hidden_states=True).hidden_states
    for found, expected in zip(states(weights, audio), due, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "w2v_encoder.w2v_model.", "wav2vec2."])
def test_a_state_dict_gives_the_states_of_its_model_and_its_clusters(tmp_path, prefix):
    module = tiny("base")
    toolkit = "torchaudio" if prefix == "wav2vec2." else "fairseq"
    state = export(module, toolkit, "base", prefix)
    outer = "" if toolkit == "torchaudio" else prefix
    weight, bias, embeddings = torch.randn(24, 128), torch.randn(24), torch.randn(9, 24)
    head = dict(zip(HEADS[toolkit], (weight, bias, embeddings), strict=True))
    torch.save({"model": state | {outer + name: x for name, x in head.items()}}, tmp_path / "hubert.pt")
    weights = load_hubert_weights(tmp_path / "hubert.pt")
    check_states(weights, module)
    assert (weights.num_layers, weights.dim, weights.feedforward_dim, weights.num_heads) == (2, 128, 48, 2)
    assert (weights.extractor_norm, weights.structure, weights.normalize_audio) == ("default", "base", False)
    assert not any(p.requires_grad for p in weights.head.parameters())
    # Eq. 3 of HuBERT in plain loops.
    hidden = torch.randn(3, 128)
    logits = weights.head(hidden)
    for t in range(3):
        e = weight @ hidden[t] + bias
        for k in range(9):
            cosine = float(e @ embeddings[k] / (e.norm() * embeddings[k].norm()))
            assert abs(float(logits[t, k]) - cosine / 0.1) < 1e-3


def test_a_folder_of_transformers_gives_its_states(tmp_path):
    module = tiny("base")
    module.save_pretrained(tmp_path)
    weights = load_hubert_weights(str(tmp_path))
    check_states(weights, module)
    assert weights.head is None and weights.layer_convention.startswith("H[0]: input of the first layer")
    assert weights.sha256 and str(tmp_path) in weights.source
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    assert load_hubert_weights(tmp_path).normalize_audio


def test_a_model_without_norm_behind_the_convolutions_is_read(tmp_path):
    module = tiny("base", feat_proj_layer_norm=False)
    module.save_pretrained(tmp_path)
    weights = load_hubert_weights(tmp_path)
    assert weights.structure == "shallow_wide"
    check_states(weights, module)


def save_exp_dir(folder, objective="ssl", front_end="fbank", **loop):
    config = TrainConfig(
        system="hubert",
        objective=objective,
        model=ModelConfig(num_encoder_layers=2, encoder_dim=32, num_heads=4, feedforward_dim=48),
        hubert=HubertConfig(structure="deep_thin", conv_pos=8, conv_pos_groups=4),
        ssl=SslConfig(front_end=front_end, extractor_norm="default", extractor_channels=16),
        loop=LoopConfig(exp_dir=folder, **loop),
    )
    torch.manual_seed(7)
    encoder = HubertEncoder(config.model, config.hubert, config.ssl)
    model = {f"model.encoder.{name}": x for name, x in encoder.state_dict().items()}
    model |= {
        "model.cluster_head.final_proj.weight": torch.randn(8, 32),
        "model.cluster_head.final_proj.bias": torch.randn(8),
        "model.cluster_head.label_embs": torch.randn(5, 8),
        "model.mask_embedding": torch.randn(32),
    }
    saved = {"config": config_to_dict(config), "train": {"step": 1}, "tokenizer_hash": ""}
    save_checkpoint(folder / "epoch-1.pt", {"model": model, **saved})
    return encoder.eval(), model


@pytest.mark.parametrize("front_end", ["fbank", "waveform"])
def test_a_training_of_ours_gives_its_encoder_and_clusters(tmp_path, front_end):
    encoder, model = save_exp_dir(tmp_path, front_end=front_end)
    weights = load_hubert_weights(tmp_path)
    audio = torch.randn(1, 5000)
    with torch.no_grad():
        due = encoder(audio, torch.tensor([5000]), taps=(0, 1, 2)).taps
    for i, found in enumerate(states(weights, audio)):
        torch.testing.assert_close(found, due[i])
    assert torch.equal(weights.head.label_embs, model["model.cluster_head.label_embs"])
    assert weights.front_end == front_end and "epoch-1.pt" in weights.source


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("large", {}, "pre-norm"),
        ("base", {"conv_stride": (5, 2, 2, 2, 2, 2, 1)}, "its convolutions are"),
        ("base", {"conv_dim": (16,) * 6 + (32,)}, r"\[16, 32\] channels"),
    ],
)
def test_models_that_our_layers_do_not_compute_are_refused(tmp_path, model, options, reason):
    module = tiny(model, **options) if model == "base" else _large_hubert()
    module.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        load_hubert_weights(tmp_path)


def _large_hubert():
    from tests.teachers.tiny_models import ssl_model

    return ssl_model("hubert", feat_extract_norm="layer", stable=True, num_layers=2)


def test_pre_norm_state_dicts_and_other_families_are_refused(tmp_path):
    # HuBERT large has wav2vec 2.0's names, so that a file without a quantiser counts as HuBERT.
    torch.save(export(tiny("large"), "fairseq", "large"), tmp_path / "large.pt")
    with pytest.raises(ConfigError, match="post-norm, as in the base models"):
        load_hubert_weights(tmp_path / "large.pt")
    torch.save(export(tiny("data2vec"), "fairseq", "data2vec"), tmp_path / "data2vec.pt")
    with pytest.raises(ConfigError, match="is a data2vec-audio model"):
        load_hubert_weights(tmp_path / "data2vec.pt")


def test_a_state_dict_that_lacks_tensors_is_refused(tmp_path):
    state = export(tiny("base"), "fairseq", "base")
    del state["encoder.layers.1.fc2.bias"]
    torch.save(state, tmp_path / "hubert.pt")
    with pytest.raises(DataError, match=r"output_dense\.bias: not there"):
        load_hubert_weights(tmp_path / "hubert.pt")


def test_several_sets_of_clusters_are_refused(tmp_path):
    state = export(tiny("base"), "fairseq", "base")
    heads = {"final_proj.weight": (16, 128), "final_proj.bias": (16,), "label_embs_concat": (9, 8)}
    torch.save(state | {name: torch.randn(shape) for name, shape in heads.items()}, tmp_path / "hubert.pt")
    with pytest.raises(ConfigError, match="several sets of clusters"):
        load_hubert_weights(tmp_path / "hubert.pt")


def test_a_training_of_another_system_is_refused(tmp_path):
    config = TrainConfig(loop=LoopConfig(exp_dir=tmp_path))
    saved = {"config": config_to_dict(config), "train": {"step": 1}, "tokenizer_hash": ""}
    save_checkpoint(tmp_path / "epoch-1.pt", {"model": {"model.encoder.x": torch.ones(1)}, **saved})
    with pytest.raises(ConfigError, match="--system mvq; a model of --system hubert is needed"):
        load_hubert_weights(tmp_path)


# config.json of TencentGameMate/chinese-hubert-base as transformers 4.30 wrote it, without what is of other tasks.
CHINESE_BASE = {
    "architectures": ["HubertModel"],
    "model_type": "hubert",
    "activation_dropout": 0.1,
    "apply_spec_augment": True,
    "attention_dropout": 0.1,
    "conv_bias": False,
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "do_stable_layer_norm": False,
    "feat_extract_activation": "gelu",
    "feat_extract_norm": "group",
    "feat_proj_dropout": 0.0,
    "feat_proj_layer_norm": True,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "layerdrop": 0.1,
    "mask_time_prob": 0.05,
    "num_attention_heads": 12,
    "num_conv_pos_embedding_groups": 16,
    "num_conv_pos_embeddings": 128,
    "num_feat_extract_layers": 7,
    "num_hidden_layers": 12,
    "torch_dtype": "float16",
    "transformers_version": "4.30.2",
}


def test_a_folder_like_that_of_chinese_hubert_base_is_read(tmp_path):
    """Its weights are a pytorch_model.bin with the names that weight norm had; here random ones, of two layers."""
    config = {**CHINESE_BASE, "num_hidden_layers": 2}
    torch.manual_seed(1)
    module = transformers.HubertModel(transformers.HubertConfig(**config)).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # as float16 holds them
            parameter.copy_(parameter.half())
    ends = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = {}
    for name, value in module.state_dict().items():
        for new, old in ends.items():
            name = name.replace(new, old)
        state[name] = value.half()
    assert {name for name in state if "pos_conv" in name} == {
        f"encoder.pos_conv_embed.conv.{name}" for name in ("bias", "weight_g", "weight_v")
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, "sampling_rate": 16000}))
    weights = load_hubert_weights(tmp_path)
    check_states(weights, module)
    assert weights.normalize_audio and weights.head is None and weights.extractor_norm == "default"
    assert all(x.dtype == torch.float32 for x in weights.encoder.values())


def test_all_layers_of_chinese_hubert_base_are_those_of_a_base_model():
    with torch.device("meta"):
        state = transformers.HubertModel(transformers.HubertConfig(**CHINESE_BASE)).state_dict()
    weights = _from_transformers(CHINESE_BASE, state, True, None, {"source": "a folder", "sha256": "0"}).checked()
    assert (weights.num_layers, weights.dim, weights.feedforward_dim, weights.num_heads) == (12, 768, 3072, 12)
    assert (weights.structure, weights.conv_pos, weights.conv_pos_groups) == ("base", 128, 16)
    assert f"{sum(x.numel() for x in weights.encoder.values()) / 1e6:.2f}" == "94.37"
