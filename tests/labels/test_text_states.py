"""Label sets of a language model's states: keyed by texts, made once for each, the same whatever interrupts them."""

import json

import numpy as np
import pytest
import torch
from run_script import script
from text_toys import text_cuts, write_bert

from icefall_kd.config import ExtractTextConfig, LanguageModelConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.extract_text import extract_text_states
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.labels.keys import text_key
from icefall_kd.labels.store import LabelStore
from icefall_kd.labels.text_states import pack_states, rows_problem, unpack_states
from icefall_kd.runtime.files import sha256_file
from icefall_kd.teachers.language_model import LanguageModelTeacher
from icefall_kd.text.tokenizer import Tokenizer

TEXTS = ["THE CAT", "SAT ON THE MAT", "IT'S THE CAFÉ", "THE CAT", "O'NEILL SAT", "HAT", "ON IT", "THING", "A MAT"]


@pytest.fixture(scope="module")
def plm(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("plm") / "bert")


@pytest.fixture
def cuts(tmp_path):
    return text_cuts(tmp_path / "cuts.jsonl.gz", TEXTS, ("1", "9/10", "11/10"))


def config(cuts, label_dir, plm="unused", **options):
    model = LanguageModelConfig(plm=str(plm), plm_device="cpu", plm_layer=options.pop("plm_layer", -1))
    return ExtractTextConfig(
        **{"cuts": [cuts], "label_dir": label_dir, "part_texts": 3, "batch_pieces": 20, **options}, language_model=model
    )


def run(cuts, label_dir, plm, **options):
    return extract_text_states(config(cuts, label_dir, plm, **options))


def shard_bytes(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.safetensors"))}


def test_rows_are_the_states_of_each_text_and_equal_texts_share_them(tmp_path, cuts, plm):
    report = run(cuts, tmp_path / "set", plm)
    store, teacher = LabelStore(tmp_path / "set"), LanguageModelTeacher.load(LanguageModelConfig(plm=str(plm)))
    assert report.utterances == len(set(TEXTS)) == len(store) and store.verify() == []
    for text in TEXTS:
        (read,) = teacher.read([text])
        spans, states = unpack_states(store.get(text_key(text)))
        assert np.array_equal(spans, read.spans)
        wanted = teacher.states([read])[0].numpy()  # alone; the set was made in batches
        np.testing.assert_allclose(states, wanted, rtol=2e-3, atol=1e-4)
    # Hours are those of all audio, at every speed: a second becomes 10/9 and 10/11 of one.
    samples = [16000, *(round(16000 * 10 / s) for s in (9, 11))]
    assert abs(report.hours * 3600 * 16000 - len(TEXTS) * sum(samples)) <= len(TEXTS) * 3
    assert abs(store.num_samples(text_key("THE CAT")) - 2 * sum(samples)) <= 6
    assert text_key("THE CAT") == "e8d1a482ea4ed5ed77fcfe373af8cbbe28fe8ef2aeaddb7b5a1c81d36c7a1815"


def test_the_set_says_where_its_states_come_from(tmp_path, cuts, plm):
    run(cuts, tmp_path / "set", plm, plm_layer=2)
    info, weights = LabelSetInfo.load(tmp_path / "set"), sha256_file(plm / "model.safetensors")
    assert (info.kind, info.key_kind, info.row, info.layer, info.dim) == ("text_states", "text", "piece", 2, 16)
    assert info.teacher_sha256 == weights and not info.extra["causal"] and info.normalization == "texts in lower case"
    assert info.extra["tokenizer"]["in_front"] == ["[CLS]"] and info.extra["tokenizer"]["behind"] == ["[SEP]"]
    with pytest.raises(DataError, match=r"layer is 2 and 3.*another --label-dir"):
        run(cuts, tmp_path / "set", plm)
    # The same texts at other speeds are the same set; other texts are another one.
    plain = text_cuts(tmp_path / "plain.jsonl.gz", TEXTS)
    assert run(plain, tmp_path / "set", plm, plm_layer=2).skipped
    with pytest.raises(DataError, match="corpus_fingerprint"):
        run(text_cuts(tmp_path / "other.jsonl.gz", TEXTS[:4]), tmp_path / "set", plm, plm_layer=2)


def test_shards_hold_what_one_set_holds(tmp_path, cuts, plm):
    run(cuts, tmp_path / "one", plm)
    for k in (2, 0, 1):
        run(cuts, tmp_path / "three", plm, shard=k, num_shards=3)
    one, three = LabelStore(tmp_path / "one"), LabelStore(tmp_path / "three")
    assert set(one.keys()) == set(three.keys()) and three.verify() == []
    for key in one.keys():
        np.testing.assert_allclose(*(unpack_states(s.get(key))[1] for s in (one, three)), rtol=2e-3, atol=1e-4)
    before = shard_bytes(tmp_path / "three")
    next((tmp_path / "three").glob("shard-00001*")).unlink()
    assert not run(cuts, tmp_path / "three", plm, shard=1, num_shards=3).skipped
    assert shard_bytes(tmp_path / "three") == before


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path, cuts, plm, monkeypatch):
    run(cuts, tmp_path / "whole", plm)
    states, calls = LanguageModelTeacher.states, []

    def interrupted(self, texts):
        calls.append(len(texts))
        if sum(calls) > 5:
            raise KeyboardInterrupt
        return states(self, texts)

    monkeypatch.setattr(LanguageModelTeacher, "states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(cuts, tmp_path / "set", plm)
    assert not shard_bytes(tmp_path / "set")
    kept = list((tmp_path / "set").glob(".parts/*/part-*.safetensors"))
    assert len(kept) == 1
    seen = []
    monkeypatch.setattr(LanguageModelTeacher, "states", lambda self, t: seen.append(len(t)) or states(self, t))
    run(cuts, tmp_path / "set", plm)
    assert sum(seen) == len(set(TEXTS)) - 3  # the finished part is not done again
    assert shard_bytes(tmp_path / "set") == shard_bytes(tmp_path / "whole")
    assert not any((tmp_path / "set" / ".parts").iterdir())
    seen.clear()
    assert run(cuts, tmp_path / "set", plm).skipped and not seen


def test_texts_that_the_model_cannot_read_are_rejected_and_counted(tmp_path, plm):
    cuts = text_cuts(tmp_path / "cuts.jsonl.gz", [*TEXTS, "Q" * 60, ""])
    with pytest.raises(DataError, match=r"2 of 10 utterances were rejected, more than --max-reject-ratio 0.05"):
        run(cuts, tmp_path / "set", plm)
    report = run(cuts, tmp_path / "set", plm, max_reject_ratio=0.2)
    assert (report.utterances, report.rejected) == (8, 2)
    lines = (tmp_path / "set/rejects/shard-00000-of-00001.jsonl").read_text().splitlines()
    reasons = {json.loads(line)["id"]: json.loads(line)["reason"] for line in lines}
    assert reasons == {"utt9": "62 pieces, the language model reads at most 40", "utt10": "there is no text"}
    with pytest.raises(DataError, match=r"does not cover the cuts: 8 matched, 1 missing.*name normalised texts"):
        LabelStore(tmp_path / "set").join(map(text_key, [*TEXTS, "Q" * 60]))


def test_rows_that_cannot_be_are_found():
    spans = np.array([(0, 3), (4, 7), (7, 7)])
    rows = pack_states(spans, np.array([False, True, False]), torch.ones(3, 4))
    assert rows_problem(rows) is None and rows[:, 2].tolist() == [0, 1, 0]
    for place, wrong in ((1, (4, 9)), (0, (5, 7)), (1, (4, 4)), (2, (6, 7))):
        changed = rows.copy()
        changed[place, :2] = wrong
        assert "which are not spans in order" in rows_problem(changed)
    assert rows_problem(rows[:0]) == "no row for the end of the text"
    with pytest.raises(DataError, match=r"reaches 7e\+04, float16 holds 65504"):
        pack_states(spans, np.zeros(3, bool), torch.full((3, 4), 7e4))
    rows[1, 3] = 0x7C00  # infinity
    assert rows_problem(rows) == "states that are not finite"


def test_the_commands(tmp_path, cuts, plm):
    options = ["--cuts", cuts, "--label-dir", tmp_path / "set", "--plm", plm, "--plm-device", "cpu"]
    assert f"8 texts of {len(TEXTS) * 48323 / 16000 / 3600:.3f} h" in script("extract_text_states.py", *options)
    assert "bytes an hour" in script("label_sets.py", "verify", tmp_path / "set")
    assert "pieces, 0.008 h" in (info := script("label_sets.py", "info", tmp_path / "set"))
    assert "float32 states of 16 would take 1.7 times as much" in info  # 16 * 4 bytes against (3 + 16) * 2
    assert "8 matched, 0 missing, 0 extra" in script("label_sets.py", "join", tmp_path / "set", "--cuts", cuts)
    Tokenizer.train_char(TEXTS).save(tmp_path / "lang")
    found = script("label_sets.py", "align", tmp_path / "set", "--cuts", cuts, "--lang-dir", tmp_path / "lang")
    assert "token: 27 of 27 utterances aligned, 0 without states, 0 misaligned" in found and "word: 27 of 27" in found
    file = next((tmp_path / "set").glob("shard-*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=file.name):
        script("label_sets.py", "verify", tmp_path / "set")


def test_options_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--shard is 2"):
        config(tmp_path, tmp_path, shard=2, num_shards=2)
    with pytest.raises(ConfigError, match="--part-texts is 0"):
        config(tmp_path, tmp_path, part_texts=0)
