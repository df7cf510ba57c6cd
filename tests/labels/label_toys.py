"""A teacher, a quantizer, a label set and a corpus small enough for tests."""

import time

import numpy as np
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from icefall_kd.config import ExtractConfig
from icefall_kd.data.batch import Batch
from icefall_kd.frames import SSL_CONV
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.labels.keys import speed_copy
from icefall_kd.labels.shard import key_hash
from icefall_kd.labels.store import LabelStore, shard_of
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.teachers.base import TeacherOutput

RATE = 16_000


class ToyTeacher:
    """A fixed random projection of framed audio, with HuBERT's frame count."""

    sampling_rate = RATE
    frame_formula = SSL_CONV

    def __init__(self, dim=8, max_samples=None, delay=0.0, sha="toy-1", layer=1):
        self.dim, self.max_samples, self.delay, self.sha, self.layer = dim, max_samples, delay, sha, layer
        self.projection = torch.randn(400, dim, generator=torch.Generator().manual_seed(1))

    def num_frames(self, num_samples):
        return self.frame_formula.num_frames(num_samples)

    def extract(self, batch: Batch) -> TeacherOutput:
        time.sleep(self.delay)
        lens = torch.tensor([self.num_frames(n) for n in batch.audio_lens.tolist()])
        out = torch.zeros(len(batch), int(lens.max()), self.dim)
        for i, (wave, n) in enumerate(zip(batch.audio, batch.audio_lens.tolist(), strict=True)):
            out[i, : lens[i]] = wave[:n].unfold(0, 400, 320)[: lens[i]] @ self.projection
        return TeacherOutput({"embeddings": out}, {"embeddings": lens})

    def provenance(self):
        return {
            "family": "toy",
            "teacher": "toy",
            "source": "memory",
            "weights_sha256": self.sha,
            "layer": self.layer,
            "layer_convention": "1-based",
            "normalization": "none",
            "frame_formula": self.frame_formula.to_dict(),
            "device": "cpu",
            "dtype": "float32",
            "versions": {},
        }


def toy_quantizer(dim=8, num_codebooks=4):
    torch.manual_seed(3)
    return Quantizer(dim, num_codebooks, 16)


def write_cuts(folder, durations, speeds=("1",), name="cuts"):
    """Write noise recordings of the given seconds and a cut set with a cut for each of them and each speed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    cuts = []
    for i, seconds in enumerate(durations):
        samples = round(seconds * RATE)
        path = folder / f"rec{i}.wav"
        if not path.exists():
            soundfile.write(path, (0.1 * rng.standard_normal(samples)).astype(np.float32), RATE, subtype="PCM_16")
        recording = Recording.from_file(path, recording_id=f"rec{i}")
        cut = MonoCut(f"rec{i}-0", 0.0, recording.duration, 0, recording=recording)
        cut.supervisions = [SupervisionSegment(f"rec{i}", f"rec{i}", 0.0, recording.duration, text=f"text {i}")]
        cuts += [speed_copy(cut, s) for s in speeds]
    path = folder / f"{name}.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(path)
    return path


def config_for(cuts, label_dir, **options):
    options.setdefault("quantizer", "given")
    return ExtractConfig(**{"cuts": [cuts], "label_dir": label_dir, "refine_iters": 1, "part_utterances": 3, **options})


def toy_info(**changes):
    base = {
        "kind": "codebook_indexes",
        "dtype": "uint8",
        "width": 8,
        "dim": 64,
        "teacher": "toy",
        "teacher_sha256": "aaaa",
        "layer": 3,
        "layer_convention": "1-based",
        "normalization": "none",
        "frame_formula": SSL_CONV.to_dict(),
        "num_codebooks": 8,
        "codebook_size": 256,
        "quantizer_sha256": "bbbb",
        "corpus_fingerprint": "cccc",
    }
    return LabelSetInfo(**{**base, **changes})


def fill(path, num_utterances, num_shards=1, info=None, seconds=(0.5, 3.0), shards=None):
    """Write a label set of random codes and return ({key: codes}, store)."""
    info = info or toy_info()
    rng = np.random.default_rng(7)
    writers = [LabelStore.create(path, info).writer(k, num_shards) for k in range(num_shards)]
    truth = {}
    for i in range(num_utterances):
        samples = int(rng.integers(int(seconds[0] * RATE), int(seconds[1] * RATE)))
        key = f"rec{i}|0|{samples}|1/1"
        frames = SSL_CONV.num_frames(samples)
        values = rng.integers(0, 256, (frames, info.width), dtype=np.uint8)
        if info.dtype != "uint8":
            values = rng.standard_normal((frames, info.width)).astype(info.dtype)
        truth[key] = values
        writers[shard_of(key_hash(key), num_shards)].add(key, values, samples)
    for k in range(num_shards) if shards is None else shards:
        writers[k].finish()
    return truth, LabelStore(path, partial=True)
