"""Damaged and missing files: every command names them, with the exit code of data, and leaves nothing half-written."""

import shutil

import pytest
from lhotse import CutSet
from micro_corpus import read_cuts, write_labels

from icefall_kd.labels.store import LabelStore
from tests.faults import children

pytestmark = pytest.mark.timeout(900)
DATA, USAGE = 4, 2


@pytest.fixture
def copied(line, tmp_path):
    """A function that copies a file or folder of the line, to be damaged."""

    def copy(name):
        source, target = line.root / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
        return target

    return copy


def cut_off(file, where):
    """Truncate a file: ``where`` is a number of bytes, or a fraction; return what it held."""
    content = file.read_bytes()
    file.write_bytes(content[: where if isinstance(where, int) else int(where * len(content))])
    return content


def refused(command, watch, code, *words):
    """Run a command that must end with ``code``, one clear message that holds all ``words``, and nothing of its own."""
    ended = children.run(*command, watch=watch)
    assert ended.code == code, ended.err
    assert all(str(word) in ended.message for word in words), ended.message
    assert not [p for p in watch.rglob("*") if p.name.startswith(".tmp-") or p.suffix == ".pt"]


@pytest.mark.parametrize("where", [0, 7, 0.5, -1])
def test_a_truncated_label_shard_is_named_and_made_again(line, copied, tmp_path, where):
    labels, exp_dir = copied("labels"), tmp_path / "exp"
    (shard,) = labels.glob("shard-*.safetensors")
    sound = cut_off(shard, where)
    refused(line.train(exp_dir, label_dir=labels), exp_dir, DATA, shard, "damaged", "extract this shard again")
    refused(["local/label_sets.py", "verify", labels], tmp_path / "nothing", DATA, shard)
    assert children.run(*line.labels(labels), watch=labels).code == 0
    assert shard.read_bytes() == sound


def test_a_truncated_part_of_a_shard_is_made_again(line, tmp_path):
    labels = tmp_path / "labels"
    killed = children.run(*line.labels(labels), watch=labels, kill_at=16)
    assert killed.code == -9
    part, *_ = labels.rglob("part-*.safetensors")
    cut_off(part, 0.7)
    ended = children.run(*line.labels(labels), watch=labels)
    assert ended.code == 0 and f"{part} is damaged" in ended.err and "it is made again" in ended.err
    (shard,) = labels.glob("shard-*")
    assert shard.read_bytes() == (line.root / "labels" / shard.name).read_bytes()


@pytest.mark.parametrize("where", [0, 0.6])
def test_truncated_files_of_an_unfinished_quantizer_are_made_again(line, tmp_path, where):
    out = tmp_path / "q/q.safetensors"
    files = [out.with_suffix(".state.safetensors"), out.with_suffix(".frames.safetensors")]
    at = 0
    while not all(f.exists() for f in files):
        shutil.rmtree(out.parent, ignore_errors=True)
        at += 3
        assert children.run(*line.quantizer(out), watch=out.parent, kill_at=at).code == -9
    for file in files:
        cut_off(file, where)
    ended = children.run(*line.quantizer(out), watch=out.parent)
    assert ended.code == 0, ended.err
    assert all(f"{file} " in ended.err for file in files)
    assert out.read_bytes() == (line.root / "quantizer/q.safetensors").read_bytes()
    cut_off(out.with_suffix(".report.json"), where)
    ended = children.run(*line.quantizer(out), watch=out.parent)
    assert ended.code == 0 and "report.json is not valid JSON" in ended.err, ended.err
    assert out.read_bytes() == (line.root / "quantizer/q.safetensors").read_bytes()


@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_truncated_inputs_of_an_extraction_are_named(line, copied, tmp_path, where):
    folder = tmp_path / "set"
    quantizer = copied("quantizer/q.safetensors")
    cut_off(quantizer, where)
    refused(line.labels(folder, quantizer=quantizer), folder, DATA, quantizer, "train")
    cuts = copied("fbank/cuts_train.jsonl.gz")
    cut_off(cuts, where)
    refused(line.labels(folder, cuts=cuts), folder, DATA, cuts, "run the stage that writes it")
    teacher = copied("teacher")
    (weights,) = teacher.glob("*.safetensors")
    cut_off(weights, where)
    refused([*line.labels(folder), "--teacher", teacher], folder, DATA, f"teacher {teacher} cannot be loaded")
    assert not folder.exists(), "nothing is begun"


def test_a_truncated_description_of_a_label_set_is_named(line, copied, tmp_path):
    labels = copied("labels")
    cut_off(labels / "label_set.json", 0.5)
    before = {p: p.read_bytes() for p in labels.rglob("*") if p.is_file()}
    refused(line.labels(labels), labels, DATA, labels / "label_set.json")
    refused(line.train(tmp_path / "exp", label_dir=labels), tmp_path / "exp", DATA, labels / "label_set.json")
    assert {p: p.read_bytes() for p in labels.rglob("*") if p.is_file()} == before


def test_truncated_inputs_of_a_training_are_named(line, copied, tmp_path):
    exp_dir = tmp_path / "exp"
    lang = copied("lang_char")
    cut_off(lang / "tokenizer.json", 0.5)
    refused(line.train(exp_dir, lang_dir=lang), exp_dir, DATA, lang / "tokenizer.json")
    cuts = copied("fbank/cuts_train.jsonl.gz")
    shutil.copy(line.root / "fbank/cuts_dev.jsonl.gz", cuts.parent)
    cut_off(cuts, 0.5)
    refused(line.train(exp_dir, manifest_dir=cuts.parent), exp_dir, DATA, cuts)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_became_unreadable_since_the_preparation_is_named(line, tmp_path, workers):
    exp_dir, manifests = tmp_path / "exp", tmp_path / "cuts"
    cuts = list(CutSet.from_file(line.root / "fbank/cuts_train.jsonl.gz"))
    audio, archive = tmp_path / "broken.wav", tmp_path / "broken.lca"
    shutil.copy(cuts[3].recording.sources[0].source, audio)
    cut_off(audio, 0.5)
    cuts[3].recording.sources[0].source = str(audio)
    shutil.copy(cuts[5].features.storage_path, archive)
    cut_off(archive, 0.01)
    cuts[5].features.storage_path = str(archive)
    manifests.mkdir()
    CutSet.from_cuts(cuts).to_file(manifests / "cuts_train.jsonl.gz")
    shutil.copy(line.root / "fbank/cuts_dev.jsonl.gz", manifests)
    options = ["--num-workers", workers, "--oom-scan", "false"]
    heard = line.train(exp_dir, *options, "--features", "on_the_fly", manifest_dir=manifests)
    refused(heard, exp_dir, DATA, f"cut {cuts[3].id}: its audio cannot be read", "restore the file")
    stored = line.train(exp_dir, *options, manifest_dir=manifests)
    refused(stored, exp_dir, DATA, f"cut {cuts[5].id}: its stored features cannot be read", "feature stage")


def test_truncated_checkpoints_are_passed_over_and_named_when_all_are(line, copied, tmp_path):
    exp_dir = copied("exp")
    kept = {p.name: p.read_bytes() for p in exp_dir.glob("epoch-*.pt")}
    names = sorted([p.name for p in exp_dir.glob("epoch-*.pt")] + [p.name for p in exp_dir.glob("checkpoint-*.pt")])
    cut_off(exp_dir / "epoch-2.pt", 0.9)
    ended = children.run(*line.train(exp_dir), watch=exp_dir)
    assert ended.code == 0 and "epoch-2.pt is damaged" in ended.err
    decode = ["egs/librispeech/decode.py", "--manifest-dir", line.root / "fbank", "--test-parts", "dev"]
    decode += ["--device", "cpu", "--bootstrap", 20, "--exp-dir", exp_dir]
    assert children.run(*decode, watch=exp_dir).code == 0
    for i, name in enumerate(names):
        cut_off(exp_dir / name, [0, 10, 0.5, -1][i % 4])
    for command in (line.train(exp_dir), decode):
        ended = children.run(*command, watch=exp_dir)
        assert ended.code == DATA and "damaged" in ended.err and "Traceback" not in ended.err, ended.err
    for name, content in kept.items():
        (exp_dir / name).write_bytes(content)
    assert children.run(*line.train(exp_dir), watch=exp_dir).code == 0


def test_a_label_set_with_one_missing_utterance_stops_the_training(line, tmp_path):
    cuts = list(read_cuts(line.root))
    full = LabelStore(line.root / "labels")
    values = {key: full.get(key) for key in full.keys()}
    write_labels(tmp_path / "labels", cuts[1:], full.info, values=values)
    words = ("9 matched, 1 missing", "train0|0|", "--min-coverage is 1.0", "Extract labels of these cuts")
    refused(line.train(tmp_path / "exp", label_dir=tmp_path / "labels"), tmp_path / "exp", DATA, *words)


def test_a_missing_teacher_is_wrong_usage_and_nothing_is_begun(line, tmp_path):
    for name, command in (("q", line.quantizer(tmp_path / "q/q.safetensors")), ("set", line.labels(tmp_path / "set"))):
        for teacher in (tmp_path / "nowhere", "nobody/nothing", "whisper-hug"):
            refused([*command, "--teacher", teacher], tmp_path / name, USAGE, f"teacher '{teacher}' was not found")
        assert not (tmp_path / name).exists()
