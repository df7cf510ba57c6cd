#!/usr/bin/env python3
"""Time our pruned transducer loss, forward and backward, beside fast_rnnt (and k2) where they import.

    benchmarks/rnnt.py --out benchmarks/results/rnnt_cpu.json
    benchmarks/rnnt.py --device cuda --batch 30 --symbols 60 --out benchmarks/results/rnnt_gpu.json

"loss" adds encoder and decoder outputs of V channels inside the windows, so that only the loss is timed;
"with joiner" runs the projections and the joiner of the recipe, which any implementation pays for.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from memory import peak_gib
from torch import Tensor, nn

from icefall_kd.cli import parse_config
from icefall_kd.errors import run_main
from icefall_kd.losses.rnnt import pruned_transducer_loss
from icefall_kd.losses.rnnt_backends import OUTSIDE, probe
from icefall_kd.models.transducer import Joiner
from icefall_kd.runtime.env import measured_on, pick_device
from icefall_kd.runtime.files import write_json


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time the pruned transducer loss."""

    batch: int = 16
    """Utterances N."""
    frames: int = 250
    """Encoder frames T'."""
    symbols: int = 50
    """Tokens U of an utterance."""
    vocab_size: int = 500
    """V."""
    prune_range: int = 5
    """Symbol positions of a frame, R."""
    joiner_dim: int = 512
    """Channels of the joiner, "with joiner"."""
    repeats: int = 5
    """Timings of each, in turn; the median counts."""
    num_threads: int = 2
    """Threads on a CPU."""
    device: str = "cpu"
    """Where to run."""
    out: Path | None = None
    """File for the figures (JSON)."""


class Sum(nn.Module):
    """A joiner without parameters."""

    encoder_proj = decoder_proj = nn.Identity()

    def forward(self, encoder_out: Tensor, decoder_out: Tensor, project_input: bool = True) -> Tensor:
        """Return the logits: the sum of both sides."""
        return encoder_out + decoder_out


def build(config: BenchmarkConfig, what: str, backend: str, device: torch.device) -> Callable[[], float]:
    """Return a call that computes losses and gradients once, and returns the loss of a token."""
    torch.manual_seed(0)
    dim = config.vocab_size if what == "loss" else config.joiner_dim
    encoder_out = torch.randn(config.batch, config.frames, dim, device=device, requires_grad=True)
    decoder_out = torch.randn(config.batch, config.symbols + 1, dim, device=device, requires_grad=True)
    if what == "loss":
        joiner, am, lm = Sum(), nn.Identity(), nn.Identity()
    else:
        joiner = Joiner(dim, dim, dim, config.vocab_size).to(device)
        am, lm = (nn.Linear(dim, config.vocab_size).to(device) for _ in range(2))
    y = torch.randint(1, config.vocab_size, (config.batch, config.symbols), device=device)
    x_lens, y_lens = (torch.full((config.batch,), n, device=device) for n in (config.frames, config.symbols))

    def run() -> float:
        simple, pruned = pruned_transducer_loss(encoder_out, decoder_out, joiner, am, lm, y, x_lens, y_lens,
                                                prune_range=config.prune_range, backend=backend)  # fmt: skip
        loss = (0.5 * simple + pruned).sum()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach()) / y.numel()

    return run


def main() -> None:
    """Measure, print and, with --out, write."""
    config = parse_config(BenchmarkConfig, description=__doc__)
    torch.set_num_threads(config.num_threads)
    device = pick_device(config.device)
    backends = ["torch", *(name for name in OUTSIDE if probe(name, device.type).module is not None)]
    rows = []
    for what in ("loss", "with joiner"):
        runs = {name: build(config, what, name, device) for name in backends}
        losses = {name: run() for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(config.repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        for name in backends:
            peak = peak_gib(build, config, what, name, device=device, num_threads=config.num_threads)
            row = {"what": what, "backend": name, "seconds": statistics.median(seconds[name]), "loss": losses[name],
                   "peak_gib": peak}  # fmt: skip
            if name != "torch":
                row["torch_ratio"] = statistics.median(seconds["torch"]) / row["seconds"]
            rows.append(row)
            ratio = f"  ours takes {row['torch_ratio']:.2f} of its time" if "torch_ratio" in row else ""
            print(f"{what:12s} {name:10s} {1000 * row['seconds']:8.1f} ms {row['peak_gib']:6.2f} GiB  "
                  f"loss {row['loss']:.4f}{ratio}", flush=True)  # fmt: skip
    if config.out is not None:
        write_json(config.out, {**measured_on(device), "rows": rows})


if __name__ == "__main__":
    run_main(main)
