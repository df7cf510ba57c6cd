"""The sweep over epochs and averages, and scoring recogs files again."""

import dataclasses
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest

from icefall_kd.cli import config_to_dict
from icefall_kd.config import DecodeConfig
from icefall_kd.decode.suffix import decode_suffix
from icefall_kd.errors import ConfigError
from icefall_kd.results import find_results
from icefall_kd.runtime.files import read_json, write_json
from icefall_kd.scoring import per_utterance, score, summarize, write_recogs

REPO = Path(__file__).resolve().parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(f"local_{name}", REPO / "local" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the command line reads the docstrings of fields
    spec.loader.exec_module(module)
    return module


sweep, rescoring = script("sweep"), script("score")


@pytest.fixture
def exp(tmp_path, monkeypatch):
    """An exp_dir with epochs 1 to 3 whose decode.py makes epoch + avg substitutions; returns it and the calls."""
    for epoch in (1, 2, 3):
        (tmp_path / f"epoch-{epoch}.pt").write_bytes(b"")
        os.utime(tmp_path / f"epoch-{epoch}.pt", (1, 1))
    calls = []

    def decode(config: DecodeConfig):
        calls.append((config.epoch, config.avg, tuple(config.test_parts)))
        made = {}
        for part in config.test_parts:
            hyps = ["X"] * (config.epoch + config.avg) + ["A"] * 10
            scored = score(["A"] * len(hyps), hyps, [f"u{i:02d}" for i in range(len(hyps))])
            suffix = decode_suffix(config)
            made[part] = {"part": part, "suffix": suffix, **summarize(scored, 20), "config": config_to_dict(config)}
            made[part]["decoding_method"] = config.decoding_method
            write_json(config.exp_dir / config.decoding_method / f"results-{part}-{suffix}.json", made[part])
        return made

    monkeypatch.setitem(sys.modules, "icefall_kd.recipe", types.SimpleNamespace(decode=decode))
    return tmp_path, calls


def run_sweep(monkeypatch, folder, *args):
    line = ["sweep.py", "--exp-dir", str(folder), "--epochs", "1-3", "--avgs", "1,2", "--test-parts", "dev", *args]
    monkeypatch.setattr(sys, "argv", line)
    sweep.main()


def test_a_sweep_decodes_each_possible_point_and_sorts_the_table(exp, monkeypatch, capsys):
    folder, calls = exp
    run_sweep(monkeypatch, folder)
    assert [c[:2] for c in calls] == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)]
    lines = (folder / "greedy_search" / "sweep-dev.md").read_text().splitlines()
    assert lines[0] == "| epoch | avg | WER dev |"
    assert [tuple(line.split(" | ")[:2]) for line in lines[2:]] == [
        ("| 1", "1"), ("| 2", "1"), ("| 3", "1"), ("| 2", "2"), ("| 3", "2"),
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == lines


def test_a_sweep_goes_on_where_it_stopped(exp, monkeypatch):
    folder, calls = exp
    run_sweep(monkeypatch, folder)
    table = (folder / "greedy_search" / "sweep-dev.md").read_text()
    calls.clear()
    run_sweep(monkeypatch, folder)
    assert calls == []
    assert (folder / "greedy_search" / "sweep-dev.md").read_text() == table
    # A new part alone is decoded, other options and newer checkpoints decode again.
    run_sweep(monkeypatch, folder, "--test-parts", "dev,test", "--epochs", "1")
    assert calls == [(1, 1, ("test",))]
    calls.clear()
    run_sweep(monkeypatch, folder, "--blank-penalty", "0.5", "--epochs", "1")
    assert calls == [(1, 1, ("dev",))]
    calls.clear()
    os.utime(folder / "epoch-2.pt")
    future = (folder / "epoch-2.pt").stat().st_mtime + 100
    os.utime(folder / "epoch-2.pt", (future, future))
    run_sweep(monkeypatch, folder, "--epochs", "2", "--avgs", "1")
    assert calls == [(2, 1, ("dev",))]


def test_a_sweep_does_not_take_results_that_were_scored_again_in_another_unit(exp, monkeypatch):
    folder, calls = exp
    args = ["--epochs", "1", "--avgs", "1"]
    run_sweep(monkeypatch, folder, *args)
    (file,) = (folder / "greedy_search").glob("results-*.json")
    recogs = file.with_name(file.name.replace("results-", "recogs-").replace(".json", ".txt"))
    write_recogs(recogs, score(["AB"], ["AX"], ["u"]))
    rescoring.rescore(recogs, rescoring.ScoreConfig(recogs=[recogs], unit="char", results=True))
    file.unlink()
    calls.clear()
    run_sweep(monkeypatch, folder, *args)
    assert calls == [(1, 1, ("dev",))]
    assert "CER" not in (folder / "greedy_search" / "sweep-dev.md").read_text()


def test_averages_of_plain_checkpoints_need_each_file(exp):
    folder, _ = exp
    (folder / "epoch-2.pt").unlink()
    config = DecodeConfig(exp_dir=folder, epoch=3, avg=2)
    assert sweep.missing_files(config) == []
    assert sweep.missing_files(dataclasses.replace(config, use_averaged_model=False)) == ["epoch-2.pt"]
    assert sweep.missing_files(dataclasses.replace(config, avg=3)) == []
    assert sweep.missing_files(dataclasses.replace(config, avg=4)) == ["epochs before the first"]


def test_epochs_are_ranges_and_numbers():
    assert sweep.parse_epochs("3-5,8,4") == [3, 4, 5, 8]
    for wrong in ("5-3", "a", "0", ""):
        with pytest.raises(ConfigError, match="--epochs"):
            sweep.parse_epochs(wrong)


def test_words_are_scored_again_as_characters(tmp_path, capsys):
    scored = score(["AB C"], ["AX C"], ["u"])
    file = tmp_path / "recogs-test-epoch-1_avg-1.txt"
    write_recogs(file, scored)
    record = {"part": "test", "suffix": "epoch-1_avg-1", **summarize(scored, 10), "utterances": per_utterance(scored)}
    write_json(tmp_path / "results-test-epoch-1_avg-1.json", record)
    rescoring.rescore(file, rescoring.ScoreConfig(recogs=[file], unit="char", results=True))
    assert capsys.readouterr().out.startswith("[test-epoch-1_avg-1] %CER 33.33% [1 / 3, 0 ins, 0 del, 1 sub ]")
    assert "Unit: char" in (tmp_path / "errs-test-epoch-1_avg-1_unit-char.txt").read_text()
    again = read_json(tmp_path / "results-test-epoch-1_avg-1_unit-char.json")
    assert (again["unit"], again["num_ref"], again["suffix"]) == ("char", 3, "epoch-1_avg-1_unit-char")
    assert find_results(tmp_path / "results-test-epoch-1_avg-1_unit-char.json", suffix="epoch-1_avg-1") == []


def test_characters_cannot_become_words(tmp_path):
    file = tmp_path / "recogs-x.txt"
    write_recogs(file, score(["AB C"], ["AX C"], ["u"], "char"))
    with pytest.raises(ConfigError, match="holds char units, of which no word units"):
        rescoring.rescore(file, rescoring.ScoreConfig(recogs=[file], from_unit="char"))
