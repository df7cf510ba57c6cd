"""The demo corpora: deterministic, speaker-disjoint, in the layouts' own form, whole or absent."""

import dataclasses
import hashlib
import os
import re

import numpy as np
import pytest
import soundfile

from icefall_kd.data import demo
from icefall_kd.data.corpora import check_corpus, open_corpus
from icefall_kd.data.demo import DemoSpec, make_demo, plan_corpus, resample, synthesise
from icefall_kd.data.demo_text import MANDARIN_SLOTS, MANDARIN_TEMPLATES, make_sentences, vocabulary
from icefall_kd.errors import ConfigError, DataError

pytest.importorskip("espeakng_loader")
MICRO = DemoSpec(train_speakers=2, train_utts=2, dev_speakers=1, dev_utts=1, test_speakers=1, test_utts=1)


def tree(root):
    return {p.relative_to(root): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("language", "speakers"), [("en", 90), ("zh", 28)])
def test_no_voice_serves_two_parts_and_no_sentence_occurs_twice(language, speakers):
    plan = plan_corpus(DemoSpec(language=language))
    assert len({s.voice for s in plan}) == len(plan) == speakers
    texts = [u.text for s in plan for u in s.utterances]
    assert len(texts) == len(set(texts)) == 720 + 60 + 120
    assert {s.sex for s in plan if s.part.startswith("test")} == {"M", "F"}
    if language == "zh":
        return
    # One sentence of 3 to 9 words, or two of them and the word between.
    lengths = [len(t.split()) for t in texts]
    assert min(lengths) >= 3 and max(lengths) <= 19
    assert 0.5 <= sum(n > 9 for n in lengths) / len(lengths) <= 0.7


def test_training_sentences_hold_every_word_of_the_grammar():
    for language, sizes in {"en": (200, 300), "zh": (60, 200)}.items():
        words = vocabulary(language)
        assert sizes[0] <= len(words) <= sizes[1]
        assert {w for s in make_sentences(language, 720, 1, joined=0.6) for w in s.text.split()} == words


def test_an_utterance_alone_equals_the_same_one_in_a_sequence():
    speaker = plan_corpus(MICRO)[0]
    alone = synthesise(speaker, "please move the small lamp")
    synthesise(dataclasses.replace(speaker, voice="en-us+f2"), "something else")
    again = synthesise(speaker, "please move the small lamp")
    assert np.array_equal(alone, again)
    assert 0.8 < len(alone) / 16000 < 3.5
    assert np.abs(alone).max() > 0.05


def test_a_corpus_is_the_same_whatever_the_number_of_jobs_and_is_made_once(tmp_path):
    assert make_demo(tmp_path / "a", MICRO, nj=1)
    assert make_demo(tmp_path / "b", MICRO, nj=2)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    assert not make_demo(tmp_path / "a", MICRO, nj=1)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    assert make_demo(tmp_path / "a", dataclasses.replace(MICRO, seed=2))
    assert tree(tmp_path / "a") != tree(tmp_path / "b")


def test_a_corpus_that_lost_something_is_made_again(tmp_path, caplog):
    make_demo(tmp_path / "a", MICRO)
    whole = tree(tmp_path / "a")
    audio = next(p for p in sorted(whole) if p.suffix == ".flac")
    for damage in (
        lambda: os.truncate(tmp_path / "a" / audio, 100),
        lambda: (tmp_path / "a" / audio).unlink(),
        lambda: os.truncate(tmp_path / "a/demo.json", 50),
    ):
        damage()
        assert make_demo(tmp_path / "a", MICRO) and tree(tmp_path / "a") == whole
    assert f"{audio} has 100 of" in caplog.text and f"{audio} has none of" in caplog.text
    assert "demo.json is not valid JSON" in caplog.text


def test_a_stopped_build_leaves_no_corpus_and_is_made_again(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_write_tables", stop)
        with pytest.raises(KeyboardInterrupt):
            make_demo(tmp_path / "a", MICRO)
    assert not (tmp_path / "a").exists()
    make_demo(tmp_path / "a", MICRO)
    make_demo(tmp_path / "b", MICRO)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_the_english_corpus_is_in_librispeech_layout(tmp_path):
    make_demo(tmp_path, MICRO)
    corpus = open_corpus("demo", tmp_path)
    assert [c.complete for c in check_corpus(corpus)] == [True] * 3
    for part, rows in corpus.parts.items():
        for row in rows:
            speaker, chapter, _ = row.utt.split("-")
            assert row.audio == tmp_path / "LibriSpeech" / part / speaker / chapter / f"{row.utt}.flac"
            assert re.fullmatch("[A-Z' ]+", row.text)
            info = soundfile.info(row.audio)
            assert (info.samplerate, info.channels, info.format) == (16000, 1, "FLAC")
    assert (tmp_path / "LibriSpeech" / "SPEAKERS.TXT").read_text().count("\n") == 5


def test_the_mandarin_corpus_is_in_aishell_layout(tmp_path):
    make_demo(tmp_path, dataclasses.replace(MICRO, language="zh"))
    corpus = open_corpus("demo", tmp_path)
    assert corpus.language == "zh"
    assert {p: len(rows) for p, rows in corpus.parts.items()} == {"train": 4, "dev": 1, "test": 1}
    row = corpus.parts["train"][0]
    assert row.audio == tmp_path / "data_aishell" / "wav" / "train" / row.speaker / f"{row.utt}.wav"
    assert all(c.complete for c in check_corpus(corpus))


def test_the_readings_of_the_mandarin_words_are_those_of_the_dictionary():
    pypinyin = pytest.importorskip("pypinyin")
    entries = [e for words in (*MANDARIN_SLOTS.values(), *MANDARIN_TEMPLATES) for e in words.split() if ":" in e]
    for entry in entries:
        word, reading = entry.split(":")
        expected = pypinyin.lazy_pinyin(word, v_to_u=False)
        assert re.sub(r"\d", "", reading).split("_") == expected, entry


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(DataError, match=r"no demo\.json"):
        make_demo(tmp_path, MICRO)
    assert (tmp_path / "thesis.txt").is_file()


def test_too_many_speakers_are_refused():
    with pytest.raises(ConfigError, match="voices"):
        DemoSpec(train_speakers=10_000)


def test_resampling_keeps_a_tone_and_removes_what_would_alias():
    t = np.arange(22050) / 22050
    kept = resample(np.sin(2 * np.pi * 1000 * t), 22050, 16000)
    assert len(kept) == 16000
    assert np.abs(kept - np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000))[100:-100].max() < 1e-4
    assert np.abs(resample(np.sin(2 * np.pi * 9500 * t), 22050, 16000))[100:-100].max() < 1e-3


def test_noise_and_level_stay_in_their_ranges():
    speech = np.sin(np.arange(32000) / 9) * (np.arange(32000) % 8000 < 5000)
    for i in range(5):
        out = demo.add_reality(speech, MICRO, f"u{i}")
        assert -14.01 <= 20 * np.log10(np.abs(out).max()) <= -1.99
        assert np.array_equal(out, demo.add_reality(speech, MICRO, f"u{i}"))
