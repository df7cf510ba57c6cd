"""Tiny HuBERT trainings: sizes, options, and batches of samples."""

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file
from ssl_toys import speech_like

from icefall_kd.cli import config_to_dict
from icefall_kd.config import (
    AsrLossConfig,
    AugmentConfig,
    DataConfig,
    HubertAsrConfig,
    HubertConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    SslConfig,
    TrainConfig,
)
from icefall_kd.data.batch import Batch
from icefall_kd.systems import build_system
from icefall_kd.train.checkpoint import save_checkpoint

# structure and front end of each kind of model
KINDS = {
    "base": ("base", "waveform"),
    "shallow_wide": ("shallow_wide", "waveform"),
    "deep_thin": ("deep_thin", "waveform"),
    "deep_thin_fbank": ("deep_thin", "fbank"),
    "fithubert": ("fithubert", "waveform"),
}
VOCAB = 7
CTC = {"transducer_scale": 0.0, "ctc_scale": 1.0}


def write_cmvn(path: Path) -> Path:
    """Write statistics like those of speech."""
    save_file({"mean": torch.full((80,), -8.0), "std": torch.full((80,), 3.0)}, path)
    return path


def hubert_config(kind="deep_thin", cmvn=None, model=(), ssl=(), tune=(), asr=(), optim=(), data=(), **loop):
    """Return a configuration of a model of 2 layers of 32; the dicts replace single options of the groups."""
    structure, front_end = KINDS[kind]
    sizes = {"num_encoder_layers": 2, "encoder_dim": 32, "num_heads": 4, "feedforward_dim": 48, "dropout": 0.0}
    defaults = {"num_epochs": 2, "log_interval": 1, "average_period": 2, "device": "cpu", "num_threads": 1}
    front = {"front_end": front_end, "extractor_norm": "default", "extractor_channels": 16}
    return TrainConfig(
        system="hubert",
        hubert=HubertConfig(structure=structure, conv_pos=8, conv_pos_groups=4, cmvn=cmvn),
        hubert_asr=HubertAsrConfig(**dict(tune)),
        ssl=SslConfig(**{**front, **dict(ssl)}),
        model=ModelConfig(**{**sizes, **dict(model)}),
        asr=AsrLossConfig(**{**CTC, **dict(asr)}),
        augment=AugmentConfig(spec_aug=False),
        optim=OptimConfig(**{"optimizer": "adamw", "base_lr": 0.002, "lr_warmup_steps": 5, **dict(optim)}),
        data=DataConfig(**{"max_duration": 20.0, "num_workers": 0, "num_buckets": 1, **dict(data)}),
        loop=LoopConfig(**{**defaults, **loop}),
    )


def speech_batch(seed: int = 0, seconds=(0.9, 0.7, 0.8), tokens: int = 3) -> Batch:
    """Return speech-like samples with random tokens (ids 3 to 5)."""
    waves = [torch.from_numpy(speech_like(s, 100 * seed + i)) for i, s in enumerate(seconds)]
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, VOCAB - 1, (len(waves), tokens), generator=generator)
    batch = Batch.from_audio(waves, [f"u{seed}-{i}" for i in range(len(waves))])
    y_lens = torch.full((len(waves),), tokens)
    return dataclasses.replace(batch, y=y, y_lens=y_lens, durations=list(seconds))


class SpeechData:
    """Three batches an epoch."""

    def train_batches(self, epoch, skip):
        return iter([speech_batch(10 * epoch + i) for i in range(3)][skip:])

    def num_batches(self, epoch):
        return 3

    def valid_batches(self):
        return iter([speech_batch(99)])

    def worst_batches(self):
        return [speech_batch(98)]

    def state(self):
        return {"train": "toy"}


def pretrained(exp_dir, kind="deep_thin", cmvn=None, **ssl):
    """Write the exp_dir of a distilled or pre-trained model: an encoder, a mask embedding, heads, no tokenizer."""
    config = hubert_config(kind, cmvn=cmvn, exp_dir=exp_dir, ssl=ssl)
    torch.manual_seed(11)
    system = build_system(config, VOCAB)
    state = {n: t for n, t in system.state_dict().items() if n.startswith("model.encoder.")}
    state |= {"model.mask_embedding": torch.arange(32.0), "model.cluster_head.final_proj.weight": torch.ones(8, 32)}
    state |= {"heads.layers.0.weight": torch.ones(4, 32)}
    exp_dir.mkdir()
    content = {"model": state, "model_avg": {k: v.double() for k, v in state.items()}}
    content |= {"config": config_to_dict(config) | {"objective": "ssl"}, "train": {"step": 10, "average_period": 10}}
    save_checkpoint(exp_dir / "epoch-1.pt", content)
    return state
