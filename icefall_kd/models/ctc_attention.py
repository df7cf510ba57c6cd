"""Encoder, CTC head and attention decoder: the autoregressive teacher, and its Mask-CTC student."""

from torch import Tensor, nn

from icefall_kd.config import AttentionDecoderConfig, ModelConfig
from icefall_kd.models.attention_decoder import AttentionDecoder
from icefall_kd.models.conformer import Conformer


class CtcAttentionModel(nn.Module):
    """The hybrid of Watanabe et al. 2017, whose decoder is causal (teacher) or mask-predicting (student).

    Every part is built for the whole token table, ``<mask>`` included, so that teacher and student have equal shapes.
    """

    def __init__(self, model_cfg: ModelConfig, cfg: AttentionDecoderConfig, vocab_size: int) -> None:
        """Make the model.

        Args:
            model_cfg: the encoder.
            cfg: the decoder.
            vocab_size: tokens V of the tokenizer; blank is 0, sos and eos 1, unknown 2, mask V - 1.
        """
        super().__init__()
        self.vocab_size, self.blank_id, self.sos_id, self.mask_id = vocab_size, 0, 1, vocab_size - 1
        self.encoder = Conformer(model_cfg)
        self.ctc_output = nn.Linear(self.encoder.dim, vocab_size)
        self.decoder = AttentionDecoder(
            vocab_size,
            self.encoder.dim,
            cfg.num_decoder_layers,
            cfg.decoder_heads or self.encoder.shape.num_heads,
            cfg.decoder_feedforward_dim,
            cfg.decoder_dropout,
            causal=cfg.attention_decoder == "ar",
            tie_embeddings=cfg.tie_embeddings,
        )

    def ctc_log_probs(self, encoder_out: Tensor) -> Tensor:
        """Return float32 log-probabilities (N, T', V) of encoder output (N, T', C)."""
        return self.ctc_output(encoder_out).float().log_softmax(dim=-1)
