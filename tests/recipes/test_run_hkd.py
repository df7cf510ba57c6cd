"""What run_hkd.sh starts, with what options, and starts again."""

from pathlib import Path

import pytest
from recipe_copy import PREPARED, RecipeCopy

from icefall_kd.cli import parse_config
from icefall_kd.config import TrainConfig

STATES = ["extract_text_states.py", *["label_sets.py"] * 3]  # verify, join, align


@pytest.fixture
def recipe(tmp_path) -> RecipeCopy:
    options = ["--num-shards", "1", "--decoding-methods", "cif_greedy_search", "--plm", "tiny-random-masked"]
    return RecipeCopy(tmp_path / "a copy", "run_hkd.sh", *options)


def started_lines(recipe: RecipeCopy, name: str) -> list[str]:
    return [line for line in Path(f"{recipe.log}.words").read_text().splitlines() if name in line]


def trainings(recipe: RecipeCopy) -> dict[str, str]:
    """Return the command line of each training by the name of its exp_dir."""
    return {line.split("--exp-dir ")[1].split()[0].split("/")[-1]: line for line in started_lines(recipe, "train.py")}


def test_what_changed_runs_again_and_nothing_else(recipe):
    options = ["--systems", "cif both"]
    everything = [*PREPARED, *STATES, *["train.py"] * 2, *["decode.py"] * 2, *["report.py"] * 2, "results.py"]
    assert recipe.run(*options)[0] == everything
    assert recipe.run(*options)[0] == ["results.py"]
    # One system more: its training and decoding; the reports compare with it.
    started = recipe.run("--systems", "cif both lrd")[0]
    assert started == ["train.py", "decode.py", *["report.py"] * 3, "results.py"]
    # Another layer of the language model: other states, but nothing that the stand-in would make different.
    started, log = recipe.run("--systems", "cif both lrd", "--labels-args", "--plm-layer 1")
    assert started[:3] == STATES[:3] and "option labels_args changed: '' -> '--plm-layer 1'" in log
    assert "train.py" not in started
    # Another beam: decoded again where it is one, and told in the reports.
    beam = ["--decoding-methods", "cif_greedy_search cif_beam_search"]
    decoded = [*["decode.py"] * 2, *["report.py"] * 2, "results.py"]
    assert recipe.run(*options, "--labels-args", "--plm-layer 1", *beam)[0] == decoded
    again = recipe.run(*options, "--labels-args", "--plm-layer 1", *beam, "--beam-size", "4")[0]
    assert again == decoded


def test_each_system_gets_its_losses_and_its_labels(recipe):
    recipe.run("--systems", "cif acd lrd both", "--seeds", "1 2", "--stop-stage", "2")
    found = trainings(recipe)
    assert list(found) == [f"{system}-seed{seed}" for seed in (1, 2) for system in ("cif", "acd", "lrd", "both")]
    (extraction,) = started_lines(recipe, "extract_text_states.py")  # one set for all seeds and systems
    folder = extraction.split("--label-dir ")[1].split()[0]
    assert folder.endswith("/labels/tiny-random-masked") and "--plm tiny-random-masked " in extraction
    configs = {}
    for name, line in found.items():
        system, seed = name.split("-seed")
        losses = {"cif": None, "acd": "acd", "lrd": "lrd", "both": "acd,lrd"}[system]
        options = ("text-kd", "label-dir")
        given = {o: line.split(f"--{o} ")[1].split()[0] if f"--{o} " in line else None for o in options}
        assert given == {"text-kd": losses, "label-dir": losses and folder}, name
        assert f"--seed {seed} " in line and "--system hkd " in line
        words = [word for word in line.split() if word.startswith("--config=")]
        configs[system] = parse_config(TrainConfig, [w.replace("=", f"={recipe.folder}/") for w in words])
    # All rows have one model and one schedule: what differs is the losses.
    for name in ("model", "attention", "cif", "optim", "loop", "data"):
        assert len({repr(getattr(config, name)) for config in configs.values()}) == 1, name


def test_without_distillation_no_language_model_is_needed(recipe):
    started = recipe.run("--systems", "cif", "--plm", "/no/such/folder")[0]
    assert started == [*PREPARED, "train.py", "decode.py", "report.py", "results.py"]


def test_states_belong_to_words_where_tokens_are_english_characters(recipe):
    for number, kind in enumerate(("char", "plm", "bpe")):
        out = ["--exp-dir", f"exp/{number}"]
        recipe.run("--systems", "acd", "--token-kind", kind, "--vocab-size", "50", *out, "--stop-stage", "2")
    units = [line.split("--text-alignment ")[1].split()[0] for line in started_lines(recipe, "train.py")]
    assert units == ["word", "token", "token"]
    recipe.run("--systems", "acd", "--token-kind", "plm", "--text-alignment", "word", "--stop-stage", "2")
    assert "--text-alignment word " in started_lines(recipe, "train.py")[-1]


def test_the_tokens_and_the_language_model_that_are_named_have_folders_of_their_own(recipe):
    recipe.run("--systems", "acd", "--stop-stage", "2")
    recipe.run("--systems", "acd", "--token-kind", "plm", "--plm", "hub/model", "--stop-stage", "2")
    folders = [line.split("--exp-dir ")[1].split()[0] for line in started_lines(recipe, "train.py")]
    assert folders == ["exp/trans-hkd-tiny-random-masked/acd-seed42", "exp/trans-hkd-plm-hub-model/acd-seed42"]


def test_the_usual_tokens_go_on_by_their_name_where_the_data_have_others_too(recipe):
    options = ["--systems", "acd", "--skip-stages", "4"]
    recipe.run(*options)
    recipe.run(*options, "--token-kind", "plm", "--stop-stage", "0")
    assert "choose with --token-kind" in recipe.run(*options, "--stage", "1", code=2)[1]
    assert recipe.run(*options, "--token-kind", "bpe", "--stage", "1")[0] == ["results.py"]


def test_random_weights_are_said_loudly(recipe):
    assert "a language model of RANDOM weights" in recipe.run("--stop-stage", "0")[1]
    assert "RANDOM" not in recipe.run("--stop-stage", "0", "--plm", "minilm")[1]


def test_a_wrong_system_or_config_is_told_before_anything_runs(recipe):
    started, log = recipe.run("--config", "conf/none.yaml", code=2)
    assert started == [] and "--config conf/none.yaml is no file" in log
    started, log = recipe.run("--systems", "cif best", code=2)
    assert started == [] and "--systems names best; there are cif, acd, lrd and both" in log
