"""A tiny pre-trained HuBERT in an exp_dir, students of it, and batches of samples."""

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file

from icefall_kd.cli import config_to_dict
from icefall_kd.config import (
    AugmentConfig,
    DataConfig,
    HubertConfig,
    HubertKdConfig,
    KdConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    SslConfig,
    TeacherConfig,
    TrainConfig,
)
from icefall_kd.data.batch import Batch
from icefall_kd.models.cluster_head import ClusterHead
from icefall_kd.models.hubert import HubertEncoder
from icefall_kd.train.checkpoint import save_checkpoint
from tests.students import babble

TEACHER = {"num_encoder_layers": 3, "encoder_dim": 32, "num_heads": 4, "feedforward_dim": 48}
THIN = {"num_encoder_layers": 3, "encoder_dim": 24, "num_heads": 4, "feedforward_dim": 24}
WIDE = {**TEACHER, "num_encoder_layers": 1}
POSITIONS = {"conv_pos": 8, "conv_pos_groups": 4}
FRONT = {"extractor_norm": "default", "extractor_channels": 16}


def hubert_config(
    objective="distil", structure="deep_thin", model=(), hubert=(), ssl=(), hubert_kd=(), kd=(), teacher=None, **groups
) -> TrainConfig:
    """Return a tiny configuration; the dicts replace single options of the groups."""
    sizes = {"base": TEACHER, "shallow_wide": WIDE}.get(structure, THIN)
    defaults = {"num_epochs": 2, "log_interval": 1, "average_period": 2, "device": "cpu", "num_threads": 1}
    loop = {**defaults, "oom_scan": False, **groups.pop("loop", {})}
    data = dataclasses.replace(
        DataConfig(max_duration=20.0, num_workers=0, num_buckets=1), **dict(groups.pop("data", {}))
    )
    return TrainConfig(
        system="hubert",
        objective=objective,
        hubert=HubertConfig(**{"structure": structure, **POSITIONS, **dict(hubert)}),
        model=ModelConfig(**{"dropout": 0.0, **sizes, **dict(model)}),
        ssl=SslConfig(**{"front_end": "waveform", **FRONT, **dict(ssl)}),
        hubert_kd=HubertKdConfig(**dict(hubert_kd)),
        kd=KdConfig(**{"teacher_labels": "online", **dict(kd)}),
        teacher=TeacherConfig(teacher=str(teacher), teacher_device="cpu") if teacher else TeacherConfig(),
        augment=AugmentConfig(spec_aug=False),
        optim=OptimConfig(optimizer="adamw", base_lr=0.003, lr_warmup_steps=2, weight_decay=0.1),
        data=data,
        loop=LoopConfig(**loop),
        **groups,
    )


def write_teacher(exp_dir: Path, clusters: int = 7, objective: str = "ssl", **options) -> HubertEncoder:
    """Write an exp_dir of a random model (with clusters, unless 0); return its encoder."""
    torch.manual_seed(3)
    config = hubert_config(objective, **{"structure": "base", **options})
    encoder = HubertEncoder(config.model, config.hubert, config.ssl).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                parameter.mul_(8)  # so that layers differ
    state = {f"model.encoder.{name}": x for name, x in encoder.state_dict().items()}
    if clusters:
        head = ClusterHead(encoder.dim, clusters, 6)
        state |= {f"model.cluster_head.{name}": x for name, x in head.state_dict().items()}
    exp_dir.mkdir(parents=True, exist_ok=True)
    train = {"step": 3, "average_period": 100, "epoch": 1}
    save_checkpoint(
        exp_dir / "epoch-1.pt",
        {"model": state, "config": config_to_dict(config), "train": train, "tokenizer_hash": ""},
    )
    return encoder


def write_cmvn(path: Path) -> Path:
    """Write statistics near those of speech."""
    save_file({"mean": torch.full((80,), -8.0), "std": torch.full((80,), 3.0)}, path)
    return path


def samples(lens=(8000, 6500, 7001), seed: int = 0) -> Batch:
    """Return a batch of audio alone, padded with zeros."""
    waves = [torch.from_numpy(babble(n, seed + i)) for i, n in enumerate(lens)]
    batch = Batch.from_audio(waves, [f"u{seed}-{i}" for i in range(len(lens))])
    return dataclasses.replace(batch, durations=[n / 16000 for n in lens])


def arguments(config: TrainConfig) -> list[str]:
    """Return the command line of a configuration."""
    argv = []
    for name, value in config_to_dict(config).items():
        if value == []:
            continue
        shown = ",".join(map(str, value)) if isinstance(value, list) else value
        argv += [f"--{name.replace('_', '-')}", "none" if value is None else str(shown)]
    return argv
