"""Streamed batches: all utterances once, however they are read, resumable at any of them, equally many on all ranks."""

import shutil

import pytest
import torch
from micro_corpus import label_info, read_cuts, write_corpus, write_labels, write_part
from shar_toys import spec, write_label_sets, write_shar

from icefall_kd.config import AugmentConfig, DataConfig
from icefall_kd.data.datamodule import DataModule
from icefall_kd.data.shar import Shar
from icefall_kd.data.streamed import SharDataModule
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime import dist
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.checkpoint import load_checkpoint, save_checkpoint
from tests.data.test_datamodule import assert_same


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("streamed"), num_train=24, speeds=("1", "9/10"))
    write_label_sets(folder)
    write_shar(folder, num_shards=8)
    return folder


@pytest.fixture
def streamed(corpus):
    """Return a function that makes a data module of the Shar; ``data`` and ``augment`` are options of those groups."""

    def make(data=(), augment=(), kind=SharDataModule, labels=corpus / "codes", **options):
        base = {
            "manifest_dir": corpus / "fbank", "lang_dir": corpus / "lang_char", "num_workers": 0, "max_duration": 4.0,
            "num_buckets": 3, "shar_dir": corpus / "shar", "shar_streams": 2, "shar_buffer": 12,
        }  # fmt: skip
        options = {"label_specs": [spec(labels)], **options}
        tokenizer = Tokenizer.load(corpus / "lang_char")
        return kind(DataConfig(**{**base, **dict(data)}), AugmentConfig(**dict(augment)), tokenizer, **options)

    return make


def ids_of(batches) -> list[str]:
    return [name for batch in batches for name in batch.ids]


def saved(position: dict, path) -> dict:
    """Return a position as a checkpoint gives it back."""
    save_checkpoint(path / "checkpoint-1.pt", {"position": position})
    return load_checkpoint(path / "checkpoint-1.pt")["position"]


def same_but_for_the_position(a, b) -> None:
    for batch in (a, b):
        object.__setattr__(batch, "position", None)
    assert_same(a, b)


def test_each_utterance_comes_once_an_epoch_as_the_cut_set_has_it(corpus, streamed):
    plain = streamed(augment={"spec_aug": False}, kind=DataModule, with_audio=True)
    cuts = {cut.id: cut for cut in plain.train_cuts}
    data = streamed(augment={"spec_aug": False}, with_audio=True)
    orders = []
    for epoch in (1, 2):
        batches = list(data.train_batches(epoch))
        orders.append(ids_of(batches))
        assert sorted(orders[-1]) == sorted(cuts) and data.num_batches(epoch) == len(batches) > 8
        for batch in batches[:4]:
            assert sum(batch.durations) <= 4.0 + max(batch.durations)
            wanted = plain.train_data[0, 0, [cuts[name] for name in batch.ids]]
            for name in ("features", "x_lens", "y", "y_lens"):
                assert torch.equal(getattr(batch, name), getattr(wanted, name)), name
            assert (batch.keys, batch.texts, batch.durations) == (wanted.keys, wanted.texts, wanted.durations)
            assert torch.equal(batch.labels["kd"].values, wanted.labels["kd"].values)
            torch.testing.assert_close(batch.audio, wanted.audio, rtol=0, atol=0.5001 / 32768)
    assert orders[0] != orders[1]


def test_batches_do_not_depend_on_the_number_of_workers(streamed):
    whole = list(streamed({"shar_streams": 4}).train_batches(1))
    middle = whole[len(whole) // 2].position
    for num_workers in (1, 2, 4):
        data = streamed({"shar_streams": 4, "num_workers": num_workers})
        batches = list(data.train_batches(1))
        tail = list(data.train_batches(1, 1, middle))
        for a, b in zip(whole, batches, strict=True):
            assert_same_positions(a.position, b.position)
        for a, b in zip(whole[len(whole) // 2 + 1 :], tail, strict=True):
            assert a.ids == b.ids and torch.equal(a.features, b.features)


def assert_same_positions(a, b) -> None:
    assert a["turn"] == b["turn"]
    for x, y in zip(a["streams"], b["streams"], strict=True):
        assert {k: v for k, v in x.items() if k != "held"} == {k: v for k, v in y.items() if k != "held"}
        assert torch.equal(x["held"], y["held"])


@pytest.mark.parametrize("drop_last", [False, True])
def test_resumed_behind_any_batch_the_others_are_the_same_bit_by_bit(streamed, drop_last, tmp_path):
    data = streamed({"drop_last": drop_last})
    whole = list(data.train_batches(3))
    positions = [saved(batch.position, tmp_path) for batch in whole]
    for done, position in enumerate(positions, 1):
        tail = list(data.train_batches(3, done, position))
        assert len(tail) == len(whole) - done
        for a, b, wanted in zip(whole[done:], tail, positions[done:], strict=True):
            assert_same_positions(b.position, wanted)
            same_but_for_the_position(a, b)


def test_a_resumed_stream_reads_what_it_held_and_what_follows_alone(streamed, monkeypatch):
    data = streamed({"shar_streams": 1, "shar_buffer": 6})
    whole = list(data.train_batches(1))
    read, original = [], Shar.read
    monkeypatch.setattr(Shar, "read", lambda self, k, fields: read.append(k) or original(self, k, fields))
    plan = data._plan(())
    order = plan.order(1, 0)
    for batch in whole:
        (state,) = batch.position["streams"]
        read.clear()
        rest = list(data.train_batches(1, 1, batch.position))
        held = sorted({order[i] for i, _ in state["held"].tolist()})
        assert sorted(read) == sorted(held + order[state["shard"] :])
        assert len(state["held"]) <= 6
        # (shard, offset) is as far as it read: all that it held or gave lies before.
        done = sum(plan.shar.rows[k].cuts for k in order[: state["shard"]]) + state["offset"]
        assert done == 48 - len(ids_of(rest)) + len(state["held"])
    assert len(read) < len(order)


def test_without_a_position_an_epoch_does_not_go_on_in_its_middle(streamed):
    with pytest.raises(DataError, match="does not say where the streams of the Shar stood"):
        streamed().train_batches(1, 3)


def as_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_read_different_shards_and_choose_like_buckets(streamed, monkeypatch, world_size):
    seen, counts = [], []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        data = streamed()
        batches = list(data._batches(2, None))
        seen += ids_of(batches)
        counts.append(len(batches))
        # Ranks agree on the smaller number, which drawing alone tells.
        monkeypatch.setattr(dist, "gather_objects", lambda drawn: [drawn, 10_000])
        assert data.num_batches(2) == len(batches)
    assert len(set(seen)) == len(seen) == 48
    orders = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        orders += [streamed()._plan(()).order(2, k) for k in range(2)]
    assert sorted(k for order in orders for k in order) == list(range(8))
    by_rank = [len(orders[2 * r]) + len(orders[2 * r + 1]) for r in range(world_size)]
    assert max(by_rank) - min(by_rank) <= 1


def test_an_epoch_ends_when_the_first_rank_has_no_batch(streamed, monkeypatch):
    as_rank(monkeypatch, 0, 2)
    asked = []
    # The other rank has four batches.
    monkeypatch.setattr(dist, "collective_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(dist, "any_rank", lambda ended, device: asked.append(ended) or ended or len(asked) > 4)
    data = streamed()
    assert len(list(data.train_batches(1))) == 4 and asked == [False] * 5


def test_filters_count_what_they_leave_out(corpus, streamed):
    cuts = [cut for cut in read_cuts(corpus) if cut.duration <= 0.95]
    batches = list(streamed({"max_utt_duration": 0.95}).train_batches(1))
    assert sorted(ids_of(batches)) == sorted(cut.id for cut in cuts)
    for batch in batches[-1:]:
        assert sum(state["left_out"] for state in batch.position["streams"]) == 48 - len(cuts)


def test_the_look_at_the_memory_reads_the_data_of_its_batches(streamed):
    data = streamed({"max_tokens": 60})
    worst, batches = data.worst_batches(), list(data.train_batches(1))
    assert all((batch.labels["kd"].lens > 0).all() and torch.isfinite(batch.features).all() for batch in worst)
    for size in (lambda b: len(b) * max(b.durations), lambda b: int(len(b) * b.y_lens.max()), len):
        assert max(map(size, worst)) >= max(map(size, batches))
    assert max(int(len(b) * b.y_lens.max()) for b in batches) <= 60


def test_what_does_not_fit_is_refused_before_training(corpus, streamed, tmp_path):
    with pytest.raises(ConfigError, match="has 8 shards; 1 ranks with --shar-streams 9 need at least 9"):
        streamed({"shar_streams": 9})
    with pytest.raises(ConfigError, match=r"--num-workers 3 does not divide --shar-streams 4"):
        streamed({"shar_streams": 4, "num_workers": 3})
    with pytest.raises(ConfigError, match=r"holds utterances, this training hears pieces of at most 0.5 s"):
        streamed(crop_duration=0.5)
    with pytest.raises(DataError, match=r"has too few labels of embeddings: 46 matched"):
        streamed(label_specs=[spec(corpus / "embeddings", kind="embeddings")])
    other = write_labels(tmp_path / "other", read_cuts(corpus), label_info(teacher_sha256="dddd"))
    with pytest.raises(DataError, match="teacher_sha256 is 'aaaa' and 'dddd'"):
        streamed(labels=other)
    with pytest.raises(DataError, match="layer is 3, expected 4"):
        streamed(label_specs=[spec(corpus / "codes", expect={"layer": 4})])
    small = write_shar(corpus, tmp_path / "features", store="features", num_shards=2, label_dir=[])
    for wanted in ({"data": {"features": "on_the_fly"}}, {"with_audio": True}):
        data = {"shar_dir": small, "shar_streams": 1, **wanted.pop("data", {})}
        with pytest.raises(ConfigError, match=r"holds features, .* needs recording; export it with .* --store both"):
            streamed(data, label_specs=[], **wanted)
    with pytest.raises(DataError, match=r"holds no shar.json; write it with local/export_shar.py"):
        streamed({"shar_dir": tmp_path / "nowhere"})


def test_labels_of_the_shar_alone_suffice_where_validation_needs_none(corpus, streamed, tmp_path):
    alone = shutil.copytree(corpus / "shar", tmp_path / "alone") / "labels" / "codebook_indexes"
    batch = next(streamed({"shar_dir": tmp_path / "alone"}, labels=alone).train_batches(1))
    assert (batch.labels["kd"].lens > 0).all()
    with pytest.raises(DataError, match=r"has no shards yet.*--label-dir must be the whole label set"):
        streamed(labels=alone, own_labels=True)


def test_another_shar_is_other_data(corpus, streamed, tmp_path):
    moved = shutil.copytree(corpus / "shar", tmp_path / "moved")
    assert streamed({"shar_dir": moved}).state() == streamed().state()
    fewer = write_shar(corpus, tmp_path / "fewer", num_shards=5)
    assert streamed({"shar_dir": fewer}).state() != streamed().state()


def test_pieces_are_written_as_a_training_hears_them(tmp_path):
    write_part(tmp_path, "train", [0.9, 1.7, 2.4], seed=1)
    write_part(tmp_path, "dev", [0.8], seed=2)
    shar = write_shar(tmp_path, num_shards=1, pieces=0.8, label_dir=[])
    config = DataConfig(
        manifest_dir=tmp_path / "fbank", max_duration=2.0, num_workers=0, shar_dir=shar, shar_streams=1
    )
    found = []
    for kind in (DataModule, SharDataModule):
        batches = list(kind(config, AugmentConfig(spec_aug=False), None, crop_duration=0.8).train_batches(1))
        found.append({name: x[:n] for b in batches for name, x, n in zip(b.ids, b.features, b.x_lens, strict=True)})
    wanted, streamed = found
    assert wanted.keys() == streamed.keys() and len(wanted) == 8
    assert all(torch.equal(streamed[name], wanted[name]) for name in wanted)
