"""Mean and deviation of a training set's log-mel features, for the log-mel front end of HuBERT's students."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from icefall_kd.config.checks import at_least
from icefall_kd.data.datamodule import cuts_path
from icefall_kd.data.features import NUM_BINS, snipped_fbank
from icefall_kd.data.loader import audio_of
from icefall_kd.data.manifests import iterate_cuts
from icefall_kd.errors import DataError
from icefall_kd.frames import FBANK_SNIPPED
from icefall_kd.runtime.tensors import write_tensors
from icefall_kd.train.checkpoint import state_sha256

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CmvnConfig:
    """Compute the statistics that --cmvn names."""

    manifest_dir: Path = Path("data/fbank")
    """Folder of cuts_<part>.jsonl.gz; the audio is read, not stored features, whose frames differ."""
    parts: list[str] = field(default_factory=lambda: ["train"])
    """Parts of the training set: names in manifest-dir, or paths of lhotse cut sets."""
    out: Path = Path("data/cmvn.safetensors")
    """File to write: mean and std (80,)."""
    cmvn_utts: int | None = None
    """Read so many utterances of each part, evenly spaced; None: all."""

    def __post_init__(self) -> None:
        at_least(self, cmvn_utts=1)


def compute_cmvn(manifest_dir: Path, parts: Sequence[str], out: Path, utterances: int | None = None) -> int:
    """Write mean and standard deviation of each bin over all frames; return how many frames there were.

    Args:
        manifest_dir: folder of the cut sets.
        parts: their names, or paths.
        out: safetensors file with mean and std (80,) float32.
        utterances: of each part, evenly spaced; None: all.
    Raises:
        DataError: no audio, or a bin that never changes.
    """
    count, total, squares = 0, torch.zeros(NUM_BINS, dtype=torch.float64), torch.zeros(NUM_BINS, dtype=torch.float64)
    for part in parts:
        path = cuts_path(manifest_dir, part)
        number = sum(1 for _ in iterate_cuts(path))
        wanted = number if utterances is None else min(utterances, number)
        chosen = {i * number // wanted for i in range(wanted)}
        for i, cut in enumerate(iterate_cuts(path)):
            if i not in chosen:
                continue
            wave = audio_of(cut)
            if FBANK_SNIPPED.num_frames(len(wave)) == 0:
                continue
            features = snipped_fbank(wave.unsqueeze(0))[0].double()
            count += len(features)
            total += features.sum(dim=0)
            squares += features.square().sum(dim=0)
    if count == 0:
        raise DataError(f"{', '.join(parts)} in {manifest_dir}: no utterance has a frame of 25 ms")
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    if not bool((std > 1e-4).all()):
        raise DataError(
            f"bin {int(std.argmin())} of {count} frames never changes: {', '.join(parts)} is silent; check "
            "--manifest-dir and --parts"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"mean": mean.float(), "std": std.float()}
    write_tensors(out, tensors, {"metadata": json.dumps({"frames": count, "sha256": state_sha256(tensors)})})
    logger.info("%s: mean and deviation of %d frames", out, count)
    return count
