"""The driver of the real beds: what it collects, compares and prints, without a training."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from icefall_kd.runtime.files import read_json, write_json

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "real_recordings.py"
IDS, REF_LENS = [f"u{i}" for i in range(40)], [5] * 40


@pytest.fixture(scope="module")
def driver():
    spec = importlib.util.spec_from_file_location("real_recordings", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the command line reads the docstrings of fields
    spec.loader.exec_module(module)
    return module


def decoding(part: str, method: str, errors: list[int]) -> dict:
    zeros = [0] * len(errors)
    utterances = {"ids": IDS, "ref_hash": ["h"] * 40, "ref_len": REF_LENS, "ins": zeros, "del": zeros, "sub": errors}
    rate = 100 * sum(errors) / sum(REF_LENS)
    names = {"part": part, "decoding_method": method, "unit": "word", "rtf": 0.0125}
    return {**names, "error_rate": rate, "utterances": utterances}


def write_exp_dir(folder: Path, part: str, errors: list[int], kd: dict) -> None:
    write_json(folder / "config.json", {"config": {"label_dir": []}})
    names = "finished epochs steps audio_hours audio_hours_per_hour parameters device".split()
    write_json(folder / "train_summary.json", {**dict.fromkeys(names, 1), "seconds": 60.0, "peak_memory_gib": 0.5})
    (folder / "log").mkdir()
    lines = ['{"kind": "train", "kd_codebook_acc": 0.1}', '{"kind": "valid"}']
    if kd:
        lines.append('{"kind": "train", "loss": 1.0, ' + ", ".join(f'"{k}": {v}' for k, v in kd.items()) + "}")
    (folder / "log" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for method in ("greedy_search", "modified_beam_search"):
        write_json(folder / method / "results-x.json", decoding(part, method, errors))


def test_runs_are_collected_compared_and_tabled(driver, tmp_path):
    config = driver.RealConfig(
        exp_root=tmp_path, data_root=tmp_path / "data", results=tmp_path / "results", beds=["barista"]
    )
    rng = np.random.default_rng(0)
    for seed in (1, 2):
        for system, share in (("none", 0.5), ("mvq", 0.2)):
            exp_dir = tmp_path / "barista" / f"{system}-seed{seed}"
            errors = rng.binomial(5, share, 40).tolist()
            write_exp_dir(exp_dir, "dev", errors, {"kd_codebook_acc": 0.25} if system == "mvq" else {})
            result = driver.without_machine_paths(driver.collect(exp_dir, "barista", system, seed), config)
            result["note"] = "a [text  with  brackets] stays as it is"
            assert result["last_step"].get("kd_codebook_acc", 0.1) == (0.25 if system == "mvq" else 0.1)
            assert str(tmp_path) not in str(result) and result["training"]["seconds"] == 60.0
            assert result["decodings"]["dev"]["greedy_search"]["utterances"]["sub"] == errors
            file = driver.result_file(config, "barista", system, seed)
            driver.write_result(file, result)
            assert read_json(file) == result and len(file.read_text().splitlines()) < 100
    driver.compare(config)
    found = read_json(tmp_path / "results" / "barista_mvq_vs_none_greedy_search.json")
    assert found["seeds"] == [1, 2] and found["probability_of_improvement"] == 1.0
    low, high = found["difference"].split("[")[1].rstrip("]").split(",")
    assert float(low) < float(high) < 0  # half the errors against a fifth: no draw of utterances turns that round
    table = driver.table(config)
    rows = {tuple(cell.strip() for cell in line.split("|")[1:5]) for line in table.splitlines()[2:]}
    methods = ("greedy_search", "modified_beam_search")
    assert rows == {("barista", system, "1, 2", method) for system in ("none", "mvq") for method in methods}
    assert "25.0 %" in table and found["difference"] in table and "| utterance | 0.013 |" in table


def test_decodings_of_several_chunk_sizes_are_kept_apart(driver, tmp_path):
    config = driver.RealConfig(exp_root=tmp_path, results=tmp_path / "results", beds=["barista_streaming"])
    for system, errors in (("none", [3] * 40), ("mvq", [1] * 40)):
        exp_dir = tmp_path / "barista" / f"{system}-streaming-seed1"
        write_exp_dir(exp_dir, "dev", errors, {})
        for old in exp_dir.glob("*/results-x.json"):
            result = read_json(old)
            old.unlink()
            for chunk, more in ((8, 1), (16, 0)):
                worse = [e + more for e in errors]
                heard = {"chunk_size": chunk, "algorithmic_latency": 0.04 * chunk + 0.0575}
                again = {**decoding("dev", result["decoding_method"], worse), **heard}
                write_json(old.with_name(f"results-{chunk}.json"), again)
        driver.write_result(
            driver.result_file(config, "barista_streaming", system, 1),
            driver.collect(exp_dir, "barista_streaming", system, 1),
        )
    driver.compare(config)
    names = [f"greedy_search, chunks of {ms} ms" for ms in (320, 640)]
    assert set(names) < set(driver.BEDS["barista_streaming"].searches)
    lines = [line for name in names for line in driver.table(config).splitlines() if f"| {name} |" in line]
    rates = [line.split("|")[5].split()[1] for line in lines]
    assert rates == ["80.00", "40.00", "60.00", "20.00"]  # none and mvq at 320 ms, then at 640 ms
    assert [line.split("|")[7].strip() for line in lines] == ["377.5", "377.5", "697.5", "697.5"]
    assert (tmp_path / "results" / "barista_streaming_mvq_vs_none_greedy_search_320ms.json").exists()


def test_a_failed_command_ends_the_driver_with_its_exit_code(driver):
    with pytest.raises(driver.RunFailed, match="exit code 3") as raised:
        driver.run_command([sys.executable, "-c", "raise SystemExit(3)"])
    assert raised.value.exit_code == 3


def test_every_bed_names_a_configuration_and_a_recipe(driver, repo):
    for name, bed in driver.BEDS.items():
        assert (repo / "benchmarks" / "conf" / f"{bed.shares or name}.yaml").is_file()
        assert (repo / "egs" / bed.recipe / "run_mvq.sh").is_file()
        assert len(set(bed.runs)) == len(bed.runs)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("barista_mvq_vs_none_greedy_search", "from {} % to {} %: a difference of {} points, 95 % interval {} to {}"),
        (
            "barista_streaming_mvq_vs_none_greedy_search_640ms",
            "from {} % to {} %, a difference of {} points, 95 % interval {} to {}",
        ),
    ],
)
def test_the_readme_quotes_the_result_files(repo, name, sentence):
    found = read_json(repo / f"benchmarks/results/real/{name}.json")
    text = " ".join((repo / "README.md").read_text(encoding="utf-8").split())
    none, mvq = (found[name].split()[0] for name in ("none", "mvq"))
    difference, interval = found["difference"].split(" ", 1)
    assert sentence.format(none, mvq, difference, *interval.strip("[]").split(", ")) in text
