"""What run_dualmode.sh starts, with what options, and starts again."""

from pathlib import Path

import pytest
from recipe_copy import PREPARED, RecipeCopy

from icefall_kd.cli import parse_config
from icefall_kd.config import TrainConfig

# Section of experiments: which modes are pre-trained, which are trained, and whether streams are sparse.
EXPERIMENTS = {
    "a1": (None, "full", False),
    "a2": (None, "streaming", False),
    "a3": (None, "streaming", True),
    "a4": (None, "dual", False),
    "a5": (None, "dual", True),
    "b1": ("full", "full", False),
    "b2": ("full", "streaming", True),
    "b3": ("full", "dual", True),
    "b4": ("streaming", "streaming", True),
    "c1": ("dual", "full", False),
    "c2": ("dual", "dual", True),
}


@pytest.fixture
def recipe(tmp_path) -> RecipeCopy:
    return RecipeCopy(tmp_path / "a copy", "run_dualmode.sh", "--decode-chunks", "16")


def trainings(recipe: RecipeCopy) -> dict[str, list[str]]:
    """Return the words of each training by the name of its exp_dir, in the order of their starts."""
    found = {}
    for line in Path(f"{recipe.log}.words").read_text().splitlines():
        if "train.py" in line:
            words = [w.replace("--config=", f"--config={recipe.folder}/") for w in line.split("train.py ")[1].split()]
            found[words[words.index("--exp-dir") + 1].split("/")[-1]] = words
    return found


def decodings(recipe: RecipeCopy) -> list[str]:
    lines = Path(f"{recipe.log}.decodings").read_text().splitlines()
    kept = ("--exp-dir", "--decode-chunk-size", "--sparse", "--encoder-mode")
    return [" ".join(w for flag, w in zip(x.split(), x.split()[1:], strict=False) if flag in kept) for x in lines]


def test_every_experiment_gets_its_modes_masks_and_start(recipe):
    recipe.run("--systems", " ".join(EXPERIMENTS), "--seeds", "1 2", "--ssl-seed", "7", "--stop-stage", "2")
    found = trainings(recipe)
    arms = ["ssl-full", "ssl-streaming", "ssl-dual"]
    assert list(found) == [*arms, *(f"{system}-seed{seed}" for seed in (1, 2) for system in EXPERIMENTS)]
    found = {name: parse_config(TrainConfig, words) for name, words in found.items() if not name.endswith("-seed2")}
    for arm in arms:  # one for all seeds, of audio alone, of the recognisers' encoder
        config = found[arm]
        assert (config.loop.seed, config.objective, config.augment.spec_aug) == (7, "ssl", False)
        assert config.dual.modes == arm.removeprefix("ssl-") and config.model == found["a5-seed1"].model
        assert config.dual.sparsity == (0 if arm == "ssl-full" else 0.7)
    for name, config in found.items():
        dual, system = config.dual, name.partition("-seed")[0]
        assert config.model.streaming and config.model.convolution == "chunk" and config.system == "dualmode"
        if system not in EXPERIMENTS:
            continue
        start, modes, sparse = EXPERIMENTS[system]
        assert (config.objective, dual.modes, dual.sparsity) == ("asr", modes, 0.7 if sparse else 0), name
        init = config.loop.init_from
        assert (init and f"{init}") == (start and f"exp/trans-dualmode/ssl-{start}"), name
        assert (dual.dual_kd_scale > 0) == (modes == "dual") and f"{config.loop.seed}" == name[-1]
        # Masks of pre-training are there from the beginning; others grow in it.
        begins_sparse = system in ("b4", "c2")
        assert (dual.in_steps(1000).prune_end_step == 0) == begins_sparse, name
        # They stay before the last fifth, and the final sparsity is reached before.
        steps = dual.in_steps(100000)
        assert steps.prune_end_step <= steps.mask_freeze_step - steps.mask_interval and steps.mask_freeze_step <= 80000


def test_each_mode_that_was_trained_is_decoded(recipe):
    recipe.run("--systems", "a1 a2 a3 a4 a5", "--decode-chunks", "8 32", "--stop-stage", "3")
    folder = "exp/trans-dualmode/{}-seed42"
    streams = [f"{folder} 8", f"{folder} 32"]
    wanted = {"a1": [folder], "a2": streams, "a3": streams, "a4": [folder, *streams], "a5": [folder, *streams]}
    before = decodings(recipe)
    assert before == [line.format(system) for system, lines in wanted.items() for line in lines]
    # The diagnostics are of what has masks: a3 has one mode, a5 two.
    recipe.run("--systems", "a1 a2 a3 a4 a5", "--stage", "3", "--stop-stage", "3", "--diagnostics", "true")
    more = [line.format("a3") for line in (f"{folder} 16", f"{folder} 16 false")]
    more += [line.format("a5") for line in (f"{folder} 16", f"{folder} 16 false", f"{folder} full true")]
    again = [line for line in decodings(recipe)[len(before) :] if "a3" in line or "a5" in line]
    assert again == more


def test_what_changed_runs_again_and_nothing_else(recipe):
    options = ["--systems", "a5 c2"]
    everything = [*PREPARED, *["train.py"] * 3, *["decode.py"] * 4, "results.py"]
    assert recipe.run(*options)[0] == everything
    assert recipe.run(*options)[0] == ["results.py"]
    # Another chunk: decoded in it, and no more.
    assert recipe.run(*options, "--decode-chunks", "16 8")[0] == [*["decode.py"] * 2, "results.py"]
    # Other pre-training: what starts from it follows, when its summary is another; the stand-in's never is.
    started, log = recipe.run(*options, "--ssl-args", "--num-epochs 9")
    assert started == ["train.py", "results.py"] and "stage 1 pretrain [ssl-dual]: runs, option train_args" in log
    assert recipe.run("--systems", "a5 c2 b3", "--ssl-args", "--num-epochs 9")[0] == [
        *["train.py"] * 2, *["decode.py"] * 2, "results.py",
    ]  # fmt: skip


def test_pre_training_can_be_brought_along_and_hear_other_parts(recipe):
    brought = recipe.root / "brought"
    (brought / "ssl-dual").mkdir(parents=True)
    (brought / "ssl-dual/train_summary.json").write_text("x")
    started, log = recipe.run("--systems", "c2 b1", "--ssl-dir", str(brought), code=2)
    assert started == [] and "--systems names b1, but --ssl-dir" in log and "has no ssl-full" in log
    started = recipe.run("--systems", "c2", "--ssl-dir", f"{brought}/", "--stop-stage", "2")[0]
    assert started == [*PREPARED, "train.py"]
    line = Path(f"{recipe.log}.words").read_text()
    assert f"--init-from {brought}/ssl-dual" in line
    cuts = recipe.folder / "data/trans/fbank/cuts_train.jsonl.gz"
    more = ["--ssl-parts", f"train,{cuts}", "--ssl-valid-parts", "dev", "--stage", "1", "--stop-stage", "1"]
    recipe.run("--systems", "c2", *more)
    line = Path(f"{recipe.log}.words").read_text().splitlines()[-1]
    assert f"--train-parts train,{cuts} " in line and "--objective ssl" in line


def test_trainings_run_side_by_side_and_a_failed_one_is_told(recipe):
    assert recipe.run("--systems", "a1 a3 a5", "--train-jobs", "2", "--stop-stage", "2")[0] == [
        *PREPARED, *["train.py"] * 3,
    ]  # fmt: skip
    assert set(trainings(recipe)) == {"a1-seed42", "a3-seed42", "a5-seed42"}
    stand_in = recipe.root / "bin/python3"
    stand_in.write_text(stand_in.read_text().replace("declare -A o", 'declare -A o\n[[ $* != *fails* ]] || exit 3'))
    options = ["--systems", "a1 a2", "--train-jobs", "2", "--exp-dir", "exp/fails", "--stage", "2", "--stop-stage", "2"]
    log = recipe.run(*options, code=3)[1]
    assert "failed with exit code 3: train_one a" in log and "stage 2 train failed with exit code 3" in log


def test_a_wrong_system_or_config_is_told_before_anything_runs(recipe):
    started, log = recipe.run("--config", "conf/none.yaml", code=2)
    assert started == [] and "conf/none.yaml of --config or --ssl-config is no file" in log
    started, log = recipe.run("--systems", "a5 d1", code=2)
    assert started == [] and "--systems names d1; there are a1 to a5, b1 to b4, c1 and c2" in log
