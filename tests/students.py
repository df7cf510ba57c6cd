"""Untrained students that say something, in exp_dirs, and audio for them."""

from pathlib import Path

import numpy as np
import torch

from icefall_kd.cli import config_to_dict
from icefall_kd.config import DecodeConfig, TrainConfig
from icefall_kd.data.features import FbankExtractor
from icefall_kd.models.waveform import WaveformFrontEnd
from icefall_kd.recipe import load_system
from icefall_kd.systems import build_system
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.checkpoint import save_checkpoint
from icefall_kd.train.state import write_config

torch.set_num_threads(1)

TEXTS = ["ONE TWO", "THREE", "TWO THREE ONE"]
SIZES = {
    "encoder_size": "tiny",
    "num_encoder_layers": 2,
    "encoder_dim": 32,
    "num_heads": 2,
    "feedforward_dim": 48,
    "cnn_kernel": 5,
    "subsampling_channels": (4, 6, 8),
    "decoder_dim": 16,
    "joiner_dim": 24,
}
STREAMING = {"streaming": True, "chunk_size": [4, 2, 8, -1], "left_context_frames": [8, 4, 16]}
# name: tokens and the options of the model
STUDENTS = {
    "offline-char": ("char", {}),
    "offline-pinyin": ("pinyin", {"context_size": 1}),
    "streaming-bpe": ("bpe", STREAMING),
    "streaming-chunk": ("char", STREAMING | {"convolution": "chunk"}),
}


def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "bpe":
        return Tokenizer.train_bpe(TEXTS, 20)
    return Tokenizer.train_pinyin(["中国", "你好"]) if kind == "pinyin" else Tokenizer.train_char(TEXTS)


@torch.no_grad()
def enliven(model) -> None:
    """Give a model a joiner that emits all kinds of tokens, one in about every third frame.

    What comes out of a random encoder hardly changes over time; the joiner sees the changes alone.
    """
    heard = torch.from_numpy(babble(80000, 9))
    if not isinstance(getattr(model.encoder, "subsampling", None), WaveformFrontEnd):
        heard = FbankExtractor(backend="lhotse").extract(heard)
    frames = model.encoder(heard.unsqueeze(0), torch.tensor([len(heard)])).encoder_out[0]
    joiner = model.joiner
    weight = torch.randn_like(joiner.encoder_proj.weight) / frames.std(dim=0) / len(frames[0]) ** 0.5
    joiner.encoder_proj.weight.copy_(weight)
    joiner.encoder_proj.bias.copy_(-weight @ frames.mean(dim=0))
    joiner.output_linear.weight.normal_(std=2.0)
    joiner.output_linear.bias.zero_()
    start = torch.tensor([[-1] * (model.decoder.context_size - 1) + [0]])
    logits = joiner(frames, model.decoder(start)[:, -1])
    bias = -logits.mean(dim=0)
    bias[[1, 2, -1]] -= 1000.0  # specials, which no transcript holds
    logits = logits + bias
    bias[0] += (logits[:, 1:].max(dim=1).values - logits[:, 0]).quantile(2 / 3)
    joiner.output_linear.bias.copy_(bias)


def write_student(exp_dir: Path, tokenizer: Tokenizer, config: TrainConfig) -> Path:
    """Write an exp_dir whose model is random, and neither silent nor talking in every frame."""
    torch.manual_seed(5)
    system = build_system(config, tokenizer.vocab_size, inference=True)
    if getattr(system.model, "joiner", None) is not None:
        enliven(system.eval().model)
    tokenizer.save(exp_dir / "tokenizer")
    write_config(exp_dir, config, 0)
    state = system.state_dict()
    content = {"model": state, "model_avg": {k: v.double() for k, v in state.items()}}
    others = {"config": config_to_dict(config), "tokenizer_hash": tokenizer.hash}
    save_checkpoint(exp_dir / "epoch-1.pt", content | others | {"train": {"step": 10, "average_period": 10}})
    return exp_dir


def load(exp_dir: Path, **options):
    """Return what decode.py loads."""
    return load_system(DecodeConfig(exp_dir=exp_dir, device="cpu", **options))


def babble(num_samples: int, seed: int) -> np.ndarray:
    """Return (S,) float32 audio in [-1, 1] that changes like speech: noise through moving bands."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / 16000
    pitch = 120 + 40 * np.sin(2 * np.pi * 1.3 * time + seed)
    voice = sum(np.sin(2 * np.pi * k * np.cumsum(pitch) / 16000) * rng.uniform(0.2, 1) for k in range(1, 20))
    loud = 0.5 + 0.5 * np.sin(2 * np.pi * 3.1 * time + 2 * seed)
    return (0.03 * loud * voice + 0.01 * rng.standard_normal(num_samples)).astype(np.float32)
