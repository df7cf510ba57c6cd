"""The weights of a HuBERT model as our encoder names them, from wherever they come: what a student starts from, and
what a teacher's cluster posterior is computed with.

Read are an exp_dir of ours (--system hubert), a folder of transformers (which holds no clusters), and the state dicts
of fairseq and torchaudio (teachers/state_dicts.py), whose pre-training heads are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icefall_kd.cli import config_from_dict
from icefall_kd.config import ModelConfig, TrainConfig
from icefall_kd.config.hubert import HubertConfig
from icefall_kd.config.ssl import SslConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import SSL_CONV
from icefall_kd.models.cluster_head import ClusterHead
from icefall_kd.models.hubert import HubertEncoder, own_states
from icefall_kd.runtime.files import read_json
from icefall_kd.teachers import hf
from icefall_kd.teachers.families import family_of, is_exp_dir
from icefall_kd.teachers.locate import locate
from icefall_kd.teachers.state_dicts import read_state_dict
from icefall_kd.train.average import load_trained
from icefall_kd.train.checkpoint import load_model, load_tensors, state_sha256

ENCODER_PREFIX, HEAD_PREFIX = "model.encoder.", "model.cluster_head."
LAYER_CONVENTION = (
    "H[0]: input of the first layer, behind positional convolution and LayerNorm; H[i]: output of layer i, 1-based, "
    "after the LayerNorm that closes it = transformers' hidden_states[i]"
)
# Ends of the names of projection and cluster embeddings in fairseq's and torchaudio's pre-training models.
_THEIR_HEADS = (
    ("final_proj.weight", "final_proj.bias", "label_embs_concat"),
    ("logit_generator.final_proj.weight", "logit_generator.final_proj.bias", "logit_generator.label_embeddings"),
)


@dataclass(frozen=True, kw_only=True)
class HubertWeights:
    """A HuBERT model: parameters of its encoder, pre-training head where there is one, sizes and origin."""

    encoder: dict[str, Tensor]
    """Float32 parameters and buffers by the names of models/hubert.py: HubertEncoder."""
    head: ClusterHead | None
    """Projection and cluster embeddings, frozen; None: the source has none (transformers' folders, students)."""
    num_layers: int
    dim: int
    """Channels C of the layers."""
    feedforward_dim: int
    num_heads: int
    structure: str
    """One of --structure, for what sizes do not tell: LayerNorm behind the convolutions, FitHuBERT's form."""
    front_end: str
    """"waveform" or "fbank"."""
    extractor_norm: str
    """Of the convolutions: "default" or "layer_norm"."""
    extractor_channels: int
    conv_pos: int
    """Kernel of the positional convolution, in frames."""
    conv_pos_groups: int
    normalize_audio: bool
    """Whether the model was trained on samples of zero mean and unit variance; ours never are."""
    source: str
    """Where it came from, for people."""
    sha256: str
    """Of the weights file; of an exp_dir, of the encoder's tensors."""
    layer_convention: str = LAYER_CONVENTION
    """How layers are counted."""

    def new_encoder(self, **model: Any) -> HubertEncoder:
        """Return an encoder of these sizes with these weights.

        Args:
            model: options of ModelConfig beside the sizes, for instance ``dropout``.
        Raises:
            ConfigError: names or shapes of the weights are not those of the sizes.
        """
        encoder = self._empty(**model)
        load_model(encoder, self.encoder, strict=True, source=self.source)
        return encoder

    def _empty(self, **model: Any) -> HubertEncoder:
        sizes = {
            "num_encoder_layers": self.num_layers,
            "encoder_dim": self.dim,
            "feedforward_dim": self.feedforward_dim,
            "num_heads": self.num_heads,
        }
        ssl = {name: getattr(self, name) for name in ("front_end", "extractor_norm", "extractor_channels")}
        hubert = {name: getattr(self, name) for name in ("structure", "conv_pos", "conv_pos_groups")}
        return HubertEncoder(ModelConfig(**sizes, **model), HubertConfig(**hubert), SslConfig(**ssl))

    def checked(self) -> "HubertWeights":
        """Return this model when its tensors are all that its sizes want, and nothing else.

        Raises:
            DataError: naming the first that are not.
        """
        with torch.device("meta"):
            wanted = {name: tuple(x.shape) for name, x in self._empty().state_dict().items()}
        found = {name: tuple(x.shape) for name, x in self.encoder.items()}
        problems = [
            f"{name}: {found.get(name, 'not there')}, the sizes want {wanted.get(name, 'none')}"
            for name in sorted(wanted.keys() | found.keys())
            if wanted.get(name) != found.get(name)
        ]
        if problems:
            raise DataError(f"{self.source} is no HuBERT model of its sizes: {'; '.join(problems[:5])}")
        return self


def load_hubert_weights(source: str | Path) -> HubertWeights:
    """Read a HuBERT model.

    Args:
        source: an exp_dir of --system hubert (its newest weights, averaged where it kept averages), or whatever names
            a teacher (teachers/locate.py): a folder of transformers, a hub id, a state dict of fairseq or torchaudio.
    Raises:
        ConfigError: nothing is found there, or it is another model than our encoder can be: pre-norm blocks, biases in
            the convolutions, another stack of convolutions, another family.
        DataError: damaged files, or tensors that are missing, unknown or of another shape.
    """
    if is_exp_dir(Path(source)):
        return _from_exp_dir(Path(source)).checked()
    found = locate(str(source))
    origin = {"source": f"{found.name} ({found.source})", "sha256": found.weights_sha256}
    family = family_of(found.folder)
    if family == "state_dict":
        read = read_state_dict(found.folder)
        _refuse_family(read.model_type, found.name)
        head = _their_head(load_tensors(found.folder), found.name)
        return _from_transformers(read.config, read.tensors, read.do_normalize, head, origin).checked()
    _refuse_family(family, found.name)
    model = hf.speech_ssl_model(found.folder)
    config, by_norm = model.config.to_dict(), model.config.feat_extract_norm == "layer"
    path = found.folder / "preprocessor_config.json"
    normalize = bool(read_json(path).get("do_normalize", by_norm)) if path.is_file() else by_norm
    return _from_transformers(config, model.state_dict(), normalize, None, origin).checked()


def _refuse_family(family: str, name: str) -> None:
    if family != "hubert":
        raise ConfigError(f"{name} is a {family} model; students start from HuBERT, and compare with its clusters")


def _from_exp_dir(exp_dir: Path) -> HubertWeights:
    state, saved, used = load_trained(exp_dir)
    config = config_from_dict(TrainConfig, saved, str(exp_dir))
    if config.system != "hubert":
        raise ConfigError(f"{exp_dir} was trained with --system {config.system}; a model of --system hubert is needed")
    encoder = {k.removeprefix(ENCODER_PREFIX): v for k, v in state.items() if k.startswith(ENCODER_PREFIX)}
    head = {k.removeprefix(HEAD_PREFIX): v for k, v in state.items() if k.startswith(HEAD_PREFIX)}
    with torch.device("meta"):
        shape = HubertEncoder(config.model, config.hubert, config.ssl).shape
    return HubertWeights(
        encoder=encoder,
        head=_head(head["final_proj.weight"], head["final_proj.bias"], head["label_embs"]) if head else None,
        num_layers=shape.num_layers,
        dim=shape.dim,
        feedforward_dim=shape.feedforward_dim,
        num_heads=shape.num_heads,
        structure=config.hubert.structure,
        front_end=config.ssl.front_end,
        extractor_norm=config.ssl.extractor_norm,
        extractor_channels=config.ssl.extractor_channels,
        conv_pos=config.hubert.conv_pos,
        conv_pos_groups=config.hubert.conv_pos_groups,
        normalize_audio=False,
        source=f"{exp_dir} (exp_dir, {used})",
        sha256=state_sha256(encoder),
    )


def _from_transformers(
    config: Mapping[str, Any], tensors: dict[str, Tensor], normalize: bool, head: ClusterHead | None, origin: dict
) -> HubertWeights:
    """Return a model of transformers' configuration and names, which both other origins are turned into."""
    where, channels = origin["source"], set(config["conv_dim"])
    refused = {
        "its blocks are pre-norm (do_stable_layer_norm), as in the large models, and our layers post-norm, as in the "
        "base models: the same weights would compute something else": config.get("do_stable_layer_norm", False),
        "its convolutions have biases": config.get("conv_bias", False),
        "its positional convolution has a batch norm": config.get("conv_pos_batch_norm", False),
        f"its convolutions are {config['conv_kernel']} by {config['conv_stride']}, ours {SSL_CONV.kernels} by "
        f"{SSL_CONV.strides}": (*config["conv_kernel"], *config["conv_stride"])
        != (*SSL_CONV.kernels, *SSL_CONV.strides),
        f"its convolutions have {sorted(channels)} channels, ours equally many each": len(channels) > 1,
    }
    for reason, refuse in refused.items():
        if refuse:
            raise ConfigError(f"{where}: {reason}; use a model like hubert-base")
    # An embedding of masked frames belongs to training alone.
    own = own_states({name: value.detach().float() for name, value in tensors.items() if name != "masked_spec_embed"})
    return HubertWeights(
        encoder=own,
        head=head,
        num_layers=config["num_hidden_layers"],
        dim=config["hidden_size"],
        feedforward_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        structure="base" if "subsampling.norm.weight" in own else "shallow_wide",
        front_end="waveform",
        extractor_norm={"group": "default", "layer": "layer_norm"}[config["feat_extract_norm"]],
        extractor_channels=channels.pop(),
        conv_pos=config["num_conv_pos_embeddings"],
        conv_pos_groups=config["num_conv_pos_embedding_groups"],
        normalize_audio=normalize,
        **origin,
    )


def _their_head(tensors: dict[str, Tensor], where: str) -> ClusterHead | None:
    """Return fairseq's or torchaudio's pre-training head; None when the file has none."""
    for names in _THEIR_HEADS:
        found = [[x for name, x in tensors.items() if f".{name}".endswith(f".{end}")] for end in names]
        if all(found):
            weight, bias, embeddings = (x[0].float() for x in found)
            if weight.shape[0] != embeddings.shape[-1]:
                raise ConfigError(
                    f"{where}: final_proj has {weight.shape[0]} outputs, cluster embeddings {embeddings.shape[-1]} "
                    "channels: a model of several sets of clusters, which is not supported"
                )
            return _head(weight, bias, embeddings)
    return None


def _head(weight: Tensor, bias: Tensor, embeddings: Tensor) -> ClusterHead:
    head = ClusterHead(weight.shape[1], *embeddings.shape)
    head.load_state_dict({"final_proj.weight": weight, "final_proj.bias": bias, "label_embs": embeddings})
    return head.eval().requires_grad_(False)
