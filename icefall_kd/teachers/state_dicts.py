"""HuBERT, wav2vec 2.0 and data2vec from the state dicts of fairseq and torchaudio.

A file of tensors has no configuration.  What follows from names and shapes is read from them: layers, sizes, the
norms and biases of the convolutions, the positional convolutions.  The rest is convention, written into the
provenance, and overridden by a JSON file of transformers' option names beside the weights (``hubert.pt``:
``hubert.json``):

* heads of 64 channels each (``num_attention_heads``), as in every published model;
* pre-norm blocks where every convolution has a LayerNorm (``do_stable_layer_norm``; both layouts have the same
  names): so in all published large models, and the base models have a GroupNorm and post-norm blocks;
* strides 5, 2, 2, 2, 2, 2, 2 (``conv_stride``), and GELU;
* audio of zero mean and unit variance where the convolutions have LayerNorms (``do_normalize``).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.files import read_json
from icefall_kd.train.checkpoint import load_tensors

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
HEAD_DIM = 64
STRIDES = (5, 2, 2, 2, 2, 2, 2)

# What wraps the model: fine-tuned fairseq models, torchaudio's models in pre-training.
_PREFIXES = ("w2v_encoder.w2v_model.", "w2v_model.", "wav2vec2.")
# What only training or decoding uses, by the beginning of the name.
_UNUSED = {
    "fairseq": (
        *("mask_emb", "final_proj.", "label_embs_concat", "quantizer.", "project_q.", "project_inp.", "target_glu."),
        *("w2v_encoder.proj.", "proj.", "_ema"),
    ),
    "torchaudio": ("aux.", "encoder.readout.", "mask_generator.", "logit_generator."),
}  # fmt: skip
_CONV = r"feature_extractor\.conv_layers\.(\d+)"
_LAYER = r"encoder\.(?:transformer\.)?layers\.(\d+)\."
_WEIGHT = r"\.(weight|bias)$"
# Name without its wrapper -> name in transformers.
_RULES = {
    "fairseq": (
        (_CONV + r"\.0" + _WEIGHT, r"feature_extractor.conv_layers.\1.conv.\2"),
        # A GroupNorm stands in the block itself, a LayerNorm between two transpositions.
        (_CONV + r"\.2(?:\.1)?" + _WEIGHT, r"feature_extractor.conv_layers.\1.layer_norm.\2"),
        (r"layer_norm" + _WEIGHT, r"feature_projection.layer_norm.\1"),
        (r"post_extract_proj" + _WEIGHT, r"feature_projection.projection.\1"),
        (r"encoder\.pos_conv\.0\.(bias|weight\w*|parametrizations\..*)$", r"encoder.pos_conv_embed.conv.\1"),
        (r"encoder\.pos_conv\.(\d+)\.0" + _WEIGHT, r"encoder.pos_conv_embed.layers.\1.conv.\2"),
        (r"encoder\.layer_norm" + _WEIGHT, r"encoder.layer_norm.\1"),
        (_LAYER + r"self_attn\.([kvq]|out)_proj" + _WEIGHT, r"encoder.layers.\1.attention.\2_proj.\3"),
        (_LAYER + r"self_attn_layer_norm" + _WEIGHT, r"encoder.layers.\1.layer_norm.\2"),
        (_LAYER + r"fc1" + _WEIGHT, r"encoder.layers.\1.feed_forward.intermediate_dense.\2"),
        (_LAYER + r"fc2" + _WEIGHT, r"encoder.layers.\1.feed_forward.output_dense.\2"),
        (_LAYER + r"final_layer_norm" + _WEIGHT, r"encoder.layers.\1.final_layer_norm.\2"),
    ),
    # torchaudio names the inside of a block as transformers does, and wraps the blocks once more.
    "torchaudio": (
        (r"(feature_extractor\.conv_layers\.\d+\.(?:conv|layer_norm)\.\w+)$", r"\1"),
        (r"encoder\.(feature_projection\.\w+\.\w+)$", r"\1"),
        (r"encoder\.transformer\.(pos_conv_embed\.conv\..*)$", r"encoder.\1"),
        (r"encoder\.transformer\.(layer_norm\.\w+)$", r"encoder.\1"),
        (_LAYER + r"((?:attention|feed_forward)\.\w+\.\w+|(?:final_)?layer_norm\.\w+)$", r"encoder.layers.\1.\2"),
    ),
}  # fmt: skip
# Names of the two factors of a weight norm, before and since PyTorch 2.
_WEIGHT_NORM = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


@dataclass(frozen=True, kw_only=True)
class StateDict:
    """A model as transformers wants it."""

    origin: str
    """"fairseq" or "torchaudio"."""
    model_type: str
    """"hubert", "wav2vec2" or "data2vec-audio"."""
    config: dict[str, Any]
    """Options of the transformers configuration."""
    do_normalize: bool
    """Whether audio gets zero mean and unit variance."""
    tensors: dict[str, Tensor]
    """Float32 tensors by transformers' names."""
    conventions: dict[str, Any]
    """Options that names and shapes do not tell: they come from convention or from the JSON file."""


def read_state_dict(path: Path) -> StateDict:
    """Recognise, rename and describe the state dict of a file.

    Raises:
        DataError: The file cannot be read, or its tensors are not those of such a model: all names are listed.
        ConfigError: It needs unpickling of more than tensors, or the options beside it do not fit.
    """
    beside = path.with_suffix(".json")
    overrides = read_json(beside) if beside.is_file() else {}
    if not isinstance(overrides, dict):
        raise ConfigError(f'{beside} is no object of options; write {{"num_attention_heads": 12}}, or rename it')
    return convert(load_tensors(path), str(path), overrides)


def convert(tensors: dict[str, Tensor], where: str, overrides: dict[str, Any] | None = None) -> StateDict:
    """Rename a state dict and derive its configuration.

    Args:
        tensors: Name -> tensor, as fairseq or torchaudio saves them.
        where: What to call it in messages.
        overrides: Options of the transformers configuration, and ``do_normalize``.
    Raises:
        DataError: Names that no rule knows, or that are missing to derive the configuration.
        ConfigError: An override that such a configuration does not have.
    """
    origin = "torchaudio" if any("encoder.transformer.layers." in name for name in tensors) else "fairseq"
    renamed = _rename(tensors, origin, where)
    shapes = {name: tuple(tensor.shape) for name, tensor in renamed.items()}
    try:
        sizes = _sizes(shapes)
    except KeyError as error:
        raise DataError(
            f"{where}: no tensor {error} among the {len(shapes)} that have {origin}'s names of a HuBERT, wav2vec 2.0 "
            "or data2vec model; is the file complete?"
        ) from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise DataError(f"{where}: convolutions are (out, in, kernel), projections (out, in); found {shapes}") from None
    model_type = _model_type(tensors, shapes)
    conventions = _conventions(sizes, model_type) | (overrides or {})
    _check_conventions(conventions, sizes, model_type, where)
    if model_type == "data2vec-audio":
        del sizes["feat_extract_norm"]  # it has no such option
    config = {**sizes, **conventions}
    return StateDict(
        origin=origin,
        model_type=model_type,
        do_normalize=bool(config.pop("do_normalize")),
        config=config,
        tensors={name: tensor.float() for name, tensor in renamed.items()},
        conventions=conventions,
    )


def _conventions(sizes: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Return what published models of these sizes have in common, and no tensor tells."""
    is_large = sizes["feat_extract_norm"] == "layer"
    found = {
        "num_attention_heads": max(sizes["hidden_size"] // HEAD_DIM, 1),
        "conv_stride": list(STRIDES[: len(sizes["conv_dim"])]),
        "do_normalize": is_large,
    }
    return found if model_type == "data2vec-audio" else {**found, "do_stable_layer_norm": is_large}


def _check_conventions(conventions: dict[str, Any], sizes: dict[str, Any], model_type: str, where: str) -> None:
    known, beside = _conventions(sizes, model_type), Path(where).with_suffix(".json")
    if unknown := sorted(set(conventions) - set(known)):
        raise ConfigError(
            f"{beside}: {', '.join(unknown)} cannot be set there; names and shapes of the tensors decide everything "
            f"but {', '.join(known)}"
        )
    heads, strides = conventions["num_attention_heads"], conventions["conv_stride"]
    if not isinstance(heads, int) or heads < 1 or sizes["hidden_size"] % heads:
        raise ConfigError(
            f"{where}: num_attention_heads is {heads!r}; it must divide the {sizes['hidden_size']} channels (set it "
            f"in {beside})"
        )
    if (
        not isinstance(strides, list)
        or len(strides) != len(sizes["conv_dim"])
        or not all(isinstance(x, int) and x > 0 for x in strides)
    ):
        raise ConfigError(
            f"{where}: conv_stride is {strides!r}; there are {len(sizes['conv_dim'])} convolutions (set it in {beside})"
        )


def _rename(tensors: dict[str, Tensor], origin: str, where: str) -> dict[str, Tensor]:
    renamed, unknown = {}, []
    for name, tensor in tensors.items():
        inner = next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p)), name)
        if inner.startswith(_UNUSED[origin]) or name.startswith(_UNUSED[origin]):
            continue
        target = _target(inner, origin)
        if target is None or target in renamed:
            unknown.append(name)
        else:
            renamed[target] = tensor
    if unknown:
        raise DataError(
            f"{where}: {len(unknown)} of {len(tensors)} tensors have names that are none of {origin}'s HuBERT, "
            f"wav2vec 2.0 or data2vec: {', '.join(unknown)}; other models are read as transformers folders"
        )
    return renamed


def _target(name: str, origin: str) -> str | None:
    for pattern, target in _RULES[origin]:
        match = re.match(pattern, name)
        if match:
            stem, _, last = match.expand(target).rpartition(".")
            return f"{stem}.{_WEIGHT_NORM.get(last, last)}"
    return None


def _sizes(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return what the shapes tell of a configuration; KeyError for a tensor that is needed and is not there."""
    convs = range(_count(shapes, r"feature_extractor\.conv_layers\.(\d+)\.conv\.weight"))
    kernels = [shapes[f"feature_extractor.conv_layers.{i}.conv.weight"] for i in convs]
    hidden_size = shapes["feature_projection.projection.weight"][0]
    norm_everywhere = all(f"feature_extractor.conv_layers.{i}.layer_norm.weight" in shapes for i in convs)
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(shapes, r"encoder\.layers\.(\d+)\.attention\.q_proj\.weight"),
        "intermediate_size": shapes["encoder.layers.0.feed_forward.intermediate_dense.weight"][0],
        "conv_dim": [k[0] for k in kernels],
        "conv_kernel": [k[2] for k in kernels],
        "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in shapes,
        "feat_extract_norm": "layer" if norm_everywhere else "group",
        **_positions(shapes, hidden_size),
    }


def _positions(shapes: dict[str, tuple[int, ...]], hidden_size: int) -> dict[str, int]:
    """Return the sizes of the positional convolutions, whose weights are (C, C / groups, kernel)."""
    stacked = _count(shapes, r"encoder\.pos_conv_embed\.layers\.(\d+)\.conv\.weight", least=0)
    if stacked:
        _, width, kernel = shapes["encoder.pos_conv_embed.layers.0.conv.weight"]
        sizes = {"num_conv_pos_embeddings": stacked, "conv_pos_kernel_size": kernel}
    else:
        _, width, kernel = shapes["encoder.pos_conv_embed.conv.parametrizations.weight.original1"]
        sizes = {"num_conv_pos_embeddings": kernel}
    return {**sizes, "num_conv_pos_embedding_groups": hidden_size // width}


def _count(shapes: dict[str, tuple[int, ...]], pattern: str, least: int = 1) -> int:
    numbers = {int(match.group(1)) for name in shapes if (match := re.fullmatch(pattern, name))}
    wanted = set(range(max(len(numbers), least)))
    if absent := sorted(wanted - numbers):
        raise KeyError(pattern.replace("\\", "").replace("(d+)", str(absent[0])))
    return len(numbers)


def _model_type(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> str:
    """Name the family; HuBERT and wav2vec 2.0 compute the same, and fine-tuned ones cannot be told apart."""
    if any(name.startswith("encoder.pos_conv_embed.layers.") for name in shapes):
        return "data2vec-audio"
    contrastive = any("quantizer." in name or "project_q." in name for name in tensors)
    return "wav2vec2" if contrastive else "hubert"
