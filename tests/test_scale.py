"""The dry run at scale, small: it makes what an export writes, draws each cut once, and its check can fail."""

import json

import pytest
from lhotse.serialization import deserialize_item

from benchmarks import scale
from icefall_kd.data.shar import Shar
from icefall_kd.errors import NumericError
from icefall_kd.labels.keys import label_key


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    labels = folder / "labels"
    labels.mkdir()
    written = scale.write_shar(folder / "shar", 1500, 12)
    scale.write_labels(labels, 1500)
    assert Shar(folder / "shar").verify() == [] and Shar(folder / "shar").num_cuts == 1500
    return {
        "cuts": 1500, "write_shar": written, "stream": scale.streaming(folder / "shar", 1500, 2, 200),
        "join": scale.joining(labels, 1500),
    }  # fmt: skip


def test_cuts_are_as_an_export_writes_them():
    for i in (0, 7, 12_345_678):
        cut = deserialize_item(json.loads(scale.cut_line(i)))
        assert label_key(cut) == scale.label_key(i) and cut.num_samples == scale.utterance(i)[1]
        assert cut.has_features and cut.supervisions[0].text


def test_each_cut_is_drawn_once_and_the_memory_is_noted(found):
    drawn = found["stream"]
    assert drawn["cuts"] == 1500 and drawn["each_once"] and drawn["resume_cuts_held"] <= 200
    assert len(drawn["mebibytes_by_tenth"]) == len(found["join"]["mebibytes_by_tenth"]) == 10
    scale.check(found, max_growth=100)


@pytest.mark.parametrize("step", ["stream", "join"])
def test_growing_memory_is_an_error(found, step):
    grown = {**found[step], "mebibytes_by_tenth": [100, 100, *(100 + 10 * i for i in range(1, 9))]}
    with pytest.raises(NumericError, match=f"{step}: memory grew from 100 MiB at two tenths to 180 MiB"):
        scale.check({**found, step: grown}, max_growth=48)
    with pytest.raises(NumericError, match="1499 cuts were drawn, not each of 1500 once"):
        scale.check({**found, "stream": {**found["stream"], "each_once": False, "cuts": 1499}}, max_growth=100)
