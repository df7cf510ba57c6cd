"""The recipe among kills, damaged files and a full disk: what it makes is what it makes undisturbed.

The driver is benchmarks/soak.py.  It runs where SOAK_MINUTES is set, to the minutes of trouble; SOAK_SEED=2 is another.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("espeakng_loader")
MINUTES, SEED = float(os.environ.get("SOAK_MINUTES", 5)), os.environ.get("SOAK_SEED", "1")


@pytest.mark.skipif("SOAK_MINUTES" not in os.environ, reason="SOAK_MINUTES is not set")
@pytest.mark.timeout(900 + int(120 * MINUTES))
def test_a_recipe_in_trouble_ends_in_the_same_labels_and_losses(repo, tmp_path):
    command = [sys.executable, str(repo / "benchmarks/soak.py"), "--minutes", str(MINUTES), "--seed", SEED]
    done = subprocess.run([*command, "--out", str(tmp_path / "soak.json")], capture_output=True, text=True)
    assert done.stdout, done.stderr
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["ended"], found["log"]
    assert {kind for kind, result in found["equal"].items() if not result["equal"]} == set(), found
    assert all(result["compared"] for result in found["equal"].values())
    assert found["unexplained"] == [] and found["processes_left"] == []
    assert found["kills"] >= 3 and found["artifacts_damaged"] >= 1, found
    assert found["disk"]["named"] and found["disk"]["exit_code"] != 0, found["disk"]
    assert done.returncode == 0, done.stderr
