"""A tiny streaming encoder and what it hears."""

import dataclasses

import torch

from icefall_kd.config import ModelConfig
from icefall_kd.data.batch import LOG_EPS
from icefall_kd.frames import chunk_num_frames
from icefall_kd.models.conformer import Conformer
from icefall_kd.models.streaming import Chunks

CONFIG = ModelConfig(
    encoder_size="tiny",
    num_encoder_layers=3,
    encoder_dim=32,
    num_heads=2,
    feedforward_dim=48,
    cnn_kernel=7,
    subsampling_channels=(4, 6, 8),
    streaming=True,
    chunk_size=[4, 2, 8, -1],
    left_context_frames=[8, 4, -1],
)
KINDS = ["causal", "chunk"]


def encoder(convolution: str = "causal", **changes) -> Conformer:
    torch.manual_seed(3)
    model = Conformer(dataclasses.replace(CONFIG, convolution=convolution, **changes)).eval()
    with torch.no_grad():  # biases and norms that are not at their neutral start
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def speech(*lens: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    features = torch.full((len(lens), max(lens), 80), LOG_EPS)
    for row, length in zip(features, lens, strict=True):
        row[:length] = torch.randn(length, 80) * 3 - 6
    return features, torch.tensor(lens)


def by_chunks(model: Conformer, features: torch.Tensor, x_lens: torch.Tensor, chunks: Chunks):
    """Yield encoder_out and its lens chunk by chunk; windows behind the end hold anything."""
    states, size = model.init_states(len(features), chunks), chunks.chunk_size
    window, hop = chunk_num_frames(size + model.look_ahead(chunks)), 4 * size
    for begin in range(0, features.shape[1], hop):
        piece = features[:, begin : begin + window]
        piece = torch.nn.functional.pad(piece, (0, 0, 0, window - piece.shape[1]), value=7.0)
        out, lens, states = model.forward_chunk(piece, (x_lens - begin).clamp(0, window), states, size)
        yield out, lens
