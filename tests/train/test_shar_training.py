"""A training out of a Shar: stopped anywhere and resumed, its losses and weights are the same bit by bit."""

import pytest
import torch
from micro_corpus import write_corpus
from shar_toys import write_label_sets, write_shar

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.recipe import train_main
from icefall_kd.train.checkpoint import load_checkpoint, load_newest
from icefall_kd.train.metrics import read_metrics

OPTIONS = """
--encoder-size tiny --num-encoder-layers 2 --encoder-dim 16 --num-heads 2 --feedforward-dim 16 --cnn-kernel 3
--decoder-dim 8 --joiner-dim 8 --max-duration 4 --num-workers 0 --num-epochs 2 --device cpu --num-threads 1
--train-parts train --valid-parts dev --kd mvq --shar-streams 2 --shar-buffer 8 --num-buckets 2 --log-interval 1
""".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("shar_training"), num_train=24)
    write_label_sets(folder)
    write_shar(folder)
    return folder


def run(corpus, exp_dir, *options, shar="shar"):
    paths = {"manifest-dir": "fbank", "lang-dir": "lang_char", "label-dir": "codes", "shar-dir": shar}
    found = [word for name, path in paths.items() for word in (f"--{name}", str(corpus / path))]
    assert train_main([*OPTIONS, *found, "--exp-dir", str(exp_dir), *options]) == 0
    return [r["loss"] for r in read_metrics(exp_dir / "log" / "metrics.jsonl", "train")]


def test_stopped_in_the_middle_of_an_epoch_it_goes_on_bit_by_bit(corpus, tmp_path):
    losses = run(corpus, tmp_path / "whole")
    steps = len(losses)
    assert steps >= 8
    # Within the first epoch, behind its last batch, and within the second, with other numbers of workers.
    for k, workers in ((2, "0"), (steps // 2, "2"), (steps - 2, "1")):
        run(corpus, tmp_path / "parts", "--max-steps", str(k), "--num-workers", workers)
    saved = load_newest(tmp_path / "parts")[1]["train"]
    (position,) = saved["positions"]
    assert saved["batch"] == sum(stream["batches"] for stream in position["streams"]) > 0
    assert {"shard", "offset", "held"} < position["streams"][0].keys()
    assert run(corpus, tmp_path / "parts") == losses
    a, b = (load_checkpoint(tmp_path / name / "epoch-2.pt") for name in ("whole", "parts"))
    for group in ("model", "model_avg"):
        assert all(torch.equal(a[group][name], b[group][name]) for name in a[group])
    assert a["train"]["positions"] == b["train"]["positions"] == []


def test_it_does_not_go_on_with_other_streams_or_another_shar(corpus, tmp_path):
    run(corpus, tmp_path, "--max-steps", "2")
    with pytest.raises(ConfigError, match="--shar-streams: 2 -> 1"):
        run(corpus, tmp_path, "--shar-streams", "1")
    write_shar(corpus, "other", num_shards=3)
    with pytest.raises(DataError, match=r"the data is not what .* was trained on"):
        run(corpus, tmp_path, shar="other")
