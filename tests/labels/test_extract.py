"""Extraction: the same labels and bytes whatever the batches, shards, order and interruptions."""

import gzip
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from label_toys import RATE, ToyTeacher, config_for, toy_quantizer, write_cuts
from lhotse import CutSet
from lhotse.utils import fastcopy

from icefall_kd.config import ExtractConfig, TeacherConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import SSL_CONV
from icefall_kd.labels import extract as extract_module
from icefall_kd.labels.extract import extract_labels
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.labels.keys import corpus_fingerprint, label_key, parse_key
from icefall_kd.labels.store import LabelStore, ShardWriter

DURATIONS = [0.31, 0.44, 0.5, 0.63, 0.77, 0.9, 1.2]
SPEEDS = ("1", "9/10", "11/10")


@pytest.fixture
def cuts(tmp_path):
    return write_cuts(tmp_path / "audio", DURATIONS, SPEEDS)


def run(cuts, label_dir, teacher=None, teacher_config=None, **options):
    if teacher_config is not None:
        options["teacher"] = teacher_config
    return extract_labels(config_for(cuts, label_dir, **options), teacher or ToyTeacher(), toy_quantizer())


def shard_bytes(label_dir):
    return {f.name: f.read_bytes() for f in sorted(label_dir.glob("*.safetensors"))}


def test_codes_equal_those_of_each_utterance_alone(tmp_path, cuts):
    report = run(cuts, tmp_path / "set", extract_max_duration=2.0)
    assert (report.utterances, report.rejected, report.skipped) == (21, 0, False)
    store, quantizer = LabelStore(tmp_path / "set"), toy_quantizer()
    for cut in CutSet.from_file(cuts):
        wave = torch.from_numpy(cut.load_audio()[0])
        alone = ToyTeacher().extract(Batch.from_audio([wave])).arrays["embeddings"][0]
        key = label_key(cut.with_id("renamed"))
        assert np.array_equal(store.get(key), quantizer.encode(alone, refine_iters=1).numpy())
        assert store.num_samples(key) == len(wave) and store.num_frames(key) == SSL_CONV.num_frames(len(wave))
    speeds = {parse_key(k).speed for k in store.keys()}
    assert speeds == {Fraction(s) for s in SPEEDS}
    assert store.join(label_key(c.with_id(str(i))) for i, c in enumerate(CutSet.from_file(cuts))).coverage == 1
    assert store.verify() == [] and not any((tmp_path / "set" / ".parts").iterdir())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_embeddings_are_stored_as_they_are(tmp_path, cuts, dtype):
    run(cuts, tmp_path / "set", kind="embeddings", embeddings_dtype=dtype)
    store = LabelStore(tmp_path / "set")
    for cut in CutSet.from_file(cuts):
        wave = torch.from_numpy(cut.load_audio()[0])
        alone = ToyTeacher().extract(Batch.from_audio([wave])).arrays["embeddings"][0].numpy()
        found = store.get(label_key(cut))
        assert found.dtype == dtype
        np.testing.assert_allclose(found, alone, rtol=1e-3 if dtype == "float16" else 1e-5, atol=1e-3)


def test_shards_are_independent_of_each_other_and_of_the_order_of_cuts(tmp_path, cuts):
    shuffled = tmp_path / "audio" / "shuffled.jsonl.gz"
    CutSet.from_cuts(list(CutSet.from_file(cuts))[::-1]).to_file(shuffled)
    run(cuts, tmp_path / "one")
    for k in (2, 0, 1):
        run(cuts, tmp_path / "three", shard=k, num_shards=3)
        run(shuffled, tmp_path / "back", shard=k, num_shards=3)
    assert shard_bytes(tmp_path / "three") == shard_bytes(tmp_path / "back")
    one, three = LabelStore(tmp_path / "one"), LabelStore(tmp_path / "three")
    assert set(one.keys()) == set(three.keys())
    assert all(np.array_equal(one.get(k), three.get(k)) for k in one.keys())
    before = shard_bytes(tmp_path / "three")
    (tmp_path / "three" / "shard-00001-of-00003.safetensors").unlink()
    assert not run(cuts, tmp_path / "three", shard=1, num_shards=3).skipped
    assert shard_bytes(tmp_path / "three") == before


def test_a_finished_shard_is_skipped_and_a_damaged_one_made_again(tmp_path, cuts):
    first = run(cuts, tmp_path / "set")
    wanted, when = first.path.read_bytes(), first.path.stat().st_mtime_ns
    (tmp_path / "set" / ".parts" / "shard-00000-of-00001").mkdir()  # as left by a kill behind the last rename
    again = run(cuts, tmp_path / "set")
    assert again.skipped and again.utterances == 21 and first.path.stat().st_mtime_ns == when
    assert not any((tmp_path / "set" / ".parts").iterdir())
    first.path.write_bytes(wanted[:-10])
    assert not run(cuts, tmp_path / "set").skipped and first.path.read_bytes() == wanted


def test_changed_options_are_refused_with_both_values(tmp_path, cuts):
    run(cuts, tmp_path / "set")
    with pytest.raises(DataError, match=r"teacher_sha256 is 'toy-1' and 'toy-2'.*another --label-dir"):
        run(cuts, tmp_path / "set", teacher=ToyTeacher(sha="toy-2"))
    with pytest.raises(DataError, match="refine_iters is 1 and 2"):
        run(cuts, tmp_path / "set", refine_iters=2)
    other = write_cuts(tmp_path / "audio", DURATIONS[:3], SPEEDS, name="other")
    with pytest.raises(DataError, match="corpus_fingerprint"):
        run(other, tmp_path / "set")
    info = LabelSetInfo.load(tmp_path / "set")
    assert info.corpus_fingerprint == corpus_fingerprint(CutSet.from_file(cuts))
    assert (info.num_codebooks, info.codebook_size, info.width, info.dim) == (4, 16, 4, 8)


def test_another_division_into_shards_is_refused_before_the_work(tmp_path, cuts):
    run(cuts, tmp_path / "set", shard=1, num_shards=2)
    with pytest.raises(DataError, match=r"has shards of 2, --num-shards is 3"):
        run(cuts, tmp_path / "set", ToyTeacher(delay=1e9), num_shards=3)
    run(cuts, tmp_path / "set", num_shards=2)
    assert LabelStore(tmp_path / "set").verify() == []


def test_more_shards_than_utterances(tmp_path):
    cuts = write_cuts(tmp_path / "audio", [0.5, 0.6])
    found = [run(cuts, tmp_path / "set", shard=k, num_shards=5).utterances for k in range(5)]
    assert sum(found) == 2 and 0 in found and LabelStore(tmp_path / "set").verify() == []


def test_cut_sets_without_cuts_are_named(tmp_path, cuts):
    sound = cuts.read_bytes()
    contents = {
        "empty": gzip.compress(b""),
        "plain": b"no gzip at all",
        "cut_off": sound[: len(sound) // 2],
        "no_cuts": gzip.compress(b'{"id": "x"}\n'),
        "no_json": gzip.compress(b"cut\n"),
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}.jsonl.gz (is damaged|holds no cuts)"):
            run(path, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_one_id_in_two_corpora_is_refused(tmp_path, cuts):
    other = tmp_path / "other.jsonl.gz"
    CutSet.from_file(cuts).map_supervisions(lambda s: fastcopy(s, text="else")).to_file(other)
    both = ExtractConfig(cuts=[cuts, other], label_dir=tmp_path / "set", quantizer="given")
    with pytest.raises(DataError, match=r"one label key 'rec.*texts 'text .' and 'else'.*between corpora"):
        extract_labels(both, ToyTeacher(), toy_quantizer())
    twice = ExtractConfig(cuts=[cuts, cuts], label_dir=tmp_path / "set", quantizer="given", refine_iters=1)
    assert extract_labels(twice, ToyTeacher(), toy_quantizer()).utterances == 21


def test_progress_tells_time_left_speed_and_size(tmp_path, cuts, caplog):
    with caplog.at_level(logging.INFO):
        report = run(cuts, tmp_path / "set")
    first, *_, last = [m for m in caplog.messages if m.startswith("shard 0 of 1: ")]
    assert re.search(r"/21 utterances, \S+ utterances/s, .* left, hours_per_hour \S+, bytes_per_hour \S+$", first)
    told = float(last.rsplit(" ", 1)[1])
    assert told == pytest.approx(LabelStore(tmp_path / "set").storage_report()["value_bytes"] / report.hours, rel=1e-3)


def test_unreadable_audio_is_rejected_with_its_reason(tmp_path, cuts):
    (tmp_path / "audio" / "rec2.wav").unlink()
    (tmp_path / "audio" / "rec4.wav").write_bytes(b"RIFF no audio")
    with pytest.raises(DataError, match="6 of 21 utterances were rejected"):
        run(cuts, tmp_path / "set")
    report = run(cuts, tmp_path / "set", max_reject_ratio=0.3)
    assert (report.utterances, report.rejected) == (15, 6)
    lines = (tmp_path / "set" / "rejects" / "shard-00000-of-00001.jsonl").read_text().splitlines()
    rejects = [json.loads(line) for line in lines]
    assert {r["key"].split("|")[0] for r in rejects} == {"rec2", "rec4"}
    assert all("cannot be read" in r["reason"] for r in rejects)
    with pytest.raises(DataError, match="6 missing"):
        LabelStore(tmp_path / "set").join(map(label_key, CutSet.from_file(cuts)))


def test_restored_audio_is_tried_again_after_a_failed_run(tmp_path, cuts):
    run(cuts, tmp_path / "whole")
    audio = tmp_path / "audio" / "rec2.wav"
    shutil.move(audio, tmp_path / "kept.wav")
    with pytest.raises(DataError, match="rejected"):
        run(cuts, tmp_path / "set")
    shutil.move(tmp_path / "kept.wav", audio)
    assert run(cuts, tmp_path / "set").rejected == 0
    assert shard_bytes(tmp_path / "set") == shard_bytes(tmp_path / "whole")


def test_long_utterances_are_windowed_or_rejected(tmp_path, cuts):
    limit = int(0.8 * RATE)
    run(cuts, tmp_path / "free", kind="embeddings", embeddings_dtype="float32")
    run(cuts, tmp_path / "window", ToyTeacher(max_samples=limit), kind="embeddings", embeddings_dtype="float32")
    free, window = LabelStore(tmp_path / "free"), LabelStore(tmp_path / "window")
    for key in free.keys():
        np.testing.assert_allclose(window.get(key), free.get(key), rtol=1e-4, atol=1e-5)
    rejecting = TeacherConfig(long_utterances="reject")
    report = run(cuts, tmp_path / "reject", ToyTeacher(max_samples=limit), rejecting, max_reject_ratio=1.0)
    assert report.rejected == sum(c.num_samples > limit for c in CutSet.from_file(cuts))


def test_a_teacher_that_breaks_its_formula_is_refused(tmp_path, cuts):
    class Liar(ToyTeacher):
        def extract(self, batch):
            out = super().extract(batch)
            return type(out)(out.arrays, {"embeddings": out.lens["embeddings"] - 1})

    with pytest.raises(DataError, match=r"teacher gave .* frames"):
        run(cuts, tmp_path / "set", Liar())


def test_too_short_and_non_finite_utterances_are_rejected(tmp_path):
    cuts = write_cuts(tmp_path / "audio", [0.02, 0.5, 0.6])

    class Burst(ToyTeacher):
        def extract(self, batch):
            out = super().extract(batch)
            for i, n in enumerate(batch.audio_lens.tolist()):
                if n == 8000:
                    out.arrays["embeddings"][i, 3] = float("inf")
            return out

    report = run(cuts, tmp_path / "set", Burst(), max_reject_ratio=1.0)
    lines = (tmp_path / "set" / "rejects" / "shard-00000-of-00001.jsonl").read_text()
    assert (report.utterances, report.rejected) == (1, 2)
    assert "320 samples give no frame" in lines and "not finite" in lines


def test_usage_errors(tmp_path):
    with pytest.raises(ConfigError, match="--quantizer"):
        ExtractConfig(cuts=[], label_dir=tmp_path)
    with pytest.raises(ConfigError, match="--shard is 4"):
        config_for(tmp_path / "x", tmp_path, shard=4, num_shards=4)
    with pytest.raises(DataError, match=r"no cut set .*none.jsonl"):
        run(tmp_path / "none.jsonl.gz", tmp_path / "set")
    with pytest.raises(ConfigError, match="embeddings of 8, the teacher's have 5"):
        run(write_cuts(tmp_path / "audio", [0.5]), tmp_path / "set", ToyTeacher(dim=5))


SCRIPT = """
import sys, torch
from pathlib import Path
from label_toys import ToyTeacher, config_for, toy_quantizer
from icefall_kd.labels import extract as extract_module
from icefall_kd.labels.extract import extract_labels
torch.set_num_threads(1)
extract_labels(config_for(Path(sys.argv[1]), Path(sys.argv[2])), ToyTeacher(delay=float(sys.argv[3])), toy_quantizer())
"""


def test_killed_in_mid_shard_the_same_command_gives_the_same_bytes(tmp_path, cuts):
    run(cuts, tmp_path / "whole")
    target = tmp_path / "set"
    command = [sys.executable, "-c", SCRIPT, str(cuts), str(target)]
    process = subprocess.Popen([*command, "0.4"], env=os.environ.copy())
    try:
        deadline = time.monotonic() + 600  # a busy machine takes its time to start
        while len(list(target.glob(".parts/*/part-*.safetensors"))) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert not list(target.glob("*.safetensors"))
    kept = {p: p.stat().st_mtime_ns for p in target.glob(".parts/*/part-*.safetensors")}
    counting = ToyTeacher()
    seen = []
    counting.extract = lambda batch: seen.append(len(batch)) or ToyTeacher.extract(counting, batch)
    run(cuts, target, counting)
    assert sum(seen) == 21 - 3 * len(kept)  # finished parts are not done again
    assert shard_bytes(target) == shard_bytes(tmp_path / "whole")


def test_a_run_that_ends_between_its_parts_and_its_shard_loses_nothing(tmp_path, cuts, monkeypatch):
    run(cuts, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(cuts, tmp_path / "set")
    run(cuts, tmp_path / "set", ToyTeacher(delay=1e9))
    assert shard_bytes(tmp_path / "set") == shard_bytes(tmp_path / "whole")


def test_two_runs_of_one_shard_at_once_do_it_once(tmp_path, cuts):
    run(cuts, tmp_path / "whole")
    config, teacher, quantizer = config_for(cuts, tmp_path / "set"), ToyTeacher(delay=0.02), toy_quantizer()
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda _: extract_labels(config, teacher, quantizer), range(2)))
    assert sorted(r.skipped for r in reports) == [False, True]
    assert shard_bytes(tmp_path / "set") == shard_bytes(tmp_path / "whole")


def script_main(repo, name, monkeypatch, *args):
    """Run the main function of a script of local/ in this process."""
    spec = importlib.util.spec_from_file_location(name, repo / "local" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    module.main()


def test_the_label_sets_command(tmp_path, repo, cuts, monkeypatch, capsys):
    for k in (0, 1):
        run(cuts, tmp_path / f"part{k}", shard=k, num_shards=2)
    merged = tmp_path / "all"

    def call(*args):
        script_main(repo, "label_sets", monkeypatch, *args)
        return capsys.readouterr().out

    assert "21 utterances in 2 shards" in call("merge", "--into", merged, tmp_path / "part0", tmp_path / "part1")
    assert "21 matched, 0 missing, 0 extra" in call("join", merged, "--cuts", cuts)
    assert "8.0 times" in call("info", merged)  # 8 float32 against 4 bytes
    assert "21 utterances in 2 shards, all sound" in call("verify", merged)
    file = next(merged.glob("shard-00001*"))
    file.write_bytes(file.read_bytes()[:-1])
    broken = subprocess.run(
        [sys.executable, repo / "local" / "label_sets.py", "verify", merged], capture_output=True, text=True
    )
    assert broken.returncode == 4 and file.name in broken.stderr


def test_the_extraction_command(tmp_path, repo, cuts, monkeypatch, capsys):
    toy_quantizer().save(tmp_path / "quantizer.safetensors")
    monkeypatch.setattr(extract_module, "build_teacher", lambda config: ToyTeacher(layer=config.layer))
    options = ["--cuts", cuts, "--label-dir", tmp_path / "set", "--quantizer", tmp_path / "quantizer.safetensors"]
    for state in ("took", "was finished"):
        script_main(repo, "extract_labels", monkeypatch, *options, "--layer", "2", "--refine-iters", "1")
        out = capsys.readouterr().out
        assert "21 utterances" in out and "0 rejected" in out and state in out
    assert LabelStore(tmp_path / "set", expect={"layer": 2, "quantizer_sha256": toy_quantizer().sha256}).verify() == []
    with pytest.raises(ConfigError, match="--label-dir"):
        script_main(repo, "extract_labels", monkeypatch, "--cuts", "x", "--label-dirr", "y")


def test_a_quantizer_of_another_layer_is_refused_with_both_values_and_nothing_written(tmp_path, cuts):
    teacher, quantizer = ToyTeacher(), toy_quantizer()
    quantizer.metadata["teacher"] = {**teacher.provenance(), "layer": teacher.layer + 1}
    with pytest.raises(DataError, match=rf"layer is {teacher.layer + 1}, this one's is {teacher.layer}"):
        extract_labels(config_for(cuts, tmp_path / "set"), teacher, quantizer)
    assert not (tmp_path / "set").exists()
