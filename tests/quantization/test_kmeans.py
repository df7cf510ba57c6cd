"""From cuts to clusters and from clusters to labels."""

import builtins
import dataclasses
import json

import numpy as np
import pytest
import torch

from icefall_kd.config import KmeansConfig
from icefall_kd.data.filters import cut_into_pieces
from icefall_kd.data.manifests import read_cuts
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.extract import extract_labels
from icefall_kd.labels.keys import label_key
from icefall_kd.labels.store import LabelStore
from icefall_kd.quantization import kmeans
from icefall_kd.quantization.clusters import Clusters
from icefall_kd.quantization.collect import collect_frames, draw_sample
from icefall_kd.quantization.kmeans import TrainKmeansConfig, describe, find_centers, train_kmeans
from icefall_kd.runtime.tensors import write_tensors
from tests.labels.label_toys import ToyTeacher, config_for, write_cuts

SMALL = KmeansConfig(num_clusters=6, kmeans_utts=4, kmeans_batch=64, kmeans_passes=10, kmeans_inits=2)


@pytest.fixture
def cuts(tmp_path):
    return write_cuts(tmp_path / "audio", [0.9, 1.3, 2.1, 1.7, 1.1], speeds=("1", "9/10"))


def config(cuts, tmp_path, **options):
    return TrainKmeansConfig(cuts=[cuts], out=tmp_path / "km" / "clusters.safetensors", **{"kmeans": SMALL, **options})


def nearest(frames: np.ndarray, centers: np.ndarray) -> list[int]:
    return [int(np.argmin([((x - c) ** 2).sum() for c in centers])) for x in frames.astype(np.float64)]


def test_separate_clouds_are_found():
    generator = torch.Generator().manual_seed(0)
    middles = 20 * torch.randn(5, 7, generator=generator)
    frames = (middles[:, None] + torch.randn(5, 300, 7, generator=generator)).reshape(-1, 7)
    centers = find_centers(frames, KmeansConfig(num_clusters=5, kmeans_batch=256))
    for middle in middles:
        assert float((centers - middle).norm(dim=1).min()) < 0.5
    assert torch.equal(centers, find_centers(frames, KmeansConfig(num_clusters=5, kmeans_batch=256)))
    with pytest.raises(DataError, match="3 frames for --num-clusters 5"):
        find_centers(frames[:3], KmeansConfig(num_clusters=5))


def test_a_frame_belongs_to_the_nearest_centre():
    generator = torch.Generator().manual_seed(1)
    clusters, frames = Clusters(torch.randn(300, 9, generator=generator)), torch.randn(50, 9, generator=generator)
    assert clusters.encode(frames).squeeze(1).tolist() == nearest(frames.numpy(), clusters.centers.numpy())
    with pytest.raises(DataError, match="not finite"):
        clusters.encode(frames / 0)
    with pytest.raises(DataError, match="have 8 channels, the clusters' 9"):
        clusters.encode(frames[:, :8])


def test_clusters_are_made_once_and_labels_of_them_know_where_they_come_from(cuts, tmp_path, monkeypatch):
    teacher = ToyTeacher()
    report = train_kmeans(config(cuts, tmp_path), teacher)
    path = config(cuts, tmp_path).out
    assert report["num_clusters"] == 6 and report["num_utterances"] == 4 and 0 < report["relative_error"] < 1
    assert "6 clusters of" in describe(report)
    assert len(path.with_suffix(".utterances.txt").read_text().splitlines()) == 4
    clusters = Clusters.load(path)
    assert clusters.metadata["teacher"]["weights_sha256"] == "toy-1"
    assert clusters.metadata["packages"]["scikit-learn"]
    monkeypatch.setattr(kmeans, "find_centers", None)  # a finished file is kept
    assert train_kmeans(config(cuts, tmp_path), teacher) == report

    labels = config_for(cuts, tmp_path / "labels", kind="clusters", quantizer=path)
    extract_labels(labels, teacher)
    store = LabelStore(tmp_path / "labels")
    assert (store.info.kind, store.info.dtype, store.info.codebook_size) == ("clusters", "uint16", 6)
    assert store.info.quantizer_sha256 == clusters.sha256 and store.info.refine_iters is None
    assert store.verify() == []
    cut = read_cuts(cuts)[0]
    wave = torch.from_numpy(cut.load_audio()[0])
    frames = wave.unfold(0, 400, 320) @ teacher.projection
    assert store.get(label_key(cut))[:, 0].tolist() == nearest(frames.numpy(), clusters.centers.numpy())
    with pytest.raises(DataError, match="set of clusters was trained on a teacher whose weights_sha256 is 'toy-1'"):
        extract_labels(config_for(cuts, tmp_path / "other", kind="clusters", quantizer=path), ToyTeacher(sha="toy-2"))


def test_no_more_frames_are_kept_than_wanted_and_the_report_is_that_of_plain_loops(cuts, tmp_path):
    few = dataclasses.replace(SMALL, kmeans_frames=100)
    report = train_kmeans(config(cuts, tmp_path, kmeans=few), ToyTeacher())
    assert 60 < report["num_frames"] < 140
    sample = draw_sample([cuts], few.kmeans_utts, few.kmeans_seed)
    assert report["hours"] == pytest.approx(sum(cut.duration for cut in sample.cuts.values()) / 3600, abs=1e-4)
    every, some = (collect_frames(sample, ToyTeacher(), 100.0, most).values.float() for most in (None, 100))
    assert len(every) > 200 and len(some) == report["num_frames"]
    assert {tuple(x) for x in some.tolist()} <= {tuple(x) for x in every.tolist()}
    centers = Clusters.load(config(cuts, tmp_path).out).centers
    near = [min(float((x - c).square().sum()) for c in centers) for x in some]
    around = [float((x - some.mean(dim=0)).square().sum()) for x in some]
    assert report["relative_error"] == pytest.approx(sum(near) / sum(around), rel=1e-4)
    used = np.bincount(nearest(some.numpy(), centers.numpy()), minlength=6) / len(some)
    assert report["perplexity"] == pytest.approx(np.exp(-sum(p * np.log(p) for p in used if p)), rel=1e-4)
    assert report["unused"] == sum(used == 0)


def test_many_clusters_need_two_bytes_and_a_number_too_high_is_found(cuts, tmp_path):
    teacher = ToyTeacher()
    clusters = Clusters(torch.randn(500, 8, generator=torch.Generator().manual_seed(2)))
    clusters.save(tmp_path / "c.safetensors")
    made = config_for(cuts, tmp_path / "labels", kind="clusters", quantizer=tmp_path / "c.safetensors")
    extract_labels(made, teacher)
    store = LabelStore(tmp_path / "labels")
    found = np.concatenate([store.get(key)[:, 0] for key in store.keys()])
    assert found.max() > 255
    file = tmp_path / "labels" / "label_set.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "codebook_size": int(found.max())}))
    problems = LabelStore(tmp_path / "labels", partial=True).verify()
    assert problems and "does not belong to its set" in problems[0]


def test_pieces_get_labels_of_their_own(cuts, tmp_path):
    teacher = ToyTeacher()
    Clusters(torch.randn(9, 8, generator=torch.Generator().manual_seed(2))).save(tmp_path / "c.safetensors")
    made = config_for(cuts, tmp_path / "labels", kind="clusters", quantizer=tmp_path / "c.safetensors", pieces=1.0)
    extract_labels(made, teacher)
    store = LabelStore(tmp_path / "labels")
    pieces = cut_into_pieces(read_cuts(cuts), 1.0)
    assert store.join(map(label_key, pieces)).missing == 0
    assert len(store) == len({label_key(piece) for piece in pieces}) > len(read_cuts(cuts))
    with pytest.raises(DataError, match="does not cover the cuts"):  # whole utterances are other audio
        store.join(map(label_key, read_cuts(cuts)))


def test_what_is_no_file_of_clusters_is_refused(cuts, tmp_path):
    with pytest.raises(DataError, match=r"make them with local/train_kmeans\.py"):
        Clusters.load(tmp_path / "none.safetensors")
    clusters = Clusters(torch.randn(4, 8))
    clusters.save(tmp_path / "c.safetensors")
    data = bytearray((tmp_path / "c.safetensors").read_bytes())
    data[-1] ^= 64
    (tmp_path / "c.safetensors").write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        Clusters.load(tmp_path / "c.safetensors")
    with pytest.raises(ConfigError, match="--kind clusters needs --quantizer"):
        config_for(cuts, tmp_path / "labels", kind="clusters", quantizer=None)


def test_without_scikit_learn_one_error_names_the_command(cuts, tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match="pip install scikit-learn") as caught:
        find_centers(torch.randn(50, 3), SMALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("metadata", ["{broken", "[1, 2]"])
def test_damaged_metadata_are_named(tmp_path, metadata):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"centers": torch.zeros(2, 3)}, {"metadata": metadata})
    with pytest.raises(DataError, match=r"x\.safetensors is damaged: its metadata are"):
        Clusters.load(path)
