"""What run_hubert.sh starts, with what options, and starts again."""

import subprocess
from pathlib import Path

import pytest
from hubert_toys import write_teacher
from recipe_copy import PREPARED, REPO, RecipeCopy
from ssl_toys import write_speech

from icefall_kd.cli import parse_config
from icefall_kd.config import TrainConfig
from icefall_kd.labels.store import LabelStore
from icefall_kd.models.hubert import HubertShape
from icefall_kd.train.metrics import read_metrics

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


def words_of(recipe: RecipeCopy, script: str, log: str = "words") -> list[list[str]]:
    lines = Path(f"{recipe.log}.{log}").read_text().splitlines()
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


STORED = ["--systems", "wide-both fbank-two", "--teacher", "own", "--num-clusters", "10", "--num-shards", "1"]


def stored_paths(layer: int, end: str, folder: str = "labels") -> str:
    return f"exp/trans-hubert/{folder}/trans-hubert-ssl1-layer{layer}-{end}"


def test_stored_states_are_of_the_layers_that_students_compare_with(recipe):
    options = [*STORED, "--states", "stored", "--stop-stage", "3"]
    before = [*PREPARED, "train_kmeans.py", "extract_labels.py", "label_sets.py", "label_sets.py", "train.py"]
    labels = ["extract_labels.py", *["label_sets.py"] * 4]  # three sets: one check, and what each covers
    started = recipe.run(*options)[0]
    assert started == [*before, "compute_cmvn.py", *["teacher_layers.py"] * 2, *labels, *["train.py"] * 2]
    # Layers are asked for with the options of the training, but for where its states come from.
    for words in words_of(recipe, "teacher_layers.py", "layers"):
        assert words[1] == "--out"
        config = parse_config(TrainConfig, words[3:])
        assert (config.system, config.objective, config.kd.teacher_labels) == ("hubert", "distil", "online")
    extraction = words_of(recipe, "extract_labels.py")[-1]
    told = {name: extraction[extraction.index(f"--{name}") + 1] for name in ("teacher", "layer", "kind", "label-dir")}
    sets = {layer: stored_paths(layer, "states") for layer in (0, 2, 4)}
    assert told["label-dir"] == ",".join(sets.values())
    assert (told["teacher"], told["layer"], told["kind"]) == ("exp/trans-hubert/ssl1", "0,2,4", "embeddings")
    # The audio is what the training hears, validation included, and the teacher's precision that of online states.
    assert extraction[extraction.index("--pieces") + 1] == "15.6" and "--quantizer" not in extraction
    assert "cuts_dev.jsonl.gz" in extraction[extraction.index("--cuts") + 1]
    assert extraction[extraction.index("--teacher-dtype") + 1] == "float32"
    found = trainings(recipe)
    for name, layers in (("distil-wide-both-stored", (2, 4)), ("distil-fbank-two-stored", (0, 2))):
        kd = found[name].kd
        assert (kd.teacher_labels, kd.label_dir) == ("stored", [Path(sets[layer]) for layer in layers])
        assert found[name].ssl.crop_duration == 15.6 and found[name].hubert_kd.kd_quantizers == []
    assert recipe.run(*options)[0] == []
    # Fewer students: the list of layers is another, once; online students have folders of their own.
    fewer = [*options, "--systems", "fbank-two"]
    assert recipe.run(*fewer)[0] == [*labels[:-1]] and recipe.run(*fewer)[0] == [] and recipe.run(*options)[0] == []
    assert recipe.run(*fewer, "--states", "online", "--stop-stage", "5")[0] == ["train.py"] * 2
    assert recipe.run(*fewer, "--stop-stage", "5")[0] == ["train.py"]
    # What learns of no states is the same, whatever these are.
    assert recipe.run(*fewer, "--systems", "scratch teacher", "--stop-stage", "5")[0] == ["train.py"] * 2
    assert recipe.run(*fewer, "--systems", "scratch teacher", "--states", "online", "--stop-stage", "5")[0] == []
    starts = {name: str(c.loop.init_from) for name, c in trainings(recipe).items() if name.startswith("fbank-two")}
    names = {f"fbank-two{tag}-all-seed42": f"exp/trans-hubert/distil-fbank-two{tag}" for tag in ("", "-stored")}
    assert starts == names


def test_stored_codes_have_a_quantizer_a_layer(recipe):
    options = [*STORED, "--states", "mvq", "--num-codebooks", "4", "--stop-stage", "3"]
    labels = [*["train_quantizer.py"] * 3, "extract_labels.py", *["label_sets.py"] * 4, *["train.py"] * 2]
    assert recipe.run(*options)[0][-len(labels) :] == labels
    files = {n: f"{stored_paths(n, 'q4', 'quantizers')}/quantizer.safetensors" for n in (0, 2, 4)}
    made = words_of(recipe, "train_quantizer.py", "quantizers")
    assert [(words[words.index("--layer") + 1], words[words.index("--out") + 1]) for words in made] == [
        (str(layer), file) for layer, file in files.items()
    ]
    # Codes are made of the training's audio alone.
    assert not any("cuts_dev" in words[words.index("--cuts") + 1] for words in made)
    extraction = words_of(recipe, "extract_labels.py")[-1]
    assert extraction[extraction.index("--quantizer") + 1] == ",".join(files.values())
    assert extraction[extraction.index("--kind") + 1] == "codebook_indexes"
    config = trainings(recipe)["distil-wide-both-mvq"]
    assert config.kd.label_dir == [Path(stored_paths(layer, "q4")) for layer in (2, 4)]
    assert config.hubert_kd.kd_quantizers == [Path(files[layer]) for layer in (2, 4)]
    assert recipe.run(*options)[0] == []
    # Another size: the layers are known, and what hangs on the size is made beside the first.
    assert recipe.run(*options, "--num-codebooks", "8")[0][:4] == labels[:4]


@pytest.fixture
def place(tmp_path) -> Path:
    """Audio that is prepared, with a longer utterance, and a tiny teacher."""
    write_speech(tmp_path / "data", "train", [0.6, 0.65, 0.7, 1.3])
    write_speech(tmp_path / "data", "dev", [0.7], seed=1)
    write_teacher(tmp_path / "teacher")
    (tmp_path / "teacher/train_summary.json").write_text("{}")
    return tmp_path


def test_students_of_stored_states_and_of_codes_are_really_trained(place, recipe_env):
    sizes = "--extractor-channels 16 --conv-pos 8 --conv-pos-groups 4 --num-encoder-layers 1 --encoder-dim 32"
    small = f"{sizes} --num-heads 4 --feedforward-dim 48 --max-steps 2 --max-duration 2 --log-interval 1 --device cpu"
    line = ["bash", REPO / "egs/librispeech/run_hubert.sh", "--stage", "3", "--stop-stage", "3", "--data-dir"]
    line += [place / "data", "--exp-dir", place / "exp", "--train-parts", "train", "--valid-parts", "dev", "--teacher"]
    line += [place / "teacher", "--systems", "wide-both", "--crop-duration", "0.8", "--num-shards", "1", "--train-args"]
    line += [small, "--distil-args", "--teacher-layers 2", "--short", "true", "--num-codebooks", "2"]

    def run(states: str) -> str:
        done = subprocess.run([*map(str, line), "--states", states], capture_output=True, text=True, env=recipe_env)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    for states, kind in (("stored", "embeddings"), ("mvq", "codebook_indexes")):
        run(states)
        for layer in (2, 3):  # the one that is predicted, and the last, for clusters
            name = f"{place.name}-teacher-layer{layer}-{'states' if states == 'stored' else 'q2'}"
            store = LabelStore(place / "exp/labels" / name)
            # The longer utterance is stored in the two pieces that the training hears.
            assert (store.info.kind, store.info.layer, len(list(store.keys()))) == (kind, layer, 6)
        rows = read_metrics(place / f"exp/distil-wide-both-{states}/log/metrics.jsonl", "train")
        assert {"rec_loss", "cos_loss", "disc_loss", "rec_H2"} <= rows[0].keys() and "rec_H3" not in rows[0]
    log = run("mvq")
    assert ": runs, " not in log and log.count("done before, skipped") == 5


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
    started, log = recipe.run("--states", "offline", code=2)
    assert started == [] and "--states is offline; teacher states are online, stored or mvq" in log
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
