"""A line of work of a few seconds: corpus, teacher, quantizer, labels, student; each made once by the real commands."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from micro_corpus import write_corpus

from tests.faults import children
from tests.teachers.tiny_models import ssl_model

STUDENT = """
encoder-size: tiny
num-encoder-layers: 2
encoder-dim: 16
num-heads: 2
feedforward-dim: 16
cnn-kernel: 3
decoder-dim: 8
joiner-dim: 8
max-duration: 3
num-workers: 0
num-epochs: 2
log-interval: 1
save-every-n: 2
average-period: 1
device: cpu
num-threads: 1
train-parts: train
valid-parts: dev
kd: mvq
"""


@dataclass(frozen=True)
class Line:
    """Where things are, and the command lines."""

    root: Path

    @property
    def teacher_options(self) -> list:
        return ["--teacher", self.root / "teacher", "--teacher-device", "cpu", "--num-threads", 1]

    def quantizer(self, out: Path) -> list:
        """Return the command that trains the quantizer ``out``."""
        sizes = "--num-codebooks 2 --phase1-steps 10 --phase2-steps 10 --frames-per-step 64 --quantizer-utts 8"
        cuts = self.root / "fbank/cuts_train.jsonl.gz"
        words = [*sizes.split(), "--save-every", 4, *self.teacher_options]
        return ["local/train_quantizer.py", "--cuts", cuts, "--out", out, *words]

    def labels(self, label_dir: Path, shard: int = 0, num_shards: int = 1, **paths: Path) -> list:
        """Return the command that extracts a shard of a label set; ``cuts`` and ``quantizer`` may be others."""
        cuts = paths.get("cuts", self.root / "fbank/cuts_train.jsonl.gz")
        quantizer = paths.get("quantizer", self.root / "quantizer/q.safetensors")
        words = ["--shard", shard, "--num-shards", num_shards, "--part-utterances", 3, "--refine-iters", 1]
        words += ["--quantizer", quantizer, *self.teacher_options]
        return ["local/extract_labels.py", "--cuts", cuts, "--label-dir", label_dir, *words]

    def train(self, exp_dir: Path, *options: object, **paths: Path) -> list:
        """Return the command that trains a student; ``manifest_dir``, ``lang_dir`` and ``label_dir`` may be others."""
        places = {"manifest_dir": "fbank", "lang_dir": "lang_char", "label_dir": "labels"}
        found = {name: paths.get(name, self.root / place) for name, place in places.items()}
        words = [word for name, path in found.items() for word in (f"--{name.replace('_', '-')}", path)]
        config = ["--config", self.root / "student.yaml"]
        return ["egs/librispeech/train.py", *config, *words, "--exp-dir", exp_dir, *options]


@pytest.fixture(scope="session")
def line(tmp_path_factory) -> Line:
    """The whole line, uninterrupted, and a student in ``exp``; tests must not change it."""
    root = write_corpus(tmp_path_factory.mktemp("line"), num_train=10)
    torch.manual_seed(0)
    ssl_model("hubert", feat_extract_norm="layer", stable=True).save_pretrained(root / "teacher")
    (root / "student.yaml").write_text(STUDENT)
    made = Line(root)
    for command in (made.quantizer(root / "quantizer/q.safetensors"), made.labels(root / "labels"),
                    made.train(root / "exp")):
        ended = children.run(*command, watch=root)
        assert ended.code == 0, ended.err
    return made
