"""The driver of the hkd beds: what it starts, skips, compares and prints, without a training."""

import importlib.util
import sys
from pathlib import Path

import pytest
from test_real_recordings import decoding

from icefall_kd.errors import ConfigError
from icefall_kd.runtime.files import read_json, write_json

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SEARCHES = {"cif_greedy_search": 1, "cif_beam_search": 0}
RATES = {"cif": 3, "acd": 2, "lrd": 1, "both": 0}


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("real_hkd", BENCHMARKS / "real_hkd.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where the command line reads the docstrings of fields
    spec.loader.exec_module(module)
    return module


def write_exp_dir(folder: Path, errors: int) -> None:
    """Write what a training and its decodings leave: ``errors`` an utterance with beam search, one more with greedy."""
    write_json(folder / "config.json", {"config": {"label_dir": [], "text_kd": None}})
    names = "finished epochs steps audio_hours_per_hour parameters device".split()
    covered = {"utterances": 40, "aligned": 38}
    summary = {**dict.fromkeys(names, 1), "seconds": 60.0, "peak_memory_gib": 0.5, "text_coverage": covered}
    write_json(folder / "train_summary.json", summary)
    (folder / "log").mkdir()
    (folder / "log/metrics.jsonl").write_text('{"kind": "train", "loss": 2.0, "acd_acc": 0.5, "lr": 1}')
    for search, more in SEARCHES.items():
        found = decoding("dev", search, [errors + more] * 40)
        write_json(folder / search / "results-x.json", found)


@pytest.fixture
def config(driver, tmp_path):
    (tmp_path / "data").mkdir()
    return driver.RealHkdConfig(
        data_root=tmp_path / "data",
        exp_root=tmp_path / "exp",
        results=tmp_path / "results",
        beds=["hkd_barista"],
        seeds=[2],
    )


@pytest.fixture
def started(driver, config, monkeypatch):
    """The command lines of run_hkd.sh, as dictionaries; each training leaves an exp_dir."""
    found = []

    def run(command):
        words = [str(word) for word in command]
        assert words[:2] == ["bash", "egs/librispeech/run_hkd.sh"]
        found.append(dict(zip(words[2::2], words[3::2], strict=True)))
        if "--systems" in found[-1]:
            system, seed = found[-1]["--systems"], found[-1]["--seeds"]
            write_exp_dir(config.exp_root / "hkd_barista" / f"{system}-seed{seed}", RATES[system])

    for module in (driver, driver.chains):
        monkeypatch.setattr(module, "run_command", run)
    return found


def run_all(driver, config) -> None:
    driver.chains.run_missing(config, driver.BEDS, driver.source_dir, driver.prepare_line, driver.run_chain)


def test_what_is_missing_is_run_once_compared_and_tabled(driver, config, started):
    run_all(driver, config)
    assert [line.get("--systems") for line in started] == [None, "cif", "acd", "lrd", "both"]
    # Data and states are made once, before the chains that share them.
    assert started[0]["--stop-stage"] == "1" and {line["--stage"] for line in started[1:]} == {"2"}
    assert {line["--plm"] for line in started} == {"minilm"}
    run_all(driver, config)
    assert len(started) == 5

    result = read_json(driver.chains.result_file(config, "hkd_barista", "acd", 2))
    assert set(result["decodings"]) == set(SEARCHES) and result["last"] == {"train": {"loss": 2.0, "acd_acc": 0.5}}
    driver.compare(config, "hkd_barista")
    compared = driver.chains.compared(config, "hkd_barista")
    # By greedy search 4, 3, 2 and 1 errors an utterance.
    relative = {(a[0], b[0]): c["relative"] for (a, b), c in compared.items() if a[1] == b[1] == "cif_greedy_search"}
    assert relative == {
        ("cif", "acd"): "-25.0 %", ("cif", "lrd"): "-50.0 %", ("cif", "both"): "-75.0 %",
        ("acd", "both"): "-66.7 %", ("lrd", "both"): "-50.0 %",
    }  # fmt: skip
    assert compared[("cif", "cif_greedy_search"), ("cif", "cif_beam_search")]["relative"] == "-25.0 %"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in driver.table(config).splitlines()[2:]]
    assert len(rows) == 8 and rows[6][:2] == ["hkd_barista", "CIF + ACD + LRD"]
    assert rows[6][5] == "WER 20.00 [20.00, 20.00] %" and rows[6][7] == "-75.0 %" and rows[6][9] == "95.0 %"


def test_every_bed_names_its_options_and_a_recipe(driver, repo):
    for name, bed in driver.BEDS.items():
        for layer in ("", "_acd", "_lrd"):
            assert (repo / "benchmarks/conf" / f"{name}{layer}.yaml").is_file()
        assert (repo / "egs" / bed.recipe / "run_hkd.sh").is_file()
        assert (bed.systems[0] == "cif" and bed.note) or name == "hkd_barista"


def test_a_folder_of_a_language_model_is_handed_on_from_wherever_the_driver_runs(driver, config, tmp_path, monkeypatch):
    for name in ("lm", "minilm"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert "minilm" in driver.recipe_line(config, "hkd_barista", None)  # the model, not the folder
    mandarin = driver.RealHkdConfig(beds=["hkd_mandarin_demo"], plm_zh="lm", exp_root=tmp_path)
    line = driver.recipe_line(mandarin, "hkd_mandarin_demo", driver.source_dir("hkd_mandarin_demo", mandarin))
    assert line[line.index("--plm") + 1] == tmp_path / "lm" and "--corpus-dir" not in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beds": ["digits"]}, "--beds names 'digits'; there are hkd_barista, hkd_mandarin_demo, hkd_mandarin_words"),
        ({"beds": ["hkd_mandarin_demo"]}, "--plm-zh is missing: the language model of bed hkd_mandarin_demo"),
        ({"systems": ["best"]}, "--systems names 'best'; there are cif, acd, lrd, both"),
        ({"seeds": [7]}, "--seeds names 7; there are 1, 2, 3"),
    ],
)
def test_wrong_options_are_told(driver, options, said):
    with pytest.raises(ConfigError, match=said):
        driver.RealHkdConfig(**{"plm_zh": None, "beds": ["hkd_barista"], **options})
