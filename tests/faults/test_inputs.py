"""Utterances that are unfit or odd: each has its reject line with the reason, and the rest goes through to the end."""

import json

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet
from micro_corpus import write_corpus

from icefall_kd.labels.keys import label_key
from icefall_kd.labels.store import LabelStore
from tests.faults import children
from tests.faults.conftest import STUDENT, Line
from tests.teachers.tiny_models import ssl_model

pytestmark = pytest.mark.timeout(900)
RATE = 16_000
# seconds and transcript of each utterance of the training part
UTTERANCES = {
    "good0": (1.0, "one two"),
    "good1": (0.8, "three"),
    "good2": (1.2, "four"),
    "tenth": (0.1, "a"),
    "twentieth": (0.05, "a"),
    "minute": (60.0, "one two three four"),
    "talker": (0.5, "three three three three three"),
    "empty": (0.7, "..."),
    "corrupt": (0.9, "two"),
    "silent": (0.6, "one"),
}


def write_odd_corpus(folder):
    """Write ``train`` and ``dev`` with the utterances above."""
    for part, rows in (("train", UTTERANCES), ("dev", {"dev0": (0.9, "one"), "dev1": (1.0, "two")})):
        (folder / part).mkdir(parents=True)
        rng = np.random.default_rng(3)
        for name, (seconds, _) in rows.items():
            wave = 0.1 * rng.standard_normal(round(seconds * RATE)) * (name != "silent")
            soundfile.write(folder / part / f"{name}.wav", wave, RATE, subtype="PCM_16")
        lines = "".join(f"{name} {text}\n" for name, (_, text) in rows.items())
        (folder / part / "my.trans.txt").write_text(lines)
    damaged = folder / "train" / "corrupt.wav"
    damaged.write_bytes(b"RIFF" + damaged.read_bytes()[20:])
    return folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The odd corpus, prepared: folder of the data, and how the first, refused attempt ended."""
    root = tmp_path_factory.mktemp("odd")
    corpus = write_odd_corpus(root / "corpus")
    line = ["local/make_manifests.py", "--corpus", "trans", "--corpus-dir", corpus, "--data-dir", root / "data"]
    refused = children.run(*line, watch=root)
    accepted = children.run(*line, "--max-reject-ratio", 0.5, watch=root)
    assert accepted.code == 0, accepted.err
    return root / "data", refused


def test_what_no_training_can_use_is_rejected_with_its_reason(odd):
    data, refused = odd
    assert refused.code == 4
    assert "4 of 10 utterances rejected" in refused.message and "--max-reject-ratio" in refused.message
    rejects = [json.loads(row) for row in (data / "rejected/train.jsonl").read_text().splitlines()]
    reasons = {row["id"]: row["reason"] for row in rejects}
    assert sorted(reasons) == ["corrupt", "empty", "silent", "twentieth"]
    for name, reason in (("corrupt", "unreadable: "), ("empty", "empty transcript"), ("silent", "all samples are zero"),
                         ("twentieth", "lasts 0.0500 s; at least 0.1 s are needed")):
        assert reasons[name].startswith(reason), reasons
    kept = [c.id for c in CutSet.from_file(data / "manifests/cuts_train.jsonl.gz")]
    assert sorted(kept) == ["good0", "good1", "good2", "minute", "talker", "tenth"]


def test_the_odd_ones_get_features_and_labels_and_the_student_leaves_them_out(odd, tmp_path):
    data, _ = odd
    root = data.parent
    for command in (["local/compute_features.py", "--data-dir", data, "--nj", 1],
                    ["local/make_tokens.py", "--data-dir", data, "--token-kind", "char"]):
        ended = children.run(*command, watch=root)
        assert ended.code == 0, ended.err
    torch.manual_seed(0)
    ssl_model("hubert", feat_extract_norm="layer", stable=True).save_pretrained(data / "teacher")
    (data / "student.yaml").write_text(STUDENT)
    line = Line(data)
    for command in (line.quantizer(data / "quantizer/q.safetensors"), line.labels(data / "labels")):
        ended = children.run(*command, watch=root)
        assert ended.code == 0, ended.err
    cuts = list(CutSet.from_file(data / "fbank/cuts_train.jsonl.gz"))
    store = LabelStore(data / "labels")
    assert store.join(label_key(c) for c in cuts).coverage == 1 and store.verify() == []
    frames = {c.id: store.num_frames(label_key(c)) for c in cuts}
    assert frames["tenth"] == 4 and frames["minute"] == 2999
    # More tokens than frames in more than a few of the training part.
    validate = ["local/validate_data.py", "--data-dir", data, "--lang-dir", data / "lang_char"]
    ended = children.run(*validate, watch=root)
    assert ended.code == 4 and "talker: 29 tokens, 11 encoder frames" in ended.message
    assert children.run(*validate, "--max-reject-ratio", 0.5, watch=root).code == 0
    ended = children.run(*line.train(tmp_path / "exp"), watch=tmp_path / "exp")
    assert ended.code == 0, ended.err
    left_out = [json.loads(row) for row in (tmp_path / "exp/left_out.jsonl").read_text().splitlines()]
    reasons = {row["id"]: row["reason"] for row in left_out}
    assert sorted(reasons) == ["minute", "talker", "tenth"]
    assert reasons["minute"].startswith("60.00 s, outside of") and reasons["tenth"].startswith("0.10 s, outside of")
    assert "encoder frames" in reasons["talker"]
    # Allowed in, the minute is trained on, too; the tenth of a second has one encoder frame, enough for one token.
    wide = line.train(tmp_path / "wide", "--min-utt-duration", 0, "--max-utt-duration", 100, "--num-epochs", 1)
    wide += ["--oom-scan", "false"]  # it would compute the minute three times
    ended = children.run(*wide, watch=tmp_path / "wide")
    assert ended.code == 0, ended.err
    left_out = [json.loads(row)["id"] for row in (tmp_path / "wide/left_out.jsonl").read_text().splitlines()]
    assert left_out == ["talker"]
    assert "nan" not in next(x for x in ended.err.splitlines() if "validation[" in x)


def test_audio_that_broke_after_the_preparation_is_a_reject_of_the_extraction(line, tmp_path):
    root = write_corpus(tmp_path / "own", num_train=10)
    broken = root / "audio/train4.wav"
    sound = broken.read_bytes()
    broken.write_bytes(sound[:-9600])  # 0.3 s are gone: lhotse by itself would put a mirror image there
    command = line.labels(tmp_path / "set", cuts=root / "fbank/cuts_train.jsonl.gz")
    ended = children.run(*command, watch=tmp_path / "set")
    assert ended.code == 4 and "1 of 10 utterances were rejected" in ended.message
    assert "train4-0: audio cannot be read" in ended.message
    (row,) = (tmp_path / "set/rejects").glob("*.jsonl")
    assert json.loads(row.read_text())["id"] == "train4-0"
    assert not list((tmp_path / "set").glob("shard-*"))
    broken.write_bytes(sound)
    assert children.run(*command, watch=tmp_path / "set").code == 0
    assert LabelStore(tmp_path / "set").verify() == [] and len(LabelStore(tmp_path / "set")) == 10
