"""The benchmark of the searches of --system nar runs, and what it plants is what the searches find."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from icefall_kd.errors import ConfigError
from icefall_kd.runtime.files import read_json

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "nar_rtf.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_nar_rtf", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the command line reads the docstrings of fields
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VOCAB", 40)
    monkeypatch.setattr(module, "SIZES", dict.fromkeys(("big", "small"), (1, 1, 16, 16, (2, 4, 8))))
    return module


@pytest.mark.parametrize("batch", [1, 3])
def test_the_benchmark_reports_every_search_and_what_was_planted(benchmark, batch, tmp_path, monkeypatch, capsys):
    out = tmp_path / "times.json"
    options = f"--seconds 1.2 --tokens 6 --masked-share 0.25 --utterances 5 --repeats 1 --batch {batch} --out {out}"
    monkeypatch.setattr(sys, "argv", ["nar_rtf.py", *options.split()])
    benchmark.main()
    rows = read_json(out)["rows"]
    assert [r["size"] for r in rows] == ["big"] * 5 + ["small"] * 5
    for row in rows:
        assert row["tokens"] == 6.0  # of the autoregressive search too
        assert row["seconds"] == pytest.approx(row["encoder_seconds"] + row["search_seconds"])
        assert row["rtf"] == pytest.approx(row["seconds"] / 1.2)
        assert ("masked_share" in row) == row["search"].startswith("NAR")
        assert row.get("masked_share", 0.25) == pytest.approx(0.25, abs=0.02)
    assert [r["ratio"] for r in rows if r["search"] == "AR beam 10"] == [1.0, 1.0]
    assert rows[0]["ratio_to_first"] == 1.0
    assert capsys.readouterr().out.count("masked 2") == 6


def test_the_searches_say_the_script(benchmark):
    config = benchmark.RtfConfig(sizes=["big"], seconds=1.5, tokens=5, utterances=5, masked_share=0.3)
    device = torch.device("cpu")
    systems = benchmark.searches_of("big", config, device)
    for script in benchmark.scripts(config):
        for name, (model, search) in systems.items():
            _, ((best, *_),) = benchmark.run(model, search, torch.randn(1, 150, 80), script)
            kept = [not unsure or not name.startswith("NAR") for unsure in script.unsure]
            pairs = zip(best.tokens, script.tokens, kept, strict=True)
            assert all(a == b for a, b, same in pairs if same), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--repeats 0", "--repeats is 0; it must be at least 1"),
        ("--masked-share 1.5", "--masked-share is 1.5; it must lie in 0 ... 1"),
        ("--sizes huge", "--sizes names 'huge'; there are big, small"),
        ("--seconds 0.5 --tokens 14", "11 encoder frames, too few for 16 tokens; more --seconds or fewer --tokens"),
        ("--exp-dirs x --batch 8", "--exp-dirs .* one at a time; leave out --batch"),
        ("--espnet true", "ESPnet is not installed here; local/make_espnet_env.sh"),
    ],
)
def test_wrong_options_are_told_with_a_remedy(benchmark, options, said, monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["nar_rtf.py", *options.split()])
    with pytest.raises(ConfigError, match=said):
        benchmark.main()
