#!/usr/bin/env python3
"""Sizes and CPU times of a dense encoder and of the sparse one in it: one thread, one stream.

    benchmarks/sparse.py --out benchmarks/results/sparse_cpu.json

The encoder is a Conformer of 12 layers, 384 channels, 6 heads and 1536 hidden units in each of a layer's two
feed-forward modules.  Weights are random, masks are those of magnitudes.  "materialised" runs W . M as any matrix.  The
others leave out what is pruned: "CSR" is torch's product of a sparse matrix with a dense one, "BSR" that of blocks,
"gathered" takes the kept columns of every row of blocks and multiplies those, and "kernel" is
benchmarks/block_sparse.cpp, compiled here.  Every product is compared with the dense one first.  Times are those of the
process on the CPU, the least of several taken in turn, since other programs may run.
"""

import copy
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.cli import parse_config
from icefall_kd.config import DualConfig, ModelConfig
from icefall_kd.decode.streaming import encode_chunks
from icefall_kd.errors import DataError, run_main
from icefall_kd.export.graphs import log_mel_noise
from icefall_kd.models.block_storage import pack_layers
from icefall_kd.models.conformer import Conformer
from icefall_kd.models.dual import make_dual, set_mode
from icefall_kd.models.pruning import make_masks, prunable_layers, sparse_size
from icefall_kd.models.streaming import WHOLE_UTTERANCE, Chunks
from icefall_kd.runtime.env import measured_on
from icefall_kd.runtime.files import write_json
from icefall_kd.runtime.tensors import write_tensors

BLOCK = (8, 1)
# Largest difference from the dense product, relative to its largest value (at least 1).
TOLERANCE = 1e-4
BASELINE = "dense, streaming"


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measure dense and sparse encoders."""

    layers: int = 12
    """Conformer layers."""
    dim: int = 384
    """Channels."""
    heads: int = 6
    """Attention heads."""
    feedforward: int = 1536
    """Hidden units."""
    sparsity: list[float] = field(default_factory=lambda: [0.7, 0.9])
    """Shares of blocks without which the sparse encoders do."""
    seconds: float = 10.0
    """Length of the stream."""
    chunk: int = 16
    """Frames of 40 ms a chunk."""
    left: int = 64
    """Frames before a chunk that it sees."""
    repeats: int = 7
    """Timings of each, in turn; the least counts."""
    out: Path | None = None
    """File for the figures (JSON)."""


class CsrLinear(nn.Module):
    """torch's sparse rows; of BSR, rows of blocks."""

    def __init__(self, weight: Tensor, bias: Tensor, blocks: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = weight.to_sparse_bsr(BLOCK) if blocks else weight.to_sparse_csr(), bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        y = torch.sparse.mm(self.weight, x.flatten(0, -2).t())
        return (y.t() + self.bias).view(*x.shape[:-1], -1)


class BsrLinear(CsrLinear):
    """The same by blocks."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(weight, bias, blocks=True)


class GatheredLinear(nn.Module):
    """For each row of blocks, the kept columns of x times the weights there."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        rows = weight.split(BLOCK[0])
        self.columns = [row.any(0).nonzero().squeeze(1) for row in rows]
        self.weights = [row[:, c].t().contiguous() for row, c in zip(rows, self.columns, strict=True)]
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        flat = x.flatten(0, -2)
        parts = [flat.index_select(1, c) @ w for c, w in zip(self.columns, self.weights, strict=True)]
        return (torch.cat(parts, dim=1) + self.bias).view(*x.shape[:-1], -1)


class KernelLinear(nn.Module):
    """benchmarks/block_sparse.cpp."""

    function: Callable

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        blocks = weight.unflatten(0, (-1, BLOCK[0])).transpose(1, 2)  # (O, I) -> (O/8, 8, I) -> (O/8, I, 8)
        kept = blocks.any(2)
        self.values = blocks[kept].contiguous()
        self.places = kept.nonzero()[:, 1].numpy().astype("uint16")
        self.offsets = F.pad(kept.sum(1).cumsum(0), (1, 0)).int()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], len(self.bias))
        self.function(x.data_ptr(), self.values.data_ptr(), self.places.ctypes.data, self.offsets.data_ptr(),
                      self.bias.data_ptr(), y.data_ptr(), x.numel() // x.shape[-1], x.shape[-1],
                      len(self.offsets) - 1)  # fmt: skip
        return y


class DenseLinear(nn.Linear):
    """The matrix with its zeros."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], device="meta")
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)


FORMS = {
    "materialised": DenseLinear,
    "CSR": CsrLinear,
    "BSR": BsrLinear,
    "gathered": GatheredLinear,
    "kernel": KernelLinear,
}


def compile_kernel(folder: Path) -> Callable:
    """Return the compiled function of block_sparse.cpp."""
    library = folder / "block_sparse.so"
    source = Path(__file__).with_name("block_sparse.cpp")
    flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, "-o", library, source], check=True)
    function = ctypes.CDLL(str(library)).block_sparse_linear
    function.argtypes, function.restype = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 3, None
    return function


def dense_encoder(config: BenchmarkConfig) -> Conformer:
    """Return a streaming encoder of random weights."""
    torch.manual_seed(0)
    options = {"num_encoder_layers": config.layers, "encoder_dim": config.dim, "num_heads": config.heads,
               "feedforward_dim": config.feedforward}  # fmt: skip
    chunks = {"chunk_size": [config.chunk], "left_context_frames": [config.left]}
    model = ModelConfig(**options, **chunks, streaming=True, convolution="chunk")
    return Conformer(model).eval().requires_grad_(False)


def prune(encoder: Conformer, sparsity: float) -> Conformer:
    """Return a copy with masks."""
    pruned = copy.deepcopy(encoder)
    make_dual(pruned, DualConfig(sparsity=sparsity, separate_norms=False))
    layers = prunable_layers(pruned)
    for name, mask in make_masks(layers, sparsity, BLOCK).items():
        layers[name].mask.copy_(mask)
    set_mode(pruned, "streaming", sparse=True)
    return pruned


def in_form(pruned: Conformer, form: str) -> tuple[Conformer | None, str | float]:
    """Return the encoder with its pruned layers in a form, and the largest difference of a product, or why not."""
    encoder, worst = copy.deepcopy(pruned), 0.0
    for name, layer in prunable_layers(encoder).items():
        weight = layer.effective_weight().detach()
        x = torch.randn(1, 19, weight.shape[1])
        expected = F.linear(x, weight, layer.bias)
        try:
            new = FORMS[form](weight, layer.bias.detach())
            found = new(x)
        except RuntimeError as error:
            return None, str(error).splitlines()[0]
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not difference <= TOLERANCE:
            raise DataError(f"{form} of {name} differs from the dense product by {difference:g}")
        worst = max(worst, difference)
        parent, _, last = name.rpartition(".")
        setattr(encoder.get_submodule(parent), last, new)
    return encoder, worst


def stored_bytes(encoder: Conformer, pruned: Conformer | None, dtype: torch.dtype) -> int:
    """Return the bytes of a file with the encoder, by blocks if it is pruned."""
    state = {name: x.to(dtype) for name, x in encoder.state_dict().items()}
    if pruned is not None:
        state, _ = pack_layers(state, prunable_layers(pruned), BLOCK)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "encoder.safetensors"
        write_tensors(file, state, {})
        return file.stat().st_size


def sizes(encoder: Conformer, pruned: dict[float, Conformer]) -> list[dict]:
    """Return parameters, non-zeros and the bytes on the disk of the dense and the sparse encoders."""
    types = {"fp32_bytes": torch.float32, "fp16_bytes": torch.float16}
    parameters = sum(p.numel() for p in encoder.parameters())
    rows = [{"what": "dense", "parameters": parameters, "nonzeros": parameters,
             **{name: stored_bytes(encoder, None, dtype) for name, dtype in types.items()}}]  # fmt: skip
    for sparsity, model in pruned.items():
        size = sparse_size(model, BLOCK)
        found = {name: stored_bytes(encoder, model, dtype) for name, dtype in types.items()}
        rows.append({"what": "sparse", "sparsity": sparsity, "parameters": parameters,
                     "nonzeros": size.nonzeros + size.rest, **found,
                     **{f"{name}_ratio": found[name] / rows[0][name] for name in types}})  # fmt: skip
    return rows


def streamed(encoder: Conformer, features: Tensor, chunks: Chunks) -> Tensor:
    """Return the output (1, T', C) chunk by chunk."""
    lens = torch.tensor([features.shape[1]])
    return torch.cat([out for out, _ in encode_chunks(encoder, features, lens, chunks)], dim=1)


def whole(encoder: Conformer, features: Tensor) -> Tensor:
    """Return the output (1, T', C) of the utterance as a whole."""
    encoder.pinned = WHOLE_UTTERANCE
    return encoder(features, torch.tensor([features.shape[1]])).encoder_out


def times(runs: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
    """Return CPU seconds of each run, taken in turn behind one run that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - start)
    return seconds


@torch.no_grad()
def measure(config: BenchmarkConfig, encoder: Conformer, pruned: Conformer, sparsity: float) -> list[dict]:
    """Return a row for each way to run the encoder at one sparsity."""
    features, chunks = log_mel_noise(1, round(100 * config.seconds), 80), Chunks(config.chunk, config.left)
    runs: dict[str, Callable[[], Tensor]] = {
        BASELINE: lambda: streamed(encoder, features, chunks), "dense, full": lambda: whole(encoder, features)
    }  # fmt: skip
    rows, differences = [], {}
    for form in FORMS:
        model, found = in_form(pruned, form)
        if model is None:
            rows.append({"sparsity": sparsity, "what": form, "impossible": found})
            continue
        runs[form], differences[form] = (lambda model=model: streamed(model, features, chunks)), found
    expected = runs["materialised"]()
    for form in differences:
        difference = float((runs[form]() - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not difference <= 10 * TOLERANCE:
            raise DataError(f"the encoder with {form} differs from the materialised one by {difference:g}")
        differences[form] = max(differences[form], difference)
    seconds = times(runs, config.repeats)
    least = min(seconds[BASELINE])
    for name, taken in seconds.items():
        row = {"sparsity": sparsity, "what": name, "seconds": min(taken), "median_seconds": statistics.median(taken)}
        row["ratio"] = min(taken) / least
        rows.append(row | ({"difference": differences[name]} if name in differences else {}))
    return rows


def main() -> None:
    """Measure, print and, with --out, write."""
    config = parse_config(BenchmarkConfig, description=__doc__)
    torch.set_num_threads(1)
    encoder = dense_encoder(config)
    pruned = {sparsity: prune(encoder, sparsity) for sparsity in config.sparsity}
    stored, rows = sizes(encoder, pruned), []
    for row in stored:
        mb = [row[name] / 1e6 for name in ("fp32_bytes", "fp16_bytes")]
        print(f"{row['what']} {row.get('sparsity', 0):.1f}: {row['nonzeros'] / 1e6:.1f} M non-zeros, {mb[0]:.1f} MB, "
              f"in 16 bits {mb[1]:.1f} MB", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        KernelLinear.function = staticmethod(compile_kernel(Path(folder)))
        for sparsity, model in pruned.items():
            for row in measure(config, encoder, model, sparsity):
                rows.append(row)
                what = row.get("impossible") or f"{row['seconds']:.3f} s, {row['ratio']:.2f} of {BASELINE}"
                print(f"{sparsity:.1f} {row['what']:17s} {what}", flush=True)
    if config.out is not None:
        names = ("layers", "dim", "heads", "feedforward", "seconds", "chunk", "left", "repeats")
        shape = {n: getattr(config, n) for n in names}
        write_json(config.out, {**measured_on(), **shape, "num_threads": 1, "sizes": stored, "rows": rows})


if __name__ == "__main__":
    run_main(main)
