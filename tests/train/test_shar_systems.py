"""Trainings of the other systems out of a Shar: what they need is there, and a resumed one ends in the same losses."""

import pytest
from micro_corpus import write_corpus
from shar_toys import write_shar
from text_toys import write_bert

from icefall_kd.config import ExtractTextConfig, LanguageModelConfig, SharConfig, TeacherConfig
from icefall_kd.data.shar_export import export_shar
from icefall_kd.labels.extract_text import extract_text_states
from icefall_kd.recipe import train_main
from icefall_kd.runtime.files import read_json
from icefall_kd.train.metrics import read_metrics
from tests.hubert_toys import hubert_config
from tests.ssl_toys import write_speech
from tests.train.test_hubert_pretraining import make_labels
from tests.train.test_ssl_training import arguments

LOOP = """
--num-workers 0 --num-epochs 2 --device cpu --num-threads 1 --shar-streams 2 --shar-buffer 8 --num-buckets 2
--log-interval 1 --train-parts train --valid-parts dev --max-duration 4
""".split()
CONFORMER = """
--encoder-size tiny --num-encoder-layers 2 --encoder-dim 16 --num-heads 2 --feedforward-dim 16 --cnn-kernel 3
""".split()
SYSTEMS = {
    "nar": "--attention-decoder mlm --num-decoder-layers 1 --decoder-feedforward-dim 16",
    "hkd": "--front-channels 8 --pool-layers [1] --num-decoder-layers 1 --decoder-feedforward-dim 16 --oom-scan false",
    "dualmode": "--decoder-dim 8 --joiner-dim 8 --chunk-size [4,8] --left-context-frames [8,-1] "
    "--streaming true --convolution chunk",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("shar_systems"), num_train=24)
    write_shar(folder)
    return folder


def losses(words, exp_dir):
    assert train_main([*words, "--exp-dir", str(exp_dir)]) == 0
    return [r["loss"] for r in read_metrics(exp_dir / "log" / "metrics.jsonl", "train")]


def stopped_and_resumed_is_the_same(words, tmp_path):
    whole = losses(words, tmp_path / "whole")
    assert len(whole) >= 4
    losses([*words, "--max-steps", str(len(whole) // 2 - 1)], tmp_path / "parts")
    assert losses(words, tmp_path / "parts") == whole


def recogniser(system, folder):
    paths = {"manifest-dir": "fbank", "lang-dir": "lang_char", "shar-dir": "shar"}
    found = [word for name, path in paths.items() for word in (f"--{name}", str(folder / path))]
    return [*CONFORMER, *LOOP, "--system", system, *SYSTEMS[system].split(), *found]


@pytest.mark.parametrize("system", SYSTEMS)
def test_recognisers_without_labels(corpus, tmp_path, system):
    stopped_and_resumed_is_the_same(recogniser(system, corpus), tmp_path)


def test_hkd_from_the_states_of_texts(tmp_path):
    """Their keys name texts, which several cuts of a shard share, and not audio."""
    folder = write_corpus(tmp_path / "corpus", num_train=24)
    cuts, states = folder / "fbank" / "cuts_train.jsonl.gz", folder / "states"
    bert = LanguageModelConfig(plm=str(write_bert(folder / "plm")), plm_device="cpu")
    extract_text_states(ExtractTextConfig(cuts=[cuts], label_dir=states, language_model=bert))
    write_shar(folder, label_dir=[states])
    words = [*recogniser("hkd", folder), "--text-kd", "acd,lrd", "--label-dir", str(states), "--acd-negatives", "3"]
    stopped_and_resumed_is_the_same(words, tmp_path)
    for record in read_metrics(tmp_path / "whole" / "log" / "metrics.jsonl", "train"):
        assert record["acd_loss"] > 0 and record["lrd_loss"] > 0
    found = read_json(tmp_path / "whole" / "train_summary.json")["text_coverage"]
    assert found == {"unit": "token", "utterances": 24, "aligned": 24, "missing": 0, "misaligned": 0}


def test_the_pre_training_of_hubert_from_clusters_of_pieces(tmp_path):
    """Audio, cut into pieces, and a label set of another kind: both travel in the Shar."""
    speech = tmp_path / "speech"
    write_speech(speech, "train", [1.2 + 0.1 * i for i in range(10)] + [4.5])
    write_speech(speech, "dev", [1.5, 1.7], seed=1)
    labels = make_labels(speech, tmp_path / "labels", TeacherConfig(teacher="mfcc", teacher_device="cpu"), 8)
    cuts = speech / "fbank" / "cuts_train.jsonl.gz"
    wanted = {"num_shards": 3, "label_dir": [labels], "store": "both", "pieces": 3.0}
    export_shar(SharConfig(cuts=[cuts], shar_dir=tmp_path / "shar", **wanted))
    config = hubert_config(
        "ssl", "base", ssl={"mask_prob": 0.8, "crop_duration": 3.0},
        kd={"teacher_labels": "stored", "label_dir": [labels]}, data={"manifest_dir": speech / "fbank"},
    )  # fmt: skip
    words = [*arguments(config), *LOOP, "--shar-dir", str(tmp_path / "shar"), "--max-duration", "4"]
    stopped_and_resumed_is_the_same(words, tmp_path)
