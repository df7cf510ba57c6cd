"""The benchmark of the searches runs and writes what it says."""

import importlib.util
import sys
from pathlib import Path

import pytest

from icefall_kd.runtime.files import read_json

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "decoders.py"


def test_the_benchmark_reports_every_search(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("benchmark_decoders", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the command line reads the docstrings of fields
    spec.loader.exec_module(module)
    out = tmp_path / "times.json"
    sizes = "--encoder-dim 16 --vocab-size 20 --batch 2 --frames 40 --repeats 1 --beam-sizes 1,2 --device cpu"
    monkeypatch.setattr(sys, "argv", ["decoders.py", *sizes.split(), "--out", str(out)])
    module.main()
    searches = {s["search"]: s for s in read_json(out)["searches"]}
    assert set(searches) == {
        "ctc_greedy_search", "greedy_search", "modified_beam_search, beam 1", "modified_beam_search, beam 2",
    }  # fmt: skip
    assert searches["greedy_search"]["ratio_to_greedy"] == pytest.approx(1.0)
    # Beam 1 is greedy search: the same tokens from the same frames.
    density = searches["greedy_search"]["tokens_per_frame"]
    assert searches["modified_beam_search, beam 1"]["tokens_per_frame"] == density
    assert "x greedy" in capsys.readouterr().out
