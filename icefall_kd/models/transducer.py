"""The student: Conformer encoder, stateless decoder, joiner, and the optional CTC head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.config import ModelConfig
from icefall_kd.errors import ConfigError
from icefall_kd.models.conformer import Conformer

# Channels that one group of the decoder's convolution mixes.
_GROUP = 4


class StatelessDecoder(nn.Module):
    """Prediction network that sees the last ``context_size`` tokens only (Ghodsi et al. 2020).

    Embedding, a convolution over the context in groups of four channels, ReLU, as in icefall's recipes.
    """

    def __init__(self, vocab_size: int, dim: int, blank_id: int = 0, context_size: int = 2) -> None:
        super().__init__()
        if context_size < 1:
            raise ConfigError(f"--context-size is {context_size}; it must be at least 1")
        if dim % _GROUP:
            raise ConfigError(f"--decoder-dim is {dim}; it must be a multiple of {_GROUP}")
        self.vocab_size, self.blank_id, self.context_size = vocab_size, blank_id, context_size
        self.embedding = nn.Embedding(vocab_size, dim)
        self.conv = None
        if context_size > 1:
            self.conv = nn.Conv1d(dim, dim, context_size, groups=dim // _GROUP, bias=False)

    def forward(self, y: Tensor, need_pad: bool = True) -> Tensor:
        """Return the decoder output after each token.

        Args:
            y: (N, U) token ids; negative ids stand for "nothing" and embed to zero.
            need_pad: put the missing context (zeros) before the first token.  Without it the output
                has U - context_size + 1 positions: a decoder passes exactly its context and gets one.
        Returns:
            (N, U, C), or (N, U - context_size + 1, C) without need_pad.
        """
        x = self.embedding(y.clamp(min=0)).masked_fill((y < 0).unsqueeze(-1), 0.0)
        if self.conv is not None:
            if need_pad:
                x = F.pad(x, (0, 0, self.context_size - 1, 0))
            x = self.conv(x.transpose(1, 2)).transpose(1, 2)  # (N, U, C) -> (N, C, U) -> (N, U, C)
        return F.relu(x)

    def add_sos(self, y: Tensor) -> Tensor:
        """Return y (N, U) with the blank put in front: the (N, U+1) input of the training losses."""
        return F.pad(y, (1, 0), value=self.blank_id)


class Joiner(nn.Module):
    """Projections of both sides, tanh of their sum, output layer (Graves 2012)."""

    def __init__(self, encoder_dim: int, decoder_dim: int, joiner_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.encoder_proj = _scaled_linear(encoder_dim, joiner_dim)
        self.decoder_proj = _scaled_linear(decoder_dim, joiner_dim)
        self.output_linear = nn.Linear(joiner_dim, vocab_size)

    def forward(self, encoder_out: Tensor, decoder_out: Tensor, project_input: bool = True) -> Tensor:
        """Return logits.

        Args:
            encoder_out: (..., C), projected already when project_input is False.
            decoder_out: (..., C') of the same leading shape, or one that broadcasts to it.
            project_input: apply the two projections first.
        Returns:
            (..., V).
        """
        if project_input:
            encoder_out, decoder_out = self.encoder_proj(encoder_out), self.decoder_proj(decoder_out)
        return self.output_linear(torch.tanh(encoder_out + decoder_out))


class TransducerModel(nn.Module):
    """Encoder with a transducer, a CTC head, or both; parts that nothing uses are None.

    ``encoder``: None, a Conformer of ``model_cfg``, or another with its interface.
    """

    def __init__(
        self,
        model_cfg: ModelConfig,
        vocab_size: int,
        transducer: bool = True,
        ctc: bool = True,
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not transducer and not ctc:
            raise ConfigError("a model needs a transducer or a CTC head")
        self.vocab_size, self.blank_id = vocab_size, 0
        self.encoder = Conformer(model_cfg) if encoder is None else encoder
        dim, decoder_dim = self.encoder.dim, model_cfg.decoder_dim
        self.decoder = self.joiner = self.simple_am_proj = self.simple_lm_proj = self.ctc_output = None
        if transducer:
            self.decoder = StatelessDecoder(vocab_size, decoder_dim, self.blank_id, model_cfg.context_size)
            self.joiner = Joiner(dim, decoder_dim, model_cfg.joiner_dim, vocab_size)
            self.simple_am_proj = _scaled_linear(dim, vocab_size)
            self.simple_lm_proj = _scaled_linear(decoder_dim, vocab_size)
        if ctc:
            self.ctc_output = nn.Linear(dim, vocab_size)


def _scaled_linear(in_dim: int, out_dim: int, scale: float = 0.25) -> nn.Linear:
    """Return a linear layer that starts at a fraction of the usual size, so that early outputs are mild."""
    linear = nn.Linear(in_dim, out_dim)
    with torch.no_grad():
        linear.weight.mul_(scale)
        linear.bias.mul_(scale)
    return linear
