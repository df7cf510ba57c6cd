"""The driver of the dual-mode beds: what it starts, skips, compares and prints, without a training."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from test_real_recordings import decoding

from icefall_kd.errors import ConfigError
from icefall_kd.runtime.files import read_json, write_json

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# Errors an utterance of five words in the full mode; streams have one more.
RATES = {"a3": 3, "a5": 2, "b1": 1, "b3": 2, "c2": 1}


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("real_dualmode", BENCHMARKS / "real_dualmode.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where the command line reads the docstrings of fields
    spec.loader.exec_module(module)
    return module


def write_training(folder: Path, records: list[dict]) -> None:
    """Write what every training leaves."""
    write_json(folder / "config.json", {"config": {"label_dir": []}})
    names = "finished epochs steps audio_hours audio_hours_per_hour parameters device".split()
    write_json(folder / "train_summary.json", {**dict.fromkeys(names, 1), "seconds": 60.0, "peak_memory_gib": 0.5})
    (folder / "log").mkdir()
    (folder / "log/metrics.jsonl").write_text("\n".join(map(json.dumps, records)))


def write_recogniser(folder: Path, system: str) -> None:
    """Write a training and the decodings of its modes."""
    write_training(folder, [{"kind": "train", "loss": 2.0, "lr": 1}])
    modes = {"a3": ["streaming"], "b1": ["full"]}.get(system, ["full", "streaming"])
    for mode in modes:
        for chunk in (8, 16) if mode == "streaming" else (-1,):
            found = decoding("dev", "ctc_greedy_search", [RATES[system] + (mode == "streaming")] * 40)
            found |= {"encoder_mode": mode, "sparse": mode == "streaming", "chunk_size": chunk}
            found |= {"parameters": 1000, "nonzeros": 400 if mode == "streaming" else 1000, "model_bytes": 2e6}
            write_json(folder / f"ctc_greedy_search/results-{mode}{chunk}.json", found)


def write_arm(folder: Path) -> None:
    """Write a pre-training."""
    figures = {"full_contrastive_loss": 4.6, "full_acc": 0.01, "code_perplexity": 300.0, "lr": 1}
    figures |= {"streaming_contrastive_loss": 4.1, "streaming_acc": 0.02}
    records = [
        {"kind": "train", "step": 1, "epoch": 1, **figures},
        {"kind": "valid", "step": 9, "epoch": 1, **figures, "full_contrastive_loss": 4.0},
        {"kind": "train", "step": 10, "epoch": 1, **figures, "full_acc": 0.3, "figures": {"churn": 0.01}},
    ]
    write_training(folder, records)


@pytest.fixture
def config(driver, tmp_path):
    return driver.RealDualmodeConfig(
        data_root=tmp_path / "data",
        exp_root=tmp_path / "exp",
        results=tmp_path / "results",
        beds=["dualmode_barista"],
        systems=list(RATES),
        seeds=[1],
    )


@pytest.fixture
def started(driver, config, monkeypatch):
    """The command lines of run_dualmode.sh, as dictionaries; each training leaves an exp_dir."""
    found = []

    def run(command):
        words = [str(word) for word in command]
        if words[1] == "local/make_digits.py":
            return
        assert words[:2] == ["bash", "egs/librispeech/run_dualmode.sh"]
        line = dict(zip(words[2::2], words[3::2], strict=True))
        found.append(line)
        exp, system = Path(line["--exp-dir"]), line.get("--systems")
        if line.get("--stop-stage") == "1":
            write_arm(exp / f"ssl-{driver.ARM_OF[system]}")
        elif line.get("--stage") == "2":
            write_recogniser(exp / f"{system}-seed{line['--seeds']}", system)

    for module in (driver, driver.chains):
        monkeypatch.setattr(module, "run_command", run)
    return found


def run_all(driver, config) -> None:
    driver.pretrain(config)
    driver.chains.run_missing(config, driver.BEDS, driver.source_dir, driver.prepare_line, driver.run_chain)


def test_each_arm_is_trained_once_on_the_training_parts_alone(driver, config, started):
    run_all(driver, config)
    arms = [line for line in started if line.get("--stop-stage") == "1"]
    assert sorted(line["--systems"] for line in arms) == ["b1", "c2"]  # full and dual; no system needs streaming
    for line in arms:
        heard, checked = ([Path(f).name for f in line[o].split(",")] for o in ("--ssl-parts", "--ssl-valid-parts"))
        assert heard == ["cuts_train.jsonl.gz"] * 2 + ["cuts_train-clean-100.jsonl.gz"]
        assert checked == ["cuts_dev.jsonl.gz"] * 2
    results = read_json(driver.arm_file(config, "full"))
    assert results["first"]["full_contrastive_loss"] == 4.6 and results["last"]["churn"] == 0.01
    assert results["last"]["full_acc"] == 0.3 and "lr" not in results["last"]
    assert [v["full_contrastive_loss"] for v in results["validations"]] == [4.0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in driver.arms_table(config).splitlines()[2:]]
    assert [row[0] for row in rows] == ["full", "full / streaming"]
    assert rows[0][1:] == ["1", "4.600", "4.000", "1.0%", "300", "1.0%", "60"]
    assert rows[1][3:5] == ["4.000 / 4.100", "1.0% / 2.0%"]


def test_what_is_missing_is_run_once_compared_and_tabled(driver, config, started):
    run_all(driver, config)
    trained = [line for line in started if line.get("--stage") == "2"]
    assert [line["--systems"] for line in trained] == [s for s in driver.ARM_OF if s in RATES]
    assert {line["--ssl-dir"] for line in trained} == {str(driver.ssl_dir(config))}
    count = len(started)
    run_all(driver, config)
    assert len(started) == count

    driver.compare(config, "dualmode_barista")
    compared = driver.chains.compared(config, "dualmode_barista")
    relative = {(a, b): c["relative"] for ((a, mode), (b, _)), c in compared.items() if mode == driver.STREAMS[0]}
    # Streams make 4, 3, 3 and 2 errors an utterance.
    assert relative["a3", "a5"] == "-25.0 %" and relative["a3", "c2"] == "-50.0 %"
    assert relative["a5", "c2"] == relative["b3", "c2"] == "-33.3 %" and ("b4", "c2") not in relative
    assert compared[("b1", "full"), ("c2", "full")]["difference"].startswith("0.00")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in driver.table(config).splitlines()[2:]]
    assert len(rows) == 2 + 3 + 1 + 3 + 3 and [row[1] for row in rows[:2]] == ["A3", "A3"]
    (c2,) = [row for row in rows if row[1] == "C2" and row[4] == "full"]
    assert c2[2] == "dual" and c2[5:9] == ["dense", "1,000", "1,000", "2.00"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in driver.criteria_table(config).splitlines()[2:]]
    assert len(rows) == 5 and {row[-1] for row in rows} == {"yes"}  # one of B1, two each of A3 and A5
    assert rows[0][1:3] == ["less than 3 % worse than B1", "full"] and rows[0][-3:-1] == ["+0.0 %", "+0.0"]


@pytest.mark.parametrize(
    ("hope", "relative", "difference", "each", "met"),
    [
        ("less than 3 % worse than B1", "+2.9 %", "0.12 [-0.10, 0.30]", [0.1], "yes"),
        ("less than 3 % worse than B1", "+3.1 %", "0.13 [-0.10, 0.30]", [0.1], "no"),
        ("clearly better than A3", "-9.0 %", "-1.00 [-2.00, -0.10]", [-0.5, -1.5], "yes"),
        ("clearly better than A3", "-9.0 %", "-1.00 [-2.00, 0.10]", [-1.0], "no"),
        ("clearly better than A3", "-9.0 %", "-1.00 [-2.00, -0.10]", [-2.5, 0.5], "no"),
        ("not worse than B4", "+0.1 %", "0.01 [-1.00, 1.00]", [0.0], "no"),
    ],
)
def test_a_hope_is_met_by_value_or_clearly(driver, hope, relative, difference, each, met):
    assert driver.is_met(hope, {"relative": relative, "difference": difference}, each) == met


def test_every_bed_names_its_options(driver, repo):
    for name, bed in driver.BEDS.items():
        assert (repo / "benchmarks/conf" / f"{name}.yaml").is_file() and bed.home in driver.HEARD
    assert (repo / "benchmarks/conf/dualmode_ssl.yaml").is_file()
    assert {arm: driver.ARM_OF[system] for arm, system in driver.SSL_SYSTEM.items()} == {
        arm: arm for arm in driver.SSL_SYSTEM
    }
    assert all(train.startswith("train") for _, train, _ in driver.HEARD.values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beds": ["digits"]}, "--beds names 'digits'; there are dualmode_digits, dualmode_barista"),
        ({"systems": ["best"]}, "--systems names 'best'; there are a3, a5, "),
        ({"seeds": [7]}, "--seeds names 7; there are 1, 2, 3"),
    ],
)
def test_wrong_options_are_told(driver, options, said):
    with pytest.raises(ConfigError, match=said):
        driver.RealDualmodeConfig(**options)
