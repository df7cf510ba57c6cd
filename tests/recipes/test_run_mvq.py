"""What run_mvq.sh starts, and starts again: its real scripts, with a stand-in for Python that only writes outputs."""

from pathlib import Path

import pytest
from recipe_copy import PREPARED, RecipeCopy

LABELS = ["check_teacher.py", "train_quantizer.py", "extract_labels.py", "label_sets.py", "label_sets.py"]
STUDENTS = ["train.py"] * 2 + ["decode.py"] * 2


@pytest.fixture
def recipe(tmp_path) -> RecipeCopy:
    root = tmp_path / "a copy"
    options = ["--teacher", str(root / "teacher"), "--num-shards", "1", "--decoding-methods", "greedy_search"]
    return RecipeCopy(root, "run_mvq.sh", *options)


def test_what_changed_runs_again_and_nothing_else(recipe):
    results = ["results.py"]
    assert recipe.run()[0] == [*PREPARED, *LABELS, *STUDENTS, *results]
    assert recipe.run()[0] == results
    # Other tokens: other students.
    started, log = recipe.run("--token-kind", "char")
    assert started == ["make_tokens.py", "validate_data.py", "train.py", "train.py", *results]
    assert "input data/trans/lang_char/tokenizer.json is new" in log
    same = ["--token-kind", "char"]
    # Another test set: decoded again.  Another training set: all again.
    fbank = recipe.folder / "data/trans/fbank"
    (fbank / "cuts_dev.jsonl.gz").write_text("other")
    assert recipe.run(*same, "--stage", "1")[0] == ["decode.py", "decode.py", *results]
    (fbank / "cuts_train.jsonl.gz").write_text("other")
    assert recipe.run(*same, "--stage", "1")[0] == [*LABELS, "train.py", "train.py", *results]
    # Other weights in the teacher's folder: other labels.
    (recipe.root / "teacher/model").write_text("two")
    assert recipe.run(*same)[0][: len(LABELS)] == ["validate_data.py", *LABELS[:-1]]
    # Options of prepare.sh that run_mvq.sh does not have itself.
    log = recipe.run("--stop-stage", "0", "--prepare-args", "--max-reject-ratio 0.1")[1]
    assert "option max_reject_ratio changed: '0.01' -> '0.1'" in log


def test_a_part_without_results_is_named(recipe):
    recipe.env["FORGETS"] = "dev"
    log = recipe.run(code=4)[1]
    assert "there are no results of dev in exp/trans/none-seed42/greedy_search; run the same line again" in log
    del recipe.env["FORGETS"]
    assert recipe.run()[0] == ["decode.py", "decode.py", "results.py"]


def test_several_layers_have_a_quantizer_and_a_label_set_each_and_one_extraction(recipe):
    (recipe.root / "my_teacher.py").write_text("one")
    options = ["--teacher", str(recipe.root / "my_teacher.py:Mine"), "--layer", "6,12", "--systems", "mvq"]
    labels = [*LABELS[:1] * 2, *LABELS[1:2] * 2, "extract_labels.py", *["label_sets.py"] * 3]
    started = recipe.run(*options)[0]
    assert started == [*PREPARED, *labels, "train.py", "decode.py", "results.py"]
    extraction, training = Path(f"{recipe.log}.words").read_text().splitlines()
    name = f"{recipe.root.name}-my_teacher.py-Mine"
    sets = ",".join(f"exp/trans/labels/{name}-layer{n}-q8" for n in (6, 12))
    files = ",".join(f"exp/trans/quantizer-{name}-layer{n}-q8/quantizer.safetensors" for n in (6, 12))
    assert f"--label-dir {sets} " in extraction and f"--label-dir {sets} " in training
    assert " --layer 6,12 " in extraction and f"--quantizer {files} " in extraction
    # One layer more: what the others need is there; the code of the teacher counts.
    options[3] = "6,12,18"
    assert recipe.run(*options)[0][:4] == [*LABELS[:4]]
    (recipe.root / "my_teacher.py").write_text("two")
    assert recipe.run(*options)[0][:3] == ["check_teacher.py"] * 3


def test_two_teachers_of_one_name_keep_their_quantizers_apart(recipe):
    for folder in ("a", "b"):
        recipe.run("--systems", "mvq", "--stop-stage", "3", "--teacher", f"exp/{folder}/mvq-seed42/")
    found = sorted(p.name for p in (recipe.folder / "exp/trans").glob("quantizer-*"))
    assert found == [f"quantizer-{folder}-mvq-seed42-layerlast-q8" for folder in ("a", "b")]
    assert len(list((recipe.folder / "exp/trans/labels").iterdir())) == 2


def test_forced_training_starts_afresh_and_keeps_the_old_one(recipe):
    recipe.run("--systems", "none")
    old = recipe.folder / "exp/trans/none-seed42/epoch-1.pt"
    old.write_text("weights")
    started, log = recipe.run("--systems", "none", "--stage", "4", "--stop-stage", "4", "--force")
    assert started == ["train.py"] and "is moved to exp/trans/none-seed42.old" in log
    assert not old.exists() and (recipe.folder / "exp/trans/none-seed42.old/epoch-1.pt").read_text() == "weights"


def test_two_tokenizers_and_no_choice_stop_the_training(recipe):
    recipe.run("--stop-stage", "0")
    recipe.run("--stop-stage", "0", "--token-kind", "char")
    assert "no single tokenizer among" in recipe.run("--stage", "1", code=2)[1]
    chosen = ["--stage", "4", "--stop-stage", "4", "--token-kind", "bpe", "--systems", "none"]
    assert recipe.run(*chosen)[0] == ["train.py"]


def test_streaming_students_have_names_of_their_own_and_are_decoded_at_each_chunk_size(recipe):
    recipe.run("--systems", "mvq")
    options = ["--systems", "mvq", "--streaming", "true"]
    assert recipe.run(*options)[0] == ["train.py", "decode.py", "decode.py", "results.py"]
    training = Path(f"{recipe.log}.words").read_text().splitlines()[-1]
    assert "--exp-dir exp/trans/mvq-streaming-seed42 " in training and "--streaming true " in training
    decodings = Path(f"{recipe.log}.decodings").read_text().splitlines()[-2:]
    for chunk, decoding in zip((8, 16), decodings, strict=True):
        words = f"--decode-chunk-size {chunk} --left-context-frames 64 --chunk-by-chunk true "
        assert words in decoding and "mvq-streaming-seed42" in decoding
    assert recipe.run(*options)[0] == ["results.py"]
    # Another chunk size is decoded, nothing else.
    assert recipe.run(*options, "--decode-chunks", "8 32")[0] == ["decode.py", "results.py"]
    assert recipe.run("--systems", "mvq")[0] == ["results.py"]
