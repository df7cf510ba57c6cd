#!/usr/bin/env python3
"""Size and time of a HuBERT teacher and its students: front end, Transformer and both, one utterance at a time.

    benchmarks/hubert_frontend.py --out benchmarks/results/hubert_frontend_cpu.json
    benchmarks/hubert_frontend.py --device cuda --out benchmarks/results/hubert_frontend_gpu.json

Weights are random: they change no time.  The front end is the seven convolutions, or log-mel features from samples with
their convolution and linear layer; the Transformer is all that follows, projection and positional convolution included.
Multiply-accumulate operations are those that torch counts in matrix products and convolutions, divided by the seconds
of audio: extracting log-mel features is not among them.  Models take turns, so that another load on the machine hits
all of them; medians count.  With one thread seconds of the CPU are printed, else of the clock; the file has both.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from icefall_kd.cli import parse_config
from icefall_kd.config import ModelConfig
from icefall_kd.config.checks import at_least
from icefall_kd.config.hubert import HubertConfig
from icefall_kd.config.ssl import SslConfig
from icefall_kd.errors import run_main
from icefall_kd.models.fbank_front import FbankFrontEnd
from icefall_kd.models.hubert import HubertEncoder
from icefall_kd.runtime.env import measured_on, pick_device
from icefall_kd.runtime.files import write_json

# Name -> structure and front end.
MODELS = {
    "teacher": ("base", "waveform"),
    "shallow_wide": ("shallow_wide", "waveform"),
    "deep_thin": ("deep_thin", "waveform"),
    "deep_thin, log-mel": ("deep_thin", "fbank"),
    "shallow_wide, log-mel": ("shallow_wide", "fbank"),
}
BASELINE = "deep_thin"
PARTS = ("features", "front_end", "transformer", "total")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time the front ends and layers of HuBERT models."""

    seconds: float = 10.0
    """Length of the utterance."""
    repeats: int = 9
    """Timed rounds; the median counts, a warm-up round does not."""
    threads: list[int] = field(default_factory=lambda: [1, 2])
    """torch threads on a CPU, a table for each."""
    device: str = "cpu"
    """Where to run."""
    out: Path | None = None
    """File for the figures (JSON)."""

    def __post_init__(self) -> None:
        at_least(self, seconds=0.5, repeats=1)


def build(name: str, device: torch.device) -> HubertEncoder:
    """Return a model with random weights."""
    structure, front_end = MODELS[name]
    torch.manual_seed(0)
    ssl = SslConfig(front_end=front_end, extractor_norm="default")
    return HubertEncoder(ModelConfig(), HubertConfig(structure=structure), ssl).to(device).eval()


def features_of(model: HubertEncoder, audio: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the first convolution hears: samples, or log-mel features of them."""
    front = model.subsampling
    return front.features(audio, lens) if isinstance(front, FbankFrontEnd) else (audio, lens)


def transformer(model: HubertEncoder, x: Tensor, lens: Tensor) -> None:
    """Run all that follows the front end's ``project``."""
    front = model.subsampling
    model.forward_embedded(x if isinstance(front, FbankFrontEnd) else front.finish(front.norm(x)), lens)


@torch.no_grad()
def million_macs(model: HubertEncoder, audio: Tensor, lens: Tensor) -> tuple[float, float]:
    """Return 10^6 multiply-accumulate operations of the utterance: front end and Transformer."""
    features = features_of(model, audio, lens)
    with sdpa_kernel(SDPBackend.MATH):  # as matrix products, which are counted on every device
        with FlopCounterMode(display=False) as front:
            x = model.subsampling.project(*features)
        with FlopCounterMode(display=False) as rest:
            transformer(model, *x)
    return front.get_total_flops() / 2e6, rest.get_total_flops() / 2e6


@torch.no_grad()
def run(model: HubertEncoder, audio: Tensor, lens: Tensor) -> Tensor:
    """Return seconds by the clock and of the CPU (2,) of feature extraction, front end (that included), Transformer and
    all: (4, 2)."""
    times = [_now(audio.device)]
    features = features_of(model, audio, lens)
    times.append(_now(audio.device))
    x = model.subsampling.project(*features)
    times.append(_now(audio.device))
    transformer(model, *x)
    times.append(_now(audio.device))
    start, extracted, projected, end = torch.tensor(times, dtype=torch.float64)
    return torch.stack([extracted - start, projected - start, end - projected, end - start])


def _now(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def measure(
    models: dict[str, HubertEncoder], audio: Tensor, lens: Tensor, repeats: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Return seconds by model, clock or CPU, and part: medians over the rounds."""
    rounds: dict[str, list[Tensor]] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            rounds[name].append(run(model, audio, lens))
    found = {}
    for name, timed in rounds.items():
        by_clock, by_cpu = torch.stack(timed[1:]).median(dim=0).values.T.tolist()
        found[name] = {
            "seconds": dict(zip(PARTS, by_clock, strict=True)),
            "cpu_seconds": dict(zip(PARTS, by_cpu, strict=True)),
        }
    return found


def main() -> None:
    """Count, measure, print and, with --out, write."""
    config = parse_config(BenchmarkConfig, description=__doc__)
    device = pick_device(config.device)
    audio = 0.1 * torch.randn(1, round(16000 * config.seconds), generator=torch.Generator().manual_seed(1)).to(device)
    lens = torch.tensor([audio.shape[1]], device=device)
    models = {name: build(name, device) for name in MODELS}
    sizes = []
    for name, model in models.items():
        front, rest = (macs / 1e3 / config.seconds for macs in million_macs(model, audio, lens))
        sizes.append({
            "model": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "front_end_gmacs": front,
            "transformer_gmacs": rest,
            "gmacs": front + rest,
        })  # fmt: skip
    rows = []
    for threads in config.threads if device.type == "cpu" else [0]:
        if threads:
            torch.set_num_threads(threads)
        timed = measure(models, audio, lens, config.repeats)
        print(f"{config.seconds:g} s of audio on {f'{threads} threads of a CPU' if threads else device}")
        for size in sizes:
            name = size["model"]
            row = {"model": name, **({"threads": threads} if threads else {}), **timed[name]}
            clock = "cpu_seconds" if threads == 1 else "seconds"  # another load adds less to the CPU's
            row["faster"] = {part: timed[BASELINE][clock][part] / row[clock][part] for part in PARTS[1:]}
            row["rtf"] = row["seconds"]["total"] / config.seconds
            rows.append(row)
            times = "  ".join(f"{part} {1000 * s:7.1f} ms" for part, s in row[clock].items())
            print(f"{name:22s}{size['parameters'] / 1e6:6.2f} M {size['gmacs']:5.2f} GMAC/s  {times}"
                  f"  RTF {row['rtf']:.4f}  {row['faster']['total']:.2f} x", flush=True)  # fmt: skip
    if config.out is not None:
        record = {"seconds": config.seconds, "repeats": config.repeats, "baseline": BASELINE}
        write_json(config.out, {**measured_on(device), **record, "models": sizes, "rows": rows})


if __name__ == "__main__":
    run_main(main)
