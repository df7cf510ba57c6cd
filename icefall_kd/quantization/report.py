"""The report on a quantizer before any label is extracted: is it good, and what will the labels cost?"""

import math
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from icefall_kd.errors import DataError
from icefall_kd.quantization.outliers import energies, outlier_mask
from icefall_kd.quantization.quantizer import Quantizer

# A codebook that uses fewer than this fraction of its entries (perplexity / K) is called collapsed.
COLLAPSED = 0.1
# Two codebooks whose centers spread over the same subspace fight for it.
CORRELATED = 0.9


def index_entropy(codes: Tensor, codebook_size: int) -> Tensor:
    """Return the entropy in nats of each codebook's indexes, (Q,) float64, for codes (N, Q).

    Estimated from counts it is too low by about ``(K - 1) / (2 N)`` nats (Miller 1955), see
    :func:`entropy_bias`; the figure is not corrected.
    """
    entropies = []
    for column in codes.long().T:
        p = torch.bincount(column, minlength=codebook_size).double() / len(column)
        entropies.append(-torch.special.xlogy(p, p).sum())
    return torch.stack(entropies)


def entropy_bias(num_frames: int, codebook_size: int) -> float:
    """Return by how many nats an entropy estimated from ``num_frames`` uniform indexes is too low, about."""
    return (codebook_size - 1) / (2 * num_frames)


def codebook_correlation(quantizer: Quantizer) -> Tensor:
    """Return how far codebooks share subspaces, (Q, Q) float64 with ones on the diagonal.

    ``c_ij = tr(S_i S_j) / sqrt(tr(S_i^2) tr(S_j^2))`` with S the covariance of a codebook's centers.
    """
    centers = quantizer.scaled_centers().detach().cpu().double()
    centers = centers - centers.mean(dim=1, keepdim=True)
    # tr(S_i S_j) = |A_i A_j^T|_F^2: K x K products instead of C x C covariances.
    overlap = torch.stack([torch.stack([(a @ b.T).square().sum() for b in centers]) for a in centers])
    norm = overlap.diagonal().clamp(min=1e-300).sqrt()
    return overlap / norm.unsqueeze(0) / norm.unsqueeze(1)


def gaussian_bound(num_codebooks: int, codebook_size: int, dim: int) -> float:
    """Return Shannon's least relative error ``2^(-2R)`` of white Gaussian data at this rate (R bits a channel)."""
    return 2.0 ** (-2.0 * num_codebooks * math.log2(codebook_size) / dim)


def quantizer_report(
    quantizer: Quantizer,
    frames: Tensor,
    more_frames: Tensor | None = None,
    frame_rate: float = 50.0,
    hours: float | None = None,
    teacher_speed: float | None = None,
    max_refine: int = 5,
) -> dict:
    """Measure a quantizer.

    Args:
        frames: (N, C) embeddings that it was not trained on: errors are measured on them.
        more_frames: (N2, C) further embeddings for the index entropies (training frames will do).
        frame_rate: teacher frames a second.
        hours: hours of audio of the corpus, speed copies included; None: no projection.
        teacher_speed: hours of audio that the teacher processes in an hour; None: no projected time.
        max_refine: most refinement searches.
    Returns:
        Plain data for JSON; relative errors by number of searches, of all frames and (``usual_error``) of those
        that are no outliers; entropies in nats.
    """
    if len(frames) == 0:
        raise DataError("the quantizer report needs frames; there are none for validation")
    size, dim = quantizer.codebook_size, quantizer.dim
    errors = quantizer.relative_errors(frames, max_refine)
    rows = torch.arange(len(frames))
    outliers, energy = outlier_mask(frames, rows), energies(frames, rows)
    usual_errors = quantizer.relative_errors(frames[~outliers], max_refine) if outliers.any() else errors
    all_frames = frames if more_frames is None else torch.cat([frames, more_frames.to(frames.dtype)])
    start = time.perf_counter()
    codes = quantizer.encode(all_frames, max_refine)
    encode_speed = len(all_frames) / max(time.perf_counter() - start, 1e-9)
    entropies = index_entropy(codes, size)
    correlation = codebook_correlation(quantizer)
    bytes_per_hour = 3600 * frame_rate * quantizer.num_codebooks
    float_bytes_per_hour = 3600 * frame_rate * dim * 4
    report = {
        "dim": dim,
        "num_codebooks": quantizer.num_codebooks,
        "codebook_size": size,
        "sha256": quantizer.sha256,
        "error_frames": len(frames),
        "relative_error": {str(rounds): error for rounds, error in enumerate(errors)},
        "usual_error": {str(rounds): error for rounds, error in enumerate(usual_errors)},
        "outlier_frames": int(outliers.sum()),
        "outlier_energy": (energy[outliers].sum() / energy.sum().clamp(min=1e-300)).item(),
        "gaussian_bound": gaussian_bound(quantizer.num_codebooks, size, dim),
        "entropy_frames": len(all_frames),
        "entropy": entropies.tolist(),
        "entropy_bound": math.log(size),
        "entropy_bias": entropy_bias(len(all_frames), size),
        "perplexity": entropies.exp().tolist(),
        "correlation": correlation.tolist(),
        "frame_rate": frame_rate,
        "encode_frames_per_second": encode_speed,
        "bytes_per_frame": quantizer.num_codebooks,
        "bytes_per_hour": bytes_per_hour,
        "ratio_to_float32": float_bytes_per_hour / bytes_per_hour,
        "projection": _projection(hours, bytes_per_hour, float_bytes_per_hour, frame_rate, encode_speed, teacher_speed),
    }
    report["warnings"] = _warnings(report)
    return report


def _projection(hours, bytes_per_hour, float_bytes_per_hour, frame_rate, encode_speed, teacher_speed) -> dict | None:
    if hours is None:
        return None
    encode_hours = hours * frame_rate / encode_speed
    teacher_hours = None if teacher_speed is None else hours / teacher_speed
    return {
        "corpus_hours": hours,
        "bytes": hours * bytes_per_hour,
        "float32_bytes": hours * float_bytes_per_hour,
        "encode_hours": encode_hours,
        "teacher_hours": teacher_hours,
        "total_hours": None if teacher_hours is None else encode_hours + teacher_hours,
    }


def _warnings(report: dict) -> list[str]:
    size, found = report["codebook_size"], []
    # With few frames no codebook can show more than as many entries as there are frames.
    reachable = min(size, report["entropy_frames"])
    for n, perplexity in enumerate(report["perplexity"]):
        if perplexity < COLLAPSED * reachable:
            found.append(f"codebook {n} has collapsed: its perplexity is {perplexity:.1f} of {size} entries; "
                         "train longer or with --quantizer-init data")  # fmt: skip
    for i, row in enumerate(report["correlation"]):
        found += [f"codebooks {i} and {j} share a subspace (correlation {row[j]:.2f}); train phase 1 longer"
                  for j in range(i + 1, len(row)) if row[j] > CORRELATED]  # fmt: skip
    errors = list(report["relative_error"].values())
    usual = list(report["usual_error"].values())
    if errors[-1] > 1.2 * usual[-1] + 0.01:
        found.append(f"{report['outlier_frames']} outlier frames with {100 * report['outlier_energy']:.0f} % of the "
                     f"energy raise the relative error from {usual[-1]:.3f} to {errors[-1]:.3f}; "
                     "--normalize-embeddings true bounds them")  # fmt: skip
    if errors[-1] > 1:
        found.append(f"the relative error {errors[-1]:.3f} is above 1: the quantizer is worse than the mean frame")
    if errors[0] - errors[-1] > 0.25 * max(errors[0], 1e-12) and errors[0] > 0.02:
        found.append(f"refinement lowers the error from {errors[0]:.3f} to {errors[-1]:.3f}: "
                     "the classifier is far behind the centers; train longer")  # fmt: skip
    if report["entropy_frames"] < 10000:
        found.append(f"entropies come from {report['entropy_frames']} frames and are about "
                     f"{report['entropy_bias']:.3f} nats too low; 10000 frames would do")  # fmt: skip
    return found


def format_bytes(count: float) -> str:
    """Return a number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def print_report(report: dict, console: Console | None = None) -> None:
    """Print a report as tables."""
    console = console or Console()
    title = f"{report['num_codebooks']} codebooks of {report['codebook_size']}, {report['dim']} channels"
    table = Table(title=f"Quantizer: {title}", title_justify="left")
    table.add_column("refinements")
    table.add_column(f"relative error ({report['error_frames']} frames)", justify="right")
    table.add_column(f"without {report['outlier_frames']} outliers", justify="right")
    for rounds, error in report["relative_error"].items():
        table.add_row(rounds, f"{error:.4f}", f"{report['usual_error'][rounds]:.4f}")
    table.add_row("white Gaussian bound", f"{report['gaussian_bound']:.4f}", "")
    console.print(table)
    table = Table(
        title=f"Indexes of {report['entropy_frames']} frames; entropies in nats of at most "
        f"{report['entropy_bound']:.3f}, about {report['entropy_bias']:.3f} too low",
        title_justify="left",
    )
    for name in ("codebook", "entropy", "perplexity", "largest correlation"):
        table.add_column(name, justify="right")
    for n, (entropy, perplexity) in enumerate(zip(report["entropy"], report["perplexity"], strict=True)):
        others = [c for j, c in enumerate(report["correlation"][n]) if j != n]
        table.add_row(str(n), f"{entropy:.3f}", f"{perplexity:.1f}", f"{max(others):.2f}" if others else "-")
    console.print(table)
    table = Table(title="Cost of the labels", title_justify="left", show_header=False)
    table.add_row("an hour of audio", format_bytes(report["bytes_per_hour"]))
    table.add_row("smaller than float32 embeddings", f"{report['ratio_to_float32']:.0f} times")
    table.add_row("indexes", f"{report['encode_frames_per_second']:.0f} frames/s")
    projection = report["projection"]
    if projection is not None:
        table.add_row(f"corpus of {projection['corpus_hours']:.4g} h", format_bytes(projection["bytes"]))
        table.add_row("the same as float32 embeddings", format_bytes(projection["float32_bytes"]))
        table.add_row("time for indexes", f"{projection['encode_hours']:.3g} h")
        if projection["teacher_hours"] is not None:
            table.add_row("time for the teacher", f"{projection['teacher_hours']:.3g} h")
    console.print(table)
    for warning in report["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {warning}")
