"""Encoder, CTC head, integrate-and-fire and decoder of the CIF recogniser."""

from torch import Tensor, nn

from icefall_kd.config import AttentionDecoderConfig, CifConfig, ModelConfig
from icefall_kd.models.cif import TAIL_THRESHOLD, Cif, CifOutput
from icefall_kd.models.cif_decoder import CifDecoder
from icefall_kd.models.pooled_conformer import PooledConformer


class CifModel(nn.Module):
    """The recogniser of Han et al. 2023 without its language model, which only training sees."""

    def __init__(
        self, model_cfg: ModelConfig, attention_cfg: AttentionDecoderConfig, cif_cfg: CifConfig, vocab_size: int
    ) -> None:
        """Make the model.

        Args:
            model_cfg: the encoder.
            attention_cfg: sizes and dropout of the decoder.
            cif_cfg: all else.
            vocab_size: tokens V of the tokenizer; blank is 0, sos and eos 1.
        """
        super().__init__()
        self.vocab_size, self.blank_id, self.sos_id = vocab_size, 0, 1
        self.encoder = PooledConformer(model_cfg, cif_cfg.front_channels, cif_cfg.pool_layers)
        dim = self.encoder.dim
        self.ctc_output = nn.Linear(dim, vocab_size) if cif_cfg.cif_ctc_scale > 0 else None
        self.cif = Cif(dim, cif_cfg.cif_kernel, cif_cfg.cif_dropout, cif_cfg.cif_initial_rate, cif_cfg.max_cif_factor)
        self.decoder = CifDecoder(
            vocab_size,
            dim,
            attention_cfg.num_decoder_layers,
            attention_cfg.decoder_heads or self.encoder.shape.num_heads,
            attention_cfg.decoder_feedforward_dim,
            attention_cfg.decoder_dropout,
            model_cfg.dropout,
        )

    def fire(
        self,
        encoder_out: Tensor,
        lens: Tensor,
        target_lens: Tensor | None = None,
        tail_threshold: float = TAIL_THRESHOLD,
    ) -> CifOutput:
        """Return one vector a token of encoder_out (N, T', C) with (N,) valid frames; see models/cif.py.

        ``target_lens`` (N,) counts the end of the text, as every number of tokens of this model does.
        """
        return self.cif(encoder_out, lens, target_lens, tail_threshold)

    def ctc_log_probs(self, encoder_out: Tensor) -> Tensor:
        """Return float32 log-probabilities (N, T', V) of encoder output (N, T', C); the end of the text is a token."""
        return self.ctc_output(encoder_out).float().log_softmax(dim=-1)
