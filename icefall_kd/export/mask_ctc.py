"""The two graphs of an exported Mask-CTC student: encoder with CTC head, and masked decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.data.batch import LOG_EPS
from icefall_kd.export.graphs import SHORTEST, Graph, log_mel_noise
from icefall_kd.models.ctc_attention import CtcAttentionModel


class CtcEncoder(nn.Module):
    """Encoder and CTC head, of whole utterances."""

    def __init__(self, model: CtcAttentionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (N, T, F) log-mel frames, of which (N,) are valid.

        Returns:
            encoder_out (N, T', C), valid frames of 40 ms (N,), and CTC log-probabilities (N, T', V).
        """
        out = self.model.encoder(F.pad(x, (0, 0, 0, SHORTEST), value=LOG_EPS), x_lens)
        return out.encoder_out, out.encoder_out_lens, self.model.ctc_log_probs(out.encoder_out)


class MaskedDecoder(nn.Module):
    """One pass of the masked decoder."""

    def __init__(self, model: CtcAttentionModel) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(self, encoder_out: Tensor, encoder_out_lens: Tensor, y: Tensor, y_lens: Tensor) -> Tensor:
        """Return the logits (N, U, V) of every position of y (N, U), of which (N,) are valid tokens or masks."""
        return self.decoder(y, y_lens, self.decoder.memory(encoder_out, encoder_out_lens))


def mask_ctc_graphs(model: CtcAttentionModel, feature_dim: int) -> list[Graph]:
    """Return the graphs of a student that fills masks in."""
    dim, example = model.encoder.dim, torch.tensor([[3, model.mask_id, 4], [model.mask_id, 3, 3]])
    encoder = Graph(
        "encoder",
        CtcEncoder(model).eval(),
        {"x": {0: "N", 1: "T"}, "x_lens": {0: "N"}},
        {
            "encoder_out": {0: "N", 1: "T_out"},
            "encoder_out_lens": {0: "N"},
            "log_probs": {0: "N", 1: "T_out"},
        },
        (log_mel_noise(2, 103, feature_dim), torch.tensor([103, 71])),
    )
    decoder = Graph(
        "masked_decoder",
        MaskedDecoder(model).eval(),
        {
            "encoder_out": {0: "N", 1: "T_out"},
            "encoder_out_lens": {0: "N"},
            "y": {0: "N", 1: "U"},
            "y_lens": {0: "N"},
        },
        {"logits": {0: "N", 1: "U"}},
        (torch.randn(2, 9, dim), torch.tensor([9, 4]), example, torch.tensor([3, 2])),
    )
    return [encoder, decoder]
