#!/usr/bin/env python3
"""Time a training step without distillation, with stored codebook indexes, and with a teacher in the loop.

    benchmarks/training.py --encoder-size small --out benchmarks/results/training_cpu.json
    benchmarks/training.py --device cuda --encoder-size medium --precision bf16 --batch 30

All three take turns on the same random batch; the step is the whole of it, the optimizer included.  Labels reach
a step as the data loader hands them over, which reads them in workers of its own (benchmarks/label_store.py).
"""

import dataclasses
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from icefall_kd.cli import parse_config
from icefall_kd.config import ENCODER_SIZES, KdConfig, LoopConfig, ModelConfig, TeacherConfig, TrainConfig
from icefall_kd.data.batch import Batch, Labels
from icefall_kd.errors import run_main
from icefall_kd.frames import SSL_CONV, fbank_num_frames
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.runtime.env import measured_on, pick_device
from icefall_kd.runtime.files import write_json
from icefall_kd.systems.mvq import LabelSource, MvqSystem, OnlineTeacher, kd_targets
from icefall_kd.teachers import build_teacher
from icefall_kd.teachers.base import Teacher
from icefall_kd.train.step import Stepper, Wishes


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time training steps."""

    encoder_size: Literal["tiny", "small", "medium", "large"] = "small"
    """Size of the student."""
    batch: int = 12
    """Utterances N."""
    seconds: float = 10.0
    """Length of the longest utterance; the shortest has three quarters of it."""
    tokens_per_second: float = 4.0
    """Tokens of a transcript."""
    vocab_size: int = 500
    """V."""
    num_codebooks: int = 8
    """Codebooks of a teacher frame."""
    teacher: str | None = "whisper-tiny.en"
    """Teacher of "online"; null: leave that out."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the student."""
    repeats: int = 10
    """Steps of each kind, in turn; the median counts."""
    num_threads: int = 2
    """Threads on a CPU."""
    device: str = "cpu"
    """Where to run."""
    profile: bool = False
    """Print also where a step with stored labels spends its time."""
    out: Path | None = None
    """File for the figures (JSON)."""


def random_batch(config: BenchmarkConfig, teacher: Teacher | None, source: LabelSource) -> Batch:
    """Return a batch of noise with random tokens and labels."""
    samples = torch.linspace(config.seconds, 0.75 * config.seconds, config.batch).mul(16000).long()
    x_lens = torch.tensor([fbank_num_frames(n) for n in samples.tolist()])
    y_lens = (samples / 16000 * config.tokens_per_second).long()
    lens = torch.tensor([source.formula.num_frames(n) for n in samples.tolist()])
    codes = torch.randint(0, 256, (config.batch, int(lens.max()), source.width))
    codes[torch.arange(codes.shape[1]) >= lens[:, None]] = -100
    return Batch(
        ids=[str(i) for i in range(config.batch)],
        keys=[str(i) for i in range(config.batch)],
        features=torch.randn(config.batch, int(x_lens.max()), 80),
        x_lens=x_lens,
        audio=0.1 * torch.randn(config.batch, int(samples.max())) if teacher is not None else None,
        audio_lens=samples,
        y=torch.randint(1, config.vocab_size, (config.batch, int(y_lens.max()))),
        y_lens=y_lens,
        labels={"kd": Labels(codes, lens)},
        durations=(samples / 16000).tolist(),
    )


def steppers(config: BenchmarkConfig, exp_dir: str, teacher: Teacher | None, source: LabelSource,
             device: torch.device) -> dict[str, Stepper]:  # fmt: skip
    """Return the kinds of training, each with a student of its own."""
    base = TrainConfig(model=ModelConfig(encoder_size=config.encoder_size),
                       loop=LoopConfig(exp_dir=Path(exp_dir), precision=config.precision))  # fmt: skip
    kinds = {"none": None, "stored": None, **({"online": teacher} if teacher is not None else {})}
    found = {}
    for kind, online in kinds.items():
        options = base if kind == "none" else dataclasses.replace(base, kd=KdConfig(kd="mvq", label_dir=[Path("-")]))
        torch.manual_seed(0)
        targets = [] if kind == "none" else kd_targets(options.kd, ENCODER_SIZES[config.encoder_size][0], [source])
        if online is not None:
            quantizer = Quantizer(online.dim, config.num_codebooks).to(device)
            online = OnlineTeacher(online, quantizer, options.kd.online_refine_iters)
        system = MvqSystem(options, config.vocab_size, targets, online).to(device)
        found[kind] = Stepper(system.train(), options, device)
    return found


def main() -> None:
    """Measure, print and, with --out, write."""
    config = parse_config(BenchmarkConfig, description=__doc__)
    torch.set_num_threads(config.num_threads)
    device = pick_device(config.device)
    teacher = None
    if config.teacher is not None:
        teacher = build_teacher(TeacherConfig(teacher=config.teacher, teacher_device=str(device)))
    formula = teacher.frame_formula if teacher is not None else SSL_CONV
    source = LabelSource(path=None, kind="codebook_indexes", formula=formula, width=config.num_codebooks)
    batch = random_batch(config, teacher, source)
    with tempfile.TemporaryDirectory() as exp_dir:
        kinds = steppers(config, exp_dir, teacher, source, device)
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for step in range(config.repeats + 2):
            for name, stepper in kinds.items():
                start = time.perf_counter()
                stepper.step([batch], step, 1, is_last=False, wishes=Wishes())
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if step >= 2:
                    seconds[name].append(time.perf_counter() - start)
        if config.profile:
            with torch.profiler.profile() as profile:
                kinds["stored"].step([batch], config.repeats + 2, 1, is_last=False, wishes=Wishes())
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=50))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    # Neighbours in time are compared: the speed of a shared machine drifts.
    ratios = {name: statistics.median(a / b for a, b in zip(values, seconds["none"], strict=True))
              for name, values in seconds.items()}  # fmt: skip
    audio = sum(batch.durations)
    for name, value in medians.items():
        print(f"{name:7s} {1000 * value:8.1f} ms a step, {audio / value:6.1f} audio hours an hour, "
              f"{ratios[name]:.3f} x none")  # fmt: skip
    if config.out is not None:
        write_json(config.out, {**measured_on(device), "seconds": medians, "ratio_to_none": ratios})


if __name__ == "__main__":
    run_main(main)
