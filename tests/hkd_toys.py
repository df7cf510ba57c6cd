"""Tiny models and batches of --system hkd."""

import dataclasses

import torch
from nar_toys import SIZES, toy_batch

from icefall_kd.config import (
    AttentionDecoderConfig,
    CifConfig,
    KdConfig,
    LoopConfig,
    ModelConfig,
    TextKdConfig,
    TrainConfig,
)
from icefall_kd.data.batch import Batch, TextStates

TEACHER_DIM = 16
X_LENS = (120, 90, 50)  # of toy_batch: 15, 11 and 6 frames of the encoder
Y_LENS = (6, 3, 1)


def hkd_config(model=(), attention=(), cif=(), text=(), labels=(), loop=None) -> TrainConfig:
    """Return the configuration of a tiny recogniser."""
    sizes = {"num_decoder_layers": 2, "decoder_feedforward_dim": 48, "decoder_dropout": 0.0}
    model_sizes = {name: value for name, value in SIZES.items() if name != "subsampling_channels"}
    return TrainConfig(
        system="hkd",
        model=ModelConfig(**{**model_sizes, "dropout": 0.0, **dict(model)}),
        attention=AttentionDecoderConfig(**{**sizes, **dict(attention)}),
        cif=CifConfig(**{"front_channels": 6, "cif_dropout": 0.0, **dict(cif)}),
        text_kd=TextKdConfig(**dict(text)),
        kd=KdConfig(**dict(labels)),
        loop=loop or LoopConfig(device="cpu"),
    )


def text_states(y_lens=Y_LENS, lens=None, seed=3, dim=TEACHER_DIM) -> TextStates:
    """Return a random state of every token and end; of utterance i only if ``lens[i]`` is not 0."""
    counts = torch.tensor([n + 1 for n in y_lens])
    lens = counts if lens is None else torch.tensor(lens)
    size = int(counts.max())
    position = torch.arange(size)
    values = torch.randn(len(counts), size, dim, generator=torch.Generator().manual_seed(seed))
    values = values.masked_fill((position >= lens[:, None]).unsqueeze(2), 0.0)
    owner = torch.where(position < torch.minimum(counts, lens)[:, None], position, -100)
    return TextStates(values, lens, owner)


def hkd_batch(seed=0, lens=None) -> Batch:
    """Return a batch of random features, tokens and text states."""
    return dataclasses.replace(toy_batch(seed, Y_LENS, X_LENS), labels={"text_states": text_states(lens=lens)})
