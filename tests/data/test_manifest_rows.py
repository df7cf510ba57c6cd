"""Rows of cut sets: what lhotse would run is refused before lhotse sees it, and so are values that no cut has."""

import contextlib
import copy
import json

import pytest
from lhotse import CutSet
from lhotse.cut import MixedCut
from micro_corpus import write_part

from icefall_kd.data.manifest_rows import cut_of
from icefall_kd.data.manifests import iterate_cuts, write_jsonl
from icefall_kd.errors import DataError


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """A row with features, recording, transforms and custom fields."""
    folder = tmp_path_factory.mktemp("cuts")
    write_part(folder, "train", [1.0], speeds=["9/10"])
    (cut,) = CutSet.from_file(folder / "fbank/cuts_train.jsonl.gz")
    return cut.to_dict()


def source(row, **changes):
    row["recording"]["sources"][0] |= changes


def features(row, **changes):
    row["features"] |= changes


def nested(row, **changes):
    """Hide the recording in a custom field, where lhotse looks for recordings, too."""
    row["custom"]["other"] = copy.deepcopy(row["recording"])
    row["custom"]["other"]["sources"][0] |= changes


COMMANDS = {
    "a command": lambda row, mark: source(row, type="command", source=f"touch {mark}"),
    "a pipe as URL": lambda row, mark: source(row, type="url", source=f"pipe:touch {mark}"),
    "a name of sph2pipe": lambda row, mark: source(row, source=f"x; touch {mark}; y.sph"),
    "a pipe as folder of features": lambda row, mark: features(
        row, storage_type="numpy_files", storage_path=f"pipe:touch {mark};"
    ),
    "a command in a custom field": lambda row, mark: nested(row, type="command", source=f"touch {mark}"),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_what_lhotse_would_run_is_refused(row, tmp_path, kind):
    mark = tmp_path / "it_ran"
    evil = copy.deepcopy(row)
    COMMANDS[kind](evil, mark)
    file = tmp_path / "cuts_train.jsonl.gz"
    write_jsonl(file, [row, evil])
    # lhotse by itself runs it: if it ceases to, there is nothing left to test.
    cut = list(CutSet.from_jsonl_lazy(file))[1]
    readings = [cut.load_audio, cut.load_features]
    readings += [cut.other.load_audio] if "custom field" in kind else []
    for reading in readings:
        with contextlib.suppress(Exception):
            reading()
    assert mark.exists()
    mark.unlink()
    with pytest.raises(DataError, match=r"line 2: .*(may run code|run as a command|handed to a shell)") as error:
        list(iterate_cuts(file))
    assert str(file) in str(error.value)
    assert not mark.exists()


def test_pickled_features_are_refused(row):
    features(row := copy.deepcopy(row), storage_type="memory_raw", storage_key="gASVAAAA")
    with pytest.raises(ValueError, match="'memory_raw' is not read"):
        cut_of(row)


def test_a_sphere_file_with_a_plain_name_is_let_through(row):
    source(row := copy.deepcopy(row), source="/corpora/wsj/4k0c0301.SPH")
    assert cut_of(row).recording.sources[0].source.endswith(".SPH")


def places(value, place=()):
    """Yield the place of every value in nested plain data."""
    if place:
        yield place
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inside:
        yield from places(item, (*place, name))


WRONG = [None, True, -1, -1.5, 2**70, 1e300, float("nan"), float("inf"), "", "x", [], [[]], {}]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_wrong_values_are_refused_or_make_a_cut_that_is_written_as_it_was_read(row, wrong):
    refused = 0
    for place in places(row):
        changed = copy.deepcopy(row)
        inner = changed
        for name in place[:-1]:
            inner = inner[name]
        inner[place[-1]] = wrong
        expected = copy.deepcopy(changed)
        try:
            again = cut_of(changed).to_dict()
        except ValueError:
            refused += 1
            continue
        # lhotse leaves out what is None.
        text = json.dumps({k: v for k, v in again.items() if v is not None}, sort_keys=True)
        assert place[0] == "custom" or None in (wrong,) or text == json.dumps(expected, sort_keys=True), place
    assert refused >= 20


@pytest.mark.parametrize("place", ["id", "start", "duration", "channel", "type"])
def test_a_cut_needs_its_fields(row, place):
    del (changed := copy.deepcopy(row))[place]
    with pytest.raises(ValueError, match=f"{place}|type"):
        cut_of(changed)


def test_mixed_cuts_are_checked_track_by_track(row):
    mixed = cut_of(copy.deepcopy(row)).pad(duration=3.0)
    assert isinstance(mixed, MixedCut)
    plain = mixed.to_dict()
    assert cut_of(copy.deepcopy(plain)).to_dict() == plain
    source(plain["tracks"][0]["cut"], type="command", source="true")
    with pytest.raises(ValueError, match="may run code"):
        cut_of(plain)


def test_a_row_that_is_no_cut(row, tmp_path):
    for other in (row["recording"], [], 3, "x", None):
        write_jsonl(tmp_path / "cuts.jsonl", [other])
        with pytest.raises(DataError, match=r"cuts.jsonl .*line 1: it is no cut"):
            list(iterate_cuts(tmp_path / "cuts.jsonl"))
    (tmp_path / "cuts.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"cuts.jsonl"):
        list(iterate_cuts(tmp_path / "cuts.jsonl"))
