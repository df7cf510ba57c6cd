"""What run_hubert.sh starts, with what options, and starts again."""

from pathlib import Path

import pytest
from recipe_copy import PREPARED, REPO, RecipeCopy

from icefall_kd.cli import parse_config
from icefall_kd.config import TrainConfig
from icefall_kd.models.hubert import HubertShape

# Structure, front end, weights of states and clusters (None: no teacher), whether the front end learns alone at first.
SYSTEMS = {
    "scratch": ("deep_thin", "waveform", None, False),
    "fbank-scratch": ("deep_thin", "fbank", None, False),
    "deep-reg": ("deep_thin", "waveform", (1, 0), False),
    "deep-disc": ("deep_thin", "waveform", (0, 1), False),
    "deep-both": ("deep_thin", "waveform", (1, 1), False),
    "deep-type3": ("deep_thin", "waveform", (1, 1), False),
    "wide-reg": ("shallow_wide", "waveform", (1, 0), False),
    "wide-both": ("shallow_wide", "waveform", (1, 1), False),
    "fbank-one": ("deep_thin", "fbank", (1, 0), False),
    "fbank-two": ("deep_thin", "fbank", (1, 0), True),
    "fbank-both": ("deep_thin", "fbank", (1, 1), True),
    "distilhubert": ("shallow_wide", "waveform", (1, 0), False),
    "fithubert": ("fithubert", "waveform", (1, 0), False),
}


@pytest.fixture
def recipe(tmp_path) -> RecipeCopy:
    return RecipeCopy(tmp_path / "a copy", "run_hubert.sh", "--hours", "all", "--similarity", "false")


def words_of(recipe: RecipeCopy, script: str) -> list[list[str]]:
    lines = Path(f"{recipe.log}.words").read_text().splitlines()
    found = [line.split() for line in lines if line.split()[0].endswith(script)]
    return [[word.replace("--config=", f"--config={recipe.folder}/") for word in words] for words in found]


def trainings(recipe: RecipeCopy) -> dict[str, TrainConfig]:
    """Return the options of each training by the name of its exp_dir, in the order of their starts."""
    found = (parse_config(TrainConfig, words[1:]) for words in words_of(recipe, "train.py"))
    return {config.loop.exp_dir.name: config for config in found}


def test_every_system_gets_its_structure_losses_and_start(recipe):
    more = ("--teacher", "own", "--num-clusters", "100", "--teacher-seed", "7", "--seeds", "1 2", "--stop-stage", "5")
    recipe.run("--systems", " ".join(["teacher", *SYSTEMS]), *more)
    found, folder = trainings(recipe), Path("exp/trans-hubert")
    distilled = [name for name, (_, _, losses, _) in SYSTEMS.items() if losses]
    tuned = [f"{name}-all-seed{seed}" for seed in (1, 2) for name in ("teacher", *SYSTEMS)]
    assert list(found) == ["ssl1", *(f"distil-{name}" for name in distilled), *tuned]
    for name, config in found.items():
        assert config.system == "hubert" and not config.augment.spec_aug, name
        assert config.loop.seed == (int(name[-1]) if "-seed" in name else 7), name
    ssl = found["ssl1"]
    assert (ssl.objective, ssl.hubert.structure, ssl.ssl.front_end) == ("ssl", "base", "waveform")
    assert (ssl.ssl.mask_prob, ssl.ssl.mask_span, ssl.ssl.extractor_norm) == (0.8, 10, "default")
    assert ssl.kd.label_dir == [folder / "labels/clusters1"]
    for name, (structure, front_end, losses, first_stage) in SYSTEMS.items():
        tuned = found[f"{name}-all-seed1"]
        assert (tuned.objective, tuned.hubert.structure, tuned.ssl.front_end) == ("asr", structure, front_end), name
        assert tuned.asr.ctc_scale == 1 and tuned.asr.transducer_scale == 0 and tuned.optim.lr_schedule == "tri_stage"
        assert tuned.loop.init_from == (folder / f"distil-{name}" if losses else None), name
        # Without a teacher the front end learns, and log-mel features have their statistics from the corpus.
        assert (tuned.ssl.feature_grad_scale == 0) == (losses is not None), name
        assert (tuned.hubert.cmvn is not None) == (name == "fbank-scratch"), name
        if losses is None:
            continue
        config = found[f"distil-{name}"]
        kd = config.hubert_kd
        assert (config.objective, config.hubert, config.ssl.front_end) == ("distil", config.hubert, front_end), name
        assert config.hubert.structure == structure and config.model == tuned.model, name
        assert config.teacher.teacher == str(folder / "ssl1") and config.kd.teacher_labels == "online", name
        assert (kd.rec_scale, kd.disc_scale) == losses, name
        assert (kd.frontend_steps > 0) == first_stage and (config.hubert.cmvn is not None) == (front_end == "fbank")
        assert kd.init_from_teacher == (front_end == "waveform" and structure != "fithubert"), name
    assert found["teacher-all-seed1"].loop.init_from == folder / "ssl1"
    assert found["distil-deep-type3"].hubert_kd.disc_type == "type3"
    assert found["distil-distilhubert"].hubert_kd.teacher_layers == [4, 8, 12]
    fit = found["distil-fithubert"].hubert_kd
    assert (fit.regression, fit.cos_scale, fit.layer_scales) == ("l2", 0, [0.1] * 11 + [1.0])


def test_each_later_pre_training_learns_clusters_of_its_forerunner(recipe):
    recipe.run("--systems", "deep-both", "--teacher", "own", "--num-clusters", "10 20 30", "--stop-stage", "1")
    first, second, third = words_of(recipe, "train_kmeans.py")
    told = [[words[words.index(o) + 1] for o in ("--teacher", "--num-clusters")] for words in (first, second, third)]
    assert told == [["mfcc", "10"], ["exp/trans-hubert/ssl1", "20"], ["exp/trans-hubert/ssl2", "30"]]
    assert "--layer" not in first and second[second.index("--layer") + 1] == "6"
    for number, words in enumerate(words_of(recipe, "extract_labels.py")[::8], start=1):  # eight shards
        assert words[words.index("--label-dir") + 1] == f"exp/trans-hubert/labels/clusters{number}"
        # Pieces are those that the training hears; validation needs labels, too.
        assert words[words.index("--pieces") + 1] == "15.6" and "cuts_dev.jsonl.gz" in words[words.index("--cuts") + 1]
    labels = {name: config.kd.label_dir for name, config in trainings(recipe).items()}
    assert labels == {f"ssl{i}": [Path(f"exp/trans-hubert/labels/clusters{i}")] for i in (1, 2, 3)}
    assert all(config.ssl.crop_duration == 15.6 for config in trainings(recipe).values())


def test_transcripts_are_chosen_from_a_part_and_the_distilled_student_is_shared(recipe):
    recipe.run("--systems", "deep-reg", "--teacher", "own", "--hours", "10min 1h all", "--stop-stage", "5")
    found = trainings(recipe)
    parts = {name: config.data.train_parts for name, config in found.items() if name.startswith("deep")}
    assert parts == {
        "deep-reg-10min-seed42": ["data/trans/hours-seed42/cuts_train_10min.jsonl.gz"],
        "deep-reg-1h-seed42": ["data/trans/hours-seed42/cuts_train_1h.jsonl.gz"],
        "deep-reg-all-seed42": ["train"],
    }
    assert {found[name].loop.init_from.name for name in parts} == {"distil-deep-reg"}
    assert found["deep-reg-1h-seed42"].hubert_asr.freeze_steps == 10000
    assert found["distil-deep-reg"].data.train_parts == ["train"]


def test_teacher_and_students_that_are_trained_already_serve_another_experiment(recipe):
    options = ["--systems", "teacher fbank-both", "--teacher", "own", "--num-clusters", "10", "--num-shards", "1"]
    recipe.run(*options, "--exp-dir", "exp/heard", "--stop-stage", "3")
    before = list(trainings(recipe))
    assert before == ["ssl1", "distil-fbank-both"]
    started, _ = recipe.run(*options, "--exp-dir", "exp/tuned", "--audio-dir", "exp/heard/", "--stop-stage", "5")
    assert started == ["train.py"] * 2
    found = trainings(recipe)
    starts = {name: found[name].loop.init_from for name in ("teacher-all-seed42", "fbank-both-all-seed42")}
    assert list(map(str, starts.values())) == ["exp/heard/ssl1", "exp/heard/distil-fbank-both"]
    assert found["fbank-both-all-seed42"].loop.exp_dir == Path("exp/tuned/fbank-both-all-seed42")
    started, log = recipe.run("--systems", "deep-reg", "--teacher", "own", "--audio-dir", "exp/heard", code=2)
    assert started == [] and "--audio-dir exp/heard has no distil-deep-reg/train_summary.json" in log


def test_what_changed_runs_again_and_nothing_else(recipe):
    options = ["--systems", "scratch fbank-both", "--teacher", "own", "--num-clusters", "10", "--num-shards", "1"]
    labels = ["train_kmeans.py", "extract_labels.py", "label_sets.py", "label_sets.py"]
    trained = ["train.py", "compute_cmvn.py", *["train.py"] * 3]
    everything = [*PREPARED, *labels, *trained, *["decode.py"] * 2, "results.py"]
    assert recipe.run(*options)[0] == everything
    assert recipe.run(*options)[0] == ["results.py"]
    # Another seed: what is distilled is shared.
    assert recipe.run(*options, "--seeds", "42 1")[0] == [*["train.py"] * 2, *["decode.py"] * 2, "results.py"]
    # Other options of distillation alone: the student follows, when its summary is another; the stand-in's never is.
    started, log = recipe.run(*options, "--distil-args", "--num-epochs 9")
    assert started == ["train.py", "results.py"] and "stage 3 distil [fbank-both]: runs, option train_args" in log


def test_without_a_student_no_teacher_is_trained(recipe):
    started = recipe.run("--systems", "scratch", "--teacher", "own", "--similarity", "true")[0]
    assert started == [*PREPARED, "train.py", "decode.py", "results.py"]


def test_layers_are_compared_before_and_after_fine_tuning(recipe):
    (recipe.root / "hubert.pt").write_text("x")
    options = ["--systems", "scratch deep-reg", "--teacher", str(recipe.root / "hubert.pt")]
    started = recipe.run(*options, "--similarity", "true")[0]
    assert started == [*PREPARED, *["train.py"] * 3, *["decode.py"] * 2, *["similarity.py"] * 2, "results.py"]
    found = sorted(file.name for file in (recipe.folder / "exp/trans-hubert/similarity").iterdir())
    assert found == ["deep-reg-all-seed42.json", "deep-reg.json"]


def test_a_teacher_that_cannot_serve_a_system_is_told_before_anything_runs(recipe):
    started, log = recipe.run("--systems", "deep-both", "--teacher", "some/hub-id", code=2)
    assert started == [] and "some/hub-id is a folder of the hub, which holds no clusters" in log
    started, log = recipe.run("--systems", "teacher", "--teacher", "some/hub-id", code=2)
    assert started == [] and "only trainings of this project are fine-tuned" in log
    (recipe.root / "hubert.pt").write_text("x")
    started = recipe.run("--systems", "deep-both", "--teacher", str(recipe.root / "hubert.pt"), "--stop-stage", "3")[0]
    assert started == [*PREPARED, "train.py"]


def test_a_wrong_system_amount_or_config_is_told_before_anything_runs(recipe):
    started, log = recipe.run("--config", "conf/none.yaml", code=2)
    assert started == [] and "--config conf/none.yaml is no file" in log
    started, log = recipe.run("--systems", "deep-reg tall", code=2)
    assert started == [] and "--systems names tall; there are teacher, scratch" in log
    started, log = recipe.run("--hours", "ten", code=2)
    assert started == [] and "--hours names ten" in log


@pytest.mark.parametrize("recipe", ["librispeech", "aishell"])
@pytest.mark.parametrize("name", ["hubert", "hubert_demo"])
def test_the_options_of_both_recipes_and_their_demos_fit_together(recipe, name):
    conf = REPO / "egs" / recipe / "conf"

    def options(objective, *layers):
        files = [conf / f"{name}_{layer}.yaml" for layer in layers]
        files = [file if file.is_file() else conf / f"hubert_{file.name.removeprefix(f'{name}_')}" for file in files]
        words = [f"--config={file}" for file in (conf / f"{name}.yaml", *files)]
        return parse_config(TrainConfig, [*words, "--system", "hubert", "--objective", objective])

    teacher = options("ssl", "base", "ssl")
    for layers, more in {("deep",): "deep_distil", ("wide",): "wide_distil", ("deep", "fbank"): "fbank_distil"}.items():
        student = options("distil", *layers, "distil", more)
        for tuned in (options("asr", *layers, "tuned"), options("asr", *layers, "tuned", "scratch")):
            assert (tuned.model, tuned.hubert) == (student.model, student.hubert)
        shapes = [HubertShape.from_config(config.model, config.hubert) for config in (teacher, student)]
        # Layer by layer, each has one to learn from; what starts from the teacher has its width.
        assert student.hubert_kd.kd_heads == "expand_last" or shapes[0].num_layers == shapes[1].num_layers
        assert layers != ("wide",) or (shapes[0].dim, shapes[0].num_heads) == (shapes[1].dim, shapes[1].num_heads)
        assert max(student.hubert_kd.teacher_layers or [1]) <= shapes[0].num_layers
