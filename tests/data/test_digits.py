"""Connected digits: no recording in two splits, exact transcripts, the same bytes every time."""

import dataclasses
import hashlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import soundfile

from icefall_kd.data.corpora import open_corpus, read_part
from icefall_kd.data.digits import DIGITS, DigitsSpec, bigram_grammar, join, make_digits, plan_digits, take_of
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.files import fingerprint, read_json

SPEC = DigitsSpec(num_train=20, num_dev=10, dev_takes=(5, 6), train_takes=(10, 11))


@pytest.fixture
def singles(tmp_path):
    """Two speakers, ten digits, four takes each; the value of the samples tells the recording."""
    root = tmp_path / "fsdd" / "train"
    lines = []
    for s, speaker in enumerate(("ann", "bob")):
        (root / speaker).mkdir(parents=True)
        for d, word in enumerate(DIGITS):
            for t, take in enumerate((5, 6, 10, 11)):
                utt = f"fsdd-{speaker}-{d}-{take:02d}"
                value = (1 + s * 40 + d * 4 + t) / 128
                soundfile.write(root / speaker / f"{utt}.flac", np.full(800, value), 8000, subtype="PCM_16")
                lines.append(f"{utt} {word}\n")
    (root / "fsdd.trans.txt").write_text("".join(lines))
    return tmp_path / "fsdd"


def tree(root):
    return {p.relative_to(root): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()}


def test_no_recording_serves_both_splits(singles):
    plans = plan_digits([dataclasses.replace(r, speaker=r.audio.parent.name) for r in read_part(singles)], SPEC)
    assert {s: len(strings) for s, strings in plans.items()} == {"train": 20, "dev": 10}
    for split, takes in (("train", {10, 11}), ("dev", {5, 6})):
        assert {take_of(source) for string in plans[split] for source in string.sources} == takes
    for string in plans["train"]:
        assert 3 <= len(string.sources) <= 7
        assert string.text.split() == [DIGITS[int(source.split("-")[2])] for source in string.sources]
        assert {source.split("-")[1] for source in string.sources} == {string.speaker}


def test_overlapping_takes_are_refused():
    with pytest.raises(ConfigError, match="overlap"):
        DigitsSpec(dev_takes=(5, 10))


def test_the_audio_holds_the_recordings_in_order(singles, tmp_path):
    assert make_digits(singles, tmp_path / "out", SPEC)
    corpus = open_corpus("trans", tmp_path / "out")
    assert {p: len(rows) for p, rows in corpus.parts.items()} == {"train": 20, "dev": 10}
    for row in corpus.parts["train"]:
        wave, rate = soundfile.read(row.audio)
        assert rate == 8000
        # Recordings are constant and loud, pauses are quiet: read the values back.
        loud = np.abs(wave) > 0.006
        edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]]).astype(int)))
        values = [round(float(wave[a]) * 128) - 1 for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 700]
        assert [DIGITS[v % 40 // 4] for v in values] == row.text.split()
        assert {v // 40 for v in values} == {("ann", "bob").index(row.speaker)}
        assert {v % 4 for v in values} <= {2, 3}
        assert edges[0] >= 0.05 * 8000 - 1 and len(wave) - edges[-1] >= 0.05 * 8000 - 1


def test_the_same_specification_gives_the_same_bytes_and_is_made_once(singles, tmp_path):
    make_digits(singles, tmp_path / "a", SPEC)
    make_digits(singles, tmp_path / "b", SPEC)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert not make_digits(singles, tmp_path / "a", SPEC)
    assert make_digits(singles, tmp_path / "a", dataclasses.replace(SPEC, seed=8))
    assert tree(tmp_path / "a") != tree(tmp_path / "b")
    # More training strings leave the dev strings as they are.
    make_digits(singles, tmp_path / "c", dataclasses.replace(SPEC, num_train=25))
    assert tree(tmp_path / "c" / "dev") == tree(tmp_path / "b" / "dev")


def test_a_corpus_made_before_there_were_grammars_is_up_to_date(singles, tmp_path):
    make_digits(singles, tmp_path / "out", SPEC)
    made = read_json(tmp_path / "out" / "digits.json")
    assert set(made) == {"fingerprint", "spec", "parts"}
    fields = ("num_train", "num_dev", "dev_takes", "train_takes", "length", "pause", "noise_db", "seed")
    assert tuple(made["spec"]) == fields
    rows = [[r.utt, r.text, hashlib.sha256(r.audio.read_bytes()).hexdigest()] for r in read_part(singles)]
    assert made["fingerprint"] == fingerprint([1, {name: getattr(SPEC, name) for name in fields}, rows])


def test_in_a_bigram_grammar_each_digit_is_followed_by_its_three(singles, tmp_path):
    spec = dataclasses.replace(SPEC, grammar="bigram", num_train=4000, num_dev=10)
    grammar = bigram_grammar(spec.seed)
    assert grammar == bigram_grammar(spec.seed) != bigram_grammar(spec.seed + 1)
    for digit in DIGITS:
        assert sorted(grammar[digit].values()) == [0.1, 0.3, 0.6] and digit not in grammar[digit]
        # As often as any other, whatever came before: each probability once among the digits that it follows.
        assert sorted(grammar[before][digit] for before in DIGITS if digit in grammar[before]) == [0.1, 0.3, 0.6]
    rows = [dataclasses.replace(r, speaker=r.audio.parent.name) for r in read_part(singles)]
    texts = [string.text.split() for string in plan_digits(rows, spec)["train"]]
    pairs = Counter(pair for text in texts for pair in pairwise(text))
    firsts = Counter(pair[0] for pair in pairs.elements())
    assert set(pairs) == {(a, b) for a in DIGITS for b in grammar[a]}
    for (a, b), count in pairs.items():  # about 1,600 pairs a digit: 0.06 is five standard deviations
        assert abs(count / firsts[a] - grammar[a][b]) < 0.06
    small = dataclasses.replace(spec, num_train=20)
    assert make_digits(singles, tmp_path / "out", small) and not make_digits(singles, tmp_path / "out", small)
    made = read_json(tmp_path / "out" / "digits.json")
    assert made["grammar"] == grammar and made["spec"]["grammar"] == "bigram"
    assert make_digits(singles, tmp_path / "out", dataclasses.replace(small, grammar="uniform"))


def test_missing_digits_and_other_words_are_refused(singles, tmp_path):
    rows = read_part(singles)
    with pytest.raises(DataError, match="one digit is needed"):
        plan_digits([dataclasses.replace(rows[0], text="ELEVEN")], SPEC)
    with pytest.raises(DataError, match="has no recording of"):
        plan_digits([r for r in rows if r.text != "NINE"], SPEC)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(DataError, match=r"no digits\.json"):
        make_digits(singles, tmp_path / "out", SPEC)


def test_pauses_have_their_lengths():
    wave = join([np.ones(100), np.ones(100)], 8000, SPEC, "u")
    pauses = len(wave) - 200
    assert 3 * 0.05 * 8000 - 3 <= pauses <= 3 * 0.2 * 8000 + 3
