"""The real decode on a folder of audio: checkpoint to table, and a sweep over its epochs."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording, SupervisionSegment

from icefall_kd.cli import config_to_dict
from icefall_kd.config import DecodeConfig, LoopConfig, ModelConfig, TrainConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.recipe import decode
from icefall_kd.results import build_rows, read_run
from icefall_kd.results_table import full_table
from icefall_kd.runtime.tensors import write_tensors
from icefall_kd.scoring import read_recogs
from icefall_kd.systems import build_system
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.average import averaged_checkpoint, load_weights, save_weights
from icefall_kd.train.checkpoint import load_checkpoint, save_checkpoint
from icefall_kd.train.state import write_config

TEXTS = {"utt-a": "ONE TWO", "utt-b": "THREE", "utt-c": "TWO THREE ONE"}
SWEEP = Path(__file__).resolve().parents[2] / "local" / "sweep.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An exp_dir with two epochs of an untrained tiny student, and a folder of noise with transcripts."""
    root = tmp_path_factory.mktemp("decode")
    audio, exp_dir = root / "speech", root / "exp"
    audio.mkdir()
    rng = np.random.default_rng(0)
    for i, name in enumerate(TEXTS):
        soundfile.write(audio / f"{name}.wav", 0.1 * rng.standard_normal(16000 + 4000 * i), 16000)
    (audio / "speech.trans.txt").write_text("".join(f"{k} {v}\n" for k, v in TEXTS.items()))
    tokenizer = Tokenizer.train_char(TEXTS.values())
    tokenizer.save(exp_dir / "tokenizer")
    model = ModelConfig(encoder_size="tiny", num_encoder_layers=2, encoder_dim=32, feedforward_dim=32, decoder_dim=16)
    config = TrainConfig(model=model, loop=LoopConfig(exp_dir=exp_dir, seed=5))
    write_config(exp_dir, config, 0)
    for epoch in (1, 2):
        torch.manual_seed(epoch)
        state = build_system(config, tokenizer.vocab_size).state_dict()
        averages = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
        content = {"model": state, "model_avg": averages}
        train = {"step": 100 * epoch, "average_period": 100}
        others = {"config": config_to_dict(config), "tokenizer_hash": tokenizer.hash, "train": train}
        save_checkpoint(exp_dir / f"epoch-{epoch}.pt", content | others)
    return audio, exp_dir


@pytest.mark.parametrize("method", ["greedy_search", "modified_beam_search", "ctc_greedy_search"])
def test_every_search_decodes_a_folder_of_audio(trained, method):
    audio, exp_dir = trained
    config = DecodeConfig(exp_dir=exp_dir, test_parts=[str(audio)], decoding_method=method, device="cpu", nbest=2)
    result = decode(config)["speech"]
    assert result["suffix"].startswith("epoch-2_avg-1")
    assert result["utterances"]["ids"] == sorted(result["utterances"]["ids"])
    assert result["num_ref"] == 6
    assert result["audio_seconds"] == pytest.approx(1.0 + 1.25 + 1.5)
    ids, refs, _ = read_recogs(next((exp_dir / method).glob("recogs-speech-epoch-2*")))
    assert [" ".join(r) for r in refs] == list(TEXTS.values())
    assert len(ids) == 3


def test_shares_of_the_parts_leave_what_one_run_leaves(trained, tmp_path):
    audio, exp_dir = trained
    parts = []
    for name in ("one", "two", "three"):
        parts.append(tmp_path / name)
        parts[-1].mkdir()
        for file in audio.iterdir():
            (parts[-1] / file.name).write_bytes(file.read_bytes())
    options = {"exp_dir": exp_dir, "test_parts": list(map(str, parts)), "device": "cpu", "epoch": 1, "bootstrap": 0}
    options["decoding_method"] = "ctc_greedy_search"
    folder = exp_dir / "ctc_greedy_search"
    whole = decode(DecodeConfig(**options))
    for file in list(folder.glob("*-epoch-1*")):
        file.unlink()
    shares = [decode(DecodeConfig(**options, shard=k, num_shards=2)) for k in (0, 1)]
    assert [list(share) for share in shares] == [["one", "three"], ["two"]]
    together = shares[0] | shares[1]
    assert {n: r["utterances"] for n, r in together.items()} == {n: r["utterances"] for n, r in whole.items()}
    for name in whole:
        assert read_recogs(next(folder.glob(f"recogs-{name}-epoch-1*")))[0] == sorted(TEXTS)
    assert decode(DecodeConfig(**options, shard=3, num_shards=4)) == {}


def test_weights_in_safetensors_decode_as_their_checkpoint_does(trained, tmp_path):
    audio, exp_dir = trained
    source, weights = exp_dir / "epoch-1.pt", tmp_path / "last-1-up-to-epoch-1.safetensors"
    save_weights(weights, averaged_checkpoint(source, load_checkpoint(source)["model"]))
    options = {"exp_dir": exp_dir, "test_parts": [str(audio)], "device": "cpu", "epoch": 1, "bootstrap": 0}
    expected = decode(DecodeConfig(use_averaged_model=False, **options))["speech"]
    result = decode(DecodeConfig(weights=weights, **options))["speech"]
    assert result["utterances"] == expected["utterances"] and result["files_used"] == weights.name
    with pytest.raises(ConfigError, match="was trained with tokenizer"):
        load_weights(weights, "another")
    with pytest.raises(DataError, match="is not from local/average"):
        write_tensors(weights, {}, {"x": "y"})
        load_weights(weights, "another")


def noise(file, **lengths):
    """Write a cut set of noises of so many samples, with transcripts that no vocabulary holds; return its name."""
    cuts = []
    for name, samples in lengths.items():
        audio = file.with_name(f"{name}.wav")
        soundfile.write(audio, 0.1 * np.random.default_rng(0).standard_normal(samples), 16000)
        cut = Recording.from_file(audio, recording_id=name).to_cut().with_id(name)
        cut.supervisions = [SupervisionSegment(name, name, 0.0, cut.duration, text="ÉTÉ 中文 ONE")]
        cuts.append(cut)
    CutSet.from_cuts(cuts).to_file(file)
    return str(file)


@pytest.mark.parametrize("method", ["greedy_search", "modified_beam_search", "ctc_greedy_search"])
@pytest.mark.parametrize("max_duration", [0.1, 100.0], ids=["alone", "in a batch"])
def test_utterances_without_an_encoder_frame_get_the_empty_hypothesis(trained, tmp_path, method, max_duration):
    _, exp_dir = trained
    part = noise(tmp_path / "cuts_short.jsonl.gz", long=16000, tiny=20, short=700)
    config = DecodeConfig(
        exp_dir=exp_dir, test_parts=[part], decoding_method=method, device="cpu", max_duration=max_duration
    )
    result = decode(config)["short"]
    assert (result["num_utterances"], result["num_ref"]) == (3, 9)
    _, refs, hyps = read_recogs(next((exp_dir / method).glob("recogs-short-*")))
    assert refs == [["ÉTÉ", "中文", "ONE"]] * 3
    assert hyps[1:] == [[], []]
    lines = next((exp_dir / method).glob("nbest-short-*")).read_text().splitlines()
    assert json.loads(lines[2])["nbest"] == [{"text": "", "tokens": [], "score": 0.0, "timestamps": [], "times": []}]


def test_parts_that_cannot_be_decoded_are_refused_before_any_is(trained, tmp_path):
    audio, exp_dir = trained
    options = {"exp_dir": exp_dir, "manifest_dir": tmp_path, "device": "cpu"}
    other = str(tmp_path / "cuts_speech.jsonl.gz")
    with pytest.raises(ConfigError, match=r"cuts_speech\.jsonl\.gz would both be recorded as speech"):
        decode(DecodeConfig(test_parts=[str(audio), other], **options))
    with gzip.open(tmp_path / "cuts_none.jsonl.gz", "wb"):
        pass
    with pytest.raises(DataError, match=r"cuts_none\.jsonl\.gz holds no cuts; run the stage that writes it"):
        decode(DecodeConfig(test_parts=[str(audio), "none"], **options))


def test_a_sweep_decodes_in_process_and_its_results_become_rows(trained, monkeypatch, capsys):
    audio, exp_dir = trained
    spec = importlib.util.spec_from_file_location("local_sweep_real", SWEEP)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the command line reads the docstrings of fields
    spec.loader.exec_module(module)
    line = f"sweep.py --exp-dir {exp_dir} --epochs 1-2 --avgs 1,2 --test-parts {audio} --device cpu --bootstrap 20"
    monkeypatch.setattr(sys, "argv", line.split())
    module.main()
    table = capsys.readouterr().out.splitlines()[-5:]
    assert table[0] == "| epoch | avg | WER speech |"
    header, cells = full_table(build_rows([read_run(exp_dir, decoding_method="greedy_search")]))
    assert header[:3] == ["system", "decoding", "seeds"]
    swept = {line[1].split("_context")[0] for line in cells if line[1].startswith("epoch-")}  # another test's are there
    assert swept == {"epoch-1_avg-1", "epoch-2_avg-1", "epoch-2_avg-2"}
    assert {line[2] for line in cells} == {"5"}
