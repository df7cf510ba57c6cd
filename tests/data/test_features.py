"""Features: one frame arithmetic, arrays and manifests agree, splits resume."""

import math
import os

import lhotse
import numpy as np
import pytest
import torch

from icefall_kd.data.corpora import open_corpus
from icefall_kd.data.features import FbankExtractor, _plan_splits, _store_split, snipped_fbank, store_features
from icefall_kd.data.manifests import cuts_file, read_cuts, write_cuts
from icefall_kd.data.recordings import make_cuts, with_speed_copies
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import fbank_num_frames


@pytest.fixture
def manifest(corpus_dir, tmp_path):
    """Training cuts with speed copies, on disk."""
    cuts, _ = make_cuts(open_corpus("trans", corpus_dir).parts["train"], "en")
    path = cuts_file(tmp_path / "manifests", "train")
    write_cuts(path, with_speed_copies(cuts))
    return path


def test_features_of_16_bit_samples_are_larger_by_what_the_page_on_export_says():
    audio = torch.randn(1, 4000) * 0.1
    larger = snipped_fbank(audio * 2**15) - snipped_fbank(audio)
    torch.testing.assert_close(larger, torch.full_like(larger, 2 * math.log(2**15)), rtol=1e-4, atol=1e-3)
    assert round(float(larger.mean()), 1) == 20.8


@pytest.mark.parametrize("num_samples", [80, 159, 239, 240, 399, 400, 401, 16000, 16079, 16080, 16081, 16239, 16240])
def test_the_number_of_frames_is_that_of_the_one_formula(num_samples):
    features = FbankExtractor(backend="lhotse").extract(torch.randn(num_samples) * 0.1)
    assert features.shape == (fbank_num_frames(num_samples), 80)
    assert features.dtype == torch.float32


def test_features_are_those_of_icefall():
    wave = torch.randn(16000) * 0.1
    expected = lhotse.Fbank(lhotse.FbankConfig(num_filters=80)).extract(wave, 16000)
    assert torch.equal(FbankExtractor(backend="lhotse").extract(wave), expected)


def test_silence_gives_the_smallest_float_of_the_field():
    features = FbankExtractor(backend="lhotse").extract(torch.zeros(1600))
    assert features.unique().tolist() == pytest.approx([np.log(np.finfo(np.float32).eps)], 1e-5)


def test_empty_audio_and_unknown_backends_are_refused():
    with pytest.raises(DataError, match="S > 0"):
        FbankExtractor().extract(torch.zeros(0))
    with pytest.raises(DataError, match="not finite"):
        FbankExtractor(backend="lhotse").extract(torch.full((1600,), torch.nan))
    with pytest.raises(ConfigError, match="backend"):
        FbankExtractor(backend="sox")


def test_the_extractor_used_is_recorded(manifest, tmp_path):
    store_features([manifest], tmp_path / "fbank", FbankExtractor(backend="lhotse"))
    record = lhotse.serialization.load_json(tmp_path / "fbank" / "feature_extractor.json")
    assert record["extractor"] == "lhotse"
    assert record["version"] == lhotse.__version__
    assert record["snip_edges"] is False


def test_stored_arrays_have_the_length_of_the_audio_they_came_from(manifest, tmp_path):
    extractor = FbankExtractor(backend="lhotse")
    # More jobs than cuts: clipped.
    assert store_features([manifest], tmp_path / "fbank", extractor, nj=1) == {"train": 15}
    for plain, cut in zip(read_cuts(manifest), read_cuts(tmp_path / "fbank" / "cuts_train.jsonl.gz"), strict=True):
        array = cut.load_features()
        wave = torch.from_numpy(plain.load_audio()[0])
        assert plain.id == cut.id
        assert plain.custom == cut.custom
        assert len(wave) == cut.num_samples
        assert array.shape == (fbank_num_frames(len(wave)), 80) == (cut.features.num_frames, 80)
        assert np.abs(array - extractor.extract(wave).numpy()).max() < 2**-5


def test_more_jobs_than_cuts_are_clipped(manifest, tmp_path):
    assert len(_plan_splits(manifest, tmp_path, FbankExtractor(), 100)) == 15


def test_a_finished_split_is_not_computed_again(manifest, tmp_path):
    extractor = FbankExtractor(backend="lhotse")
    out = tmp_path / "fbank"
    out.mkdir()
    first = _plan_splits(manifest, out, extractor, 3)[0]
    _store_split(extractor, first)
    stamp = first.archive.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icefall_kd.data.features.exclusive_pool", _serial)
        store_features([manifest], out, extractor, nj=3)
        assert first.archive.stat().st_mtime_ns == stamp
        store_features([manifest], tmp_path / "other", extractor, nj=3)
    names = sorted(p.name for p in out.iterdir())
    assert names == ["cuts_train.jsonl.gz", *(f"feats_train-{k}-of-3.lca" for k in (1, 2, 3)), "feature_extractor.json"]
    for name in names[1:4]:
        assert (out / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_splits_one_by_one_are_those_of_one_run(manifest, tmp_path):
    """As the tasks of an array compute them, in any order, and a run without a split joins them."""
    extractor, out = FbankExtractor(backend="lhotse"), tmp_path / "fbank"
    for shard in (2, 0, 1):
        assert store_features([manifest], out, extractor, nj=3, shard=shard) == {}
        assert not (out / "cuts_train.jsonl.gz").exists()
    stamps = {archive: archive.stat().st_mtime_ns for archive in out.glob("*.lca")}
    assert store_features([manifest], out, extractor, nj=3) == {"train": 15}
    assert {archive: archive.stat().st_mtime_ns for archive in out.glob("*.lca")} == stamps and len(stamps) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icefall_kd.data.features.exclusive_pool", _serial)
        store_features([manifest], tmp_path / "other", extractor, nj=3)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "other").iterdir())
    for archive in out.glob("*.lca"):
        assert archive.read_bytes() == (tmp_path / "other" / archive.name).read_bytes()
    arrays = [[c.load_features() for c in read_cuts(d / "cuts_train.jsonl.gz")] for d in (out, tmp_path / "other")]
    assert all(np.array_equal(a, b) for a, b in zip(*arrays, strict=True))
    with pytest.raises(ConfigError, match="--shard is 3; with --nj 3 it must be from 0 to 2"):
        store_features([manifest], out, extractor, nj=3, shard=3)


@pytest.mark.parametrize("damaged", ["archive", "cuts"])
def test_a_finished_split_that_was_cut_off_is_computed_again(manifest, tmp_path, caplog, damaged):
    extractor, out = FbankExtractor(backend="lhotse"), tmp_path / "fbank"
    out.mkdir()
    first = _plan_splits(manifest, out, extractor, 3)[0]
    _store_split(extractor, first)
    whole, file = first.archive.read_bytes(), getattr(first, damaged)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icefall_kd.data.features.exclusive_pool", _serial)
        assert store_features([manifest], out, extractor, nj=3) == {"train": 15}
    assert first.archive.read_bytes() == whole and f"{file}" in caplog.text and "computed again" in caplog.text
    assert all(cut.load_features() is not None for cut in read_cuts(out / "cuts_train.jsonl.gz"))


def _serial(_nj):
    import contextlib

    return contextlib.nullcontext(map)


def test_another_number_of_jobs_leaves_no_old_shards(manifest, tmp_path):
    extractor = FbankExtractor(backend="lhotse")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icefall_kd.data.features.exclusive_pool", _serial)
        store_features([manifest], tmp_path / "fbank", extractor, nj=4)
        (tmp_path / "fbank" / ".tmp-0123abcd-1-0-feats_train-1-of-4.lca").write_text("left by a killed run")
        store_features([manifest], tmp_path / "fbank", extractor, nj=2)
    shards = [f"feats_train-{k}-of-2.lca" for k in (1, 2)]
    names = sorted(p.name for p in (tmp_path / "fbank").iterdir())
    assert names == ["cuts_train.jsonl.gz", *shards, "feature_extractor.json"]
    assert len(read_cuts(tmp_path / "fbank" / "cuts_train.jsonl.gz")) == 15


def test_two_processes_give_the_same_features_as_one(manifest, tmp_path):
    extractor = FbankExtractor(backend="lhotse")
    store_features([manifest], tmp_path / "one", extractor, nj=1)
    store_features([manifest], tmp_path / "two", extractor, nj=2)
    pairs = zip(*(read_cuts(tmp_path / n / "cuts_train.jsonl.gz") for n in ("one", "two")), strict=True)
    assert all(np.array_equal(a.load_features(), b.load_features()) for a, b in pairs)


def test_damaged_audio_names_the_cut(manifest, tmp_path):
    cut = read_cuts(manifest)[1]
    with open(cut.recording.sources[0].source, "r+b") as stream:
        stream.truncate(2000)
    with pytest.raises(DataError, match=f"cut {cut.id}"):
        store_features([manifest], tmp_path / "fbank", FbankExtractor(backend="lhotse"))
    assert not (tmp_path / "fbank" / "cuts_train.jsonl.gz").exists()
