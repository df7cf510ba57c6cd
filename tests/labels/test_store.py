"""What goes into the store comes out; damage, foreign labels and gaps are named."""

import json
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
from label_toys import fill, toy_info
from safetensors import safe_open

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import SSL_CONV, WHISPER_CONV
from icefall_kd.labels import shard as shard_module
from icefall_kd.labels.compat import check_label_compat, teacher_expectations
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.labels.merge import merge_label_sets
from icefall_kd.labels.shard import LabelEntry, ShardHeader, key_hash, write_shard
from icefall_kd.labels.store import LabelStore, shard_name


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_round_trip(tmp_path, dtype):
    kind = "codebook_indexes" if dtype == "uint8" else "embeddings"
    truth, _ = fill(tmp_path, 40, 3, toy_info(dtype=dtype, kind=kind, width=6))
    store = LabelStore(tmp_path)
    assert set(store.keys()) == set(truth) and len(store) == 40
    for key, values in truth.items():
        found = store.get(key)
        assert found.dtype == values.dtype and np.array_equal(found, values) and found.flags.writeable
        assert key in store and store.num_frames(key) == len(values)
        assert np.array_equal(store.get(key, 3, 9), values[3:9])
    assert "rec0|0|1|1/1" not in store
    with pytest.raises(DataError, match="no labels for"):
        store.get("rec0|0|1|1/1")
    assert store.verify() == []


def test_shards_are_plain_safetensors_in_the_order_of_keys(tmp_path):
    truth, _ = fill(tmp_path, 20)
    keys = sorted(truth)
    with safe_open(tmp_path / shard_name(0, 1), "np") as f:
        assert np.array_equal(f.get_tensor("values"), np.concatenate([truth[k] for k in keys]))
        assert f.get_tensor("num_frames").tolist() == [len(truth[k]) for k in keys]
        assert f.get_tensor("num_samples").tolist() == [int(k.split("|")[2]) for k in keys]
        assert [h.to_bytes(8, "big") for h in f.get_tensor("key_hashes").tolist()] == [key_hash(k)[:8] for k in keys]
        assert json.loads(f.metadata()["icefall_kd"])["fingerprint"] == LabelSetInfo.load(tmp_path).fingerprint
    assert sum(map(len, truth.values())) == LabelStore(tmp_path).shard(0).num_frames


def test_keys_of_any_spelling_come_back(tmp_path):
    names = ["a", "ab", "a" * 300, "a" * 301, "a" * 299 + "é", "è", "é", "b|c", "", "中文", "中心"]
    store, truth = LabelStore.create(tmp_path, toy_info()), {}
    writer = store.writer(0, 1)
    for i, name in enumerate(names):
        truth[f"{name}|0|{400 + i}|1/1"] = np.full((1, 8), i, np.uint8)
        writer.add(f"{name}|0|{400 + i}|1/1", np.full((1, 8), i, np.uint8), 400 + i)
    writer.finish()
    store = LabelStore(tmp_path)
    assert list(store.keys()) == sorted(truth) and store.verify() == []
    assert all(np.array_equal(store.get(key), values) for key, values in truth.items())
    assert store.get("none|0|400|1/1", missing_ok=True) is None


def test_keys_that_the_file_cannot_tell_apart_are_refused(tmp_path, monkeypatch):
    writer = LabelStore.create(tmp_path, toy_info()).writer(0, 1)
    writer.add("a\nb|0|400|1/1", np.zeros((1, 8), np.uint8), 400)
    with pytest.raises(DataError, match="line break"):
        writer.finish()
    writer.entries = [LabelEntry(k, np.zeros((1, 8), np.uint8), 400) for k in ("a|0|400|1/1", "b|0|400|1/1")]
    monkeypatch.setattr(shard_module, "key_hash", lambda key: b"12345678" + key_hash(key)[8:])
    with pytest.raises(DataError, match="one hash"):
        writer.finish()


def test_a_set_of_the_first_format_is_refused_with_the_remedy(tmp_path):
    fill(tmp_path, 2)
    file = tmp_path / "label_set.json"
    file.write_text(file.read_text().replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(DataError, match=r"format version 1, this code reads 2.*another --label-dir"):
        LabelStore(tmp_path)


def test_the_container_costs_less_than_one_per_cent_of_the_codes_of_read_speech(tmp_path):
    writer = LabelStore.create(tmp_path, toy_info()).writer(0, 1)
    for i, samples in enumerate(np.random.default_rng(1).integers(96_000, 288_000, 200).tolist()):  # 12 s on average
        values = np.zeros((SSL_CONV.num_frames(samples), 8), np.uint8)
        writer.add(f"{100 + i // 40}-{1000 + i // 20}-{i % 20:04d}|0|{samples}|1/1", values, samples)
    writer.finish()
    assert LabelStore(tmp_path).storage_report()["overhead"] < 0.01


def test_an_empty_shard_is_sound(tmp_path):
    fill(tmp_path, 1, 4)
    store = LabelStore(tmp_path)
    assert len(store) == 1 and store.verify() == []
    assert "other|0|400|1/1" not in store


def test_join_reports_and_names_the_first_five(tmp_path):
    truth, _ = fill(tmp_path, 30, 2)
    store = LabelStore(tmp_path)
    report = store.join(list(truth) + list(truth)[:3])
    assert (report.matched, report.missing, report.extra, report.coverage) == (30, 0, 0, 1.0)
    report = store.join([*list(truth)[:10], "new|0|8|1/1"], min_coverage=0.9)
    assert (report.matched, report.missing, report.extra) == (10, 1, 20)
    with pytest.raises(DataError, match="24 missing") as caught:
        store.join([f"new{i}|0|8|1/1" for i in range(24)])
    assert "new4|" in str(caught.value) and "new5|" not in str(caught.value)
    assert "another corpus" in str(caught.value) and caught.value.exit_code == 4


def test_join_says_which_speed_or_span_the_set_has(tmp_path):
    truth, _ = fill(tmp_path, 5)
    store, key = LabelStore(tmp_path), next(iter(truth))
    with pytest.raises(DataError, match="at speed 1, wanted is 9/10"):
        store.join([key.replace("1/1", "9/10")])
    with pytest.raises(DataError, match=r"has 'rec0.*wanted is 'rec0.1.5"):
        store.join(["rec0|1|5|1/1"])
    with pytest.raises(DataError, match="no cuts"):
        store.join([])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("teacher_sha256", "zzzz"),
        ("layer", 4),
        ("layer_convention", "0-based"),
        ("normalization", "layer_norm"),
        ("quantizer_sha256", "yyyy"),
        ("frame_formula", WHISPER_CONV),
        ("num_codebooks", 16),
        ("codebook_size", 16),
        ("corpus_fingerprint", "dddd"),
        ("kind", "embeddings"),
    ],
)
def test_another_provenance_is_an_error_with_both_values(tmp_path, field, value):
    fill(tmp_path, 2)
    info = LabelSetInfo.load(tmp_path)
    LabelStore(tmp_path, expect={field: getattr(info, field)})
    LabelStore(tmp_path, expect={field: None})
    with pytest.raises(DataError) as caught:
        LabelStore(tmp_path, expect={field: value})
    shown = value.to_dict() if field == "frame_formula" else value
    assert all(repr(v) in str(caught.value) for v in (getattr(info, field), shown)) and field in str(caught.value)


def test_expecting_nonsense_is_a_usage_error(tmp_path):
    fill(tmp_path, 2)
    with pytest.raises(ConfigError, match="teacher_sha256"):
        LabelStore(tmp_path, expect={"teacher_sha": "x"})


def test_compat_refuses_time_warp_and_other_teachers(tmp_path):
    info = toy_info()
    teacher = {"weights_sha256": "aaaa", "layer": 3, "frame_formula": SSL_CONV.to_dict(), "device": "cuda"}
    check_label_compat(info, "set", teacher=teacher, quantizer_sha256="bbbb", kind="codebook_indexes")
    assert "device" not in teacher_expectations(teacher)
    with pytest.raises(ConfigError, match=r"time-warp-factor is 80.*need 0"):
        check_label_compat(info, "set", time_warp_factor=80)
    with pytest.raises(DataError, match="layer is 3, expected 7"):
        check_label_compat(info, "set", teacher={**teacher, "layer": 7})
    with pytest.raises(DataError, match="quantizer_sha256 is 'bbbb', expected 'eeee'"):
        check_label_compat(info, "set", quantizer_sha256="eeee")


def test_other_options_for_the_same_folder_are_refused(tmp_path):
    LabelStore.create(tmp_path, toy_info())
    LabelStore.create(tmp_path, toy_info(teacher="/elsewhere/toy", origin={"versions": {"torch": "9"}}))
    with pytest.raises(DataError, match=r"layer is 3 and 5.*another --label-dir, or delete"):
        LabelStore.create(tmp_path, toy_info(layer=5))


def test_every_flipped_byte_is_found_and_its_shard_named(tmp_path):
    _, store = fill(tmp_path, 3, 1, toy_info(width=2), seconds=(0.1, 0.2))
    file = tmp_path / shard_name(0, 1)
    sound = file.read_bytes()
    assert store.verify() == []
    for position in range(len(sound)):
        broken = bytearray(sound)
        broken[position] ^= 0x11
        file.write_bytes(broken)
        problems = LabelStore(tmp_path, partial=True).verify()
        assert problems and all(file.name in p for p in problems), position
    for size in [*range(0, len(sound), 97), len(sound) - 1]:
        file.write_bytes(sound[:size])
        assert file.name in LabelStore(tmp_path, partial=True).verify()[0]
    file.write_bytes(sound + b"x")
    assert file.name in LabelStore(tmp_path, partial=True).verify()[0]
    file.write_bytes(sound)
    assert LabelStore(tmp_path).verify() == []


def test_every_flipped_byte_of_the_provenance_is_an_error_or_no_part_of_the_identity(tmp_path):
    fill(tmp_path, 3)
    file, wanted = tmp_path / "label_set.json", LabelSetInfo.load(tmp_path).fingerprint
    sound = file.read_bytes()
    for position in range(len(sound)):
        broken = bytearray(sound)
        broken[position] ^= 0x11
        file.write_bytes(broken)
        try:
            problems = LabelStore(tmp_path, partial=True).verify()
        except DataError as error:
            problems = [str(error)]
        assert problems or LabelSetInfo.load(tmp_path).fingerprint == wanted, position


def test_missing_foreign_and_doubled_shards_are_named(tmp_path):
    fill(tmp_path / "a", 40, 4)
    fill(tmp_path / "b", 40, 4, toy_info(layer=9))
    (tmp_path / "a" / shard_name(1, 4)).unlink()
    with pytest.raises(DataError, match="lacks shard 1 of 4"):
        LabelStore(tmp_path / "a")
    assert "lacks shard 1 of 4" in LabelStore(tmp_path / "a", partial=True).verify()[0]
    (tmp_path / "b" / shard_name(1, 4)).rename(tmp_path / "a" / shard_name(1, 4))
    assert any("set fingerprint" in p and "00001" in p for p in LabelStore(tmp_path / "a").verify())
    store = LabelStore(tmp_path / "a")
    with pytest.raises(DataError, match="does not belong"):
        list(store.keys())
    (tmp_path / "a" / shard_name(1, 4)).write_bytes((tmp_path / "a" / shard_name(2, 4)).read_bytes())
    assert any("place" in p for p in LabelStore(tmp_path / "a").verify())
    entries = list(LabelStore(tmp_path / "a").shard(0).entries())
    header = ShardHeader(store.info.fingerprint, 1, 4, store.info.kind)
    write_shard(tmp_path / "a" / shard_name(1, 4), entries, header, "uint8", 8)
    problems = LabelStore(tmp_path / "a").verify()
    assert any("is in shard-00000-of-00004.safetensors and in shard-00001" in p for p in problems)


def test_the_writer_refuses_what_the_formula_does_not_give(tmp_path):
    writer = LabelStore.create(tmp_path, toy_info()).writer(0, 1)
    with pytest.raises(DataError, match="50 frames, the teacher's formula gives 49"):
        writer.add("r|0|16000|1/1", np.zeros((50, 8), np.uint8), 16_000)
    values = np.zeros((49, 8), np.uint8)
    writer.add("r|0|16000|1/1", values, 16_000)
    writer.add("r|0|16000|1/1", values, 16_000)
    with pytest.raises(DataError, match="occurs twice"):
        writer.finish()
    with pytest.raises(DataError, match="int64"):
        header = ShardHeader("f", 0, 1, "k")
        write_shard(tmp_path / "x.safetensors", [LabelEntry("k", values.astype(int), 1)], header, "uint8", 8)
    assert list(tmp_path.glob("*.safetensors")) == [] and not list(tmp_path.glob(".tmp*"))
    with pytest.raises(ConfigError, match=r"0 ... 1"):
        LabelStore(tmp_path, partial=True).writer(2, 2)


def test_merge_brings_partial_sets_together(tmp_path):
    truth, _ = fill(tmp_path / "a", 30, 4, shards=[0, 1, 2])
    fill(tmp_path / "b", 30, 4, shards=[2, 3])
    store = merge_label_sets([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert set(store.keys()) == set(truth) and store.verify() == []
    with pytest.raises(ConfigError, match="exists already"):
        merge_label_sets([tmp_path / "a"], tmp_path / "all")
    with pytest.raises(DataError, match="lacks shard 3 of 4"):
        merge_label_sets([tmp_path / "a"], tmp_path / "part")
    fill(tmp_path / "c", 30, 4, toy_info(quantizer_sha256="other"))
    with pytest.raises(DataError, match="quantizer_sha256 is 'bbbb' and 'other'"):
        merge_label_sets([tmp_path / "a", tmp_path / "c"], tmp_path / "part")
    fill(tmp_path / "d", 30, 2)
    with pytest.raises(DataError, match=r"one of 4 shards.*one of 2"):
        merge_label_sets([tmp_path / "a", tmp_path / "d"], tmp_path / "part")
    fill(tmp_path / "e", 20, 4)
    with pytest.raises(DataError, match="different labels"):
        merge_label_sets([tmp_path / "a", tmp_path / "e"], tmp_path / "part")
    assert not (tmp_path / "part").exists() and not list(tmp_path.glob(".tmp*"))


def test_storage_report_counts_bytes_exactly(tmp_path):
    truth, _ = fill(tmp_path, 25, 2, toy_info(width=8, dim=1280), seconds=(10.0, 14.0))
    report = LabelStore(tmp_path).storage_report()
    frames = sum(map(len, truth.values()))
    hours = sum(int(k.split("|")[2]) for k in truth) / 16_000 / 3600
    assert report["value_bytes"] == 8 * frames and report["frames"] == frames
    assert report["hours"] == pytest.approx(hours) and report["bytes_per_hour"] == pytest.approx(8 * frames / hours)
    assert report["ratio_to_float32"] == pytest.approx(1280 * 4 / 8)
    on_disk = sum(f.stat().st_size for f in tmp_path.iterdir() if f.name[0] != ".")
    assert report["container_bytes"] == on_disk - 8 * frames
    # 8 bytes at 50 frames a second are 1.44 MB an hour, less what the convolutions lose at the end of an utterance.
    assert 0.995 * 1.44e6 < report["bytes_per_hour"] < 1.44e6


def test_a_store_survives_pickling(tmp_path):
    truth, _ = fill(tmp_path, 5)
    store = LabelStore(tmp_path)
    key = next(iter(truth))
    store.get(key)
    assert np.array_equal(pickle.loads(pickle.dumps(store)).get(key), truth[key])


def _read_all(store, truth, results, loops):
    sound = all(np.array_equal(store.get(k), v) for _ in range(loops) for k, v in truth.items())
    results.put((os.getpid(), sound))


def test_four_workers_read_while_one_is_killed(tmp_path):
    truth, _ = fill(tmp_path, 60, 3)
    store = LabelStore(tmp_path)
    store.get(next(iter(truth)))  # opened before the fork
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    victim = context.Process(target=_read_all, args=(store, truth, results, 10**6))
    victim.start()
    workers = [context.Process(target=_read_all, args=(store, truth, results, 3)) for _ in range(3)]
    for worker in workers:
        worker.start()
    os.kill(victim.pid, signal.SIGKILL)
    for worker in [*workers, victim]:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0, 0, 0] and victim.exitcode == -signal.SIGKILL
    assert {results.get() for _ in workers} == {(w.pid, True) for w in workers}
    assert LabelStore(tmp_path).verify() == []
    assert np.array_equal(store.get(next(iter(truth))), next(iter(truth.values())))
