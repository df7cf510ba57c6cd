"""Speech-like audio and a tiny self-supervised training of it; run as a program, one rank of a training."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording

from icefall_kd.config import (
    AugmentConfig,
    DataConfig,
    DualConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    SslConfig,
    TrainConfig,
)
from icefall_kd.data.batch import Batch
from icefall_kd.data.features import FbankExtractor, store_features
from icefall_kd.errors import run_main
from icefall_kd.runtime import dist
from icefall_kd.systems import build_system
from icefall_kd.train.checkpoint import state_sha256
from icefall_kd.train.loop import train

RATE = 16_000
# First and second formant of some vowels, in Hz.
VOWELS = [(300, 2300), (700, 1200), (500, 1800), (350, 800), (450, 1100), (600, 1000)]


def speech_like(seconds: float, seed: int) -> np.ndarray:
    """Return float32 samples: vowels of two formants over a fundamental, each of 80 to 250 ms, with little noise."""
    rng = np.random.default_rng(seed)
    pitch, pieces, total = rng.uniform(90, 220), [], 0
    while total < seconds * RATE:
        length = int(rng.uniform(0.08, 0.25) * RATE)
        t = np.arange(length) / RATE
        vowel = VOWELS[rng.integers(len(VOWELS))]
        wave = sum(
            np.exp(-(((k * pitch - f) / 120) ** 2)) * np.sin(2 * np.pi * k * pitch * t)
            for k in range(1, 30)
            for f in vowel
        )
        pieces.append(0.1 * wave * np.hanning(length))
        total += length
    wave = np.concatenate(pieces)[: round(seconds * RATE)]
    return (wave + 0.002 * rng.standard_normal(len(wave))).astype(np.float32)


def write_speech(folder: Path, part: str, durations, seed: int = 0, features: bool = True) -> Path:
    """Write ``fbank/cuts_<part>.jsonl.gz`` of recordings without supervisions; return the manifest."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    cuts = []
    for i, seconds in enumerate(durations):
        path = folder / "audio" / f"{part}{i}.wav"
        soundfile.write(path, speech_like(seconds, 1000 * seed + i), RATE, subtype="PCM_16")
        recording = Recording.from_file(path, recording_id=f"{part}{i}")
        cuts.append(MonoCut(f"{part}{i}", 0.0, recording.duration, 0, recording=recording))
    manifest = folder / "manifests" / f"cuts_{part}.jsonl.gz"
    manifest.parent.mkdir(exist_ok=True)
    CutSet.from_cuts(cuts).to_file(manifest)
    if features:
        store_features([manifest], folder / "fbank", FbankExtractor(backend="lhotse"))
    return manifest


def ssl_config(objective="ssl", model=(), ssl=(), dual=(), optim=(), data=(), **loop) -> TrainConfig:
    """Return a tiny configuration; the dicts replace single options of the groups."""
    sizes = {"num_encoder_layers": 2, "encoder_dim": 32, "num_heads": 2, "feedforward_dim": 64, "cnn_kernel": 7}
    stream = {"streaming": True, "convolution": "chunk", "chunk_size": [4, 8], "left_context_frames": [8, 16]}
    small = {"subsampling_channels": (4, 8, 16), "dropout": 0.1}
    defaults = {"num_epochs": 2, "log_interval": 1, "average_period": 2, "device": "cpu", "num_threads": 1}
    return TrainConfig(
        system="dualmode",
        objective=objective,
        dual=DualConfig(**{"modes": "full", **dict(dual)}),
        ssl=SslConfig(**{"target_dim": 64, "codebook_entries": 40, **dict(ssl)}),
        model=ModelConfig(**{**sizes, **stream, **small, **dict(model)}),
        augment=AugmentConfig(spec_aug=False),
        optim=OptimConfig(**{"optimizer": "adamw", "base_lr": 0.003, "lr_warmup_steps": 5, **dict(optim)}),
        data=dataclasses.replace(DataConfig(max_duration=20.0, num_workers=0, num_buckets=1), **dict(data)),
        loop=LoopConfig(**{**defaults, **loop}),
    )


def ssl_batch(seed: int = 0, lens=(160, 120, 140), audio: bool = False) -> Batch:
    """Return features that are noise with slow changes, and audio of as many frames."""
    torch.manual_seed(seed)
    n, longest = len(lens), max(lens)
    slow = torch.randn(n, longest // 20 + 1, 80).repeat_interleave(20, dim=1)[:, :longest]
    features = -6 + 3 * slow + torch.randn(n, longest, 80)
    x_lens = torch.tensor(lens)
    return Batch(
        ids=[f"u{seed}-{i}" for i in range(n)],
        features=features,
        x_lens=x_lens,
        audio=torch.randn(n, longest * 160) if audio else None,
        audio_lens=x_lens * 160 if audio else None,
        durations=[n / 100 for n in lens],
    )


class SslData:
    """Four batches an epoch, others on every rank."""

    def train_batches(self, epoch, skip):
        return iter([ssl_batch(100 * epoch + 10 * i + dist.get_rank()) for i in range(4)][skip:])

    def valid_batches(self):
        return iter([ssl_batch(99)])

    def worst_batches(self):
        return [ssl_batch(98)]

    def state(self):
        return {"train": "toy"}


def main() -> int:
    """Train in a process of its own: ssl_toys.py EXP_DIR '{"dual": {...}}'."""
    torch.set_num_threads(1)
    options = json.loads(sys.argv[2])
    dist.init(timeout=120)
    try:
        config = ssl_config(dual=options["dual"], model={"dropout": 0.0}, exp_dir=Path(sys.argv[1]))
        torch.manual_seed(7)
        system = build_system(config, 0)
        result = train(system, SslData(), config)
        result["equal_weights"] = len(set(dist.gather_objects(state_sha256(system.state_dict())))) == 1
    finally:
        dist.shutdown()
    if dist.get_rank() == 0:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    run_main(main)
