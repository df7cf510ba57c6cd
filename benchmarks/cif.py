#!/usr/bin/env python3
"""Time integrate-and-fire, forward and backward, beside loops over frames.

    benchmarks/cif.py --out benchmarks/results/cif_cpu.json
    benchmarks/cif.py --device cuda --out benchmarks/results/cif_gpu.json

"overlaps" is icefall_kd.models.cif.  The loops do a frame of all utterances at a time and fire at most once a frame,
all that these lengths ask for: "loop over indexes" takes frame t as encoder_out[:, t], as public code does, for which
autograd makes a whole tensor of zeros a frame; "loop over slices" spares it that.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from memory import peak_gib
from torch import Tensor

from icefall_kd.cli import parse_config
from icefall_kd.errors import DataError, run_main
from icefall_kd.models.cif import integrate_and_fire
from icefall_kd.runtime.env import measured_on, pick_device
from icefall_kd.runtime.files import write_json


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time integrate-and-fire."""

    batch: int = 32
    """Utterances N."""
    frames: int = 200
    """Encoder frames T'."""
    tokens: int = 50
    """Tokens U of an utterance."""
    dim: int = 256
    """Channels C."""
    repeats: int = 7
    """Timings of each, in turn; the median counts."""
    num_threads: int = 2
    """Threads on a CPU."""
    device: str = "cpu"
    """Where to run."""
    out: Path | None = None
    """File for the figures (JSON)."""


def overlaps(encoder_out: Tensor, alpha: Tensor, lens: Tensor) -> Tensor:
    """Return the fired vectors (N, U, C) by the overlap matrix."""
    return integrate_and_fire(encoder_out, alpha, lens).c


def loop(encoder_out: Tensor, alpha: Tensor, lens: Tensor, slices: bool) -> Tensor:
    """Return the same, frame after frame; at most one token fires in a frame."""
    n, num_frames, dim = encoder_out.shape
    alpha = alpha * (lens / (alpha.sum(dim=1) + 1e-8)).unsqueeze(1)
    frames = encoder_out.unbind(1) if slices else [encoder_out[:, t] for t in range(num_frames)]
    weights = alpha.unbind(1) if slices else [alpha[:, t] for t in range(num_frames)]
    mass, state = alpha.new_zeros(n), encoder_out.new_zeros(n, dim)
    states, fires = [], []
    for x, weight in zip(frames, weights, strict=True):
        missing = 1 - mass
        fire = weight >= missing - 1e-4  # the last token of float32 sums would be lost without
        used = torch.where(fire, missing, weight)
        state = state + used.unsqueeze(1) * x
        states.append(state)
        fires.append(fire)
        rest = weight - used
        mass = torch.where(fire, rest, mass + weight)
        state = torch.where(fire.unsqueeze(1), rest.unsqueeze(1) * x, state)
    stacked, fired = torch.stack(states, dim=1), torch.stack(fires, dim=1)
    return torch.nn.utils.rnn.pad_sequence([stacked[i][fired[i]] for i in range(n)], batch_first=True)


def loop_over_indexes(encoder_out: Tensor, alpha: Tensor, lens: Tensor) -> Tensor:
    """Return :func:`loop` as it is mostly written."""
    return loop(encoder_out, alpha, lens, slices=False)


def loop_over_slices(encoder_out: Tensor, alpha: Tensor, lens: Tensor) -> Tensor:
    """Return :func:`loop` with the cheapest backward pass."""
    return loop(encoder_out, alpha, lens, slices=True)


FORMS = {"overlaps": overlaps, "loop over slices": loop_over_slices, "loop over indexes": loop_over_indexes}


def build(config: BenchmarkConfig, name: str, device: torch.device) -> Callable[[], Tensor]:
    """Return a call that fires and goes back once, and returns the fired vectors."""
    generator = torch.Generator().manual_seed(0)
    shape = config.batch, config.frames
    encoder_out = torch.randn(*shape, config.dim, generator=generator).to(device).requires_grad_()
    alpha = (0.05 + 0.9 * torch.rand(*shape, generator=generator)).to(device).requires_grad_()
    gradient = torch.randn(config.batch, config.tokens, config.dim, generator=generator).to(device)
    lens = torch.full((config.batch,), config.tokens, device=device)

    def run() -> Tensor:
        c = FORMS[name](encoder_out, alpha, lens)
        encoder_out.grad = alpha.grad = None
        c.backward(gradient)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return c.detach()

    return run


def main() -> None:
    """Measure, print and, with --out, write."""
    config = parse_config(BenchmarkConfig, description=__doc__)
    torch.set_num_threads(config.num_threads)
    device = pick_device(config.device)
    runs = {name: build(config, name, device) for name in FORMS}
    fired = {name: run() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(config.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name in FORMS:
        difference = float((fired[name] - fired["overlaps"]).abs().max())
        if difference > 1e-2:
            raise DataError(f"{name} differs from the overlaps by {difference:g}: these lengths need another loop")
        row = {"what": name, "seconds": statistics.median(seconds[name]), "difference": difference,
               "peak_gib": peak_gib(build, config, name, device=device, num_threads=config.num_threads)}  # fmt: skip
        if name != "overlaps":
            row["ratio"] = row["seconds"] / statistics.median(seconds["overlaps"])
            row["memory_ratio"] = row["peak_gib"] / rows[0]["peak_gib"]
        rows.append(row)
        ratio = f"  {row['ratio']:.0f} x the time, {row['memory_ratio']:.1f} x the memory" if "ratio" in row else ""
        print(f"{name:18s} {1000 * row['seconds']:8.1f} ms {1024 * row['peak_gib']:7.0f} MiB{ratio}", flush=True)
    if config.out is not None:
        sizes = {n: getattr(config, n) for n in ("batch", "frames", "tokens", "dim", "num_threads")}
        write_json(config.out, {**measured_on(device), **sizes, "rows": rows})


if __name__ == "__main__":
    run_main(main)
