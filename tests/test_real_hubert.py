"""The driver of HuBERT's beds: what it starts, skips, compares and prints, without a training."""

import importlib.util
import sys
from pathlib import Path

import pytest
from test_real_dualmode import write_training
from test_real_recordings import decoding

from icefall_kd.errors import ConfigError
from icefall_kd.runtime.files import read_json, write_json

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# Errors an utterance of five words.
ERRORS = {"scratch": 4, "deep-reg": 2, "deep-both": 1, "fbank-both": 2, "teacher": 1}


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("real_hubert", BENCHMARKS / "real_hubert.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where the command line reads the docstrings of fields
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(driver, tmp_path):
    return driver.RealHubertConfig(
        data_root=tmp_path / "data",
        exp_root=tmp_path / "exp",
        results=tmp_path / "results",
        beds=["hubert_barista"],
        systems=[f"{word}-{amount}" for amount in ("3min", "all") for word in ERRORS],
        seeds=[1],
    )


@pytest.fixture
def started(driver, config, monkeypatch):
    """The command lines of run_hubert.sh, as dictionaries; each training leaves an exp_dir."""
    found = []

    def run(command):
        words = [str(word) for word in command]
        if words[1] == "local/make_digits.py":
            return
        if words[1] == "local/make_lexicon.py":
            assert dict(zip(words[2::2], words[3::2], strict=True))["--lang-dir"].endswith("/lang_char")
            return
        if words[1] == "egs/librispeech/decode.py":
            line = dict(zip(words[2::2], words[3::2], strict=True))
            assert line["--decoding-method"] == "ctc_lexicon_beam" and line["--avg"] == "3"
            folder = Path(line["--exp-dir"])
            system, amount, _ = folder.name.rsplit("-", 2)
            errors = ERRORS[system] + (amount == "3min")
            write_json(folder / "ctc_lexicon_beam/results-x.json", decoding("dev", "ctc_lexicon_beam", [errors] * 40))
            return
        assert words[:2] == ["bash", "egs/librispeech/run_hubert.sh"]
        line = dict(zip(words[2::2], words[3::2], strict=True))
        found.append(line)
        exp = Path(line["--exp-dir"])
        if line.get("--stage") == "1":
            records = [{"kind": "train", "step": 1, "masked_loss": 3.9}]
            records.append({"kind": "valid", "loss": 1.5, "disc_loss": 0.2})
            for name in ("ssl1", "ssl2", *(f"distil-{w}" for w in line["--systems"].split() if w != "teacher")):
                write_training(exp / name, records)
        elif line.get("--stage") == "5":
            folder = exp / f"{line['--systems']}-{line['--hours']}-seed{line['--seeds']}"
            write_training(folder, [{"kind": "train", "loss": 2.0}])
            write_json(folder / "ctc_greedy_search/results-x.json", decoding("dev", "ctc_greedy_search", [5] * 40))

    for module in (driver, driver.chains, sys.modules["real_dualmode"]):
        monkeypatch.setattr(module, "run_command", run)
    return found


def run_all(driver, config) -> None:
    driver.teach(config)
    driver.choose_hours(config)
    driver.chains.run_missing(config, driver.BEDS, driver.source_dir, driver.prepare_line, driver.run_chain)


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_teacher_and_students_are_trained_once_on_the_training_parts_alone(driver, config, started):
    run_all(driver, config)
    (line,) = [line for line in started if line.get("--stage") == "1"]
    assert line["--systems"].split() == ["deep-reg", "deep-both", "fbank-both", "teacher"]
    heard, checked = ([Path(f).name for f in line[o].split(",")] for o in ("--ssl-parts", "--ssl-valid-parts"))
    assert heard == ["cuts_train.jsonl.gz"] * 2 + ["cuts_train-clean-100.jsonl.gz"]
    assert checked == ["cuts_dev.jsonl.gz"] * 2 and line["--stop-stage"] == "3"
    assert read_json(driver.audio_file(config, "ssl1"))["first"]["masked_loss"] == 3.9
    rows = rows_of(driver.audio_table(config))
    assert [row[0] for row in rows] == ["distil-deep-both", "distil-deep-reg", "distil-fbank-both", "ssl1", "ssl2"]
    assert rows[0][3:8] == ["1.500", "-", "-", "0.200", "-"]


def test_what_is_missing_is_run_once_compared_and_tabled(driver, config, started):
    run_all(driver, config)
    tuned = [line for line in started if line.get("--stage") == "5"]
    assert [f"{line['--systems']}-{line['--hours']}" for line in tuned] == [
        s for s in driver.BEDS["hubert_barista"].systems if s in config.systems
    ]
    assert {line["--audio-dir"] for line in tuned} == {str(driver.audio_dir(config))}
    for line in tuned:
        epochs, rate = driver.BEDS["hubert_barista"].amounts[line["--hours"]]
        words = f"--valid-utts 20 --max-duration 6 --num-epochs {epochs}"
        untaught = line["--systems"] == "scratch"
        assert line["--tune-args"] == words + (f" --base-lr {rate}" if untaught else "")
    (chosen,) = [line for line in started if line.get("--stop-stage") == "4"]
    assert chosen["--hours"] == "3min" and "--stage" not in chosen and chosen["--systems"] == "scratch"
    run_all(driver, config)
    assert len([line for line in started if line.get("--stage") in ("1", "5")]) == 1 + len(tuned)

    driver.chains.compare(config, "hubert_barista", driver.BEDS["hubert_barista"], driver.pairs_of("hubert_barista"))
    compared = driver.chains.compared(config, "hubert_barista")
    relative = {(a, b): c["relative"] for ((a, search), (b, _)), c in compared.items() if search == driver.WORDS}
    assert relative["scratch-all", "deep-reg-all"] == "-50.0 %" == relative["deep-reg-all", "deep-both-all"]
    assert relative["scratch-3min", "deep-both-3min"] == "-60.0 %" and ("wide-reg-all", "deep-reg-all") not in relative
    rows = rows_of(driver.table(config))
    assert [row[1:3] for row in rows[:2]] == [["3min", "fbank-both"], ["3min", "teacher"]] and len(rows) == len(tuned)
    (both,) = [row for row in rows if row[1:3] == ["all", "deep-both"]]
    assert both[8] == "deep-reg" and both[10] == "-50.0 %"
    assert both[5].split()[1] == "100.00" and both[6].split()[1] == "20.00"  # letters alone, words


def test_beds_know_their_homes_and_their_conf_is_there(driver, repo):
    assert (repo / driver.CONF).is_file()
    assert all(bed.home in driver.HEARD and "all" in bed.amounts for bed in driver.BEDS.values())
    words = set(driver.COMPARED_WITH)
    assert {word for pair in driver.PAIRS for word in pair} | set(filter(None, driver.COMPARED_WITH.values())) <= words


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beds": ["digits"]}, "--beds names 'digits'; there are hubert_digits, hubert_barista"),
        ({"systems": ["best-all"]}, "--systems names 'best-all'; there are fbank-scratch-2min, "),
    ],
)
def test_wrong_options_are_told(driver, options, said):
    with pytest.raises(ConfigError, match=said):
        driver.RealHubertConfig(**options)


def test_systems_that_differ_in_one_thing_stand_in_one_table(driver, config, started):
    run_all(driver, config)
    text = driver.grids(config)
    # Of the first and the third table too few systems are there.
    titles = [line for line in text.splitlines() if line.startswith("T")]
    assert titles == ["T2, losses: hubert_barista, seed 1", "T3, front ends: hubert_barista, seed 1"]
    rows = rows_of(text.split("\n\n")[1])
    assert [row[0] for row in rows] == ["deep-reg", "deep-both"]
    assert [row[2].split()[1] for row in rows] == ["60.00", "40.00"]  # 3 and 2 of 5 words with few transcripts
    assert [row[3].split()[1] for row in rows] == ["40.00", "20.00"]


def test_layers_are_compared_before_and_after_fine_tuning(driver, config, started, monkeypatch):
    run_all(driver, config)
    assert driver.similarity_table(config) == ""
    audio, tuned = driver.audio_dir(config), config.exp_root.resolve() / "hubert_digits/deep-both-all-seed1"
    write_training(tuned, [{"kind": "train", "loss": 2.0}])
    compared = []

    def run(command):
        words = dict(zip(command[2::2], command[3::2], strict=True))
        compared.append(words["--student"])
        assert words["--teacher"] == audio / "ssl2"
        value = 0.25 if words["--student"] == tuned else 0.75
        found = {"student": str(tuned), "student_layers": [1, 2], "teacher_layers": [1, 2, 3], "cka": [[value] * 3] * 2}
        write_json(Path(words["--out"]), found)

    monkeypatch.setattr(driver, "run_command", run)
    driver.compare_layers(config)
    driver.compare_layers(config)
    before = [audio / f"distil-{word}" for word in ("deep-reg", "deep-both", "fbank-both")]
    assert compared == [*before[:2], tuned, before[2]]
    assert str(tuned) not in driver.similarity_file(config, "deep-both-all-seed1").read_text()
    rows = rows_of(driver.similarity_table(config).split("\n\n")[1])
    assert rows == [["deep-both", layer, *["0.75 / 0.25"] * 3] for layer in ("1", "2")]
