"""The real prepare.sh of both recipes on corpora of a few utterances."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from icefall_kd.data.manifests import read_cuts
from icefall_kd.text.tokenizer import Tokenizer


def command(repo, recipe, *options):
    script = repo / "egs" / recipe / "prepare.sh"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["VIRTUAL_ENV"] = str(Path(sys.executable).parent.parent)
    return {"args": [str(script), *map(str, options)], "env": environment, "cwd": "/"}


def run(repo, recipe, *options, code=0):
    done = subprocess.run(**command(repo, recipe, *options), capture_output=True, text=True, timeout=280)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr if code or not done.stdout else done.stdout + done.stderr


@pytest.fixture(scope="module")
def demo(repo, demo_corpus, tmp_path_factory):
    """A prepared demo corpus: its folder, the options that made it, and the log."""
    root = tmp_path_factory.mktemp("a folder of data")  # with spaces
    options = ["--corpus", "demo", "--corpus-dir", demo_corpus("en"), "--data-dir", root / "data"]
    options += ["--nj", 30, "--vocab-size", 60]
    return root, options, run(repo, "librispeech", *options)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and ".done" not in p.parts}


def test_the_demo_corpus_is_prepared(demo):
    root, _, log = demo
    data = root / "data"
    corpus = json.loads((data / "corpus.json").read_text())
    assert {p: row["cuts"] for p, row in corpus["parts"].items()} == {"train-demo": 12, "dev-demo": 2, "test-demo": 2}
    assert re.findall(r"stage (\d) \w+: done", log) == ["0", "1", "3", "4", "5"]
    for part, row in corpus["parts"].items():
        plain = read_cuts(data / "manifests" / f"cuts_{part}.jsonl.gz")
        cuts = read_cuts(data / "fbank" / f"cuts_{part}.jsonl.gz")
        assert [c.id for c in plain] == [c.id for c in cuts]
        assert len(cuts) == row["cuts"]
        assert all(c.load_features().shape == (c.features.num_frames, 80) for c in cuts)
    tokenizer = Tokenizer.load(data / "lang_bpe_60")
    assert tokenizer.vocab_size == 60
    text = cuts[0].supervisions[0].text
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    assert (data / "rejected" / "train-demo.jsonl").read_text() == ""


def test_a_second_run_does_nothing(demo, repo):
    root, options, _ = demo
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and ".done" not in p.parts}
    started = time.monotonic()
    log = run(repo, "librispeech", *options)
    assert time.monotonic() - started < 10
    assert log.count("done before, skipped") == 5
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_killed_stage_runs_again_and_ends_in_the_same_files(demo, repo):
    root, options, _ = demo
    before = contents(root / "data")
    options = [*options, "--stage", 3]
    process = subprocess.Popen(
        **command(repo, "librispeech", *options, "--stop-stage", 3, "--force"),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    for line in process.stderr:
        if "stage 3 features: runs, forced" in line:
            break
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    (root / "data" / "fbank" / "cuts_dev-demo.jsonl.gz").unlink()
    log = run(repo, "librispeech", *options)
    assert "stage 3 features: runs, not finished before" in log
    assert contents(root / "data") == before


@pytest.mark.timeout(600)
def test_any_folder_of_audio_with_transcripts_is_prepared(repo, tmp_path):
    for part, count in {"train": 8, "dev": 2}.items():
        (tmp_path / "mine" / part).mkdir(parents=True)
        rows = {f"{part}{i}": f"word number {'abc'[i % 3]}" for i in range(count)}
        for i, utt in enumerate(rows):
            wave = np.random.default_rng(i).standard_normal(9000) * 0.1
            soundfile.write(tmp_path / "mine" / part / f"{utt}.wav", wave, 8000)
        lines = "".join(f"{utt} {text}\n" for utt, text in rows.items())
        (tmp_path / "mine" / part / "mine.trans.txt").write_text(lines)
    (tmp_path / "mine" / "train" / "train3.wav").write_bytes(b"no audio")
    options = ["--corpus", "trans", "--corpus-dir", tmp_path / "mine", "--data-dir", tmp_path / "data", "--nj", 2]
    options += ["--token-kind", "char", "--features", "on_the_fly", "--speed-perturb", "true"]
    log = run(repo, "librispeech", *options, code=4)
    assert "train3: unreadable" in log
    assert "--max-reject-ratio" in log
    log = run(repo, "librispeech", *options, "--max-reject-ratio", 0.2, "--stop-stage", 4)
    assert "option max_reject_ratio changed" in log or "not finished before" in log
    cuts = read_cuts(tmp_path / "data" / "manifests" / "cuts_train.jsonl.gz")
    assert len(cuts) == 21
    assert cuts[0].load_audio().shape == (1, 18000)
    assert not (tmp_path / "data" / "fbank").exists()
    assert Tokenizer.load(tmp_path / "data" / "lang_char").unit == "word"
    options += ["--token-kind", "plm", "--plm", "tiny-random-masked", "--stage", 4, "--stop-stage", 4]
    run(repo, "librispeech", *options)
    assert Tokenizer.load(tmp_path / "data" / "lang_plm").pieces("WORD B") == ["▁W", "O", "R", "D", "▁B"]


def test_the_mandarin_demo_is_made_and_prepared(repo, demo_corpus, tmp_path):
    pytest.importorskip("pypinyin")
    options = ["--corpus", "demo", "--corpus-dir", demo_corpus("zh"), "--data-dir", tmp_path / "data"]
    run(repo, "aishell", *options, "--token-kind", "pinyin", "--features", "on_the_fly", "--stop-stage", 4)
    assert json.loads((tmp_path / "data" / "corpus.json").read_text())["language"] == "zh"
    cut = read_cuts(tmp_path / "data" / "manifests" / "cuts_train.jsonl.gz")[0]
    assert re.fullmatch("[\u4e00-\u9fff]+", cut.supervisions[0].text)
    tokenizer = Tokenizer.load(tmp_path / "data" / "lang_pinyin")
    assert tokenizer.unit == "token"
    assert tokenizer.unk_id not in tokenizer.encode(cut.supervisions[0].text)


@pytest.mark.parametrize("recipe", ["librispeech", "aishell"])
def test_help_lists_options_and_stages(repo, recipe):
    text = run(repo, recipe, "--help")
    for word in ("--corpus-dir", "--parts", "--token-kind", "--max-reject-ratio", "corpus", "manifests", "validation"):
        assert word in text
    # The recipe's own examples and defaults.
    example, token_kind = {"librispeech": ("960 h", "bpe"), "aishell": ("AISHELL-1", "char")}[recipe]
    for word in (example, f"(default: '{recipe}')", f"(default: '{token_kind}')"):
        assert word in text


def test_what_cannot_be_prepared_is_refused(repo, tmp_path):
    assert "needs --corpus-dir" in run(repo, "librispeech", "--corpus", "trans", code=2)
    (tmp_path / "LibriSpeech").mkdir()
    options = ["--corpus-dir", tmp_path, "--data-dir", tmp_path / "data", "--stop-stage", 0]
    assert "lacks the parts" in run(repo, "librispeech", *options, code=4)
