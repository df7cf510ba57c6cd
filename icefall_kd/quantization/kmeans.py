"""From cuts and a teacher to clusters: sample utterances, collect their frames, k-means by scikit-learn, report.

Mini-batch k-means (Sculley 2010) is what HuBERT's code uses, with the options that stand in KmeansConfig.  This is the
only module that imports scikit-learn.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from icefall_kd.config import KmeansConfig, TeacherConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.quantization.clusters import Clusters
from icefall_kd.quantization.collect import Sample, collect_frames, draw_sample, finished_report
from icefall_kd.runtime.env import environment, package_version
from icefall_kd.runtime.files import fingerprint, write_json, write_text
from icefall_kd.runtime.log import format_seconds
from icefall_kd.teachers import build_teacher
from icefall_kd.teachers.base import Teacher
from icefall_kd.teachers.windows import WindowedTeacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainKmeansConfig:
    """Find clusters in a teacher's embeddings of some utterances, and report on them."""

    cuts: list[Path]
    """Cut sets that labels will be made for (cuts_*.jsonl.gz), several as a,b; perturbed copies are not drawn."""
    out: Path
    """The file of the clusters (.safetensors); report and list of utterances are written beside it."""
    teacher_max_duration: float = 100.0
    """Seconds of padded audio a batch of the teacher."""
    num_threads: int | None = None
    """torch threads on a CPU; None: torch's own choice."""
    kmeans: KmeansConfig = field(default_factory=KmeansConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    def __post_init__(self) -> None:
        if not self.cuts:
            raise ConfigError("--cuts names no cut set")
        if self.out.suffix != ".safetensors":
            raise ConfigError(f"--out is {self.out}; its name must end in .safetensors")
        if self.teacher_max_duration <= 0:
            raise ConfigError(f"--teacher-max-duration is {self.teacher_max_duration}; it must be positive")


def train_kmeans(config: TrainKmeansConfig, teacher: Teacher | None = None) -> dict:
    """Write clusters, their report (.report.json) and the list of utterances (.utterances.txt).

    Finished clusters of the same options are kept.

    Returns:
        The report.
    Raises:
        ConfigError: scikit-learn is not installed.
        DataError: no utterance can be read, or there are fewer frames than clusters.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    teacher = teacher if teacher is not None else build_teacher(config.teacher)
    if teacher.max_samples is not None and config.teacher.long_utterances == "window":
        teacher = WindowedTeacher(teacher)
    sample = draw_sample(config.cuts, config.kmeans.kmeans_utts, config.kmeans.kmeans_seed)
    provenance = json.loads(json.dumps(teacher.provenance()))
    version = package_version("scikit-learn")
    identity = fingerprint([provenance, sample.sha256, config.teacher_max_duration, asdict(config.kmeans), version])
    report_path = config.out.with_suffix(".report.json")
    if (finished := finished_report(Clusters.load, config.out, report_path, identity)) is not None:
        return finished
    write_text(config.out.with_suffix(".utterances.txt"), "".join(f"{key}\n" for key in sample.cuts))
    frames = collect_frames(sample, teacher, config.teacher_max_duration, config.kmeans.kmeans_frames).values.float()
    began = time.monotonic()
    centers = find_centers(frames, config.kmeans)
    seconds = time.monotonic() - began
    metadata = {
        "identity": identity,
        "teacher": provenance,
        "utterances_sha256": sample.sha256,
        "config": asdict(config.kmeans),
        "packages": {**environment()["packages"], "scikit-learn": version},
    }
    clusters = Clusters(centers, metadata)
    report = {**_report(clusters, frames, sample), "seconds": round(seconds, 1), "sha256": clusters.sha256}
    write_json(report_path, report)
    clusters.save(config.out)
    return report


def find_centers(frames: Tensor, config: KmeansConfig) -> Tensor:
    """Return the centres (K, C) float32 of frames (F, C) float32.

    Raises:
        ConfigError: scikit-learn is not installed.
        DataError: there are fewer frames than clusters.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise ConfigError(f"k-means needs scikit-learn ({error}); type: pip install scikit-learn") from error
    if len(frames) < config.num_clusters:
        raise DataError(f"{len(frames)} frames for --num-clusters {config.num_clusters}; draw more with --kmeans-utts")
    kmeans = MiniBatchKMeans(
        n_clusters=config.num_clusters,
        init="k-means++",
        max_iter=config.kmeans_passes,
        batch_size=config.kmeans_batch,
        tol=0.0,
        max_no_improvement=100,
        n_init=config.kmeans_inits,
        reassignment_ratio=0.0,
        compute_labels=False,
        random_state=config.kmeans_seed,
    )
    kmeans.fit(frames.numpy())
    return torch.from_numpy(kmeans.cluster_centers_).float()


def _report(clusters: Clusters, frames: Tensor, sample: Sample) -> dict:
    """Return how well the clusters stand for the frames (F, C) that they were made of, and how they are used."""
    numbers, parts = clusters.encode(frames).squeeze(1), frames.split(1 << 16)
    mean = sum(part.double().sum(dim=0) for part in parts) / len(frames)
    error = variance = 0.0
    for part, ids in zip(parts, numbers.split(1 << 16), strict=True):
        error += (part - clusters.centers[ids]).double().square().sum().item()
        variance += (part - mean).square().sum().item()
    used = torch.bincount(numbers, minlength=clusters.codebook_size).double()
    shares = used[used > 0] / used.sum()
    return {
        "num_clusters": clusters.codebook_size,
        "dim": clusters.dim,
        "num_frames": len(frames),
        "num_utterances": len(sample.cuts),
        "hours": round(sum(cut.duration for cut in sample.cuts.values()) / 3600, 4),
        "relative_error": error / max(variance, 1e-20),
        "perplexity": float(torch.exp(-(shares * shares.log()).sum())),
        "unused": int((used == 0).sum()),
    }


def describe(report: dict) -> str:
    """Return a report of :func:`train_kmeans` in one line for people."""
    return (
        f"{report['num_clusters']} clusters of {report['num_frames']} frames of {report['hours']:.2f} h in "
        f"{format_seconds(report['seconds'])}: relative error {report['relative_error']:.3f}, perplexity of use "
        f"{report['perplexity']:.1f}, {report['unused']} unused"
    )
