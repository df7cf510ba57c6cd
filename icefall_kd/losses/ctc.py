"""Connectionist temporal classification."""

import torch
import torch.nn.functional as F
from torch import Tensor

from icefall_kd.errors import DataError
from icefall_kd.models.masks import make_pad_mask


def ctc_loss(logits: Tensor, y: Tensor, encoder_out_lens: Tensor, y_lens: Tensor, blank_id: int = 0) -> Tensor:
    """Compute the CTC loss of every utterance (Graves et al. 2006) in float32.

    An utterance with more tokens (repeats count twice) than frames has no path: its loss is plus infinity,
    which the caller is meant to see.

    Args:
        logits: (N, T', V) before the softmax.
        y: (N, U) token ids, padded with anything.
        encoder_out_lens: (N,) frames.
        y_lens: (N,) tokens.
        blank_id: id of blank.
    Returns:
        (N,) loss in nats, not normalised.
    Raises:
        DataError: for lengths that do not fit the tensors, or for tokens outside the vocabulary.
    """
    limits = torch.stack([*torch.aminmax(encoder_out_lens), *torch.aminmax(y_lens)]).tolist()
    x_min, x_max, y_min, y_max = limits
    if x_min < 1 or x_max > logits.shape[1]:
        raise DataError(f"encoder_out_lens lie in {x_min}..{x_max}, not in 1..{logits.shape[1]}")
    if y_min < 0 or y_max > y.shape[1]:
        raise DataError(f"y_lens lie in {y_min}..{y_max}, not in 0..{y.shape[1]}")
    tokens = y.masked_fill(make_pad_mask(y_lens, y.shape[1]), blank_id)
    wrong = (tokens < 0) | (tokens >= logits.shape[2])
    if bool(wrong.any()):  # torch would read beyond its memory
        raise DataError(
            f"token {int(tokens[wrong][0])} lies outside the vocabulary of {logits.shape[2]}: "
            "the model was not built for this tokenizer"
        )
    with torch.autocast(logits.device.type, enabled=False):
        logprobs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(2)
        logprobs = logprobs.transpose(0, 1)  # (N, T', V) -> (T', N, V)
        return F.ctc_loss(logprobs, y, encoder_out_lens, y_lens, blank=blank_id, reduction="none")
