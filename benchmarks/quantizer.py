#!/usr/bin/env python3
"""Our quantizer beside multi_quantization 0.1.1, the package of the authors of MVQ-KD, in one run with equal threads.

    benchmarks/quantizer.py --parts speed --out benchmarks/results/quantizer_speed.json
    benchmarks/quantizer.py --parts error --out benchmarks/results/quantizer_error.json

"speed" encodes and trains with both; "error" trains both from scratch on two reference distributions and compares
the relative error of held-out frames (the library needs five minutes a run of 1000 + 1000 steps on two cores).
The package is part of the [dev] extra: pip install multi_quantization==0.1.1 h5py
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

import torch

from icefall_kd.cli import parse_config
from icefall_kd.config import QuantizerConfig
from icefall_kd.errors import ConfigError, run_main
from icefall_kd.quantization import native
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.quantization.trainer import QuantizerTrainer
from icefall_kd.runtime.env import measured_on, pick_device
from icefall_kd.runtime.files import write_json

try:
    import multi_quantization as library
except ImportError:
    library = None


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Compare our quantizer with multi_quantization 0.1.1."""

    parts: list[Literal["speed", "error"]] = ("speed",)
    """What to measure."""
    dims: list[int] = (384, 512, 1280)
    """Channels of the embeddings whose encoding and training is timed."""
    num_codebooks: int = 8
    """Codebooks of the quantizers that are timed."""
    frames: int = 1024
    """Frames that the library encodes; ours encodes 8 times as many."""
    repeats: int = 3
    """Timings of each kind, in turn; the median counts."""
    steps: int = 3
    """Training steps of the library in a timing; ours makes 8 times as many."""
    error_steps: int = 1000
    """Training steps of each phase in "error"."""
    error_seeds: list[int] = (1, 2)
    """Seeds of data and training in "error"."""
    num_threads: int = 2
    """Threads of torch and of the kernel."""
    device: str = "cpu"
    """Where both run."""
    out: Path | None = None
    """File for the figures (JSON)."""


def white_gaussian(count: int, dim: int) -> torch.Tensor:
    """Return frames (N, C) that nothing compresses."""
    return torch.randn(count, dim)


def through_relu_net(count: int, dim: int, source: int = 16) -> torch.Tensor:
    """Return frames (N, C): a source of few dimensions through a random two-layer net, as embeddings are."""
    net = torch.nn.Sequential(torch.nn.Linear(source, 256), torch.nn.ReLU(), torch.nn.Linear(256, dim))
    with torch.no_grad():
        return net(torch.randn(count, source))


def embedding_like(count: int, dim: int) -> torch.Tensor:
    """Return frames (N, C) of a 64-dimensional source, with noise in all channels."""
    x = through_relu_net(count, dim, source=64)
    return x / x.std() + 0.3 * torch.randn(count, dim)


def median_times(runs: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each run; they take turns, after one call of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_pytorch(run: Callable[[], object]) -> Callable[[], object]:
    """Return ``run`` with the search in PyTorch, even where the C++ kernel works."""
    return mock.patch.object(native, "kernel", lambda: None)(run)


def encoding(config: BenchmarkConfig, dim: int, device: torch.device) -> dict:
    """Time the encoding of frames by a shortly trained quantizer; the library loads its tensors.

    It starts at random as the library's do, so that several searches change codes; from data, fewer do.
    """
    torch.manual_seed(0)
    x = embedding_like(8 * config.frames, dim)
    options = QuantizerConfig(num_codebooks=config.num_codebooks, phase1_steps=150, phase2_steps=150,
                              quantizer_init="random")  # fmt: skip
    quantizer = QuantizerTrainer(x, options, device=device).run().to(device)
    theirs = library.Quantizer(dim=dim, codebook_size=256, num_codebooks=config.num_codebooks).to(device)
    theirs.load_state_dict(quantizer.state_dict())
    x, few = x.to(device), x[: config.frames].to(device)
    with torch.no_grad():
        expected = theirs.encode(few)
    runs = {
        "library": torch.no_grad()(lambda: theirs.encode(few)),
        "pytorch": in_pytorch(lambda: quantizer.encode(x)),
    }
    if device.type == "cpu" and native.kernel() is not None:
        runs["kernel"] = lambda: quantizer.encode(x)
    times = median_times(runs, config.repeats, device)
    rates = {name: len(few if name == "library" else x) / seconds for name, seconds in times.items()}
    equal = (quantizer.encode(few) == expected).all(dim=1).double().mean().item()
    return {"what": "encode, frames/s", "dim": dim, "num_codebooks": config.num_codebooks, **_ratios(rates),
            "equal_frames": equal, "relative_error": quantizer.relative_error(x)}  # fmt: skip


def training(config: BenchmarkConfig, dim: int, device: torch.device) -> dict:
    """Time steps of the first phase, 512 frames each."""
    torch.manual_seed(0)
    random.seed(0)
    x = embedding_like(512 * 8, dim)
    theirs = library.QuantizerTrainer(dim=dim, bytes_per_frame=config.num_codebooks, device=device)
    # Its first step prints losses of many searches, which is no part of a step.
    theirs.step(x[:512].to(device))
    options = QuantizerConfig(num_codebooks=config.num_codebooks, phase1_steps=10000, quantizer_init="random")
    ours = QuantizerTrainer(x, options, device=device)

    def library_steps() -> None:
        for _ in range(config.steps):
            theirs.step(x[:512].to(device))

    def our_steps() -> None:
        for _ in range(8 * config.steps):
            ours._train_step()

    runs = {"library": library_steps, "pytorch": in_pytorch(our_steps)}
    if device.type == "cpu" and native.kernel() is not None:
        runs["kernel"] = our_steps
    times = median_times(runs, config.repeats, device)
    rates = {name: config.steps * (1 if name == "library" else 8) / seconds for name, seconds in times.items()}
    return {"what": "train, steps/s of 512 frames", "dim": dim, "num_codebooks": config.num_codebooks, **_ratios(rates)}


def _ratios(rates: dict[str, float]) -> dict:
    ratios = {f"{name}_ratio": rate / rates["library"] for name, rate in rates.items() if name != "library"}
    return {"rates": rates, **ratios}


def errors(config: BenchmarkConfig, name: str, make: Callable[[int, int], torch.Tensor], device: torch.device) -> dict:
    """Train both from scratch, on the same frames, and return relative errors of 10,000 held-out frames."""
    found: dict[str, list[float]] = {"library": [], "ours": []}
    seconds: dict[str, list[float]] = {"library": [], "ours": []}
    for seed in config.error_seeds:
        torch.manual_seed(seed)
        random.seed(seed)
        x = make(60000, 64)
        train, held_out = x[:50000], x[50000:].to(device)
        start = time.perf_counter()
        phases = {"phase_one_iters": config.error_steps, "phase_two_iters": config.error_steps}
        trainer = library.QuantizerTrainer(dim=64, bytes_per_frame=4, device=device, **phases)
        step = 0
        while not trainer.done():
            rows = torch.arange(step * 512, (step + 1) * 512) % len(train)
            trainer.step(train[rows].to(device))
            step += 1
        seconds["library"].append(time.perf_counter() - start)
        theirs = Quantizer.from_state_dict(trainer.get_quantizer().state_dict()).to(device)
        found["library"].append(theirs.relative_error(held_out))
        start = time.perf_counter()
        options = QuantizerConfig(num_codebooks=4, phase1_steps=config.error_steps, phase2_steps=config.error_steps,
                                  quantizer_seed=seed)  # fmt: skip
        ours = QuantizerTrainer(train, options, device=device).run().to(device)
        seconds["ours"].append(time.perf_counter() - start)
        found["ours"].append(ours.relative_error(held_out))
        print(f"{name}, seed {seed}: library {found['library'][-1]:.4f}, ours {found['ours'][-1]:.4f}", flush=True)
    means = {key: statistics.mean(values) for key, values in found.items()}
    return {"what": "relative error", "data": name, "held_out_frames": 10000, "errors": found, "mean": means,
            "relative_difference": means["ours"] / means["library"] - 1, "seconds": seconds}  # fmt: skip


def describe(row: dict) -> str:
    """Return a row for people."""
    if row["what"] == "relative error":
        return (f"{row['what']}, {row['data']}: library {row['mean']['library']:.4f}, ours {row['mean']['ours']:.4f} "
                f"({100 * row['relative_difference']:+.2f} %)")  # fmt: skip
    rates = ", ".join(f"{name} {rate:.4g}" for name, rate in row["rates"].items())
    ratios = ", ".join(f"{row[f'{name}_ratio']:.1f}x" for name in row["rates"] if name != "library")
    return f"{row['what']}, C = {row['dim']}: {rates} ({ratios})"


def main() -> None:
    """Measure, print and, with --out, write."""
    config = parse_config(BenchmarkConfig, description=__doc__)
    if library is None:
        raise ConfigError("multi_quantization is not installed: pip install multi_quantization==0.1.1 h5py")
    torch.set_num_threads(config.num_threads)
    device = pick_device(config.device)
    rows, jobs = [], []
    if "speed" in config.parts:
        jobs += [partial(f, config, dim, device) for dim in config.dims for f in (encoding, training)]
    if "error" in config.parts:
        jobs += [partial(errors, config, "white Gaussian", white_gaussian, device),
                 partial(errors, config, "16 dimensions through a ReLU net", through_relu_net, device)]  # fmt: skip
    for job in jobs:
        rows.append(job())
        print(describe(rows[-1]), flush=True)
        if config.out is not None:
            write_json(config.out, {**measured_on(device), "rows": rows})


if __name__ == "__main__":
    run_main(main)
