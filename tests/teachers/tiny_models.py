"""Small random-weight models and model folders for the teacher tests."""

import struct
from pathlib import Path

import numpy as np
import torch
import transformers

CONV = {
    "conv_dim": (16,) * 7,
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
}
CLASSES = {
    "hubert": (transformers.HubertConfig, transformers.HubertModel),
    "wavlm": (transformers.WavLMConfig, transformers.WavLMModel),
    "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
    "data2vec-audio": (transformers.Data2VecAudioConfig, transformers.Data2VecAudioModel),
}


def ssl_model(family: str, *, feat_extract_norm: str, stable: bool, num_layers: int = 3, **options):
    """Return a random model whose activations are far from degenerate."""
    config_class, model_class = CLASSES[family]
    norms = {"feat_extract_norm": feat_extract_norm, "do_stable_layer_norm": stable}
    positions = {"num_conv_pos_embeddings": 16}
    if family == "data2vec-audio":  # knows neither choice; three convolutions of 12 frames
        norms, positions = {}, {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 12}
    config = config_class(
        num_hidden_layers=num_layers,
        intermediate_size=48,
        num_conv_pos_embedding_groups=4,
        initializer_range=0.2,
        **{"hidden_size": 32, "num_attention_heads": 4, **CONV, **norms, **positions, **options},
    )
    return model_class(config).eval()


def whisper_config(**options) -> "transformers.WhisperConfig":
    sizes = {
        "vocab_size": 40,
        "num_mel_bins": 80,
        "d_model": 64,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 1,
        "decoder_attention_heads": 1,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_target_positions": 12,
        "init_std": 0.2,
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    return transformers.WhisperConfig(**{**sizes, **tokens, **options})


def whisper_model(**options) -> "transformers.WhisperForConditionalGeneration":
    model = transformers.WhisperForConditionalGeneration(whisper_config(**options)).eval()
    with torch.no_grad():  # biases and norms away from their initial 0 and 1
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


_CODES = {"f4": 0, "i1": 1, "i2": 2, "i4": 3, "f2": 4}


def ct2_variables(model) -> list[tuple[str, np.ndarray]]:
    """Return the CTranslate2 variables of a transformers Whisper, written from the format's description."""
    state = {k: v.detach().float().numpy() for k, v in model.state_dict().items()}
    out = [
        ("encoder/num_heads", np.array(model.config.encoder_attention_heads, "<i2")),
        ("decoder/num_heads", np.array(model.config.decoder_attention_heads, "<i2")),
        ("decoder/embeddings/weight", state["model.decoder.embed_tokens.weight"]),
    ]
    for side, count in (("encoder", model.config.encoder_layers), ("decoder", model.config.decoder_layers)):
        out.append((f"{side}/position_encodings/encodings", state[f"model.{side}.embed_positions.weight"]))
        out += _norm(state, f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(count):
            source, target = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            out += _norm(state, f"{source}.self_attn_layer_norm", f"{target}/self_attention/layer_norm")
            out += _stack(state, f"{source}.self_attn", "qkv", f"{target}/self_attention/linear_0")
            out += _stack(state, f"{source}.self_attn.out_proj", "", f"{target}/self_attention/linear_1")
            out += _norm(state, f"{source}.final_layer_norm", f"{target}/ffn/layer_norm")
            out += _stack(state, f"{source}.fc1", "", f"{target}/ffn/linear_0")
            out += _stack(state, f"{source}.fc2", "", f"{target}/ffn/linear_1")
            if side == "decoder":
                out += _norm(state, f"{source}.encoder_attn_layer_norm", f"{target}/attention/layer_norm")
                out += _stack(state, f"{source}.encoder_attn", "q", f"{target}/attention/linear_0")
                out += _stack(state, f"{source}.encoder_attn", "kv", f"{target}/attention/linear_1")
                out += _stack(state, f"{source}.encoder_attn.out_proj", "", f"{target}/attention/linear_2")
    for conv in ("conv1", "conv2"):
        out += _stack(state, f"model.encoder.{conv}", "", f"encoder/{conv}")
    return out


def _norm(state, source, target):
    return [(f"{target}/gamma", state[f"{source}.weight"]), (f"{target}/beta", state[f"{source}.bias"])]


def _stack(state, source, letters, target):
    names = [f"{source}.{x}_proj" for x in letters] or [source]
    weights = [state[f"{n}.weight"] for n in names]
    biases = [state.get(f"{n}.bias", np.zeros(len(w), np.float32)) for n, w in zip(names, weights, strict=True)]
    return [(f"{target}/weight", np.concatenate(weights)), (f"{target}/bias", np.concatenate(biases))]


def ct2_bytes(variables, aliases=(), version: int = 6, spec: str = "WhisperSpec") -> bytes:
    def name(text: str) -> bytes:
        raw = text.encode() + b"\0"
        return struct.pack("<H", len(raw)) + raw

    out = [struct.pack("<I", version), name(spec), struct.pack("<II", 3, len(variables))]
    for key, value in variables:
        value = np.asarray(value)
        code = _CODES[value.dtype.str[1:]]
        out += [name(key), struct.pack("<B", value.ndim), struct.pack(f"<{value.ndim}I", *value.shape)]
        out += [struct.pack("<BI", code, value.nbytes), value.tobytes()]
    out.append(struct.pack("<I", len(aliases)))
    for alias, target in aliases:
        out += [name(alias), name(target)]
    return b"".join(out)


ALIASES = [("decoder/projection/weight", "decoder/embeddings/weight")]


def write_ct2(folder: Path, model) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_bytes(ct2_bytes(ct2_variables(model), ALIASES))
    return folder
