"""The join: against sets of all keys, with files in memory and on the disk."""

import random

import numpy as np
import pytest
from label_toys import fill

import icefall_kd.labels.join as module
from icefall_kd.labels.join import KeyJoin, join
from icefall_kd.labels.store import LabelStore


@pytest.fixture(scope="module")
def label_set(tmp_path_factory):
    truth, store = fill(tmp_path_factory.mktemp("join") / "set", 60, num_shards=5, seconds=(0.1, 0.2))
    return truth, store


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("divisions", [1, 3, 64])
def test_a_join_counts_what_sets_of_all_keys_count(label_set, monkeypatch, spilled, divisions):
    truth, store = label_set
    monkeypatch.setattr(module, "_DIVISIONS", divisions)
    monkeypatch.setattr(module, "_IN_MEMORY", 64 if spilled else 1 << 20)
    monkeypatch.setattr(module, "_AT_ONCE", 7)
    rng = random.Random(divisions)
    for _ in range(5):
        wanted = rng.choices(list(truth) + [f"new{i}|0|8|1/1" for i in range(20)] + ["a\nb|0|8|1/1"], k=80)
        absent = [key for key in dict.fromkeys(wanted) if key not in truth]
        report = join(store, wanted)
        found = set(wanted) & set(truth)
        assert (report.matched, report.missing, report.extra) == (len(found), len(absent), len(truth) - len(found))
        assert report.first_missing == tuple(absent[:5])


def test_a_join_keeps_no_shard_open_and_no_key(label_set):
    truth, _ = label_set
    store = LabelStore(label_set[1].path)
    opened = []
    joined = KeyJoin(store)
    joined.add(list(truth))
    joined.add([f"new{i}|0|8|1/1" for i in range(3)])
    assert not any(isinstance(value, str | set | dict) for value in vars(joined).values())
    # 24 bytes a key: 16 of its hash, and its number.
    assert sum(file.tell() for file in joined._files) == 24 * (len(truth) + 3) == 24 * joined._added
    open_shard = store.open_shard
    store.open_shard = lambda k: opened.append(k) or open_shard(k)
    assert joined.report().matched == len(truth)
    assert sorted(opened) == list(range(5)) and store._shards == {}


def test_two_keys_that_share_half_of_their_hash_are_two(label_set, monkeypatch):
    _, store = label_set
    halves = {"a": (1, 5), "b": (1, 10), "c": (2, 5), "d": (1, 5)}
    monkeypatch.setattr(module, "hash_words", lambda keys: np.array([halves[k] for k in keys], np.uint64))
    report = join(store, ["a", "b", "c", "d", "a"])  # a and d have all 16 bytes in common
    assert (report.matched, report.missing, report.first_missing) == (0, 3, ("a", "b", "c"))
