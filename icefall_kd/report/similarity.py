"""How alike the layers of two models are: centred kernel alignment with linear kernels.

Kornblith et al. 2019, arXiv 1905.00414; debiased: with the unbiased estimator of Song et al. 2012, "Feature selection
via dependence maximization", as in Nguyen et al. 2021, arXiv 2010.15327.  The plain one of few frames and many channels
is near 1 whatever the models are.
"""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from icefall_kd.config import TeacherConfig
from icefall_kd.config.checks import at_least
from icefall_kd.data.batch import Batch
from icefall_kd.data.manifests import iterate_cuts
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.audio import clean_audio
from icefall_kd.labels.keys import speech_track
from icefall_kd.quantization.sampling import sample_utterances
from icefall_kd.runtime.files import write_json
from icefall_kd.teachers import build_teacher
from icefall_kd.teachers.base import Teacher, tap

logger = logging.getLogger(__name__)

Estimator = Literal["debiased", "plain"]


@dataclass(frozen=True, kw_only=True)
class SimilarityConfig:
    """Which models are compared, on which frames."""

    student: str
    """An exp_dir, or whatever else --teacher of local/extract_labels.py takes."""
    teacher: str
    """The other model."""
    cuts: list[Path]
    """Cut sets, several as a,b."""
    out: Path
    """JSON file of the result."""
    estimator: Estimator = "debiased"
    """Of the kernel alignment."""
    num_utts: int = 50
    """Utterances, drawn with the seed, stratified by duration; speed copies are left out."""
    num_frames: int = 1500
    """Frames of these, drawn with the seed; memory grows with their square."""
    seed: int = 42
    """Of the draw."""
    device: str = "auto"
    """auto: the GPU when there is one."""

    def __post_init__(self) -> None:
        at_least(self, num_utts=1, num_frames=10)


def centred_gram(x: Tensor, estimator: Estimator) -> Tensor:
    """Return the centred Gram matrix (n, n) of frames (n, C) in float64, of norm 1.

    The inner product of two of them, summed over all entries, is the alignment of their layers.

    Raises:
        DataError: all frames are alike.
    """
    x = x.double()
    gram, n = x @ x.T, len(x)
    if estimator == "plain":
        gram = gram - gram.mean(dim=0) - gram.mean(dim=1, keepdim=True) + gram.mean()
    else:
        gram.fill_diagonal_(0.0)
        rows = gram.sum(dim=1)
        gram = gram - (rows + rows.unsqueeze(1)) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
        gram.fill_diagonal_(0.0)
    norm = gram.norm()
    if not norm > 1e-9 * n * float(x.square().mean().clamp(min=1e-30)):
        raise DataError("all frames of a layer are alike; there is nothing to compare")
    return gram / norm


def alignment(student: Sequence[Tensor], teacher: Sequence[Tensor], estimator: Estimator = "debiased") -> Tensor:
    """Return the alignments (I, J) float64 of I layers of one model with J of another.

    Args:
        student: (n, C) frames of each layer.
        teacher: (n, D) the same frames.
        estimator: "debiased" lies in [-1, 1] and is 0 on average for layers that have nothing in common; "plain" lies
            in [0, 1].
    """
    first, second = (
        torch.stack([centred_gram(x, estimator).flatten() for x in layers]) for layers in (student, teacher)
    )
    return first @ second.T


def measure(config: SimilarityConfig) -> dict:
    """Compare all layers of two models and write the result.

    Returns:
        What the JSON file holds: cka[i][j] of student layer i and teacher layer j, and what was compared.
    Raises:
        ConfigError: the models have different frames.
        DataError: a recording cannot be read.
    """
    cuts = {c.id: speech_track(c) for path in config.cuts for c in iterate_cuts(path)}
    chosen = [cuts[name] for name in sample_utterances(cuts.values(), config.num_utts, config.seed)]
    waves = [clean_audio(cut, 16000) for cut in chosen]
    models = [_model(source, config.device) for source in (config.student, config.teacher)]
    counts = [[model.num_frames(len(wave)) for wave in waves] for model in models]
    if counts[0] != counts[1]:
        i = next(i for i, pair in enumerate(zip(*counts, strict=True)) if pair[0] != pair[1])
        raise ConfigError(
            f"{config.student} makes {counts[0][i]} frames of {chosen[i].id}, {config.teacher} {counts[1][i]}; layers "
            "are compared frame by frame"
        )
    places = [(u, t) for u, count in enumerate(counts[0]) for t in range(count)]
    places = sorted(random.Random(config.seed).sample(places, min(config.num_frames, len(places))))
    if len(places) < 10:
        raise DataError(f"{len(places)} frames are too few to compare layers; give more cuts")
    layers = [_frames(model, waves, places) for model in models]
    values = alignment(*(list(of.values()) for of in layers), config.estimator)
    result = {
        "student": config.student,
        "teacher": config.teacher,
        "student_sha256": models[0].provenance().get("weights_sha256"),
        "teacher_sha256": models[1].provenance().get("weights_sha256"),
        "measure": "linear CKA",
        "estimator": config.estimator,
        "utterances": len(waves),
        "frames": len(places),
        "seed": config.seed,
        "student_layers": list(layers[0]),
        "teacher_layers": list(layers[1]),
        "cka": values.tolist(),
    }
    write_json(config.out, result)
    return result


def _model(source: str, device: str) -> Teacher:
    return build_teacher(TeacherConfig(teacher=source, teacher_dtype="float32", teacher_device=device))


@torch.no_grad()
def _frames(model: Teacher, waves: Sequence[Tensor], places: Sequence[tuple[int, int]]) -> dict[int, Tensor]:
    """Return the chosen frames (n, C) of each layer; ``places`` are sorted (utterance, frame)."""
    layers = list(range(1, model.provenance()["layer"] + 1))
    arrays = tap(model, layers) if len(layers) > 1 else ["embeddings"]
    wanted: dict[int, list[int]] = {}
    for utterance, frame in places:
        wanted.setdefault(utterance, []).append(frame)
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for utterance, frames in wanted.items():
        out = model.extract(Batch.from_audio([waves[utterance]], [str(utterance)]))
        for layer, array in zip(layers, arrays, strict=True):
            found[layer].append(out.arrays[array][0, frames].cpu())
    return {layer: torch.cat(pieces) for layer, pieces in found.items()}


def table(result: dict) -> str:
    """Return the result as a Markdown table: a row for each layer of the student, the largest of a row in bold."""
    head = ["student \\ teacher", *map(str, result["teacher_layers"])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for layer, row in zip(result["student_layers"], result["cka"], strict=True):
        best = max(row)
        shown = [f"**{value:.3f}**" if value == best else f"{value:.3f}" for value in row]
        lines.append("| " + " | ".join([str(layer), *shown]) + " |")
    return "\n".join(lines) + "\n"
