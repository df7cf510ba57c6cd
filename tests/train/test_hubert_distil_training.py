"""Distillation of HuBERT through train.py: stages, start from the teacher, stored and online states."""

import json

import pytest
import torch
from hubert_toys import arguments, hubert_config, samples, write_cmvn, write_teacher
from ssl_toys import write_speech

from icefall_kd.config import ExtractLayersConfig
from icefall_kd.config.labels import LayersConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.extract import extract_layers
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.recipe import train_main
from icefall_kd.systems import build_system
from icefall_kd.train.average import load_trained
from icefall_kd.train.checkpoint import load_checkpoint
from icefall_kd.train.hubert_transfer import start_from_teacher
from icefall_kd.train.metrics import read_metrics
from tests.train.toy import same_weights


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_speech(folder, "train", [0.6 + 0.05 * i for i in range(6)])
    write_speech(folder, "dev", [0.7, 0.8], seed=1)
    write_teacher(folder / "teacher")
    write_cmvn(folder / "cmvn.safetensors")
    return folder


def run(place, exp_dir, steps=2, **options):
    options = {"data": {"manifest_dir": place / "fbank", "max_duration": 2.0}, "teacher": place / "teacher", **options}
    config = hubert_config(loop={"exp_dir": exp_dir, "max_steps": steps, "num_epochs": 4, "oom_scan": True}, **options)
    assert train_main(arguments(config)) == 0
    return config


def newest(exp_dir):
    return load_checkpoint(max(exp_dir.glob("*.pt"), key=lambda f: (load_checkpoint(f)["train"]["step"], f.name)))


def test_a_resumed_training_of_two_stages_is_the_same_bit_by_bit(place, tmp_path):
    options = {
        "ssl": {"front_end": "fbank"},
        "hubert": {"cmvn": place / "cmvn.safetensors"},
        "hubert_kd": {"frontend_steps": 2},
        "model": {"dropout": 0.1},
    }
    run(place, tmp_path / "parts", steps=2, **options)
    first = newest(tmp_path / "parts")["model"]
    run(place, tmp_path / "parts", steps=4, **options)
    run(place, tmp_path / "whole", steps=4, **options)
    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert same_weights(whole["model"], parts["model"])
    # The first stage left the layers as they were drawn; weight decay, too, would have changed them.
    torch.manual_seed(42)
    drawn = build_system(hubert_config(teacher=place / "teacher", **options), 0).state_dict()
    changed = {name for name in drawn if not torch.equal(drawn[name], first[name])}
    learnt = ("model.encoder.subsampling.", "heads.front.")
    assert changed and all(name.startswith(learnt) and "cmvn" not in name for name in changed)
    # The second stage trains the rest, and not what only the first one needs.
    later = {name for name in drawn if not torch.equal(first[name], whole["model"][name])}
    assert "model.encoder.body.layers.2.feed_forward.output_dense.weight" in later
    assert not any(name.startswith("heads.front.") for name in later)
    metrics = read_metrics(tmp_path / "whole" / "log" / "metrics.jsonl", "train")
    assert ["frontend_loss" in m for m in metrics][:4] == [True, True, False, False]
    assert {"rec_loss", "cos_loss", "disc_loss", "cluster_acc", "rec_H3"} <= metrics[-1].keys()
    valid = read_metrics(tmp_path / "whole" / "log" / "metrics.jsonl", "valid")[-1]
    assert {"rec_loss", "cos_loss", "disc_loss"} <= valid.keys()
    assert not (tmp_path / "whole" / "tokenizer").exists()


def stored(place, layers, pieces=None, **options):
    """Extract label sets of layers of both parts; return their folders."""
    folders = [place / f"labels-{'-'.join(options) or 'states'}-{pieces}-{layer}" for layer in layers]
    config = ExtractLayersConfig(
        cuts=[place / "fbank" / f"cuts_{part}.jsonl.gz" for part in ("train", "dev")],
        label_dir=folders,
        kind=[options.get("kind", "embeddings")],
        quantizer=options.get("quantizer", []),
        pieces=pieces,
        teacher=LayersConfig(teacher=str(place / "teacher"), layer=list(layers), teacher_device="cpu"),
    )
    extract_layers(config.each())
    return folders


def losses(exp_dir, part="train"):
    return read_metrics(exp_dir / "log" / "metrics.jsonl", part)[0]


def test_stored_states_teach_what_the_teacher_teaches(place, tmp_path):
    front = {
        "ssl": {"front_end": "fbank"},
        "hubert": {"cmvn": place / "cmvn.safetensors"},
        "hubert_kd": {"frontend_steps": 1},
    }
    run(place, tmp_path / "online", **front)
    folders = stored(place, (0, 1, 2, 3))
    kd = {"teacher_labels": "stored", "label_dir": folders}
    run(place, tmp_path / "stored", kd=kd, **front)
    for part in ("train", "valid"):
        a, b = losses(tmp_path / "online", part), losses(tmp_path / "stored", part)
        names = [name for name in a if name.endswith("_loss") or name.startswith("rec_H")]
        assert names and [a[n] for n in names] == pytest.approx([b[n] for n in names], rel=2e-3)
    with pytest.raises(ConfigError, match="holds layers 1, 2, 3; layer 0 is needed"):
        run(place, tmp_path / "lacking", kd={**kd, "label_dir": folders[1:]}, **front)
    with pytest.raises(ConfigError, match="are both of layer 3"):
        run(place, tmp_path / "twice", kd={**kd, "label_dir": [*folders, folders[3]]}, **front)
    # Pieces of an utterance are other audio than what was labelled.
    with pytest.raises(DataError, match="does not cover the cuts"):
        run(place, tmp_path / "pieces", kd={**kd, "label_dir": folders[1:]}, ssl={"crop_duration": 0.6})


def test_stored_states_of_pieces_are_those_of_the_crops_that_the_student_hears(place, tmp_path):
    options = {"ssl": {"crop_duration": 0.65}}
    run(place, tmp_path / "online", **options)
    kd = {"teacher_labels": "stored", "label_dir": stored(place, (1, 2, 3), pieces=0.65)}
    run(place, tmp_path / "stored", kd=kd, **options)
    left_out = [(tmp_path / name / "left_out.jsonl").read_text() for name in ("online", "stored")]
    assert left_out[0] == left_out[1]
    # The first step: the same student, crops and teacher.  States in float16 are off by 2**-11 of themselves at most.
    a, b = losses(tmp_path / "online"), losses(tmp_path / "stored")
    names = [name for name in a if name.endswith("_loss") or name.startswith(("rec_H", "cos_H"))]
    assert {"rec_loss", "cos_loss", "disc_loss", "rec_H1", "cos_H3"} <= set(names)
    assert [b[n] for n in names] == pytest.approx([a[n] for n in names], rel=2**-11)
    # Another length of the crops has other pieces; none of them is taken for one that is stored.
    with pytest.raises(DataError, match="does not cover the cuts"):
        run(place, tmp_path / "other", kd=kd, ssl={"crop_duration": 0.7})


def test_codes_teach_what_they_stand_for(place, tmp_path):
    torch.manual_seed(1)
    quantizer = Quantizer(32, 2, 16)
    with torch.no_grad():
        quantizer.centers.mul_(20)
    file = tmp_path / "quantizer.safetensors"
    quantizer.save(file)
    folder = stored(place, (3,), kind="codebook_indexes", quantizer=[file])[0]
    options = {"hubert_kd": {"kd_quantizers": [file], "kd_heads": "expand_last"}}
    kd = {"teacher_labels": "stored", "label_dir": [folder]}
    run(place, tmp_path / "codes", kd=kd, **options)
    found = losses(tmp_path / "codes")
    assert {"rec_loss", "cos_loss", "disc_loss"} <= found.keys() and found["rec_loss"] > 0
    with pytest.raises(ConfigError, match="--kd-quantizers does not name"):
        run(place, tmp_path / "without", kd=kd)


def test_a_wide_student_starts_from_its_teacher(place, tmp_path):
    kd = {"init_from_teacher": True, "disc_scale": 0.0}
    run(place, tmp_path, steps=1, structure="shallow_wide", hubert_kd=kd, model={"num_encoder_layers": 2})
    report = json.loads((tmp_path / "transfer.json").read_text())
    theirs = load_trained(place / "teacher")[0]
    loaded = {n.removeprefix("model.encoder.") for n in report["tensors"]["loaded"]}
    assert report["parts"] == [
        "convolutions", "projection", "positional convolution", "norm in front of the layers", "layer 1", "layer 2",
    ]  # fmt: skip
    assert report["tensors"]["missing"] == [] and report["tensors"]["mismatched"] == []
    rest = {n.removeprefix("model.encoder.") for n in report["tensors"]["unexpected"]}
    assert {n.split(".")[2] for n in rest if n.startswith("body.layers.")} == {"2"}
    assert rest - {n for n in rest if n.startswith("body.layers.2.")} == {
        "subsampling.norm.weight",
        "subsampling.norm.bias",
    }
    assert report["weights_sha256"] and len(loaded) + len(rest) == len(
        [n for n in theirs if n.startswith("model.encoder.")]
    )
    recorded = json.loads((tmp_path / "config.json").read_text())["init"]
    assert recorded["loaded"] == len(loaded)


def test_a_thin_student_takes_the_convolutions_alone(place):
    config = hubert_config(
        teacher=place / "teacher", hubert_kd={"init_from_teacher": True}, model={"feedforward_dim": 48}
    )
    torch.manual_seed(5)
    system = build_system(config, 0)
    before = {n: x.clone() for n, x in system.model.encoder.state_dict().items()}
    record, report = system.start()
    after, theirs = system.model.encoder.state_dict(), load_trained(place / "teacher")[0]
    changed = {n for n in after if not torch.equal(before[n], after[n])}
    assert record["parts"] == ["convolutions"] and all(n.startswith("subsampling.convolutions.") for n in changed)
    assert len(changed) == 7 and all(torch.equal(after[n], theirs[f"model.encoder.{n}"]) for n in changed)
    # Biases of the teacher's size stay with their layer.
    assert "model.encoder.body.layers.0.feed_forward.intermediate_dense.bias" in report.skipped
    assert any("projection" in line or "subsampling.out.weight" in line for line in report.mismatched)


def test_heads_of_attention_that_are_others_are_not_taken(place):
    config = hubert_config(
        structure="shallow_wide", teacher=place / "teacher", model={"num_heads": 8}, hubert_kd={"disc_scale": 0.0}
    )
    system = build_system(config, 0)
    weights = build_system(hubert_config(teacher=place / "teacher"), 0).target.weights
    record, _ = start_from_teacher(system.model.encoder, weights)
    assert "layer 1" not in record["parts"] and "positional convolution" in record["parts"]


def test_a_student_that_shares_nothing_is_refused(place):
    options = {"hubert_kd": {"init_from_teacher": True}, "ssl": {"extractor_channels": 8}}
    with pytest.raises(ConfigError, match="no part of the student"):
        build_system(hubert_config(teacher=place / "teacher", **options), 0).start()


def test_a_distilled_student_teaches_on(place, tmp_path):
    run(place, tmp_path / "student", steps=1)
    system = build_system(
        hubert_config(teacher=tmp_path / "student", hubert_kd={"disc_scale": 0.0}, model={"num_encoder_layers": 3}), 0
    )
    assert system.target.source.dim == 24 and system.losses(samples(), 0).total.isfinite()
