"""A tiny pre-trained HuBERT in an exp_dir, students of it, and batches; as a program, one rank of a training."""

import dataclasses
import json
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from icefall_kd.cli import config_to_dict
from icefall_kd.config import (
    AugmentConfig,
    DataConfig,
    HubertConfig,
    HubertKdConfig,
    HubertSslConfig,
    KdConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    SslConfig,
    TeacherConfig,
    TrainConfig,
)
from icefall_kd.data.batch import IGNORE, Batch, Labels
from icefall_kd.errors import run_main
from icefall_kd.frames import SSL_CONV
from icefall_kd.models.cluster_head import ClusterHead
from icefall_kd.models.hubert import HubertEncoder
from icefall_kd.runtime import dist
from icefall_kd.systems import build_system
from icefall_kd.systems.base import System
from icefall_kd.systems.hubert_ssl import HubertSslSystem
from icefall_kd.train.checkpoint import save_checkpoint, state_sha256
from icefall_kd.train.loop import train

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


def babble(num_samples: int, seed: int) -> torch.Tensor:
    """Return (S,) samples: a voice whose pitch and loudness move, and noise."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(num_samples) / 16000
    pitch = 120 + 40 * torch.sin(8.2 * time + seed)
    phase = 2 * torch.pi * pitch.cumsum(0) / 16000
    voice = sum(torch.rand((), generator=generator) * torch.sin(k * phase) for k in range(1, 20))
    loud = 0.5 + 0.5 * torch.sin(19.5 * time + 2 * seed)
    return 0.03 * loud * voice + 0.01 * torch.randn(num_samples, generator=generator)


def samples(lens=(8000, 6500, 7001), seed: int = 0) -> Batch:
    """Return a batch of audio alone, padded with zeros."""
    waves = [babble(n, seed + i) for i, n in enumerate(lens)]
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


CLUSTERS = 7


def with_clusters(batch: Batch) -> Batch:
    """Return a batch of audio with a cluster of every frame, which its loudness tells."""
    lens = [SSL_CONV.num_frames(n) for n in batch.audio_lens.tolist()]
    values = torch.full((len(lens), max(lens), 1), IGNORE)
    for row, frames in enumerate(lens):
        loud = batch.audio[row].unfold(0, 400, 320)[:frames].square().mean(dim=1).sqrt()
        values[row, :frames, 0] = (loud * 40).long().clamp(max=CLUSTERS - 1)
    return dataclasses.replace(batch, labels={"clusters": Labels(values, torch.tensor(lens))})


class TwoRanksData:
    """Three batches an epoch and a rank, with clusters; one rank alone has those of two, one after the other."""

    def train_batches(self, epoch, skip):
        ranks = range(2) if dist.get_world_size() == 1 else [dist.get_rank()]
        batches = [samples((5000 + 700 * r, 4000), 100 * epoch + 10 * i + r) for i in range(3) for r in ranks]
        batches = [with_clusters(batch) for batch in batches]
        return iter(batches[skip:])

    def num_batches(self, epoch):
        return 6 // dist.get_world_size()

    def valid_batches(self):
        return iter([with_clusters(samples(seed=99))])

    def worst_batches(self):
        return [with_clusters(samples(seed=98))]

    def state(self):
        return {"train": "toy"}


class SameMasks(HubertSslSystem):
    """Pre-training whose masks the batch tells, whichever rank has it."""

    def losses(self, batch, step):
        torch.manual_seed(zlib.crc32("|".join(batch.ids).encode()))
        return super().losses(batch, step)


def pretraining(loop: dict) -> tuple[TrainConfig, System]:
    """Return a pre-training behind convolutions."""
    ssl = {"mask_prob": 0.5, "mask_span": 2}
    config = hubert_config("ssl", "base", ssl=ssl, hubert_ssl=HubertSslConfig(cluster_dim=16), loop=loop)
    torch.manual_seed(7)
    encoder = HubertEncoder(config.model, config.hubert, config.ssl)
    return config, SameMasks(config, encoder, "labels", SimpleNamespace(codebook_size=CLUSTERS))


def distillation(loop: dict, teacher: str, cmvn: str) -> tuple[TrainConfig, System]:
    """Return a distillation in two stages behind log-mel features."""
    front = {"ssl": {"front_end": "fbank"}, "hubert": {"cmvn": Path(cmvn)}, "hubert_kd": {"frontend_steps": 0.5}}
    config = hubert_config(teacher=teacher, loop=loop, **front)
    torch.manual_seed(7)
    return config, build_system(config, 0)


def main() -> int:
    """Train in a process of its own: hubert_toys.py EXP_DIR '{"teacher": ..., "cmvn": ..., "accum_grad": 1}'.

    Without a teacher it pre-trains.
    """
    torch.set_num_threads(1)
    options = json.loads(sys.argv[2])
    dist.init(timeout=120)
    try:
        loop = {"exp_dir": Path(sys.argv[1]), "oom_scan": True, "accum_grad": options["accum_grad"]}
        teacher = {name: options[name] for name in ("teacher", "cmvn") if name in options}
        config, system = distillation(loop, **teacher) if teacher else pretraining(loop)
        result = train(system, TwoRanksData(), config)
        result["equal_weights"] = len(set(dist.gather_objects(state_sha256(system.state_dict())))) == 1
    finally:
        dist.shutdown()
    if dist.get_rank() == 0:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    run_main(main)
