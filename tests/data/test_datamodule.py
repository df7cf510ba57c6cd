"""Batches: deterministic, resumable without reading, equal in number on all ranks, with the right labels."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from lhotse import CutSet
from micro_corpus import label_info, read_cuts, write_corpus, write_labels, write_part

import icefall_kd.data.datamodule as module
from icefall_kd.config import AugmentConfig, DataConfig
from icefall_kd.data.batch import IGNORE, LOG_EPS
from icefall_kd.data.datamodule import DataModule, decoding_batches
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.store import LabelStore
from icefall_kd.systems.base import LabelSpec
from icefall_kd.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("datamodule"), speeds=("1", "9/10"))


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return Tokenizer.load(corpus / "lang_char")


@pytest.fixture
def data_module(corpus, tokenizer):
    """Return a function that makes a data module; ``data`` and ``augment`` are options of those groups."""

    def make(data=(), augment=(), folder=corpus, where="fbank", **options):
        base = {"manifest_dir": folder / where, "lang_dir": corpus / "lang_char", "num_workers": 0, "max_duration": 4.0}
        config = DataConfig(**{**base, **dict(data)})
        return DataModule(config, AugmentConfig(**dict(augment)), tokenizer, **options)

    return make


def spec(path, **options) -> LabelSpec:
    return LabelSpec(name="kd", kind="codebook_indexes", path=str(path), **options)


def ids_of(batches) -> list[str]:
    return [name for batch in batches for name in batch.ids]


def assert_same(a, b) -> None:
    """Require two batches to be equal bit by bit."""
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and torch.equal(x, y), field.name
        elif field.name == "labels":
            assert x.keys() == y.keys()
            assert all(torch.equal(x[n].values, y[n].values) and torch.equal(x[n].lens, y[n].lens) for n in x)
        else:
            assert x == y, field.name


def test_a_batch_holds_what_the_cuts_say(corpus, tokenizer, data_module):
    cuts = {cut.id: cut for cut in read_cuts(corpus)}
    data = data_module(augment={"spec_aug": False}, with_audio=True)
    seen = []
    for batch in data.train_batches(1):
        seen += batch.ids
        assert sum(batch.durations) <= 4.0 + max(batch.durations)
        for i, cut in enumerate(cuts[name] for name in batch.ids):
            t, u, s = int(batch.x_lens[i]), int(batch.y_lens[i]), int(batch.audio_lens[i])
            assert np.array_equal(batch.features[i, :t].numpy(), cut.load_features())
            assert (batch.features[i, t:] == LOG_EPS).all() and (batch.audio[i, s:] == 0).all()
            assert tokenizer.decode(batch.y[i, :u].tolist()) == cut.supervisions[0].text == batch.texts[i]
            assert (batch.y[i, u:] == tokenizer.blank_id).all()
            assert s == cut.num_samples and np.array_equal(batch.audio[i, :s].numpy(), cut.load_audio()[0])
    assert sorted(seen) == sorted(cuts)


@pytest.mark.parametrize("where", ["fbank", "manifests"])
def test_batches_depend_on_seed_and_epoch_alone(corpus, data_module, where, tmp_path):
    labels = write_labels(tmp_path / "labels", read_cuts(corpus))
    noise = {"musan_cuts": corpus / where / "cuts_noise.jsonl.gz"}
    features = "precomputed" if where == "fbank" else "on_the_fly"

    def batches(epoch, num_workers=0, **options):
        options = {"with_audio": True, "label_specs": [spec(labels)], **options}
        data = data_module({"num_workers": num_workers, "features": features}, noise, where=where, **options)
        return list(data.train_batches(epoch))

    first = batches(1)
    assert len(first) > 4
    for a, b in zip(first, batches(1, num_workers=2), strict=True):
        assert_same(a, b)
    for other in (batches(2), batches(1, seed=7)):
        assert [b.ids for b in other] != [b.ids for b in first]
        assert sorted(ids_of(other)) == sorted(ids_of(first))


def test_a_skip_is_the_tail_of_the_epoch_and_reads_nothing_of_what_it_skips(data_module, monkeypatch):
    data = data_module()
    whole = list(data.train_batches(3))
    assert data.num_batches(3) == len(whole)
    read = []
    get = module.CutBatches.__getitem__
    monkeypatch.setattr(module.CutBatches, "__getitem__", lambda self, plan: read.append(plan[1]) or get(self, plan))
    for skip in (0, 1, len(whole) - 1, len(whole), len(whole) + 3):
        read.clear()
        tail = list(data.train_batches(3, skip))
        assert read == list(range(skip, len(whole)))
        for a, b in zip(whole[skip:], tail, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_get_equally_many_batches_of_different_utterances(data_module, monkeypatch, world_size, drop_last):
    monkeypatch.setattr(module, "get_world_size", lambda: world_size)
    data, ids, valid, counts = data_module({"drop_last": drop_last}), [], [], set()
    for rank in range(world_size):
        monkeypatch.setattr(module, "get_rank", lambda rank=rank: rank)
        batches = list(data.train_batches(2))
        counts.add(len(batches))
        ids += ids_of(batches)
        valid += ids_of(data.valid_batches())
    assert len(counts) == 1 and counts != {0}
    assert len(ids) == len(set(ids))
    if not drop_last:
        # The last utterances are repeated, under other ids, when they are fewer than ranks.
        assert len(data.train_cuts) <= len(ids) < len(data.train_cuts) + world_size
        assert {name.split("_dup")[0] for name in ids} == {c.id for c in data.train_cuts}
    assert sorted(valid) == sorted(c.id for c in data.valid_cuts)


def test_validation_on_a_few_utterances_spreads_them(data_module):
    everyone = [c.id for c in data_module().valid_cuts]
    assert len(everyone) == 3
    assert sorted(ids_of(data_module({"valid_utts": 2}).valid_batches())) == [everyone[0], everyone[1]]
    assert sorted(ids_of(data_module({"valid_utts": 9}).valid_batches())) == sorted(everyone)
    with pytest.raises(ConfigError, match="--valid-utts is 0"):
        data_module({"valid_utts": 0})


def test_ranks_hear_different_noise(corpus, data_module, monkeypatch):
    data, seeds = data_module(augment={"musan_cuts": corpus / "fbank" / "cuts_noise.jsonl.gz"}), []
    monkeypatch.setattr(data.train_data, "noise", lambda cuts, seed: seeds.append(seed) or list(cuts))
    monkeypatch.setattr(module, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(module, "get_rank", lambda rank=rank: rank)
        list(data.train_batches(1))
    assert len(seeds) == len(set(seeds))


def test_tokens_limit_a_batch(data_module):
    def size(batch):
        return len(batch) * int(batch.y_lens.max())

    free = list(data_module().train_batches(1))
    for epoch in range(1, 6):
        limited = list(data_module({"max_tokens": 28}).train_batches(epoch))
        assert max(map(size, free)) > 28 >= max(map(size, limited)) > 14
    assert sorted(ids_of(limited)) == sorted(ids_of(free))


def test_a_single_utterance_above_the_limits_is_a_batch_of_its_own(data_module):
    assert {len(b) for b in data_module({"max_tokens": 1}).train_batches(1)} == {1}
    assert {len(b) for b in data_module({"max_duration": 0.5}).train_batches(1)} == {1}


@pytest.mark.parametrize("num_train", [1, 3, 9])
def test_small_corpora_have_batches_and_no_warnings(data_module, tmp_path, num_train):
    write_part(tmp_path, "train", [0.8] * num_train)
    write_part(tmp_path, "dev", [0.8])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        batches = list(data_module(folder=tmp_path).train_batches(1))
    assert sum(map(len, batches)) == num_train


@pytest.mark.parametrize("limits", [{}, {"max_tokens": 40}, {"num_buckets": 2}])
def test_no_batch_is_worse_than_the_worst_batches(corpus, data_module, tmp_path, limits):
    def sizes(batch):
        return np.array([len(batch) * max(batch.durations), len(batch) * int(batch.y_lens.max()), len(batch)])

    data = data_module(limits, label_specs=[spec(write_labels(tmp_path / "labels", read_cuts(corpus)))])
    worst = data.worst_batches()
    assert all((batch.labels["kd"].lens > 0).all() for batch in worst)
    bound = np.max([sizes(b) for b in worst], axis=0)
    most = np.max([sizes(b) for epoch in range(1, 8) for b in data.train_batches(epoch)], axis=0)
    assert (most <= bound).all() and (bound <= 2 * most).all()


def test_masks_do_not_depend_on_padding(data_module):
    data = data_module(augment={"spec_aug_p": 1.0})
    short, *others = sorted(data.train_cuts, key=lambda c: c.duration)
    alone = data.train_data[(1, 5, CutSet.from_cuts([short]))]
    padded = data.train_data[(1, 5, CutSet.from_cuts([short, others[-1]]))]
    length = int(alone.x_lens[0])
    assert length < padded.features.size(1)
    assert torch.equal(alone.features[0], padded.features[0, :length])
    assert (padded.features[0, length:] == LOG_EPS).all()


def test_validation_is_neither_augmented_nor_labelled(corpus, data_module, tmp_path):
    augment = {"musan_cuts": corpus / "fbank" / "cuts_noise.jsonl.gz", "musan_p": 1.0, "spec_aug_p": 1.0}
    data = data_module(augment=augment, label_specs=[spec(write_labels(tmp_path / "labels", read_cuts(corpus)))])
    cuts = {cut.id: cut for cut in read_cuts(corpus, "dev")}
    for batch in data.valid_batches():
        assert batch.labels == {}
        for i, name in enumerate(batch.ids):
            assert np.array_equal(batch.features[i, : batch.x_lens[i]].numpy(), cuts[name].load_features())


def test_noise_leaves_lengths_labels_and_the_teachers_audio_alone(corpus, data_module, tmp_path):
    specs = [spec(write_labels(tmp_path / "labels", read_cuts(corpus)))]
    noise = {"spec_aug": False, "musan_cuts": corpus / "fbank" / "cuts_noise.jsonl.gz", "musan_p": 1.0}
    clean = list(data_module(augment={"spec_aug": False}, label_specs=specs, with_audio=True).train_batches(1))
    noisy = list(data_module(augment=noise, label_specs=specs, with_audio=True).train_batches(1))
    for a, b in zip(clean, noisy, strict=True):
        assert not torch.equal(a.features, b.features)
        assert_same(a, dataclasses.replace(b, features=a.features))


def test_labels_are_those_of_the_store(corpus, data_module, tmp_path):
    codes, floats = tmp_path / "codes", tmp_path / "floats"
    write_labels(codes, read_cuts(corpus))
    info = label_info(kind="embeddings", dtype="float16", width=8, num_codebooks=None, codebook_size=None)
    write_labels(floats, read_cuts(corpus), info)
    specs = [spec(codes), LabelSpec(name="other", kind="embeddings", path=str(floats))]
    for batch in data_module({"num_workers": 1}, label_specs=specs).train_batches(1):
        for name, path, padding in (("kd", codes, IGNORE), ("other", floats, 0)):
            labels, store = batch.labels[name], LabelStore(path)
            for i, key in enumerate(batch.keys):
                assert np.array_equal(labels.values[i, : labels.lens[i]].numpy(), store.get(key).astype(np.float32))
                assert (labels.values[i, labels.lens[i] :] == padding).all()


def test_missing_labels_stop_unless_coverage_is_lowered(corpus, data_module, tmp_path):
    cuts = list(read_cuts(corpus))
    specs = [spec(write_labels(tmp_path / "labels", cuts[:18]))]
    with pytest.raises(DataError, match=r"18 matched, 6 missing.*--min-coverage is 1.0"):
        data_module(label_specs=specs)
    labelled = {c.id for c in cuts[:18]}
    data = data_module(label_specs=specs, min_coverage=0.75)
    for batch in data.train_batches(1):
        for i, name in enumerate(batch.ids):
            assert (batch.labels["kd"].lens[i] > 0) == (name in labelled)
            if name not in labelled:
                assert (batch.labels["kd"].values[i] == IGNORE).all()


def test_labels_of_something_else_are_refused_with_both_values(corpus, data_module, tmp_path):
    cuts = read_cuts(corpus)
    plain = [c for c in cuts if c.recording.id.startswith("train") and "sp0.9" not in c.id]
    assert len(plain) == len(cuts) // 2
    with pytest.raises(DataError, match="at speed 1, wanted is 9/10"):
        data_module(label_specs=[spec(write_labels(tmp_path / "speed", plain))])
    path = write_labels(tmp_path / "teacher", cuts)
    for name, found in (("teacher_sha256", "aaaa"), ("quantizer_sha256", "bbbb"), ("layer", "3")):
        with pytest.raises(DataError, match=f"{name} is '?{found}'?, expected 'other'"):
            data_module(label_specs=[spec(path, expect={name: "other"})])
    data = data_module(label_specs=[spec(write_labels(tmp_path / "length", cuts, extra=3200))])
    with pytest.raises(DataError, match=r"39 label frames, the teacher's formula gives 29 for its 9600 samples"):
        data.train_data[(1, 0, CutSet.from_cuts([min(data.train_cuts, key=lambda c: c.duration)]))]


def test_time_warp_is_refused_with_labels(corpus, data_module, tmp_path):
    warp = {"spec_aug_time_warp_factor": 80}
    specs = [spec(write_labels(tmp_path / "labels", read_cuts(corpus)))]
    with pytest.raises(ConfigError, match=r"--spec-aug-time-warp-factor is 80.*need 0"):
        data_module(augment=warp, label_specs=specs)
    with pytest.raises(ConfigError, match=r"--spec-aug-time-warp-factor is 80.*need 0"):
        data_module(augment=warp, with_audio=True)
    assert list(data_module(augment=warp).train_batches(1))
    data_module(augment={**warp, "spec_aug": False}, label_specs=specs)


def test_unusable_data_is_refused_at_the_start(data_module, tokenizer, tmp_path, corpus):
    write_part(tmp_path, "train", [0.8], rate=8000, features=False)
    write_part(tmp_path, "dev", [0.8], features=False)
    with pytest.raises(DataError, match=r"train0-0 is at 8000 Hz.*16000 Hz"):
        data_module({"features": "on_the_fly"}, folder=tmp_path, where="manifests")
    cuts = CutSet.from_file(tmp_path / "manifests" / "cuts_train.jsonl.gz").to_eager()
    with pytest.raises(DataError, match="8000 Hz"):
        decoding_batches(cuts, tokenizer, max_duration=10, features="on_the_fly")
    with pytest.raises(DataError, match=r"no stored features.*on_the_fly"):
        data_module(where="manifests")
    with pytest.raises(DataError, match=r"no cut set.*dev, noise, train"):
        data_module({"train_parts": ["trian"]})
    with pytest.raises(DataError, match="no training utterance is left of 24"):
        data_module({"min_utt_duration": 10.0})


def test_the_state_tells_data_and_labels_apart(corpus, data_module, tmp_path):
    cuts = read_cuts(corpus)
    a = [spec(write_labels(tmp_path / "a", cuts))]
    b = [spec(write_labels(tmp_path / "b", cuts, label_info(layer=4)))]
    states = [data_module(label_specs=s).state() for s in ([], a, b)]
    states.append(data_module({"max_utt_duration": 1.0}).state())
    assert states[0] == data_module({"num_workers": 1}).state()
    assert all(states[i] != states[j] for i in range(4) for j in range(i))


def test_any_cut_set_can_be_decoded(corpus, tokenizer):
    cuts = list(read_cuts(corpus, "dev"))
    joined = cuts[0].append(cuts[1])  # no single span of one recording, two supervisions
    bare = cuts[2].drop_recording()
    batches = decoding_batches(CutSet.from_cuts([joined, bare]), tokenizer, max_duration=10, features="precomputed")
    (batch,) = batches
    assert batch.ids == [joined.id, bare.id]
    assert batch.texts == ["one two three", "four"]
