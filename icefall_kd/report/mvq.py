"""The page of --system mvq: how the labels use their codebooks, and what the student learned of each."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from icefall_kd.labels.info import INFO_NAME
from icefall_kd.labels.store import LabelStore
from icefall_kd.quantization.report import COLLAPSED, index_entropy
from icefall_kd.report.page import Section, figure, paragraph, table, text
from icefall_kd.report.plots import draw_codebooks
from icefall_kd.report.training import curves
from icefall_kd.results import Run, find_folder

# Frames of a label set that its usage is counted from; entropies are then right to a thousandth.
_MOST_FRAMES = 200_000


def mvq_sections(run: Run, records: Sequence[dict]) -> list[Section]:
    """Return the section about codebooks, one drawing a label set; for other trainings, a sentence."""
    if run.config["kd"] != "mvq":
        told = f"This student (--kd {run.config['kd']}) has no codebooks to predict."
        return [Section("Codebooks", paragraph(text(told)))]
    targets: dict[str, list[float]] = {}
    for name, curve in curves(records).items():
        if (found := re.fullmatch(r"(\w+)_ce\d+", name)) is not None:
            targets.setdefault(found[1], []).append(curve.last()[0])
    body = paragraph(
        "Of each codebook of the label set: the entropy of its indexes, how many of its entries are used "
        "(perplexity is the exponential of the entropy), and the student's cross-entropy at the end of the training, "
        "in nats. Entropy less cross-entropy is what the student knows of a codebook.",
        note=True,
    )
    folders = run.config["label_dir"] if run.config["teacher_labels"] == "stored" else []
    for k, (target, reached) in enumerate(targets.items()):
        body += _target(run, target, reached, folders[k] if k < len(folders) else None)
    return [Section("Codebooks", body or paragraph("The log has no cross-entropies yet."))]


def _target(run: Run, target: str, reached: list[float], label_dir: str | None) -> str:
    found = find_folder(run.exp_dir, label_dir, INFO_NAME) if label_dir is not None else None
    if found is None:
        svg = draw_codebooks(f"cross-entropy, {target}", reached, None, None, "nats")
        lines = [[str(m), f"{x:.3f}"] for m, x in enumerate(reached)]
        gone = "made in training" if label_dir is None else f"{label_dir} is no more"
        return (
            figure("Cross-entropy of the student", f"{target}; labels: {gone}", svg, wide=True)
            + table(f"Codebooks of {target}", ["codebook", "cross-entropy"], lines, numbers=(0, 1))
        )
    codes, store = read_codes(found), LabelStore(found)
    size, q = store.info.codebook_size, codes.shape[1]
    entropies, used = index_entropy(codes, size).tolist(), [len(c.unique()) for c in codes.T]
    lines = []
    for m, x in enumerate(reached):
        # The codebooks of the teacher frames that a student frame spans follow each other.
        entropy, entries = entropies[m % q], used[m % q]
        perplexity = math.exp(entropy)
        flag = " (collapsed)" if perplexity < COLLAPSED * min(size, len(codes)) else ""
        lines.append([str(m), str(m % q), str(m // q), f"{entries} of {size}", f"{perplexity:.1f}{flag}",
                      f"{entropy:.3f}", f"{x:.3f}", f"{entropy - x:+.3f}"])  # fmt: skip
    header = ["target", "codebook", "teacher frame", "entries used", "perplexity", "entropy", "cross-entropy", "known"]
    bound = math.log(size)
    svg = draw_codebooks(f"cross-entropy, {target}", reached, [entropies[m % q] for m in range(len(reached))], bound,
                         "nats")  # fmt: skip
    told = f"{label_dir}; entropies of {len(codes):,} frames; the bound is ln {size}"
    return figure("Cross-entropy of the student", told, svg, wide=True) + table(
        f"Codebooks of {target}", header, lines, numbers=range(len(header))
    )


def read_codes(folder) -> Tensor:
    """Return indexes (F, Q) int64 of a label set: all, or those of its first utterances."""
    store, found, frames = LabelStore(folder), [], 0
    for k in range(store.num_shards):
        for entry in store.shard(k).entries():
            found.append(torch.from_numpy(entry.values.astype("int64")))
            frames += len(entry.values)
            if frames >= _MOST_FRAMES:
                return torch.cat(found)
    return torch.cat(found)
