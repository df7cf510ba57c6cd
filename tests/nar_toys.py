"""Tiny models and batches of --system nar."""

import dataclasses
from pathlib import Path

import torch

from icefall_kd.cli import config_to_dict
from icefall_kd.config import AttentionDecoderConfig, KdConfig, LoopConfig, ModelConfig, RecogniserKdConfig, TrainConfig
from icefall_kd.data.batch import Batch, Labels, NBest, TopK
from icefall_kd.systems import build_system
from icefall_kd.systems.base import System
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.checkpoint import save_checkpoint
from icefall_kd.train.state import write_config

VOCAB = 12
SIZES = {
    "encoder_size": "tiny",
    "num_encoder_layers": 2,
    "encoder_dim": 32,
    "num_heads": 2,
    "feedforward_dim": 48,
    "cnn_kernel": 5,
    "subsampling_channels": (4, 6, 8),
}


def nar_config(decoder="mlm", model=(), attention=(), kd=(), labels=(), loop=None) -> TrainConfig:
    """Return the configuration of a tiny teacher (ar) or student (mlm)."""
    sizes = {"num_decoder_layers": 2, "decoder_feedforward_dim": 48, "decoder_dropout": 0.0}
    return TrainConfig(
        system="nar",
        model=ModelConfig(**{**SIZES, "dropout": 0.0, **dict(model)}),
        attention=AttentionDecoderConfig(attention_decoder=decoder, **{**sizes, **dict(attention)}),
        recogniser_kd=RecogniserKdConfig(**dict(kd)),
        kd=KdConfig(**dict(labels)),
        loop=loop or LoopConfig(device="cpu"),
    )


def toy_batch(seed=0, y_lens=(6, 3, 1), x_lens=(120, 90, 50)) -> Batch:
    """Return a batch of random features and tokens."""
    generator = torch.Generator().manual_seed(seed)
    n = len(y_lens)
    y = torch.randint(3, VOCAB - 1, (n, max(y_lens)), generator=generator)
    y = y.masked_fill(torch.arange(max(y_lens)) >= torch.tensor(y_lens)[:, None], 0)
    return Batch(
        ids=[f"u{i}" for i in range(n)],
        features=torch.randn(n, max(x_lens), 80, generator=generator),
        x_lens=torch.tensor(x_lens),
        y=y,
        y_lens=torch.tensor(y_lens),
    )


def random_top_k(lens, k=4, seed=0, specials=()) -> TopK:
    """Return random posteriors of the vocabulary without some classes, with zeros beyond the lengths."""
    probs = torch.rand(len(lens), max(lens), VOCAB, generator=torch.Generator().manual_seed(seed)) ** 4
    probs[..., list(specials)] = 0
    probs = probs / probs.sum(-1, keepdim=True)
    values, ids = probs.topk(k, dim=-1)
    beyond = torch.arange(max(lens)) >= torch.tensor(lens)[:, None]
    rest = (1 - values.sum(-1)).masked_fill(beyond, 0.0)
    return TopK(ids, values.masked_fill(beyond.unsqueeze(-1), 0.0), rest, torch.tensor(lens))


def toy_labels(batch: Batch, teacher_dim=16) -> Batch:
    """Return the batch with random labels of every kind."""
    frames = [(int(t) - 3) // 4 for t in batch.x_lens]
    n = len(batch)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCAB - 1, (n, 3, 5), generator=generator)
    labels = {
        "ctc_posteriors": random_top_k(frames),
        "token_posteriors": random_top_k(batch.y_lens.tolist(), specials=(0, 1, VOCAB - 1)),
        "embeddings": Labels(torch.randn(n, max(frames), teacher_dim, generator=generator), torch.tensor(frames)),
        "nbest": NBest(tokens, torch.tensor([[5, 4, 3]] * n), torch.tensor([[-1.0, -1.5, -4.0]] * n)),
    }
    return dataclasses.replace(batch, labels=labels)


def write_exp_dir(exp_dir: Path, config: TrainConfig, tokenizer: Tokenizer, seed: int = 5) -> System:
    """Write an exp_dir as a training of one epoch leaves it, of random weights; return its system in evaluation mode.

    The CTC head says something: its bias is drawn so that about a third of the frames are not blank.
    """
    torch.manual_seed(seed)
    system = build_system(config, tokenizer.vocab_size, inference=True).eval()
    with torch.no_grad():
        batch = toy_batch()
        encoder_out, lens = system.encode(batch)
        frames = encoder_out[torch.arange(encoder_out.shape[1]) < lens[:, None]]
        head = system.model.ctc_output
        # A random encoder hardly changes over time; the head sees the changes alone.
        head.weight.copy_(torch.randn_like(head.weight) / frames.std(dim=0) / len(frames[0]) ** 0.5)
        logits = frames @ head.weight.T
        head.bias.copy_(-logits.mean(dim=0))
        head.bias[[1, 2, tokenizer.mask_id]] -= 1000.0
        logits = logits + head.bias
        head.bias[0] += (logits[:, 3:-1].max(dim=1).values - logits[:, 0]).quantile(2 / 3)
    tokenizer.save(exp_dir / "tokenizer")
    write_config(exp_dir, config, 0)
    state = system.state_dict()
    content = {"model": state, "model_avg": {k: v.double() for k, v in state.items()}}
    train = {"epoch": 2, "step": 1, "average_period": 1}
    content |= {"config": config_to_dict(config), "tokenizer_hash": tokenizer.hash, "train": train}
    save_checkpoint(exp_dir / "epoch-1.pt", content)
    return system
