"""Options of the autoregressive teacher and of its Mask-CTC student."""

from dataclasses import dataclass
from typing import Literal

from icefall_kd.config.checks import at_least
from icefall_kd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AttentionDecoderConfig:
    """Attention decoder beside the CTC head (--system nar), and the losses of both."""

    attention_decoder: Literal["ar", "mlm"] = "mlm"
    """ar: left to right, the autoregressive teacher; mlm: fills masked tokens in, the Mask-CTC student."""
    num_decoder_layers: int = 6
    """Transformer layers of the decoder; its dimension is the encoder's."""
    decoder_heads: int | None = None
    """Attention heads of the decoder; None: the encoder's."""
    decoder_feedforward_dim: int = 2048
    """Hidden dimension of the decoder's feed-forward modules."""
    decoder_dropout: float = 0.1
    """Dropout of the decoder."""
    tie_embeddings: bool = False
    """One matrix for the decoder's embedding and output layer: what a small model with many tokens needs."""
    ctc_weight: float = 0.3
    """Weight of the CTC loss; the decoder's has the rest."""
    label_smoothing: float = 0.1
    """Probability that the decoder's targets spread over all other tokens."""
    mask_sampling: Literal["without_replacement", "with_replacement"] = "without_replacement"
    """How the positions of a drawn number of masks are drawn; with_replacement masks fewer, as ESPnet does."""
    mask_draws: int = 1
    """Masked copies of every transcript in a training step, each with masks of its own; the loss is their mean.  The
    encoder, which costs most, runs once for all of them."""

    def __post_init__(self) -> None:
        at_least(self, num_decoder_layers=1, decoder_heads=1, decoder_feedforward_dim=1, mask_draws=1)
        for name in ("decoder_dropout", "ctc_weight", "label_smoothing"):
            least = "above 0" if name == "ctc_weight" else "at least 0"  # a CTC head without a loss is none
            if not 0 <= getattr(self, name) < 1 or (name == "ctc_weight" and self.ctc_weight == 0):
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {least}, below 1")


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """What --init-from takes from the other training."""

    init_modules: list[str] | None = None
    """Parts that are taken, of encoder, ctc and decoder (mask-predicting students of an autoregressive teacher:
    encoder,ctc); None: everything that has the same name and shape."""
    init_encoder_layers: list[int] | None = None
    """Teacher layers, 1-based, that become layers 1, 2, ... of a shallower student's encoder; None: equal numbers."""
    init_decoder_layers: list[int] | None = None
    """The same of the decoder, with decoder among the parts."""

    def __post_init__(self) -> None:
        for name in self.init_modules or ():
            if name not in ("encoder", "ctc", "decoder"):
                raise ConfigError(f"--init-modules names {name!r}; the parts are encoder, ctc and decoder")
        for name, part in (("init_encoder_layers", "encoder"), ("init_decoder_layers", "decoder")):
            layers = getattr(self, name)
            if layers is not None and (not layers or min(layers) < 1):
                raise ConfigError(f"--{name.replace('_', '-')} is {layers}; layers count from 1")
            if twice := [layer for i, layer in enumerate(layers or ()) if layer in layers[:i]]:
                raise ConfigError(f"--{name.replace('_', '-')} names layer {twice[0]} twice; give each layer once")
            if layers is not None and self.init_modules is not None and part not in self.init_modules:
                raise ConfigError(f"--{name.replace('_', '-')} is given, but --init-modules leaves out {part}")


@dataclass(frozen=True, kw_only=True)
class RecogniserKdConfig:
    """Distillation from an autoregressive recogniser (--system nar); each term is off at scale 0."""

    ctc_kd_scale: float = 0.0
    """Frame level: divergence from the teacher's CTC posteriors, a frame."""
    token_kd_scale: float = 0.0
    """Token level: divergence from the teacher's decoder posteriors, a masked token."""
    nbest_ctc_scale: float = 0.0
    """Sequence level: CTC loss of the teacher's n-best, a token."""
    nbest_token_scale: float = 0.0
    """Sequence level: the masked decoder's loss on the teacher's n-best, a masked token."""
    encoder_kd_scale: float = 0.0
    """Distance between a projection of the student's encoder output and the teacher's, a frame."""
    encoder_kd: Literal["mse", "cosine"] = "mse"
    """Which distance."""
    kd_temperature: float = 1.0
    """Temperature of both distributions at frame and token level; the loss is scaled by its square."""
    kd_blank_threshold: float = 0.99
    """Teacher's blank probability above which a frame counts kd-blank-weight only."""
    kd_blank_weight: float = 1.0
    """Weight of those frames; 1: as all others."""
    kd_warm_step: int = 0
    """Steps over which all distillation scales grow from 0."""
    kd_nbest: int = 4
    """Hypotheses of the n-best that are used, at most."""
    nbest_temperature: float = 1.0
    """Temperature of the weights that hypotheses get from their scores."""
    kd_top_k: int = 8
    """Online labels: classes of a posterior that are kept beside the rest, as in stored ones."""
    kd_beam_size: int = 10
    """Online labels: beam of the teacher's search for the n-best."""

    def __post_init__(self) -> None:
        scales = [name for name in self.__dataclass_fields__ if name.endswith("_scale")]
        at_least(self, kd_warm_step=0, kd_nbest=1, kd_top_k=1, kd_beam_size=1, **dict.fromkeys(scales, 0))
        for name in ("kd_temperature", "nbest_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0")
        for name in ("kd_blank_threshold", "kd_blank_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must lie in 0 ... 1")
