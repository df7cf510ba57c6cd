"""icefall's published codebook indexes become a label set, whatever the cuts are called, and nothing else does."""

import builtins
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from lhotse import CutSet, MonoCut, NumpyHdf5Writer
from lhotse.utils import fastcopy
from micro_corpus import RATE, read_cuts, write_corpus, write_part
from test_extract import script_main, shard_bytes

from icefall_kd.config import AugmentConfig, DataConfig, ImportConfig, KdConfig, ModelConfig, TrainConfig
from icefall_kd.data.datamodule import DataModule
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import ICEFALL_INDEXES, SSL_CONV, conv2d_subsampled_len, fbank_num_frames
from icefall_kd.labels.align import check_lengths, join_frames, surplus_bounds
from icefall_kd.labels.import_icefall import import_labels, utterance_name
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.labels.keys import corpus_fingerprint, label_key, parse_key
from icefall_kd.labels.store import LabelStore
from icefall_kd.recipe import train_main
from icefall_kd.systems import build_system
from icefall_kd.text.tokenizer import Tokenizer

Q = 4
# n mod 320 is 0, 16 (HuBERT: one frame fewer), 81, 319 (as many) samples.
DURATIONS = [9600 / RATE, 9936 / RATE, 12561 / RATE, 16319 / RATE]
SPEEDS = ("1", "9/10", "11/10")


def librispeech_like(cuts, name=lambda i, cut: f"103-124{i // 2}-000{i % 2}-{i}"):
    """Give cuts the ids of LibriSpeech's, with the suffixes of their speed copies."""
    numbers: dict[str, int] = {}
    renamed = []
    for cut in cuts:
        i = numbers.setdefault(parse_key(label_key(cut)).recording_id, len(numbers))
        speed = parse_key(label_key(cut)).speed
        renamed.append(cut.with_id(name(i, cut) + (f"_sp{float(speed)}" if speed != 1 else "")))
    return CutSet.from_cuts(renamed)


@pytest.fixture
def cuts(tmp_path):
    """The user's own cuts, written, under ids as LibriSpeech's."""
    found = librispeech_like(write_part(tmp_path, "train", DURATIONS, SPEEDS, features=False))
    found.to_file(tmp_path / "cuts.jsonl.gz")
    return found


def publish(folder, cuts, job=1, frames=lambda cut: cut.num_samples // 320, codes=None, **array):
    """Write what a job of icefall's extraction writes for ``cuts``; return the manifest and the codes by id."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / f"with_codebook_indexes-librispeech-cuts_train-clean-100-{job}.jsonl.gz"
    truth, bare = {}, []
    rng = np.random.default_rng(job)
    with NumpyHdf5Writer(folder / f"job-{job}") as writer:
        for cut in cuts:
            truth[cut.id] = rng.integers(0, 256, (frames(cut), Q), dtype=np.uint8)
            new = MonoCut(id=cut.id, start=cut.start, duration=cut.duration, channel=cut.channel)
            stored = truth[cut.id] if codes is None else codes(cut, truth[cut.id])
            options = {"frame_shift": 0.02, "temporal_dim": 0, "start": 0, **array}
            new.codebook_indexes = writer.store_array(key=cut.id, value=stored, **options)
            bare.append(new)
    CutSet.from_cuts(bare).to_jsonl(manifest)
    return manifest, truth


def run(tmp_path, manifests, **options):
    options = {"cuts": [tmp_path / "cuts.jsonl.gz"], "label_dir": tmp_path / "set", **options}
    return import_labels(ImportConfig(indexes=manifests, **options))


def report(tmp_path):
    return [json.loads(line) for line in (tmp_path / "set" / "import_report.jsonl").read_text().splitlines()]


def test_published_indexes_come_out_under_the_users_keys(tmp_path, cuts, recwarn):
    parts = [list(cuts)[:5], list(cuts)[5:]]
    published = [publish(tmp_path / "vq", part, job) for job, part in enumerate(parts, 1)]
    known = {"teacher": "hubert-xl", "layer": 36, "layer_convention": "1-based", "dim": 1280}
    found = run(tmp_path, [m for m, _ in published], num_shards=3, **known)
    assert (found.utterances, found.by_rule, found.without, found.surplus) == (12, 0, 0, 0)
    assert found.hours == pytest.approx(sum(c.num_samples for c in cuts) / RATE / 3600)
    truth = {k: v for _, codes in published for k, v in codes.items()}
    store = LabelStore(tmp_path / "set")
    for cut in cuts:
        key = label_key(cut)
        assert np.array_equal(store.get(key), truth[cut.id]) and store.num_samples(key) == cut.num_samples
    assert {parse_key(k).speed for k in store.keys()} == {Fraction(s) for s in SPEEDS}
    assert store.verify() == [] and store.join(map(label_key, cuts)).coverage == 1 and report(tmp_path) == []
    info = store.info
    assert (info.teacher, info.layer, info.layer_convention, info.dim) == ("hubert-xl", 36, "1-based", 1280)
    assert (info.num_codebooks, info.codebook_size, info.width, info.formula) == (Q, 256, Q, ICEFALL_INDEXES)
    assert info.corpus_fingerprint == corpus_fingerprint(cuts)
    assert not recwarn.list


def test_what_is_not_told_is_unknown(tmp_path, cuts):
    run(tmp_path, [publish(tmp_path / "vq", cuts)[0]])
    info = LabelSetInfo.load(tmp_path / "set")
    unknown = ("teacher", "teacher_sha256", "layer_convention", "normalization", "quantizer_sha256", "device")
    assert {getattr(info, name) for name in unknown} == {"unknown"}
    assert info.layer is None and info.refine_iters is None and info.dim == 0
    with pytest.raises(DataError, match="layer is None, expected 36"):
        LabelStore(tmp_path / "set", expect={"layer": 36})


def test_alignment_takes_these_lengths_and_no_others():
    low, high = surplus_bounds(ICEFALL_INDEXES)
    one_more, surplus = set(), set()
    for n in range(1, 30_000):
        student = conv2d_subsampled_len(fbank_num_frames(n))
        check_lengths(n // 320, n, ICEFALL_INDEXES, student)
        if n >= 400:
            one_more |= {n % 320} if n // 320 != SSL_CONV.num_frames(n) else set()
        if student > 0:
            surplus.add(n // 320 - 2 * student)
    assert one_more == set(range(80)) and (min(surplus), max(surplus)) == (low, high)
    for wrong in (49, 51):
        with pytest.raises(DataError, match=f"{wrong} label frames.*gives 50 for its 16019 samples"):
            check_lengths(wrong, 16019, ICEFALL_INDEXES, conv2d_subsampled_len(fbank_num_frames(16019)))


@pytest.mark.parametrize(("cut_id", "name"), [
    ("103-1240-0000-7", "103-1240-0000"),
    ("103-1240-0000-7_sp0.9", "103-1240-0000_sp9/10"),
    ("103-1240-0000_sp1.1", "103-1240-0000_sp11/10"),
    ("103-1240-0000-7_sp1.0", "103-1240-0000"),
    ("a-b-c-d-e", "a-b-c"),
    ("BAC009S0002W0122-3", None),
])  # fmt: skip
def test_names_of_renamed_cuts(cut_id, name):
    assert utterance_name(cut_id) == name


@pytest.mark.parametrize("whose", ["ids", "recordings"])
def test_renamed_cuts_are_found_by_the_rule(tmp_path, whose):
    plain = write_part(tmp_path, "train", DURATIONS, SPEEDS, features=False)
    theirs = librispeech_like(plain)
    if whose == "ids":  # lhotse's numbering of cuts changed
        ours = librispeech_like(plain, lambda i, cut: f"103-124{i // 2}-000{i % 2}-{1000 + i}")
    else:  # the cuts have any ids, and the recordings those of the utterances
        numbers = {r: i for i, r in enumerate(dict.fromkeys(parse_key(label_key(c)).recording_id for c in plain))}
        stamped = [c.custom["source"] for c in plain]
        ours = CutSet.from_cuts(
            fastcopy(c, id=f"mine{k}", custom={"source": {**s, "recording_id": utterance(numbers[s["recording_id"]])}})
            for k, (c, s) in enumerate(zip(plain, stamped, strict=True))
        )
    ours.to_file(tmp_path / "cuts.jsonl.gz")
    manifest, truth = publish(tmp_path / "vq", theirs)
    found = run(tmp_path, [manifest])
    assert (found.utterances, found.by_rule) == (12, 12)
    store = LabelStore(tmp_path / "set")
    for mine, other in zip(ours, theirs, strict=True):
        assert np.array_equal(store.get(label_key(mine)), truth[other.id])


def utterance(i):
    return f"103-124{i // 2}-000{i % 2}"


def test_the_rule_decides_nothing_that_is_ambiguous(tmp_path, cuts):
    plain = [c for c in cuts if "_sp" not in c.id]
    # The archive has two segments of the first utterance; two of the user's cuts share the name of the second one.
    theirs = [plain[0].with_id("103-1240-0000-8"), plain[0].with_id("103-1240-0000-9"), *plain[1:]]
    theirs[2] = plain[1].with_id("103-1240-0001-9")
    ours = [plain[0], plain[1], plain[2].with_id("103-1240-0001-5"), plain[3]]
    CutSet.from_cuts(ours).to_file(tmp_path / "cuts.jsonl.gz")
    manifest, _ = publish(tmp_path / "vq", theirs)
    with pytest.raises(DataError, match="labels for 1 of 4"):
        run(tmp_path, [manifest])
    assert run(tmp_path, [manifest], min_coverage=0.25).utterances == 1
    assert list(LabelStore(tmp_path / "set").keys()) == [label_key(plain[3])]
    reasons = {r["id"]: r["reason"] for r in report(tmp_path) if "key" in r}
    assert "'103-1240-0000-8', '103-1240-0000-9'" in reasons["103-1240-0000-0"]
    assert "'103-1240-0001-1', '103-1240-0001-5'" in reasons["103-1240-0001-1"]


def test_missing_and_surplus_utterances_are_reported(tmp_path, cuts):
    everything = list(cuts)
    CutSet.from_cuts(everything[3:]).to_file(tmp_path / "cuts.jsonl.gz")
    manifest, _ = publish(tmp_path / "vq", everything[:10])
    with pytest.raises(DataError, match=r"labels for 7 of 9 .*--min-coverage is 1.0.*Name all manifests") as caught:
        run(tmp_path, [manifest])
    assert everything[10].id in str(caught.value) and caught.value.exit_code == 4
    assert not (tmp_path / "set" / "label_set.json").exists()
    found = run(tmp_path, [manifest], min_coverage=0.7)
    assert (found.utterances, found.without, found.surplus) == (7, 2, 3)
    rows = report(tmp_path)
    assert {r["id"] for r in rows if "key" in r} == {c.id for c in everything[10:]}
    assert {r["id"] for r in rows if "key" not in r} == {c.id for c in everything[:3]}
    with pytest.raises(DataError, match="7 matched, 2 missing"):
        LabelStore(tmp_path / "set").join(map(label_key, everything[3:]))


def test_other_lengths_are_other_audio(tmp_path, cuts):
    manifest, _ = publish(tmp_path / "vq", cuts, frames=lambda cut: cut.num_samples // 320 + 1)
    with pytest.raises(DataError, match=r"labels for 0 of 12.*31 frames in the archive, 9600 samples .* give 30"):
        run(tmp_path, [manifest], min_coverage=0.0)
    # Archives of the copies at another speed have other durations.
    swapped = {"": "_sp0.9", "_sp0.9": "_sp1.1", "_sp1.1": ""}
    bare = [c.with_id(c.id[:15] + swapped[c.id[15:]]) for c in cuts]
    with pytest.raises(DataError, match=r"labels for 0 of 12.*other audio"):
        run(tmp_path, [publish(tmp_path / "other", bare)[0]])


def test_archives_with_huberts_count_for_the_longest_of_a_batch(tmp_path, cuts):
    longest = [c.id for c in cuts][1:5]
    short = {c.id for c in cuts if c.id in longest and c.num_samples % 320 < 80}
    assert short
    manifest, truth = publish(
        tmp_path / "vq", cuts, frames=lambda c: SSL_CONV.num_frames(c.num_samples) if c.id in longest else
        c.num_samples // 320,
    )  # fmt: skip
    with pytest.raises(DataError, match=rf"labels for {12 - len(short)} of 12.*--frames hubert keeps it"):
        run(tmp_path, [manifest])
    assert {r["id"] for r in report(tmp_path)} == short
    assert run(tmp_path, [manifest], frames="hubert").utterances == 12
    store = LabelStore(tmp_path / "set", expect={"frame_formula": SSL_CONV})
    for cut in cuts:
        assert np.array_equal(store.get(label_key(cut)), truth[cut.id][: SSL_CONV.num_frames(cut.num_samples)])
    assert store.verify() == []


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda codes: codes.astype(np.int64) + 1000, r"run from 1\d\d\d to 1\d\d\d, --codebook-size is 256"),
    (lambda codes: codes.astype(np.int16) - 300, "run from -"),
    (lambda codes: codes.astype(np.float32), "of type float32"),
])  # fmt: skip
def test_what_is_no_index_is_rejected_with_its_reason(tmp_path, cuts, spoil, reason):
    victim = next(iter(cuts)).id
    manifest, _ = publish(tmp_path / "vq", cuts, codes=lambda cut, x: spoil(x) if cut.id == victim else x)
    with pytest.raises(DataError, match=rf"labels for 11 of 12.*{victim}: .*{reason}"):
        run(tmp_path, [manifest])
    assert list((tmp_path / "set").glob("*.safetensors")) == []
    assert run(tmp_path, [manifest], min_coverage=0.9).utterances == 11
    # The finished shard remembers what it lacks.
    assert run(tmp_path, [manifest], min_coverage=0.9).without == 1
    with pytest.raises(DataError, match="labels for 11 of 12"):
        run(tmp_path, [manifest])


def test_integers_of_any_width_are_stored_as_bytes(tmp_path, cuts):
    manifest, truth = publish(tmp_path / "vq", cuts, codes=lambda cut, x: x.astype(np.int64))
    run(tmp_path, [manifest])
    store = LabelStore(tmp_path / "set")
    assert all(np.array_equal(store.get(label_key(c)), truth[c.id]) for c in cuts)
    assert store.info.dtype == "uint8"


def test_manifests_that_do_not_fit_are_named(tmp_path, cuts):
    one, two = list(cuts)[:6], list(cuts)[6:]
    narrow = publish(tmp_path / "vq", two, 2, codes=lambda cut, x: x[:, :2])[0]
    first = publish(tmp_path / "vq", one, 1)[0]
    with pytest.raises(DataError, match="has 2 codebooks, the cuts before have 4"):
        run(tmp_path, [first, narrow])
    with pytest.raises(DataError, match="has 4 codebooks, --num-codebooks is 8"):
        run(tmp_path, [first], num_codebooks=8)
    with pytest.raises(DataError, match=r"has two arrays.*job-1.h5.*job-3.h5"):
        run(tmp_path, [first, publish(tmp_path / "vq", one, 3)[0]])
    with pytest.raises(DataError, match=r"frame_shift 0\.04 s"):
        run(tmp_path, [publish(tmp_path / "vq", two, 4, frame_shift=0.04)[0]])
    with pytest.raises(DataError, match=r"cuts.jsonl.gz: cut 103-.* has no codebook_indexes"):
        run(tmp_path, [tmp_path / "cuts.jsonl.gz"])
    with pytest.raises(DataError, match=r"no cut set .*none"):
        run(tmp_path, [tmp_path / "none.jsonl.gz"])
    assert not (tmp_path / "set").exists()


def test_archives_lie_beside_their_manifests_or_where_h5_dir_says(tmp_path, cuts):
    manifest, _ = publish(tmp_path / "made", cuts)
    for folder in ("moved", "split"):
        (tmp_path / folder).mkdir()
    archive = (tmp_path / "made" / "job-1.h5").rename(tmp_path / "moved" / "job-1.h5")
    manifest = manifest.rename(tmp_path / "moved" / manifest.name)
    assert run(tmp_path, [manifest]).utterances == 12
    archive = archive.rename(tmp_path / "split" / "job-1.h5")
    with pytest.raises(DataError, match=r"no archive .*made/job-1.h5 nor .*moved/job-1.h5.*--h5-dir"):
        run(tmp_path, [manifest])
    assert run(tmp_path, [manifest], h5_dir=tmp_path / "split").finished_before == 1
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"archive .*job-1.h5 is damaged.*download"):
        run(tmp_path, [manifest], h5_dir=tmp_path / "split", label_dir=tmp_path / "new")


def test_a_lost_array_is_a_reject_line(tmp_path, cuts):
    lost = next(iter(cuts)).id
    publish(tmp_path / "vq", [c for c in cuts if c.id != lost])
    manifest, _ = publish(tmp_path / "full", cuts)
    found = run(tmp_path, [manifest], h5_dir=tmp_path / "vq", min_coverage=0.9)
    assert found.without == 1 and f"no readable array {lost}" in report(tmp_path)[0]["reason"]


def test_the_same_line_again_changes_nothing_and_a_lost_shard_comes_back(tmp_path, cuts, monkeypatch):
    manifest, _ = publish(tmp_path / "vq", cuts)
    assert run(tmp_path, [manifest], num_shards=3, label_dir=tmp_path / "whole").finished_before == 0
    write = LabelStore.writer

    def killed(self, shard, num_shards):
        if shard == 2:
            raise KeyboardInterrupt
        return write(self, shard, num_shards)

    with monkeypatch.context() as patch:
        patch.setattr(LabelStore, "writer", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, [manifest], num_shards=3)
    with pytest.raises(DataError, match="lacks shard 2 of 3"):
        LabelStore(tmp_path / "set")
    assert run(tmp_path, [manifest], num_shards=3).finished_before == 2
    assert shard_bytes(tmp_path / "set") == shard_bytes(tmp_path / "whole")
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "set").glob("*.safetensors")}
    again = run(tmp_path, [manifest], num_shards=3)
    assert (again.finished_before, again.utterances) == (3, 12)
    assert {f: f.stat().st_mtime_ns for f in times} == times
    assert not list((tmp_path / "set").glob(".tmp*"))
    with pytest.raises(DataError, match="has shards of 3, --num-shards is 2"):
        run(tmp_path, [manifest], num_shards=2)
    with pytest.raises(DataError, match="layer is None and 36"):
        run(tmp_path, [manifest], num_shards=3, layer=36)
    other, _ = publish(tmp_path / "vq2", list(cuts)[::-1])
    with pytest.raises(DataError, match="made with other options: extra"):
        run(tmp_path, [other], num_shards=3)


def test_without_h5py_one_error_names_the_command(tmp_path, cuts, monkeypatch):
    manifest, _ = publish(tmp_path / "vq", cuts)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="pip install h5py") as caught:
        run(tmp_path, [manifest])
    assert caught.value.exit_code == 2 and not (tmp_path / "set").exists()


def test_the_command(tmp_path, cuts, repo, monkeypatch, capsys):
    manifest, _ = publish(tmp_path / "vq", cuts)
    options = ["--indexes", manifest, "--cuts", tmp_path / "cuts.jsonl.gz", "--label-dir", tmp_path / "set"]
    script_main(repo, "import_labels", monkeypatch, *options, "--teacher", "hubert-xl", "--layer", "36")
    assert "12 utterances" in capsys.readouterr().out
    script_main(repo, "label_sets", monkeypatch, "info", tmp_path / "set")
    out = capsys.readouterr().out
    assert '"layer": 36' in out and "float32 embeddings" not in out  # of unknown size
    with pytest.raises(ConfigError, match="at most 256"):
        script_main(repo, "import_labels", monkeypatch, *options, "--codebook-size", "512")


TINY = {"encoder_size": "tiny", "num_encoder_layers": 2, "encoder_dim": 16, "num_heads": 2, "feedforward_dim": 16}


def test_a_student_is_trained_on_an_imported_set(tmp_path):
    corpus = write_corpus(tmp_path, num_train=6, speeds=("1", "9/10"))
    cuts = read_cuts(corpus)
    manifest, truth = publish(tmp_path / "vq", cuts)
    fbank = corpus / "fbank"
    import_labels(
        ImportConfig(indexes=[manifest], cuts=[fbank / "cuts_train.jsonl.gz"], label_dir=tmp_path / "labels")
    )
    model = ModelConfig(**TINY, decoder_dim=8, joiner_dim=8, cnn_kernel=3)
    config = TrainConfig(model=model, kd=KdConfig(kd="mvq", label_dir=[tmp_path / "labels"]))
    data = DataConfig(manifest_dir=fbank, lang_dir=corpus / "lang_char", num_workers=0, max_duration=4.0)
    system = build_system(config, 20)
    tokenizer = Tokenizer.load(corpus / "lang_char")
    module = DataModule(data, AugmentConfig(), tokenizer, label_specs=system.label_specs)
    seen = Counter()
    for batch in module.train_batches(1):
        lens = torch.tensor([conv2d_subsampled_len(n) for n in batch.x_lens.tolist()])
        joined = join_frames(batch.labels["kd"], lens, system.targets[0].ratio)  # (N, T', 2Q) at 25 Hz
        for i, cut_id in enumerate(batch.ids):
            n = int(lens[i])
            wanted = truth[cut_id][: 2 * n].reshape(n, 2 * Q)
            assert np.array_equal(joined[i, :n].numpy(), wanted) and (joined[i, n:] == -100).all()
            seen[cut_id] += 1
        loss = system.train()(batch, 0).terms["kd_codebook_loss"]
        assert loss.count == int(lens.sum()) and torch.isfinite(loss.value)
    assert seen == Counter(c.id for c in cuts)
    flags = {**TINY, "decoder_dim": 8, "joiner_dim": 8, "cnn_kernel": 3, "max_duration": 4, "num_workers": 0}
    flags |= {"max_steps": 2, "device": "cpu", "num_threads": 1, "log_interval": 1, "exp_dir": tmp_path / "exp"}
    flags |= {"manifest_dir": fbank, "lang_dir": corpus / "lang_char", "train_parts": "train", "valid_parts": "dev"}
    flags |= {"kd": "mvq", "teacher_labels": "stored", "label_dir": tmp_path / "labels"}
    assert train_main([w for k, v in flags.items() for w in (f"--{k.replace('_', '-')}", str(v))]) == 0
    log = "".join(f.read_text() for f in (tmp_path / "exp").glob("log/*"))
    assert "12 matched, 0 missing" in log and "kd_codebook_loss" in log
