"""The driver of the nar beds: what it starts, skips, compares and prints, without a training."""

import importlib.util
import sys
from pathlib import Path

import pytest
from test_real_recordings import decoding

from icefall_kd.errors import ConfigError, KdError
from icefall_kd.runtime.files import read_json, write_json

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SEARCHES = {"ctc_greedy_search": 2, "mask_predict": 1, "nar_beam_search": 0}
TUNED = {f"{search}, threshold 0.7" for search in ("mask_predict", "nar_beam_search")}


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("real_nar", BENCHMARKS / "real_nar.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where the command line reads the docstrings of fields
    spec.loader.exec_module(module)
    return module


def write_exp_dir(folder: Path, errors: int, masked: float | None = 0.25) -> None:
    """Write what a training and its decodings leave: ``errors`` an utterance with the last search, more with others."""
    write_json(folder / "config.json", {"config": {"label_dir": [], "ctc_weight": 0.3}})
    names = "finished epochs steps audio_hours_per_hour parameters device".split()
    write_json(folder / "train_summary.json", {**dict.fromkeys(names, 1), "seconds": 60.0, "peak_memory_gib": 0.5})
    (folder / "log").mkdir()
    (folder / "log/metrics.jsonl").write_text('{"kind": "train", "loss": 2.0, "lr": 1}\n{"kind": "valid", "loss": 1.5}')
    searches = SEARCHES if masked is not None else {"ctc_greedy_search": 1, "joint_beam_search": 0}
    for search, more in searches.items():
        write_decoding(folder, search, errors + more, masked, 0.99)


def write_decoding(folder: Path, search: str, errors: int, masked: float | None, threshold: float) -> None:
    """Write the result of a search that makes so many errors in each of 40 utterances."""
    found = decoding("dev", search, [errors] * 40) | {"parameters": 4321, "config": {"mask_threshold": threshold}}
    write_json(folder / search / f"results-{threshold}.json", found | ({"masked_share": masked} if masked else {}))


@pytest.fixture
def config(driver, tmp_path):
    (tmp_path / "data").mkdir()
    return driver.RealNarConfig(
        data_root=tmp_path / "data", exp_root=tmp_path / "exp", results=tmp_path / "results", beds=["nar_barista"]
    )


@pytest.fixture
def started(driver, config, monkeypatch):
    """The systems that run_nar.sh was started for; each leaves an exp_dir."""
    found = []
    rates = {"teacher": 0, "scratch": 2, "transfer": 1, "transfer-both": 0, "small": 3, "small-both": 3}

    def run(command):
        words = [str(word) for word in command]
        assert words[:2] == ["bash", "egs/librispeech/run_nar.sh"]
        if "--systems" in words:
            system, seed = (words[words.index(f"--{name}") + 1] for name in ("systems", "seeds"))
            folder = config.exp_root / "nar_barista" / f"{system}-seed{seed}"
            if "--mask-threshold" in words:
                assert words[words.index("--stage") + 1] == "4" and found[-1] == system
                for search in words[words.index("--decoding-methods") + 1].split():
                    errors = rates[system] + (search == "mask_predict")
                    write_decoding(folder, search, errors, 0.1, float(words[words.index("--mask-threshold") + 1]))
                return
            found.append(system)
            if not (folder / "config.json").exists():
                write_exp_dir(folder, rates[system], None if system == "teacher" else 0.25)

    monkeypatch.setattr(driver, "run_command", run)
    return found


def test_what_is_missing_is_run_once_compared_and_tabled(driver, config, started):
    corpus = driver.source_dir("nar_barista", config)
    driver.run_chain(config, "nar_barista", 1, corpus)
    assert started == driver.BEDS["nar_barista"].systems
    driver.chains.result_file(config, "nar_barista", "small", 1).unlink()
    exp = config.exp_root / "nar_barista" / "small-seed1"
    for file in sorted(exp.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    driver.run_chain(config, "nar_barista", 1, corpus)
    assert started[6:] == ["small"]
    out = driver.chains.result_file(config, "nar_barista", "scratch", 1)
    whole = read_json(out)
    write_json(out, whole | {"decodings": {s: d for s, d in whole["decodings"].items() if s not in TUNED}})
    driver.run_chain(config, "nar_barista", 1, corpus)  # a row that lacks searches is decoded
    assert started[7:] == ["scratch"] and read_json(out)["decodings"] == whole["decodings"]

    result = read_json(driver.chains.result_file(config, "nar_barista", "transfer", 1))
    assert set(result["decodings"]) == set(SEARCHES) | TUNED
    assert result["last"] == {"train": {"loss": 2.0}, "valid": {"loss": 1.5}}
    driver.compare(config, "nar_barista")
    compared = {
        (tuple(c["from"]), tuple(c["to"])): c for c in read_json(driver.chains.comparisons_file(config, "nar_barista"))
    }
    helped = compared[("scratch", "mask_predict"), ("transfer", "mask_predict")]
    assert helped["relative"] == "-33.3 %" and helped["probability_of_improvement"] == 1.0  # from 3 to 2 an utterance
    assert compared[("small", "nar_beam_search"), ("small-both", "nar_beam_search")]["relative"] == "+0.0 %"
    assert compared[("scratch", "mask_predict"), ("scratch", "nar_beam_search")]["relative"] == "-33.3 %"
    assert compared[("teacher", "joint_beam_search"), ("scratch", "nar_beam_search")]["relative"] == "-"  # from 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in driver.table(config).splitlines()[2:]]
    assert [tuple(row[1:4:2]) for row in rows[:2]] == [
        ("teacher", "ctc_greedy_search"), ("teacher", "joint_beam_search"),
    ]  # fmt: skip
    assert len(rows) == 2 + 5 * 5
    (transfer,) = [row for row in rows if (row[1], row[3]) == ("transfer", "mask_predict")]
    assert transfer[5] == "WER 40.00 [40.00, 40.00] %" and transfer[7] == "-33.3 %" and transfer[9] == "25.0 %"
    assert transfer[8] == compared[("transfer", "ctc_greedy_search"), ("transfer", "mask_predict")]["difference"]


def test_every_bed_names_its_options_and_a_recipe(driver, repo):
    for name, bed in driver.BEDS.items():
        for layer in ("", "_teacher", "_small"):
            assert (repo / "benchmarks/conf" / f"{name}{layer}.yaml").is_file()
        assert (repo / "egs" / bed.recipe / "run_nar.sh").is_file()
        assert len(set(bed.systems)) == len(bed.systems) and bed.systems[0] == "teacher"


def test_the_committed_rows_have_every_search(driver):
    """A search that one seed lacks would be left out of the table without a word."""
    files = sorted((BENCHMARKS / "results/real_nar").glob("*_seed*.json"))
    assert len(files) == 30
    assert [file.name for file in files if not driver.is_finished(file, read_json(file)["system"])] == []


def test_a_failed_training_ends_the_driver(driver, config, monkeypatch):
    def run(command):
        raise KdError("exit code 3")

    monkeypatch.setattr(driver, "run_command", run)
    with pytest.raises(KdError, match="exit code 3"):
        driver.run_chain(config, "nar_barista", 1, config.data_root)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beds": ["digits"]}, "--beds names 'digits'; there are nar_digits, nar_barista, nar_mandarin_words"),
        ({"systems": ["best"]}, "--systems names 'best'; there are teacher, scratch"),
        ({"seeds": [7]}, "--seeds names 7; there are 1, 2, 3"),
        ({"jobs": 0}, "--jobs is 0; it must be at least 1"),
    ],
)
def test_wrong_options_are_told(driver, options, said):
    with pytest.raises(ConfigError, match=said):
        driver.RealNarConfig(**options)
