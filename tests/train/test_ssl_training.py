"""Self-supervised training through train.py, on audio without transcripts, and fine-tuning from it."""

import dataclasses
import json

import pytest
import torch
from micro_corpus import write_corpus
from ssl_toys import ssl_config, write_speech

from icefall_kd.cli import config_to_dict
from icefall_kd.config import AsrLossConfig, AugmentConfig, DataConfig, DecodeConfig, SslConfig, TrainConfig
from icefall_kd.data.datamodule import DataModule, load_cuts
from icefall_kd.data.filters import cut_into_pieces
from icefall_kd.errors import ConfigError
from icefall_kd.recipe import load_system, train_main
from icefall_kd.systems import build_system
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.average import load_trained
from icefall_kd.train.checkpoint import load_checkpoint
from icefall_kd.train.metrics import read_metrics
from icefall_kd.train.transfer import initialise
from tests.train.toy import same_weights


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    write_speech(folder, "train", [1.5 + 0.2 * i for i in range(10)] + [7.0, 0.3])
    write_speech(folder, "dev", [2.0, 2.4], seed=1)
    return folder


def run(folder, exp_dir, **groups) -> TrainConfig:
    data = {"manifest_dir": folder / "fbank", "lang_dir": folder / "no_such_folder", **groups.pop("data", {})}
    config = ssl_config(data=data, ssl={"crop_duration": 4.0, **groups.pop("ssl", {})}, exp_dir=exp_dir, **groups)
    assert train_main(arguments(config)) == 0
    return config


def arguments(config: TrainConfig) -> list[str]:
    """Return the command line of a configuration."""
    argv = []
    for name, value in config_to_dict(config).items():
        shown = ",".join(map(str, value)) if isinstance(value, list) else value
        argv += [f"--{name.replace('_', '-')}", "none" if value is None else str(shown)]
    return argv


def newest(exp_dir):
    return load_checkpoint(max(exp_dir.glob("*.pt"), key=lambda f: (load_checkpoint(f)["train"]["step"], f.name)))


DUAL = {"dual": {"modes": "dual", "sparsity": 0.5, "prune_end_step": 4, "mask_interval": 2, "dual_kd_scale": 0.1}}


WAVEFORM = {"ssl": {"crop_duration": 4.0, "front_end": "waveform", "extractor_channels": 8}, "model": {"dropout": 0.2}}


@pytest.mark.parametrize("options", [{}, DUAL, WAVEFORM], ids=["full", "dual", "waveform"])
def test_a_resumed_training_is_the_same_bit_by_bit(speech, tmp_path, options):
    run(speech, tmp_path / "whole", **options)
    run(speech, tmp_path / "parts", max_steps=1, **options)
    run(speech, tmp_path / "parts", **options)
    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert whole["train"]["step"] > 2 and same_weights(whole["model"], parts["model"])
    assert whole["train"]["train_loss"] == parts["train"]["train_loss"]
    assert whole["train"]["valid"] == parts["train"]["valid"] and whole["tokenizer_hash"] == ""
    assert not (tmp_path / "whole" / "tokenizer").exists()
    first = read_metrics(tmp_path / "whole" / "log" / "metrics.jsonl", "train")[0]
    assert first["full_contrastive_loss"] == pytest.approx(4.615, abs=0.5)  # ln 101; few codes, some of which are equal
    assert {"full_acc", "code_perplexity", "prob_perplexity", "gumbel_temperature", "masked_share"} <= first.keys()
    left_out = [json.loads(line) for line in open(tmp_path / "whole" / "left_out.jsonl")]
    assert [x["id"] for x in left_out] == ["train11"] and " are needed" in left_out[0]["reason"]
    with pytest.raises(ConfigError, match="recognises nothing"):
        load_system(DecodeConfig(exp_dir=tmp_path / "whole"))


def test_long_utterances_are_cut_into_equal_pieces(speech):
    cuts = load_cuts(speech / "fbank", ["train"])
    pieces = cut_into_pieces(cuts, 4.0)
    found = [c for c in pieces if c.recording_id == "train10"]
    assert [c.duration for c in found] == [3.5, 3.5] and [c.start for c in found] == [0.0, 3.5]
    assert [c.id for c in found] == ["train10-1-of-2", "train10-2-of-2"]
    assert sum(c.duration for c in pieces) == pytest.approx(sum(c.duration for c in cuts))
    whole = next(c for c in cuts if c.id == "train10").load_features()
    assert (whole == torch.cat([torch.from_numpy(c.load_features()) for c in found]).numpy()).all()
    thirds = [c for c in cut_into_pieces(cuts, 2.5) if c.recording_id == "train10"]
    assert [len(c.load_features()) for c in thirds] == [c.num_frames for c in thirds] == [233, 234, 233]


def test_batches_of_audio_alone_have_no_texts(speech):
    config = ssl_config(ssl={"front_end": "waveform", "extractor_channels": 8})
    system = build_system(config, 0)
    data = DataModule(
        DataConfig(manifest_dir=speech / "fbank", num_workers=0, max_duration=20.0),
        config.augment,
        None,
        with_audio=system.needs_audio,
        own_audio=system.hears_samples,
        **system.alignment_losses,
    )
    batch = next(data.train_batches(1))
    assert batch.y is None and batch.texts == [] and batch.audio.shape[0] == len(batch.ids)
    assert system.losses(batch, 0).total.isfinite()
    assert next(data.valid_batches()).audio is not None


@pytest.mark.parametrize("modes", ["full", "streaming", "dual"])
def test_fine_tuning_starts_from_it(speech, tmp_path, modes):
    ssl_dir, exp_dir = tmp_path / "ssl", tmp_path / "asr"
    pruned = {"sparsity": 0.5, "prune_end_step": 0, "mask_interval": 1} if modes == "dual" else {}
    run(speech, ssl_dir, max_steps=3, dual={"modes": modes, **pruned})
    folder = write_corpus(tmp_path / "corpus")
    start = ssl_config(
        objective="asr",
        dual={"modes": "dual", **pruned},
        data={"manifest_dir": folder / "fbank", "lang_dir": folder / "lang_char"},
        exp_dir=exp_dir,
        init_from=ssl_dir,
        max_steps=1,
    )
    start = dataclasses.replace(
        start, ssl=SslConfig(), asr=AsrLossConfig(transducer_scale=0.0, ctc_scale=1.0), augment=AugmentConfig()
    )
    student = build_system(start, Tokenizer.load(folder / "lang_char").vocab_size)
    record, report = initialise(student, ssl_dir)
    theirs, mine = load_trained(ssl_dir)[0], student.state_dict()
    encoder = {name for name in mine if name.startswith("model.encoder.") and not name.endswith("mask_step")}
    assert {line.split(" <- ")[0] for line in report.loaded} == encoder
    for name in encoder:
        of_one_mode = name.replace(".full.", ".").replace(".streaming.", ".")
        assert torch.equal(mine[name], theirs[name if modes == "dual" else of_one_mode]), name
    if modes == "dual":
        masks = [mine[name] for name in encoder if name.endswith(".mask")]
        assert masks and all(0.4 < 1 - mask.float().mean() < 0.6 for mask in masks)
    assert any("quantizer" in name for name in report.unexpected)

    assert train_main(arguments(start)) == 0
    recorded = json.loads((exp_dir / "config.json").read_text())["init"]
    assert recorded["weights_sha256"] == record["weights_sha256"] and recorded["loaded"] == len(encoder)


def test_a_recogniser_that_hears_samples_starts_from_it(speech, tmp_path):
    front_end = {"front_end": "waveform", "extractor_channels": 8}
    run(speech, tmp_path / "ssl", max_steps=1, ssl=front_end, dual={"modes": "full"})
    folder = write_corpus(tmp_path / "corpus")
    start = ssl_config(
        objective="asr",
        dual={"modes": "dual"},
        data={"manifest_dir": folder / "fbank", "lang_dir": folder / "lang_char"},
        exp_dir=tmp_path / "asr",
        init_from=tmp_path / "ssl",
        max_steps=2,
    )
    frozen = SslConfig(**front_end, feature_grad_scale=0.0)
    start = dataclasses.replace(start, ssl=frozen, asr=AsrLossConfig(transducer_scale=0.0, ctc_scale=1.0))
    assert train_main(arguments(start)) == 0
    before, after = load_trained(tmp_path / "ssl")[0], newest(tmp_path / "asr")["model"]
    front = [name for name in before if name.startswith("model.encoder.subsampling.")]
    kept = {name for name in front if torch.equal(before[name], after[name])}
    assert kept == {name for name in front if "convolutions" in name or "inner_norms" in name}
    valid = read_metrics(tmp_path / "asr" / "log" / "metrics.jsonl", "valid")
    assert valid and {"full_ctc_loss", "streaming_ctc_loss"} <= valid[-1].keys()
