"""HuBERT and its distilled students: a front end over samples, and transformers' HuBERT layers.

Hsu et al. 2021, arXiv 2106.07447 (HuBERT); Wang et al. 2022, arXiv 2210.15631 (students of equal size, and a log-mel
front end); Chang et al. 2021, arXiv 2110.01900 (DistilHuBERT); Lee et al. 2022, arXiv 2207.00555 (FitHuBERT).
"""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.config import ModelConfig
from icefall_kd.config.hubert import HubertConfig
from icefall_kd.config.ssl import SslConfig
from icefall_kd.errors import ConfigError
from icefall_kd.frames import SSL_CONV, FrameFormula
from icefall_kd.models.conformer import EncoderOutput, maybe_bypass
from icefall_kd.models.fbank_front import FbankFrontEnd
from icefall_kd.models.masks import make_pad_mask
from icefall_kd.models.streaming import WHOLE_UTTERANCE, Chunks
from icefall_kd.models.waveform import WaveformFrontEnd
from icefall_kd.teachers import hf

# FitHuBERT: convolutions of kernel 1 widen, which costs little; frames are those of SSL_CONV.
THIN_CHANNELS = (128, 256, 256, 256, 256, 256, 512, 512, 512)
THIN_CONV = FrameFormula(kernels=(10, 1, 3, 3, 3, 3, 1, 2, 2), strides=(5, 1, 2, 2, 2, 2, 1, 2, 2))


@dataclass(frozen=True)
class HubertShape:
    """Sizes of a model."""

    num_layers: int
    dim: int
    feedforward_dim: int
    num_heads: int
    output_norm: bool
    """LayerNorm between convolutions and projection."""
    thin: bool = False
    """FitHuBERT's convolutions, and layers at half the frame rate."""

    @classmethod
    def from_config(cls, model: ModelConfig, hubert: HubertConfig) -> "HubertShape":
        """Return the sizes that the options name.

        Raises:
            ConfigError: the dimension is no multiple of heads, or of the groups of the positional convolution.
        """
        shape = STRUCTURES[hubert.structure]
        given = {
            "num_layers": model.num_encoder_layers,
            "dim": model.encoder_dim,
            "feedforward_dim": model.feedforward_dim,
            "num_heads": model.num_heads,
        }
        shape = replace(shape, **{name: value for name, value in given.items() if value is not None})
        for flag, divisor in (("--num-heads", shape.num_heads), ("--conv-pos-groups", hubert.conv_pos_groups)):
            if shape.dim % divisor:
                raise ConfigError(f"--encoder-dim {shape.dim} is no multiple of {flag} {divisor}")
        return shape


# What --structure names.
STRUCTURES = {
    "base": HubertShape(12, 768, 3072, 12, True),
    "shallow_wide": HubertShape(2, 768, 3072, 12, False),
    "deep_thin": HubertShape(12, 480, 480, 12, False),
    "fithubert": HubertShape(12, 480, 480, 12, True, True),
}


class HubertEncoder(nn.Module):
    """Front end, positional convolution, post-norm Transformer layers: samples to frames of 20 ms.

    The layers are transformers' own modules; around them, what makes an utterance independent of its batch: padding is
    zeroed in front of the positional convolution and masked in the attention, and the statistics of the first
    convolution's norm leave it out (models/waveform.py).  The encoder has the interface of models/conformer.py, for
    whole utterances.

    ``taps`` count as hidden states do in the literature: H[0] is the input of the first layer, behind positional
    convolution and LayerNorm, and H[i] the output of layer i.

    Args:
        model: overrides of the sizes, dropout (hidden, attention and activation) and layer dropout.
        hubert: the structure.
        ssl: the front end.
    """

    def __init__(self, model: ModelConfig, hubert: HubertConfig, ssl: SslConfig) -> None:
        super().__init__()
        self.cfg, self.shape = model, HubertShape.from_config(model, hubert)
        shape, self.layer_dropout = self.shape, model.layer_dropout
        self.chunks: Chunks = WHOLE_UTTERANCE
        if ssl.front_end == "fbank":
            self.subsampling: nn.Module = FbankFrontEnd(shape.dim, model.dropout)
        else:
            self.subsampling = WaveformFrontEnd(
                shape.dim,
                THIN_CHANNELS if shape.thin else ssl.extractor_channels,
                ssl.extractor_norm,
                model.dropout,
                ssl.feature_grad_scale,
                THIN_CONV if shape.thin else SSL_CONV,
                shape.output_norm,
            )
        self.body = hf.hubert_layers(
            hidden_size=shape.dim,
            num_hidden_layers=shape.num_layers,
            intermediate_size=shape.feedforward_dim,
            num_attention_heads=shape.num_heads,
            num_conv_pos_embeddings=hubert.conv_pos,
            num_conv_pos_embedding_groups=hubert.conv_pos_groups,
            hidden_dropout=model.dropout,
            attention_dropout=model.dropout,
            activation_dropout=model.dropout,
        )
        self.time_reduction = nn.Conv1d(shape.dim, shape.dim, kernel_size=2, stride=2) if shape.thin else None

    @property
    def dim(self) -> int:
        """Return C of the encoder output."""
        return self.shape.dim

    @property
    def num_layers(self) -> int:
        """Return the number of layers."""
        return self.shape.num_layers

    @property
    def layers(self) -> nn.ModuleList:
        """Return the layers; a teacher is cut behind one of them."""
        return self.body.layers

    @layers.setter
    def layers(self, layers: nn.ModuleList) -> None:
        self.body.layers = layers

    def output_lens(self, num_samples):
        """Return T' for S samples, an int or an integer tensor (N,)."""
        return self._reduced(self.subsampling.output_lens(num_samples))

    def _reduced(self, lens):
        return lens if self.time_reduction is None else (lens + 1) // 2

    def forward(self, audio: Tensor, audio_lens: Tensor, taps: tuple[int, ...] = ()) -> EncoderOutput:
        """Map samples (N, S), of which (N,) are valid, to (N, T', C); ``taps``: 0 ... num_layers."""
        return self.forward_embedded(*self.subsampling(audio, audio_lens), taps)

    def forward_embedded(self, x: Tensor, lens: Tensor, taps: tuple[int, ...] = ()) -> EncoderOutput:
        """Map the front end's output (N, T', C) with (N,) valid frames to (N, T', C)."""
        padding = make_pad_mask(lens, x.shape[1])
        x = x.masked_fill(padding.unsqueeze(-1), 0.0)
        x = self.body.dropout(self.body.layer_norm(x + self.body.pos_conv_embed(x)))
        kept = {0: x} if 0 in taps else {}
        if self.time_reduction is not None:
            # A frame without a partner is paired with silence (ours; FitHuBERT drops it).  A frame more without a
            # partner gives none.
            x = F.pad(x.masked_fill(padding.unsqueeze(-1), 0.0), (0, 0, 0, 1))
            x, lens = self.time_reduction(x.transpose(1, 2)).transpose(1, 2), self._reduced(lens)
            padding = make_pad_mask(lens, x.shape[1])
        mask = None if not bool(padding.any()) else ~padding[:, None, None, :]  # (N, 1, 1, T'): keys that are seen
        for i, layer in enumerate(self.body.layers, start=1):
            y = layer(x, attention_mask=mask)
            x = maybe_bypass(x, y, self.layer_dropout) if self.training else y
            if i in taps:
                kept[i] = x
        return EncoderOutput(x, lens, kept)


def own_states(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of transformers' HubertModel by the names of :class:`HubertEncoder`."""
    return {_own_name(name): value for name, value in theirs.items()}


# Beginnings of transformers' names and of ours.
_NAMES = {
    "feature_projection.layer_norm.": "subsampling.norm.",
    "feature_projection.projection.": "subsampling.out.",
    "encoder.": "body.",
}


def _own_name(name: str) -> str:
    if name.startswith("feature_extractor.conv_layers."):
        number, module, parameter = name.split(".")[2:]
        return f"subsampling.{'convolutions' if module == 'conv' else 'inner_norms'}.{number}.{parameter}"
    their = next((their for their in _NAMES if name.startswith(their)), "")
    return _NAMES.get(their, "") + name.removeprefix(their)
