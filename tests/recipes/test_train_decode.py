"""train.py and decode.py as a user runs them, on a corpus of a few seconds."""

import json
import subprocess
import sys

import pytest
import torch
from micro_corpus import WORDS, read_cuts, write_corpus, write_labels

import icefall_kd.systems.mvq as mvq
from icefall_kd.config import DecodeConfig
from icefall_kd.decode.base import Hypothesis
from icefall_kd.decode.runner import Decoded, score_decoded
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.recipe import decode, train_main
from icefall_kd.scoring import read_recogs
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.checkpoint import load_checkpoint, save_checkpoint

METHODS = ["greedy_search", "modified_beam_search", "ctc_greedy_search"]
SMALL = """
encoder-size: tiny
num-encoder-layers: 2
encoder-dim: 16
num-heads: 2
feedforward-dim: 16
cnn-kernel: 3
decoder-dim: 8
joiner-dim: 8
max-duration: 4
num-workers: 0
num-epochs: 2
log-interval: 1
save-every-n: 100
average-period: 1
device: cpu
num-threads: 1
train-parts: train
valid-parts: dev
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("recipe"), num_train=8)
    write_labels(folder / "labels", read_cuts(folder))
    (folder / "small.yaml").write_text(SMALL)
    return folder


def command(corpus, exp_dir, *options) -> list[str]:
    paths = {"config": "small.yaml", "manifest-dir": "fbank", "lang-dir": "lang_char", "label-dir": "labels"}
    found = [word for name, path in paths.items() for word in (f"--{name}", str(corpus / path))]
    return [*found, "--exp-dir", str(exp_dir), "--kd", "mvq", *options]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """An exp_dir of two epochs, trained in one go in this process."""
    exp_dir = tmp_path_factory.mktemp("trained") / "exp"
    assert train_main(command(corpus, exp_dir)) == 0
    return exp_dir


def model_of(exp_dir, name="epoch-2.pt") -> dict:
    saved = load_checkpoint(exp_dir / name)
    return {**saved["model"], **{f"average {k}": v for k, v in saved["model_avg"].items()}}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_commands_of_the_recipe(corpus, trained, tmp_path, repo):
    exp_dir, scripts = tmp_path / "exp", repo / "egs" / "librispeech"

    def run(script, *options):
        line = [sys.executable, str(scripts / script), *options]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)

    done = run("train.py", *command(corpus, exp_dir))
    assert done.returncode == 0, done.stderr
    assert "UserWarning" not in done.stderr and "labels kd: 8 matched, 0 missing" in done.stderr
    assert "kd_codebook_loss" in done.stderr
    # Another process and another folder give the same weights, bit by bit.
    assert same(model_of(exp_dir), model_of(trained))
    assert json.loads((exp_dir / "config.json").read_text())["command"][0] == "train.py"
    options = ["--manifest-dir", str(corpus / "fbank"), "--test-parts", "dev,noise", "--device", "cpu"]
    done = run("decode.py", "--exp-dir", str(exp_dir), *options)
    assert done.returncode == 0, done.stderr
    assert [line.split("]")[0] for line in done.stdout.splitlines()] == ["[dev", "[noise"]
    done = run("decode.py", "--exp-dir", str(tmp_path / "epx"), *options)
    assert done.returncode == 2 and "epx does not exist" in done.stderr and not (tmp_path / "epx").exists()
    done = run("train.py", *command(corpus, exp_dir, "--kd-layr", "1"))
    assert done.returncode == 2 and "--kd-layer" in done.stderr


def test_the_same_command_again_does_nothing(corpus, trained):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in trained.rglob("*") if p.suffix in (".pt", ".json")}
    assert train_main(command(corpus, trained)) == 0
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before
    assert same(model_of(trained), model_of(trained))


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_stopped_training_ends_like_an_uninterrupted_one(corpus, trained, tmp_path, num_steps):
    steps = load_checkpoint(trained / "epoch-1.pt")["train"]["step"]
    assert steps > 2
    train_main(command(corpus, tmp_path / "exp", "--max-steps", str(num_steps)))
    assert not (tmp_path / "exp" / "epoch-2.pt").exists()
    train_main(command(corpus, tmp_path / "exp", "--num-workers", "1"))
    assert same(model_of(tmp_path / "exp"), model_of(trained))


def test_a_streaming_training_resumes_with_the_chunks_it_would_have_drawn(corpus, trained, tmp_path):
    streaming = ["--streaming", "true", "--chunk-size", "4,2,-1", "--left-context-frames", "8,4", "--kd-delay", "1"]
    train_main(command(corpus, tmp_path / "whole", *streaming))
    train_main(command(corpus, tmp_path / "parts", *streaming, "--max-steps", "3"))
    train_main(command(corpus, tmp_path / "parts", *streaming))
    assert same(model_of(tmp_path / "parts"), model_of(tmp_path / "whole"))
    assert not same(model_of(tmp_path / "whole"), model_of(trained))
    options = {"exp_dir": tmp_path / "whole", "manifest_dir": corpus / "fbank", "test_parts": ["dev"], "bootstrap": 0}
    options |= {"device": "cpu", "num_threads": 1}
    results = [decode(DecodeConfig(**options, chunk_by_chunk=caches))["dev"] for caches in (False, True)]
    assert results[0]["utterances"] == results[1]["utterances"]
    assert [(r["chunk_size"], r["left_context_frames"]) for r in results] == [(4, 8)] * 2
    with pytest.raises(ConfigError, match="--decode-chunk-size 4: this model sees whole utterances"):
        decode(DecodeConfig(**options | {"exp_dir": trained}, decode_chunk_size=4))


def test_a_refused_training_leaves_the_tokenizer_alone(corpus, trained, tmp_path):
    Tokenizer.train_char([*WORDS, "zzz"]).save(tmp_path / "lang")
    before = Tokenizer.load(trained / "tokenizer").hash
    assert before == Tokenizer.load(corpus / "lang_char").hash
    for options in (["--lang-dir", str(tmp_path / "lang")], ["--encoder-dim", "24"]):
        with pytest.raises(ConfigError):
            train_main(command(corpus, trained, "--num-epochs", "3", *options))
        assert Tokenizer.load(trained / "tokenizer").hash == before


def test_what_the_filters_left_out_is_listed(corpus, tmp_path):
    line = command(corpus, tmp_path / "exp", "--max-utt-duration", "1.0", "--max-steps", "1")
    train_main(line)
    rows = [json.loads(row) for row in (tmp_path / "exp" / "left_out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [c.id for c in read_cuts(corpus) if c.duration > 1.0]
    assert len(rows) == 2 and all("outside of 0.3 to 1.0 s" in row["reason"] for row in rows)


def test_labels_below_the_coverage_stop_the_training(corpus, tmp_path):
    write_labels(tmp_path / "labels", list(read_cuts(corpus))[:6])
    line = command(corpus, tmp_path / "exp", "--label-dir", str(tmp_path / "labels"), "--max-steps", "1")
    with pytest.raises(DataError, match="6 matched, 2 missing"):
        train_main(line)
    assert train_main([*line, "--min-coverage", "0.7"]) == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_search_decodes_what_was_trained(corpus, trained, method, monkeypatch):
    monkeypatch.setattr(mvq, "build_teacher", lambda _: pytest.fail("decoding built a teacher"))
    config = DecodeConfig(
        exp_dir=trained, manifest_dir=corpus / "fbank", test_parts=["dev"], decoding_method=method, device="cpu",
        num_threads=1, bootstrap=20,
    )  # fmt: skip
    result = decode(config)["dev"]
    assert (result["unit"], result["num_ref"]) == ("word", 4)
    (file,) = (trained / method).glob("recogs-dev-epoch-2*")
    assert [" ".join(ref) for ref in read_recogs(file)[1]] == WORDS[:3]


def test_an_online_training_is_decoded_without_its_teacher(corpus, trained, tmp_path, monkeypatch):
    saved = load_checkpoint(trained / "epoch-2.pt")
    saved["config"] |= {"teacher_labels": "online", "teacher": "gone", "quantizer": "gone.safetensors"}
    exp_dir = tmp_path / "exp"
    save_checkpoint(exp_dir / "epoch-2.pt", saved)
    Tokenizer.load(trained / "tokenizer").save(exp_dir / "tokenizer")
    config = {"manifest_dir": corpus / "fbank", "test_parts": ["dev"], "device": "cpu", "num_threads": 1}
    config |= {"use_averaged_model": False, "bootstrap": 20}
    rows = [decode(DecodeConfig(exp_dir=folder, **config))["dev"]["utterances"] for folder in (trained, exp_dir)]
    assert rows[0] == rows[1]


def test_a_swapped_tokenizer_is_refused(corpus, trained, tmp_path):
    # As many tokens, so that no shape would give it away.
    mine = Tokenizer.load(corpus / "lang_char")
    other = Tokenizer("char", [*mine.tokens[:3], *reversed(mine.tokens[3:-1]), mine.tokens[-1]], mine.unit)
    save_checkpoint(tmp_path / "epoch-2.pt", load_checkpoint(trained / "epoch-2.pt"))
    other.save(tmp_path / "tokenizer")
    options = {"exp_dir": tmp_path, "manifest_dir": corpus / "fbank", "test_parts": ["dev"], "device": "cpu"}
    for averaged in ({"avg": 2}, {"use_averaged_model": False}):
        config = DecodeConfig(**options, **averaged)
        with pytest.raises(ConfigError, match=f"trained with tokenizer {mine.hash}, .* is {other.hash}; put the lang"):
            decode(config)


def test_weights_of_another_model_are_refused(corpus, trained, tmp_path):
    saved = load_checkpoint(trained / "epoch-2.pt")
    saved["model"] = {k: v for k, v in saved["model"].items() if "joiner" not in k}
    save_checkpoint(tmp_path / "epoch-2.pt", saved)
    Tokenizer.load(trained / "tokenizer").save(tmp_path / "tokenizer")
    config = DecodeConfig(
        exp_dir=tmp_path, manifest_dir=corpus / "fbank", test_parts=["dev"], use_averaged_model=False, device="cpu"
    )
    with pytest.raises(ConfigError, match=r"do not fit the model.*missing: model\.joiner"):
        decode(config)


def test_pinyin_is_scored_in_tokens():
    tokenizer = Tokenizer.train_pinyin(["中国"])
    assert tokenizer.tokens[3:-1] == sorted(["zh", "ong1", "g", "uo2"])
    right = tokenizer.encode("中国")
    decoded = Decoded(ids=["a", "b"], refs=["中国", "中山"], nbest=[[Hypothesis(right, 0.0, None)]] * 2)
    scored = score_decoded(decoded, tokenizer, "auto")
    # "sh an1", unknown to the table, against "g uo2": two substitutions, in either row none is forgiven.
    assert (scored.unit, scored.num_ref, scored.num_errors) == ("token", 8, 2)
    with pytest.raises(ConfigError, match=r"--unit char.*pinyin.*token"):
        score_decoded(decoded, tokenizer, "char")
