"""Validation finds every planted fault, and names it."""

import dataclasses
import re

import pytest
from lhotse.utils import fastcopy

from icefall_kd.data.features import FbankExtractor, store_features
from icefall_kd.data.manifests import cuts_file, read_cuts, write_cuts
from icefall_kd.data.prepare import CorpusConfig, ManifestConfig, TokenConfig, make_manifests, make_tokens
from icefall_kd.data.validate import ValidateConfig, validate_data
from icefall_kd.errors import DataError
from icefall_kd.text.tokenizer import Tokenizer


@pytest.fixture
def prepared(corpus_dir, tmp_path):
    """A prepared corpus and its validation's options."""
    data = tmp_path / "data"
    make_manifests(
        CorpusConfig(corpus="trans", corpus_dir=corpus_dir), ManifestConfig(data_dir=data, speed_perturb=True)
    )
    store_features([cuts_file(data / "manifests", p) for p in ("train", "dev")], data / "fbank", FbankExtractor())
    make_tokens(TokenConfig(data_dir=data, token_kind="char"))
    return ValidateConfig(data_dir=data, lang_dir=data / "lang_char")


def plant(config, change, index=1):
    """Rewrite the training cuts with ``change`` applied to one of them (a list replaces it)."""
    path = cuts_file(config.data_dir / "fbank", "train")
    cuts = read_cuts(path)
    changed = change(cuts[index])
    cuts[index : index + 1] = changed if isinstance(changed, list) else [changed]
    write_cuts(path, cuts)


def supervision(cut, **changes):
    return fastcopy(cut, supervisions=[fastcopy(cut.supervisions[0], **changes)])


def test_healthy_data_passes(prepared):
    report = validate_data(prepared)
    assert {p: row["cuts"] for p, row in report.items()} == {"train": 15, "dev": 2}
    assert report["train"]["unk_ratio"] == 0
    assert validate_data(dataclasses.replace(prepared, features="on_the_fly")) == report


FAULTS = {
    "2 supervisions": lambda cut: fastcopy(cut, supervisions=cut.supervisions * 2),
    "0 supervisions": lambda cut: fastcopy(cut, supervisions=[]),
    "its supervision runs from": lambda cut: supervision(cut, duration=cut.duration + 1),
    "of a recording of": lambda cut: fastcopy(cut, start=0.5),
    "has no text": lambda cut: supervision(cut, text=""),
    "not normalised": lambda cut: supervision(cut, text="Three!"),
    "no stored features": lambda cut: fastcopy(cut, features=None),
    "samples make": lambda cut: fastcopy(cut, features=fastcopy(cut.features, num_frames=cut.features.num_frames + 1)),
    "cannot be read": lambda cut: fastcopy(cut, features=fastcopy(cut.features, storage_path="/nowhere.lca")),
    "occurs twice": lambda cut: [cut, cut],
    "is the same audio as": lambda cut: [cut, fastcopy(cut, id="other")],
    "corpus.json says 15": lambda cut: [],
    "is a MixedCut": lambda cut: cut.pad(duration=cut.duration + 1),
}


@pytest.mark.parametrize("message", FAULTS)
def test_planted_faults_are_found(prepared, message):
    plant(prepared, FAULTS[message])
    with pytest.raises(DataError, match=re.escape(message)) as error:
        validate_data(prepared)
    assert "train: " in str(error.value)


def test_a_manifest_that_disagrees_with_its_arrays_is_found(prepared):
    path = cuts_file(prepared.data_dir / "fbank", "dev")
    first, second = read_cuts(path)
    swapped = first.features.storage_key
    write_cuts(
        path, [fastcopy(first, features=fastcopy(first.features, storage_key=second.features.storage_key)), second]
    )
    assert swapped != second.features.storage_key
    with pytest.raises(DataError, match=r"the manifest says|cannot be read"):
        validate_data(prepared)


def test_tokens_that_do_not_fit_the_text_are_found_in_training_parts_alone(prepared, caplog):
    Tokenizer.train_char(["XYZ TWO"]).save(prepared.data_dir / "lang_other")
    with pytest.raises(DataError, match="unknown to") as error:
        validate_data(dataclasses.replace(prepared, lang_dir=prepared.data_dir / "lang_other"))
    assert "dev: " not in str(error.value)
    assert "dev: " in caplog.text


def test_audio_of_two_parts_is_a_fault_and_a_speaker_of_two_a_warning(prepared, caplog):
    validate_data(prepared)
    assert "train: 1 of 1 speakers are in other parts too (spk in dev)" in caplog.text
    path = cuts_file(prepared.data_dir / "fbank", "dev")
    own = read_cuts(path)
    write_cuts(path, [fastcopy(read_cuts(cuts_file(prepared.data_dir / "fbank", "train"))[0], id="other"), own[1]])
    with pytest.raises(DataError, match="train: t0 is in part dev too"):
        validate_data(prepared)


def test_utterances_too_short_for_their_text_are_found(prepared):
    plant(prepared, lambda cut: supervision(cut, text="THREE " * 30 + "TWO"))
    with pytest.raises(DataError, match="more tokens than encoder frames"):
        validate_data(prepared)
    validate_data(dataclasses.replace(prepared, max_reject_ratio=0.5))
