"""Small training sets: nested, balanced over speakers, a function of the seed alone."""

import pytest
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource

from icefall_kd.data.hours import balanced_order, seconds_of, select_hours
from icefall_kd.data.manifests import cuts_file, read_cuts, write_cuts
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.keys import speed_copy, stamp_source


def part(folder, per_speaker=(30, 30, 5), speeds=("1",), speakers=True):
    """Write cuts_train.jsonl.gz of utterances of 2 to 5 seconds; nobody reads their audio."""
    cuts = []
    for s, count in enumerate(per_speaker):
        for i in range(count):
            seconds, name = 2.0 + (7 * i + s) % 4, f"s{s}-{i}"
            source = AudioSource(type="file", channels=[0], source=f"{name}.wav")
            recording = Recording(name, [source], 16000, int(seconds * 16000), seconds)
            cut = MonoCut(name, 0.0, seconds, 0, recording=recording)
            who = f"speaker{s}" if speakers else None
            cut.supervisions = [SupervisionSegment(name, name, 0.0, seconds, text="ONE", speaker=who)]
            cuts += [speed_copy(stamp_source(cut, 1), speed) for speed in speeds]
    write_cuts(cuts_file(folder, "train"), CutSet.from_cuts(cuts))
    return cuts


def test_sets_are_nested_as_long_as_asked_and_balanced(tmp_path):
    part(tmp_path)
    files = select_hours(tmp_path, "train", ["20s", "1min", "2min"], seed=1)
    names = []
    for (amount, file), seconds in zip(files.items(), (20, 60, 120), strict=True):
        cuts = read_cuts(file)
        assert file.name == f"cuts_train_{amount}.jsonl.gz"
        lasts = [sum(c.duration for c in cuts if c.supervisions[0].speaker == f"speaker{s}") for s in range(3)]
        assert seconds <= sum(lasts) < seconds + 5
        # The third speaker has but 5 utterances; nobody else is ahead by more than an utterance.
        assert max(lasts[:2]) - min(lasts[:2]) <= 5 and (amount == "2min" or max(lasts) - min(lasts) <= 5)
        names.append({c.id for c in cuts})
        lines = (tmp_path / f"train_{amount}.list").read_text().splitlines()
        assert {line.split("\t")[0] for line in lines} == names[-1]
    assert names[0] < names[1] < names[2]


def test_the_draw_depends_on_the_seed_and_on_nothing_else(tmp_path):
    rows = [(f"u{i}", f"s{i % 3}", 1.0 + i % 2) for i in range(40)]
    assert balanced_order(rows, 1) == balanced_order(rows[::-1], 1) != balanced_order(rows, 2)
    assert sorted(balanced_order(rows, 1)) == sorted(name for name, *_ in rows)
    part(tmp_path)
    first = select_hours(tmp_path, "train", ["20s"], seed=1)["20s"].read_bytes()
    assert select_hours(tmp_path, "train", ["1min", "20s"], seed=1)["20s"].read_bytes() == first
    assert select_hours(tmp_path, "train", ["20s"], seed=2)["20s"].read_bytes() != first


def test_speed_copies_follow_their_utterances_and_do_not_count(tmp_path):
    for folder, speeds in ((tmp_path / "plain", ["1"]), (tmp_path / "perturbed", ["1", "9/10", "11/10"])):
        folder.mkdir()
        part(folder, speeds=speeds)
        select_hours(folder, "train", ["1min"], seed=3)
    plain, perturbed = (read_cuts(tmp_path / f"{n}/cuts_train_1min.jsonl.gz") for n in ("plain", "perturbed"))
    assert len(perturbed) == 3 * len(plain)
    lists = {(tmp_path / f"{n}/train_1min.list").read_text() for n in ("plain", "perturbed")}
    assert len(lists) == 1 and lists.pop().count("\n") == len(plain)
    assert {c.id for c in plain} < {c.id for c in perturbed}


def test_amounts_that_are_none_or_too_large_are_refused(tmp_path, caplog):
    assert [seconds_of(x) for x in ("90s", "10min", "1h", "0.5h")] == [90, 600, 3600, 1800]
    for amount in ("10", "1 h", "0s", "h", "-1h"):
        with pytest.raises(ConfigError, match="an amount is written as 90s, 10min or 1h"):
            seconds_of(amount)
    part(tmp_path, speakers=False)
    with pytest.raises(DataError, match=r"--hours 1h: part train of .* lasts 0\.0\d\d h in all"):
        select_hours(tmp_path, "train", ["20s", "1h"], seed=1)
    assert "names no speakers" in caplog.text
