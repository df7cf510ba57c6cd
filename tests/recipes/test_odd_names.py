"""Names that hold spaces, quotes, semicolons and substitutions stay names: in folders, parts, utterances and files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recipe_copy import RecipeCopy

from icefall_kd.data.manifests import read_cuts

REPO = Path(__file__).resolve().parents[2]
RAN = "ran_me"
ODD = f"it's \"odd\"; touch {RAN} & $(touch {RAN}) `touch {RAN}` * ;x"
PARTS = (f"train; touch {RAN}", f"dev 'x' $(touch {RAN})")
# By part; none is in two.
UTTERANCES = {
    part: [f"u'{4 * n + i};touch${{IFS}}{RAN};\"$(touch${{IFS}}{RAN})&" for i in range(4)]
    for n, part in enumerate(PARTS)
}
SCRIPTS = {
    "run_mvq.sh": ["--teacher", "TEACHER", "--num-shards", "1", "--decoding-methods", "greedy_search"],
    "run_nar.sh": ["--num-shards", "1", "--decoding-methods", "mask_predict", "--teacher-methods", "joint_beam_search"],
    "run_hkd.sh": ["--num-shards", "1", "--decoding-methods", "cif_greedy_search", "--plm", "tiny-random-masked"],
    "run_dualmode.sh": ["--decode-chunks", "16"],
    "run_hubert.sh": ["--hours", "all", "--similarity", "false"],
}


def ran(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob(RAN)]


def write_odd_corpus(folder: Path) -> Path:
    """Write parts of wav files and transcripts, with speakers, utterances and files of odd names."""
    for n, part in enumerate(PARTS):
        speaker = folder / part / f"speaker \"1\"; touch {RAN}"
        speaker.mkdir(parents=True)
        for i, utterance in enumerate(UTTERANCES[part]):
            wave = 0.1 * np.random.default_rng(4 * n + i).standard_normal(9000 + 500 * i)
            soundfile.write(speaker / f"{utterance}.wav", wave, 16000)
        lines = "".join(f"{utterance} word {'abc'[i % 3]}\n" for i, utterance in enumerate(UTTERANCES[part]))
        (speaker / f"my; touch {RAN}.trans.txt").write_text(lines)
    return folder


def test_the_real_preparation(repo, tmp_path):
    corpus, data = write_odd_corpus(tmp_path / ODD), tmp_path / f"data {ODD}"
    beside = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{beside}:{os.environ['PATH']}", "VIRTUAL_ENV": str(beside.parent)}
    line = [repo / "egs/librispeech/prepare.sh", "--corpus", "trans", "--corpus-dir", corpus, "--data-dir", data]
    line += ["--token-kind", "char", "--nj", "1"]
    for again in (False, True):
        done = subprocess.run(list(map(str, line)), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("done before, skipped") == 5 * again
    assert ran(tmp_path, repo / "egs", repo / "local") == []
    parts = json.loads((data / "corpus.json").read_text())["parts"]
    assert sorted(parts) == sorted(PARTS)
    for part in parts:
        cuts = read_cuts(data / f"fbank/cuts_{part}.jsonl.gz")
        assert sorted(cut.id for cut in cuts) == sorted(UTTERANCES[part])
        assert all(len(cut.load_audio()[0]) == cut.num_samples and cut.load_features() is not None for cut in cuts)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_every_recipe_starts(tmp_path, script):
    """The scripts themselves are real; a stand-in for Python gets the words that the shell makes."""
    root = tmp_path / ODD
    options = [str(root / "teacher") if word == "TEACHER" else word for word in SCRIPTS[script]]
    recipe = RecipeCopy(root, script, *options)
    data, exp = tmp_path / f"data {ODD}", tmp_path / f"exp {ODD}"
    started, _ = recipe.run("--data-dir", str(data), "--exp-dir", str(exp))
    assert started.count("train.py") >= 1 and started.count("decode.py") >= 1 and started[-1] == "results.py"
    assert ran(tmp_path) == []
    assert (data / "corpus.json").is_file() and list(exp.rglob("train_summary.json"))
    # Nothing went to pieces: every folder in the two of the test is one that was named, or lies in one of these.
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([ODD, f"data {ODD}", f"exp {ODD}"])
    again, _ = recipe.run("--data-dir", str(data), "--exp-dir", str(exp))
    assert "train.py" not in again and "decode.py" not in again


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("option", "name", "why"), [
    ("--data-dir", "a,b", "commas stand between"), ("--exp-dir", "exp_JOB 1", "the word JOB stands for"),
])  # fmt: skip
def test_a_folder_whose_name_would_be_taken_for_something_else_is_refused(repo, tmp_path, script, option, name, why):
    line = ["bash", str(repo / "egs/librispeech" / script), "--corpus", "trans", option, str(tmp_path / name)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert f"{option} is {tmp_path / name}; {why}" in done.stderr
    assert list(tmp_path.iterdir()) == []
