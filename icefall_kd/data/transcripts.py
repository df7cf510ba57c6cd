"""Transcripts of cuts as token ids: one way for training, decoding and teachers that follow them."""

from collections.abc import Sequence

import torch
from lhotse.cut import Cut
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from icefall_kd.text.tokenizer import Tokenizer


def transcript(cut: Cut) -> str:
    """Return the normalised text of a cut, "" without any."""
    return " ".join(s.text for s in cut.supervisions if s.text)


def pad_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return token ids (N, U) int64 padded with the blank, and their numbers (N,)."""
    tokens = [torch.tensor(tokenizer.encode(text), dtype=torch.int64) for text in texts]
    y = pad_sequence(tokens, batch_first=True, padding_value=tokenizer.blank_id)
    return y, torch.tensor([len(t) for t in tokens])
