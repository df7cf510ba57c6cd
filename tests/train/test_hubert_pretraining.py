"""HuBERT's pre-training from audio alone: clusters of MFCC, a training, clusters of a layer of it, another training."""

import json

import pytest
import torch

from icefall_kd.config import KmeansConfig, TeacherConfig
from icefall_kd.config.hubert_ssl import HubertSslConfig
from icefall_kd.errors import DataError
from icefall_kd.labels.extract import extract_labels
from icefall_kd.labels.store import LabelStore
from icefall_kd.quantization.kmeans import TrainKmeansConfig, train_kmeans
from icefall_kd.recipe import train_main
from icefall_kd.teachers.hubert_weights import load_hubert_weights
from icefall_kd.train.metrics import read_metrics
from tests.hubert_toys import hubert_config
from tests.labels.label_toys import config_for
from tests.ssl_toys import write_speech
from tests.train.test_ssl_training import arguments, newest
from tests.train.toy import same_weights


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    write_speech(folder, "train", [1.2 + 0.1 * i for i in range(6)] + [4.5])
    write_speech(folder, "dev", [1.5, 1.7], seed=1)
    return folder


def make_labels(speech, folder, teacher: TeacherConfig, clusters: int, pieces=3.0):
    """Run what local/train_kmeans.py and local/extract_labels.py run; return the label set."""
    kmeans = KmeansConfig(num_clusters=clusters, kmeans_utts=6, kmeans_batch=200, kmeans_passes=5, kmeans_inits=1)
    cuts = [speech / "fbank" / f"cuts_{part}.jsonl.gz" for part in ("train", "dev")]
    out = folder / "clusters.safetensors"
    train_kmeans(TrainKmeansConfig(cuts=cuts[:1], out=out, kmeans=kmeans, teacher=teacher))
    made = config_for(cuts[0], folder / "labels", kind="clusters", quantizer=out, teacher=teacher, pieces=pieces)
    extract_labels(type(made)(**{**vars(made), "cuts": cuts}))
    return folder / "labels"


def run(speech, exp_dir, labels, **loop):
    config = hubert_config(
        "ssl",
        "base",
        ssl={"mask_prob": 0.8, "crop_duration": 3.0},
        hubert_ssl=HubertSslConfig(cluster_dim=32),
        kd={"teacher_labels": "stored", "label_dir": [labels]},
        data={"manifest_dir": speech / "fbank", "max_duration": 5.0},
        loop={"exp_dir": exp_dir, **loop},
    )
    assert train_main(arguments(config)) == 0


def test_two_iterations(speech, tmp_path):
    mfcc = TeacherConfig(teacher="mfcc", teacher_device="cpu")
    labels = make_labels(speech, tmp_path / "it1", mfcc, 8)
    run(speech, tmp_path / "exp1", labels)
    rows = read_metrics(tmp_path / "exp1" / "log" / "metrics.jsonl", "train")
    assert {"masked_loss", "unmasked_loss", "feature_penalty", "masked_acc", "unmasked_acc"} <= rows[0].keys()
    valid = newest(tmp_path / "exp1")["train"]["valid"]
    assert 0 < valid["masked_loss"] < 10 and 0 <= valid["masked_acc"] <= 1
    # Stopped and resumed it ends in the same weights.
    run(speech, tmp_path / "parts", labels, max_steps=1)
    run(speech, tmp_path / "parts", labels)
    assert same_weights(newest(tmp_path / "exp1")["model"], newest(tmp_path / "parts")["model"])
    assert json.loads((tmp_path / "exp1" / "config.json").read_text())["config"]["objective"] == "ssl"

    weights = load_hubert_weights(tmp_path / "exp1")
    assert weights.head.label_embs.shape == (8, 32) and torch.isfinite(weights.head.label_embs).all()
    layer = TeacherConfig(teacher=str(tmp_path / "exp1"), layer=2, teacher_device="cpu")
    second = make_labels(speech, tmp_path / "it2", layer, 10)
    info = LabelStore(second).info
    assert (info.layer, info.codebook_size, info.dim) == (2, 10, 32) and info.teacher_sha256
    run(speech, tmp_path / "exp2", second, max_steps=2)

    # Whole utterances are other audio than pieces: labels of the one are not those of the other.
    whole = make_labels(speech, tmp_path / "whole", mfcc, 8, pieces=None)
    with pytest.raises(DataError, match="does not cover the cuts"):
        run(speech, tmp_path / "exp3", whole, max_steps=1)
