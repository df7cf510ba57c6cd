"""What run_nar.sh starts, with what options, and starts again; and its real label stage, killed."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from recipe_copy import PREPARED, RecipeCopy

from icefall_kd.cli import parse_config
from icefall_kd.config import TrainConfig

REPO = Path(__file__).resolve().parents[2]
SETS = {kind: f"exp/trans-nar/labels/teacher-seed42-{kind}" for kind in ("ctc_posteriors", "token_posteriors", "nbest")}


@pytest.fixture
def recipe(tmp_path) -> RecipeCopy:
    options = ["--num-shards", "1", "--decoding-methods", "mask_predict", "--teacher-methods", "joint_beam_search"]
    return RecipeCopy(tmp_path / "a copy", "run_nar.sh", *options)


def trainings(recipe: RecipeCopy) -> dict[str, str]:
    """Return the command line of each training by the name of its exp_dir."""
    lines = Path(f"{recipe.log}.words").read_text().splitlines()
    return {line.split("--exp-dir ")[1].split()[0].split("/")[-1]: line for line in lines if "train.py" in line}


def test_what_changed_runs_again_and_nothing_else(recipe):
    options = ["--systems", "scratch transfer-both"]
    labels = ["extract_labels.py", "label_sets.py", *["label_sets.py"] * 3]
    everything = [*PREPARED, "train.py", *labels, *["train.py"] * 2, *["decode.py"] * 3, "results.py"]
    assert recipe.run(*options)[0] == everything
    assert recipe.run(*options)[0] == ["results.py"]
    # One student more: its training and decoding.
    assert recipe.run("--systems", "scratch transfer-both small")[0] == ["train.py", "decode.py", "results.py"]
    # Another beam of the teacher's labels: other labels, and the students that read them.
    started, log = recipe.run(*options, "--labels-args", "--nbest-beam-size 4")
    assert started == [*labels, "results.py"] and "option labels_args changed: '' -> '--nbest-beam-size 4'" in log
    # Another threshold: decoded again.
    assert recipe.run(*options, "--labels-args", "--nbest-beam-size 4", "--mask-threshold", "0.9")[0] == [
        "decode.py", "decode.py", "results.py",
    ]  # fmt: skip


def test_each_system_gets_its_start_its_labels_and_its_options(recipe):
    names = "scratch transfer transfer-frame transfer-sequence transfer-both"
    names = [*names.split(), *"small small-frame small-sequence small-both teacher-small".split()]
    recipe.run("--systems", " ".join(names), "--stop-stage", "3")
    found = trainings(recipe)
    assert list(found) == [f"{name}-seed42" for name in ("teacher", *names)]
    frame = f"{SETS['ctc_posteriors']},{SETS['token_posteriors']}"
    labels = {"frame": frame, "sequence": SETS["nbest"], "both": f"{frame},{SETS['nbest']}"}
    for name in names:
        line, (size, _, level) = found[f"{name}-seed42"], name.partition("-")
        start = "--init-from exp/trans-nar/teacher-seed42 --init-modules=encoder,ctc "
        assert (start in line) == (size == "transfer"), name
        given = line.split("--label-dir ")[1].split()[0] if "--label-dir" in line else None
        assert given == labels.get(level), name
        words = [word for word in line.split() if word.startswith("--config=")]
        config = parse_config(TrainConfig, [w.replace("=", f"={recipe.folder}/") for w in words])
        kd, big = config.recogniser_kd, size in ("scratch", "transfer")
        assert (kd.ctc_kd_scale > 0, kd.token_kd_scale > 0) == ((level in ("frame", "both")),) * 2, name
        assert (kd.nbest_ctc_scale > 0, kd.nbest_token_scale > 0) == ((level in ("sequence", "both")),) * 2, name
        assert config.model.encoder_dim == (None if big else 192), name
        assert config.attention.attention_decoder == ("ar" if size == "teacher" else "mlm"), name
        # Scales of distillation do not change the schedule.
        assert config.loop.num_epochs == (50 if size in ("transfer", "teacher") else 100), name


def test_only_the_labels_that_are_needed_are_made(recipe):
    started = recipe.run("--systems", "scratch small", "--stop-stage", "3")[0]
    assert "extract_labels.py" not in started
    recipe.run("--systems", "small-sequence", "--stop-stage", "2")
    (line,) = [x for x in Path(f"{recipe.log}.words").read_text().splitlines() if "extract_labels.py" in x]
    assert f"--label-dir {SETS['nbest']} " in line and "--kind nbest --teacher exp/trans-nar/teacher-seed42 " in line


def test_a_teacher_that_is_there_is_used_and_not_trained(recipe):
    teacher = recipe.folder / "exp/other"
    teacher.mkdir(parents=True)
    (teacher / "train_summary.json").write_text("x")
    options = ["--systems", "transfer-sequence", "--teacher-exp-dir", "exp/other/", "--seeds", "1 2"]
    started = recipe.run(*options)[0]
    assert started.count("train.py") == 2 and started.count("extract_labels.py") == 1
    found = trainings(recipe)["transfer-sequence-seed2"]
    assert "--label-dir exp/trans-nar/labels/exp-other-nbest " in found and "--init-from exp/other " in found
    decoded = [x.split("--exp-dir ")[1].split()[0] for x in Path(f"{recipe.log}.decodings").read_text().splitlines()]
    assert decoded == ["exp/other", *(f"exp/trans-nar/transfer-sequence-seed{seed}" for seed in (1, 2))]


def test_the_teacher_among_the_systems_is_trained_once_and_never_where_one_is_given(recipe):
    teacher = recipe.folder / "exp/other"
    teacher.mkdir(parents=True)
    (teacher / "train_summary.json").write_text("x")
    recipe.run("--systems", "teacher scratch", "--teacher-exp-dir", "exp/other")
    assert list(trainings(recipe)) == ["scratch-seed42"]
    started = recipe.run("--systems", "scratch teacher", "--exp-dir", "exp/second")[0]
    assert started.count("train.py") == started.count("decode.py") == 2
    tables = [x.split("--exp-dirs ")[1].split()[0] for x in Path(f"{recipe.log}.tables").read_text().splitlines()]
    assert tables == [
        "exp/other,exp/trans-nar/scratch-seed42", "exp/second/teacher-seed42,exp/second/scratch-seed42",
    ]  # fmt: skip


def test_a_wrong_system_is_told_before_anything_runs(recipe):
    started, log = recipe.run("--systems", "scratch small-best", code=2)
    assert started == [] and "--systems names small-best; there are scratch, transfer, small" in log


TINY = "--encoder-dim 16 --feedforward-dim 16 --num-heads 2 --decoder-feedforward-dim 16 --num-epochs 1 --num-workers 0"


@pytest.fixture(scope="module")
def with_teacher(tmp_path_factory, recipe_env, demo_corpus):
    """A copy of the recipe in which a tiny teacher is trained, and how run_nar.sh is started there."""
    root = tmp_path_factory.mktemp("nar")
    for name in ("egs", "local", "icefall_kd"):
        ignored = shutil.ignore_patterns("__pycache__", *(["data", "exp", "download"] if name == "egs" else []))
        shutil.copytree(REPO / name, root / name, ignore=ignored)
    line = ["bash", str(root / "egs/librispeech/run_nar.sh"), "--corpus-dir", str(demo_corpus("en")), "--nj", "1"]
    line += ["--systems", "small-both", "--num-shards", "2", "--train-args", f"{TINY} --average-period 1"]
    environment = {**recipe_env, "CUDA_VISIBLE_DEVICES": ""}

    def start(*options: str) -> subprocess.Popen:
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen([*line, *options], env=environment, text=True, start_new_session=True, **streams)

    first = start("--stop-stage", "1")
    log = first.communicate(timeout=280)[1]
    assert first.returncode == 0, log[-3000:]
    return root / "egs/librispeech/exp/demo-nar", start


def shards(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = sorted(folder.glob("labels/*/shard-*.safetensors"))
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_killed_labels_go_on_where_they_were(with_teacher):
    exp_dir, start = with_teacher
    process = start("--stage", "2", "--stop-stage", "2")
    end = time.monotonic() + 240
    while not shards(exp_dir) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = shards(exp_dir)
    assert before and process.returncode == -signal.SIGKILL
    process = start("--stage", "2", "--stop-stage", "2")
    log = process.communicate(timeout=280)[1]
    assert process.returncode == 0, log[-3000:]
    after = shards(exp_dir)
    assert "stage 2 labels [exp/demo-nar/teacher-seed42]: runs, not finished before" in log
    assert len(after) == 6 and {name: after[name] for name in before} == before
