#!/usr/bin/env python3
"""Time greedy and modified beam search (and CTC greedy) on random encoder output of realistic sizes.

    benchmarks/decoders.py --encoder-dim 256 --vocab-size 500 --batch 20 --frames 250

The model's weights are random, but the blank's bias is set so that about --symbols-per-frame of the frames
emit a symbol: the number of new contexts, which is what the searches pay for, is then as in real decoding.
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from icefall_kd.cli import parse_config
from icefall_kd.config import ModelConfig
from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.decode.transducer import GreedySearch, ModifiedBeamSearch
from icefall_kd.errors import run_main
from icefall_kd.models.transducer import TransducerModel
from icefall_kd.runtime.env import measured_on, pick_device
from icefall_kd.runtime.files import write_json

# Seconds of one encoder frame.
_FRAME = 0.04


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time greedy and modified beam search on random encoder output."""

    encoder_dim: int = 256
    """Channels C of the encoder output."""
    vocab_size: int = 500
    """Tokens V."""
    batch: int = 20
    """Utterances N of a batch."""
    frames: int = 250
    """Encoder frames of the longest utterance; the shortest has half as many."""
    symbols_per_frame: float = 0.15
    """Share of frames that emit a symbol (English BPE-500 at 25 Hz: about 0.15)."""
    beam_sizes: list[int] = field(default_factory=lambda: [1, 4, 8])
    """Beams of modified beam search."""
    repeats: int = 5
    """Timed runs; the median counts, one warm-up run does not."""
    device: str = "auto"
    """auto: the GPU when there is one."""
    num_threads: int = 1
    """torch threads on a CPU."""
    out: Path | None = None
    """JSON file of the times."""


def random_model(config: BenchmarkConfig) -> TransducerModel:
    """Return a random model whose blank wins in about ``1 - symbols_per_frame`` of the frames."""
    torch.manual_seed(0)
    dims = ModelConfig(encoder_size="tiny", num_encoder_layers=1, encoder_dim=config.encoder_dim)
    model = TransducerModel(dims, config.vocab_size).eval()
    model.encoder = torch.nn.Identity()
    with torch.no_grad():
        # Random logits are nearly equal; larger weights give each frame a clear winner.
        model.joiner.encoder_proj.weight.mul_(8)
        model.joiner.output_linear.weight.mul_(8)
        frames = torch.randn(4000, config.encoder_dim)
        context = model.decoder(torch.tensor([[-1, 0]]))[:, -1]
        logits = model.joiner(frames, context)
        margin = logits[:, 1:].max(dim=1).values - logits[:, 0]
        model.joiner.output_linear.bias[0] += margin.quantile(1 - config.symbols_per_frame)
    return model


def measure(search, encoder_out: torch.Tensor, lens: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Return the median seconds of a call and the tokens a frame that it emitted."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        hyps = search.decode(encoder_out, lens)
        if encoder_out.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:]), sum(len(h[0].tokens) for h in hyps) / int(lens.sum())


def main() -> None:
    """Measure each search and print seconds, real-time factor and ratio to greedy search."""
    config = parse_config(BenchmarkConfig, description=__doc__)
    torch.set_num_threads(config.num_threads)
    device = pick_device(config.device)
    model = random_model(config).to(device)
    lens = torch.linspace(config.frames, config.frames // 2, config.batch).long()
    encoder_out = torch.randn(config.batch, config.frames, config.encoder_dim).to(device)
    searches = {"ctc_greedy_search": CtcGreedySearch(model), "greedy_search": GreedySearch(model)}
    searches |= {f"modified_beam_search, beam {b}": ModifiedBeamSearch(model, b) for b in config.beam_sizes}
    measured = {name: measure(s, encoder_out, lens.to(device), config.repeats) for name, s in searches.items()}
    greedy, audio = measured["greedy_search"][0], int(lens.sum()) * _FRAME
    print(f"{config.batch} utterances, {audio:.0f} s of audio, V = {config.vocab_size}, {device}")
    rows = []
    for name, (seconds, density) in measured.items():
        rows.append({"search": name, "seconds": seconds, "rtf": seconds / audio, "ratio_to_greedy": seconds / greedy})
        rows[-1]["tokens_per_frame"] = density
        print(
            f"{name:32s} {1000 * seconds:9.1f} ms  RTF {seconds / audio:.5f}  {seconds / greedy:6.2f} x greedy  "
            f"{density:.3f} tokens a frame"
        )
    if config.out is not None:
        write_json(config.out, {**measured_on(device), "searches": rows})


if __name__ == "__main__":
    run_main(main)
