"""From a corpus on disk to cuts: what is listed, what is rejected and why, resampling and speed copies."""

import os
import shutil
import tarfile

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from icefall_kd.data.corpora import check_corpus, download, guess_language, open_corpus
from icefall_kd.data.manifests import read_cuts, write_cuts, write_jsonl
from icefall_kd.data.prepare import CorpusConfig, ManifestConfig, make_manifests
from icefall_kd.data.recordings import (
    Reject,
    check_rejects,
    cuts_from_folder,
    make_cuts,
    noise_cuts,
    prepare_cut_set,
    with_speed_copies,
)
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.keys import label_key, unperturbed_key


def test_a_trans_corpus_has_its_sub_folders_as_parts(corpus_dir):
    corpus = open_corpus("trans", corpus_dir)
    assert {p: [r.utt for r in rows] for p, rows in corpus.parts.items()} == {
        "dev": ["d0", "d1"],
        "train": ["t0", "t1", "t2", "t3", "t4"],
    }
    assert corpus.language == "en"
    assert corpus.parts["train"][0].speaker == "spk"
    assert list(open_corpus("trans", corpus_dir / "dev").parts) == ["dev"]
    assert list(open_corpus("trans", corpus_dir, ["dev"]).parts) == ["dev"]
    with pytest.raises(DataError, match="no sub-folder test"):
        open_corpus("trans", corpus_dir, ["test"])


def test_cuts_have_one_supervision_and_an_exact_key(corpus_dir):
    rows = open_corpus("trans", corpus_dir).parts["train"]
    cuts, rejects = make_cuts(rows, "en", nj=30)
    assert not rejects
    assert [c.id for c in cuts] == [r.utt for r in rows]
    assert [c.supervisions[0].text for c in cuts][-1] == "IT'S ONE"
    assert label_key(cuts[1]) == "t1|0|17601|1/1"


def test_unfit_recordings_are_rejected_with_the_reason(corpus_dir):
    folder = corpus_dir / "train" / "spk"
    with open(folder / "t0.flac", "r+b") as stream:
        stream.truncate(3000)
    (folder / "t1.flac").write_bytes(b"no audio")
    soundfile.write(folder / "t2.flac", np.zeros(8000), 16000)
    (folder / "t3.flac").unlink()
    soundfile.write(folder / "extra.wav", np.ones(8000) * 0.1, 16000)
    soundfile.write(folder / "stereo.wav", np.ones((8000, 2)) * 0.1, 16000)
    soundfile.write(folder / "empty.wav", np.zeros(0), 16000)
    with open(corpus_dir / "train" / "x.trans.txt", "a", encoding="utf-8") as stream:
        stream.write("stereo ONE\nempty TWO\nt4b ...\n")
    shutil.copy(folder / "t4.flac", folder / "t4b.flac")
    cuts, rejects = make_cuts(open_corpus("trans", corpus_dir).parts["train"], "en")
    reasons = {r.id: r.reason for r in rejects}
    assert [c.id for c in cuts] == ["t4"]
    assert set(reasons) == {"t0", "t1", "t2", "t3", "t4b", "extra", "stereo", "empty"}
    assert "unreadable" in reasons["t0"] or "were read" in reasons["t0"]
    assert "unreadable" in reasons["t1"]
    assert reasons["t2"] == "all samples are zero"
    assert reasons["t3"] == "no audio file"
    assert reasons["t4b"] == "empty transcript"
    assert reasons["extra"] == "no transcript"
    assert "2 channels" in reasons["stereo"]
    assert reasons["empty"] == "no samples"


def test_audio_too_short_for_one_frame_is_rejected(write_trans):
    samples = (1, 79, 81, 1599, 1600)
    root = write_trans({"train": {f"u{n:04d}": (n, "one") for n in samples}})
    cuts, rejects = make_cuts(open_corpus("trans", root).parts["train"], "en")
    assert [c.id for c in cuts] == ["u1600"]
    assert all(r.reason.endswith("at least 0.1 s are needed") for r in rejects) and "0.0999 s" in rejects[-1].reason
    long, _ = make_cuts(open_corpus("trans", root).parts["train"], "en", check_audio="header")
    assert [c.id for c in long] == ["u1600"]


def test_a_mark_at_the_head_of_a_file_and_tabs_are_no_text(write_trans):
    root = write_trans({"train": {"u0": (4000, None), "u1": (4000, None)}})
    (root / "train" / "x.trans.txt").write_text("\ufeffu0\tone two \n\n u1  three\n", encoding="utf-8")
    assert [r.text for r in open_corpus("trans", root).parts["train"]] == ["one two", "three"]


def test_a_folder_that_cannot_be_read_is_no_empty_folder(corpus_dir, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("spk"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"dev cannot be read: .*Permission denied.*check the permissions and links"):
        open_corpus("trans", corpus_dir)


def test_a_line_that_is_there_twice_must_say_the_same(corpus_dir):
    with open(corpus_dir / "train" / "x.trans.txt", "a", encoding="utf-8") as stream:
        stream.write("t0 one two\n")
    assert len(open_corpus("trans", corpus_dir).parts["train"]) == 5
    with open(corpus_dir / "train" / "y.trans.txt", "w", encoding="utf-8") as stream:
        stream.write("t0 another\n")
    with pytest.raises(DataError, match="t0 has two different transcripts"):
        open_corpus("trans", corpus_dir)


def test_one_bad_recording_of_twenty_stops_only_below_its_ratio(write_trans, tmp_path):
    root = write_trans({"train": {f"u{i:02d}": (4000, "one two") for i in range(20)}})
    (root / "train" / "spk" / "u07.flac").write_bytes(b"no audio")
    corpus = CorpusConfig(corpus="trans", corpus_dir=root, max_reject_ratio=0.05)
    made = make_manifests(corpus, ManifestConfig(data_dir=tmp_path / "data"))
    assert made["parts"]["train"]["rejected"] == 1
    assert '"u07"' in (tmp_path / "data" / "rejected" / "train.jsonl").read_text()
    strict = CorpusConfig(corpus="trans", corpus_dir=root)
    with pytest.raises(DataError, match=r"1 of 20 utterances rejected .*u07: unreadable"):
        make_manifests(strict, ManifestConfig(data_dir=tmp_path / "data"))


def test_a_stop_names_the_first_five_rejects(tmp_path):
    rejects = [Reject(id=f"u{i}", reason="no samples") for i in range(9)]
    with pytest.raises(DataError) as error:
        check_rejects("train", rejects, 100, 0.01, tmp_path)
    assert "u4: no samples" in str(error.value)
    assert "u5" not in str(error.value)
    assert error.value.exit_code == 4
    check_rejects("train", rejects, 1000, 0.01, tmp_path)


@pytest.mark.parametrize("rate", [7999, 11025, 22050, 44100, 48000])
def test_odd_rates_and_lengths_have_the_samples_that_are_promised(write_trans, rate):
    root = write_trans({"train": {f"u{n}": (n, "one") for n in (rate, rate + 1, rate + 7, 12345)}}, rate=rate)
    cuts, rejects = make_cuts(open_corpus("trans", root).parts["train"], "en")
    assert not rejects
    for cut in with_speed_copies(cuts):
        assert cut.sampling_rate == 16000 and cut.load_audio().shape == (1, cut.num_samples)


def test_other_rates_are_resampled_when_read(write_trans):
    root = write_trans({"train": {"u0": (8000, "one"), "u1": (4001, "two")}}, rate=8000)
    cuts, _ = make_cuts(open_corpus("trans", root).parts["train"], "en")
    assert [c.sampling_rate for c in cuts] == [16000, 16000]
    assert [c.load_audio().shape for c in cuts] == [(1, 16000), (1, 8002)]
    # Keys name the recording at its native rate.
    assert [label_key(c) for c in cuts] == ["u0|0|8000|1/1", "u1|0|4001|1/1"]
    copies = list(with_speed_copies(cuts))
    assert [label_key(c) for c in copies[2:]] == [
        "u0|0|8000|9/10", "u1|0|4001|9/10", "u0|0|8000|11/10", "u1|0|4001|11/10",
    ]  # fmt: skip
    assert all(c.load_audio().shape == (1, c.num_samples) for c in copies)


def test_speed_copies_follow_the_unperturbed_cuts_and_share_their_source(corpus_dir, tmp_path):
    config = ManifestConfig(data_dir=tmp_path / "data", speed_perturb=True)
    made = make_manifests(CorpusConfig(corpus="trans", corpus_dir=corpus_dir), config)
    assert {p: row["cuts"] for p, row in made["parts"].items()} == {"train": 15, "dev": 2}
    cuts = read_cuts(tmp_path / "data" / "manifests" / "cuts_train.jsonl.gz")
    assert [c.id for c in cuts[:5]] == ["t0", "t1", "t2", "t3", "t4"]
    assert len({c.id for c in cuts}) == 15
    assert [unperturbed_key(label_key(c)) for c in cuts[5:10]] == [label_key(c) for c in cuts[:5]]
    assert abs(cuts[5].num_samples - cuts[0].num_samples / 0.9) < 2


def test_manifests_are_the_same_bytes_every_time(corpus_dir, tmp_path):
    corpus = CorpusConfig(corpus="trans", corpus_dir=corpus_dir, nj=7)
    contents = []
    for name in ("a", "b"):
        make_manifests(corpus, ManifestConfig(data_dir=tmp_path / name, speed_perturb=True))
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        contents.append([(p.relative_to(tmp_path / name), p.read_bytes()) for p in files])
    assert contents[0] == contents[1]


def test_an_incomplete_librispeech_is_named_with_the_figures(write_trans, tmp_path):
    root = write_trans({"dev-clean": {"1-2-0000": (16000, "ONE")}}, root=tmp_path / "LibriSpeech")
    for folder in (root, tmp_path):
        corpus = open_corpus("librispeech", folder, ["dev-clean"])
        with pytest.raises(DataError, match=r"dev-clean: 1 utterances, .* the table says 2703 utterances, 5\.40 h"):
            check_corpus(corpus)
        assert not check_corpus(corpus, partial=True)[0].complete
    with pytest.raises(DataError, match=r"lacks the parts train-clean-100, .*it has dev-clean"):
        open_corpus("librispeech", tmp_path)


def test_aishell_needs_no_test_part(tmp_path):
    root = tmp_path / "data_aishell"
    for part in ("train", "dev"):
        folder = root / "wav" / part / "S0001"
        folder.mkdir(parents=True)
        soundfile.write(folder / f"BAC009{part}.wav", np.random.default_rng(0).standard_normal(8000) * 0.1, 16000)
    (root / "transcript").mkdir()
    (root / "transcript" / "aishell_transcript_v0.8.txt").write_text(
        "BAC009train 而 对\nBAC009dev 楼市\n", encoding="utf-8"
    )
    corpus = open_corpus("aishell", tmp_path, ["train", "dev"])
    cuts, _ = make_cuts(corpus.parts["train"], corpus.language)
    assert cuts[0].supervisions[0].text == "而对"
    assert cuts[0].supervisions[0].speaker == "S0001"
    with pytest.raises(DataError, match="lacks the part test"):
        open_corpus("aishell", tmp_path)


def test_the_script_of_the_transcripts_tells_the_language():
    assert guess_language(["而 对", None, "楼市"]) == "zh"
    assert guess_language(["TWO WORDS", "第"]) == "en"
    assert guess_language([]) == "en"


def test_two_files_of_one_name_are_refused(corpus_dir):
    (corpus_dir / "train" / "other").mkdir()
    shutil.copy(corpus_dir / "train" / "spk" / "t0.flac", corpus_dir / "train" / "other" / "t0.flac")
    with pytest.raises(DataError, match="two audio files"):
        open_corpus("trans", corpus_dir)


def test_a_folder_can_be_decoded_as_it_is(corpus_dir):
    (corpus_dir / "dev" / "spk" / "d1.flac").write_bytes(b"no audio")
    assert [c.id for c in cuts_from_folder(corpus_dir / "dev")] == ["d0"]


def test_any_lhotse_cut_set_can_be_prepared(corpus_dir, tmp_path):
    cuts, _ = make_cuts(open_corpus("trans", corpus_dir).parts["train"], "en")
    foreign = [c.with_id(f"cut-{i}") for i, c in enumerate(cuts)]
    foreign[0].supervisions[0].text = "Hello, World!"
    foreign[1].supervisions = []
    foreign[2] = foreign[2].truncate(offset=0.25, duration=0.5)
    for cut in foreign:
        cut.custom = None
    CutSet.from_cuts([*foreign, foreign[4]]).to_file(tmp_path / "cuts_train.jsonl.gz")
    made, rejects, language = prepare_cut_set(tmp_path / "cuts_train.jsonl.gz")
    assert language == "en"
    assert [r.id for r in rejects] == ["cut-1"]
    assert made[0].supervisions[0].text == "HELLO WORLD"
    assert label_key(made[1]) == "t2|4000|8000|1/1"
    config = CorpusConfig(corpus="cuts", corpus_dir=tmp_path, max_reject_ratio=0.5)
    content = make_manifests(config, ManifestConfig(data_dir=tmp_path / "data"))
    assert content["parts"]["train"] == {
        "utterances": 4,
        "hours": content["parts"]["train"]["hours"],
        "rejected": 2,
        "cuts": 4,
    }
    assert "twice" in (tmp_path / "data" / "rejected" / "train.jsonl").read_text()


def test_noises_are_cut_into_windows(tmp_path):
    (tmp_path / "musan" / "noise").mkdir(parents=True)
    for name, seconds in {"long": 26, "short": 3}.items():
        soundfile.write(tmp_path / "musan" / "noise" / f"{name}.wav", np.ones(16000 * seconds) * 0.01, 16000)
    cuts = noise_cuts(tmp_path)
    assert [round(c.duration, 3) for c in cuts] == [10, 10, 6]
    assert len({c.id for c in cuts}) == 3
    assert not any(c.supervisions for c in cuts)


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="Python before 3.11.4 unpacks nothing")
def test_what_is_there_is_not_downloaded(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download was started")

    for name in ("librispeech", "aishell", "musan"):
        monkeypatch.setattr(f"lhotse.recipes.download_{name}", refuse)
    (tmp_path / "LibriSpeech" / "dev-clean-2").mkdir(parents=True)
    (tmp_path / "aishell" / "data_aishell" / "wav").mkdir(parents=True)
    (tmp_path / "musan").mkdir()
    download("mini", tmp_path, ["dev-clean-2"])
    download("aishell", tmp_path)
    download("musan", tmp_path)
    with pytest.raises(AssertionError):
        download("mini", tmp_path, ["train-clean-5"])
    # A stopped download has its archive, and no mark of completion.
    (tmp_path / "musan.tar.gz").touch()
    with pytest.raises(AssertionError):
        download("musan", tmp_path)
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        download("trans", tmp_path)


def test_damaged_cut_sets_are_named(corpus_dir, tmp_path):
    cuts, _ = make_cuts(open_corpus("trans", corpus_dir).parts["dev"], "en")
    path = tmp_path / "cuts_dev.jsonl.gz"
    write_cuts(path, cuts)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cuts_dev\.jsonl\.gz is damaged"):
        read_cuts(path)
    write_jsonl(path, [])
    with pytest.raises(DataError, match="no cuts"):
        read_cuts(path)
    with pytest.raises(DataError, match="no cut set"):
        read_cuts(tmp_path / "cuts_other.jsonl.gz")
