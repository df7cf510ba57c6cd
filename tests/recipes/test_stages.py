"""Real small bash scripts over local/stages.sh."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

SCRIPT = """#!/usr/bin/env bash
# Make toy data.
# Second line.
set -euo pipefail
layer=3          # Teacher layer.
out_dir=out      # Where it goes.
short=false      # Fewer utterances.
hidden=1
. "$(dirname "$0")/../local/stages.sh"
parse_options "$@"
marker_dir=$out_dir/.done

stage_1_manifests() {  # Write the manifests.
  begin --input corpus.txt --output "$out_dir/m.txt" --code 'src/*.py' || return 0
  mkdir -p "$out_dir"
  echo manifests
  cat corpus.txt > "$out_dir/m.txt"
}

stage_2_labels() {  # Extract labels.
  begin --option layer short --input "$out_dir/m.txt" --output "$out_dir/l.txt" --code src/labels.py || return 0
  echo "labels $layer"
  echo half > "$out_dir/l.txt"
  ${SLEEP:-true}
  echo "$layer $(cat "$out_dir/m.txt")" > "$out_dir/l.txt"
}

stage_3_train() {  # Train twice.
  local kd
  for kd in none mvq; do
    if begin --name "$kd" --option kd --input "$out_dir/l.txt" --output "$out_dir/$kd"; then
      echo "train $kd"
      touch "$out_dir/$kd"
      finish
    fi
  done
}

stage_10_table() {  # Always print.
  echo table
}

run_stages
"""


class Recipe:
    """A copy of the engine with a script over it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("local/stages.sh", "local/stage_marker.py", "icefall_kd/__init__.py", "icefall_kd/errors.py",
                     "icefall_kd/runtime/__init__.py", "icefall_kd/runtime/files.py", "icefall_kd/runtime/jobs.py",
                     "icefall_kd/runtime/slurm.py", "local/submit.py", "local/job.sh"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, root / name)
        (root / "src").mkdir()
        (root / "src/data.py").write_text("1\n")
        (root / "src/labels.py").write_text("1\n")
        self.write(SCRIPT)
        self.work = root / "egs"
        (self.work / "corpus.txt").write_text("one\n")
        self.env = {**os.environ, "PYTHON": sys.executable}

    def write(self, script: str) -> None:
        (self.root / "egs").mkdir(exist_ok=True)
        (self.root / "egs/run.sh").write_text(script)

    def start(self, *arguments: str, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "run.sh", *arguments], cwd=self.work, env={**self.env, **env}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            # These tests may run in the background of a shell, whose children ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *arguments: str, code: int = 0, **env: str) -> tuple[list[str], str]:
        """Return the lines of stdout, and stderr."""
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        return out.splitlines(), err


ALL = ["manifests", "labels 3", "train none", "train mvq", "table"]


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    return Recipe(tmp_path)


def test_finished_stages_are_skipped(recipe):
    out, err = recipe.run()
    assert out == ALL
    assert "stage 1 manifests: runs, not run before" in err and "stage 3 train [mvq]: done in" in err
    out, err = recipe.run()
    assert out == ["table"]
    assert err.count("done before, skipped") == 4
    marker = json.loads((recipe.work / "out/.done/2_labels").read_text())
    assert marker["options"] == {"layer": "3", "short": "false"} and marker["outputs"] == ["out/l.txt"]


def test_a_changed_option_runs_what_depends_on_it_and_says_why(recipe):
    recipe.run()
    out, err = recipe.run("--layer", "4")
    assert out == ["labels 4", "train none", "train mvq", "table"]
    assert "stage 2 labels: runs, option layer changed: '3' -> '4'" in err
    assert "stage 3 train [none]: runs, input out/l.txt changed: 6 bytes, sha256" in err
    assert recipe.run("--layer=4")[0] == ["table"]


def test_content_of_an_input_decides_and_not_its_time(recipe):
    recipe.run()
    corpus = recipe.work / "corpus.txt"
    os.utime(corpus, (1, 1))
    assert recipe.run()[0] == ["table"]
    corpus.write_text("two\n")
    out, err = recipe.run()
    assert out == ALL
    assert "stage 1 manifests: runs, input corpus.txt changed: 4 bytes, sha256 2c8b08da5ce6 -> 4 bytes, sha256" in err
    corpus.unlink()
    _, err = recipe.run(code=4)
    assert "input corpus.txt does not exist" in err


def test_changed_code_is_named(recipe):
    recipe.run()
    (recipe.root / "src/labels.py").write_text("2\n")
    out, err = recipe.run()
    assert out == ["manifests", "labels 3", "table"]  # the same labels come out, so nothing is trained again
    assert "stage 2 labels: runs, code src/labels.py changed: 4355a46b19d3 -> 53c234e5e847" in err
    recipe.write(SCRIPT.replace('echo "train $kd"', 'echo "TRAIN $kd"'))
    out, err = recipe.run()
    assert out == ["TRAIN none", "TRAIN mvq", "table"]
    assert "code run.sh:stage_3_train changed" in err


def test_a_missing_output_is_made_again(recipe):
    recipe.run()
    (recipe.work / "out/mvq").unlink()
    out, err = recipe.run()
    assert out == ["train mvq", "table"] and "output out/mvq is missing" in err


def test_an_output_that_was_cut_off_is_named_and_made_again(recipe):
    recipe.write(SCRIPT.replace('--output "$out_dir/m.txt"', """--output "$out_dir"/{m.txt,folder,'*.pt'}""").replace(
        "  echo manifests\n",
        '  echo manifests\n  mkdir -p "$out_dir/folder/sub"\n  for n in 1 2; do\n'
        '    echo whole > "$out_dir/$n.pt"\n    echo whole > "$out_dir/folder/sub/$n"\n  done\n',
    ))  # fmt: skip
    out_dir = recipe.work / "out"
    assert recipe.run()[0] == ALL
    for name, size in (("m.txt", 4), ("1.pt", 6), ("folder/sub/2", 6)):
        whole = (out_dir / name).read_bytes()
        os.truncate(out_dir / name, 2)
        out, err = recipe.run()
        # The same comes out of it, so nothing behind it runs.
        assert out == ["manifests", "table"] and f"runs, output out/{name} was cut off: 2 of {size} bytes" in err
        assert (out_dir / name).read_bytes() == whole
    # What grows, what is new and what is removed inside a folder or behind a pattern is nobody's damage.
    for name in ("m.txt", "1.pt", "folder/sub/1"):
        (out_dir / name).write_text("one\nmore than it was\n")
    (out_dir / "folder/new").write_text("x")
    (out_dir / "2.pt").unlink()
    (out_dir / "folder/sub/2").unlink()
    assert "manifests" not in recipe.run("--stop-stage", "1")[0]
    os.truncate(out_dir / "l.txt", 0)
    assert "output out/l.txt was cut off: 0 of" in recipe.run("--stage", "2", "--stop-stage", "2")[1]


def test_a_killed_stage_is_done_again(recipe):
    out, _ = recipe.run()
    result = (recipe.work / "out/l.txt").read_text()
    process = recipe.start("--layer", "4", SLEEP="sleep 60")
    while process.stdout.readline() != "labels 4\n":
        pass
    deadline = time.monotonic() + 20
    while (recipe.work / "out/l.txt").read_text() != "half\n" and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()
    assert (recipe.work / "out/l.txt").read_text() == "half\n"
    # The options of the finished run again: its marker must not vouch for the half-written output.
    out, err = recipe.run()
    assert out == ["labels 3", "table"]
    assert "stage 2 labels: runs, not finished before" in err
    assert (recipe.work / "out/l.txt").read_text() == result


def test_a_failed_stage_stops_the_script_with_its_exit_code(recipe):
    _, err = recipe.run(SLEEP="false", code=1)
    assert "stage 2 labels failed with exit code 1" in err and "table" not in err
    assert recipe.run()[0] == ALL[1:]


def test_a_stage_without_its_declared_output_fails(recipe):
    recipe.write(SCRIPT.replace('touch "$out_dir/$kd"', "true"))
    _, err = recipe.run(code=4)
    assert "the stage ended without its output out/none" in err


def test_stages_are_chosen_by_number_in_numeric_order(recipe):
    assert recipe.run("--stop-stage", "2")[0] == ALL[:2]
    assert recipe.run("--stage", "3", "--skip-stages", "10")[0] == ALL[2:4]
    assert recipe.run("--stage", "2", "--stop-stage", "2", "--force")[0] == ["labels 3"]
    assert recipe.run()[0] == ["table"]


def test_help_lists_options_and_stages(recipe):
    out = "\n".join(recipe.run("--help")[0])
    assert "Make toy data.\nSecond line.\n" in out
    assert "--out-dir" in out and "Where it goes. (default: 'out')" in out
    assert "    2  labels             Extract labels." in out
    assert "--hidden" not in out
    assert out.index("train") < out.index("table")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lyer", "3"], "unknown option --lyer; did you mean --layer?"),
        (["--hidden", "3"], "unknown option --hidden"),
        (["--layer"], "--layer needs a value"),
        (["--short", "5"], "--short is '5'; it must be true or false"),
        (["--stage", "x"], "--stage is 'x'; it must be a number"),
        (["--stage", "5", "--stop-stage", "2"], "--stage 5 comes after --stop-stage 2"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_wrong_usage_is_exit_code_2(recipe, arguments, message):
    out, err = recipe.run(*arguments, code=2)
    assert out == [] and message in err


def test_a_bare_switch_is_true(recipe):
    recipe.run("--short", "--stop-stage", "2")
    marker = json.loads((recipe.work / "out/.done/2_labels").read_text())
    assert marker["options"]["short"] == "true"


def test_a_folder_as_input_is_compared_by_content(recipe):
    recipe.write(SCRIPT.replace("--input corpus.txt", "--input corpus"))
    folder = recipe.work / "corpus/sub"
    folder.mkdir(parents=True)
    (folder / "a.wav").write_text("a")
    recipe.run()
    os.utime(folder / "a.wav", (1, 1))
    (folder / ".tmp-1-0-x").write_text("ignored")
    (folder / "log").mkdir()
    (folder / "log/extract.0.log").write_text("ignored, too")
    assert recipe.run()[0] == ["table"]
    (folder / "b.wav").write_text("bc")
    out, err = recipe.run()
    assert out[0] == "manifests" and "input corpus changed: 1 files, 1 bytes, sha256" in err
    (folder / "b.wav").write_text("cd")
    assert recipe.run()[0][0] == "manifests"


def test_a_stage_reading_stdin_does_not_swallow_the_later_stages(recipe):
    recipe.write(SCRIPT.replace("echo manifests\n", "echo manifests; cat\n"))
    assert recipe.run()[0] == ALL


def test_checking_a_marker_imports_nothing_heavy():
    code = (
        "import runpy, sys; sys.argv = ['m', 'closest', 'a', 'b']\n"
        f"try: runpy.run_path({str(REPO / 'local/stage_marker.py')!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'lhotse', 'yaml', 'logging'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_a_script_may_be_started_from_any_folder(recipe):
    recipe.write(SCRIPT.replace('short=false ', 'cd "$(dirname "$0")"\nshort=false ').replace(
        '. "$(dirname "$0")/../local/stages.sh"', ". ../local/stages.sh"
    ))
    for folder, name in ((recipe.root, "egs/run.sh"), (recipe.work, "run.sh"), (recipe.root, recipe.work / "run.sh")):
        result = subprocess.run(
            ["bash", name, "--force"], cwd=folder, env=recipe.env, capture_output=True, text=True, timeout=60
        )
        assert result.stdout.splitlines() == ALL, result.stderr


def test_the_text_of_the_function_that_begins_a_step_counts_as_code(recipe):
    script = SCRIPT.replace("stage_3_train() {  # Train twice.\n", "train() {\n").replace(
        "stage_10_table", "stage_3_train() {  # Train.\n  train\n}\n\nstage_10_table"
    )
    recipe.write(script)
    assert recipe.run()[0] == ALL
    recipe.write(script.replace('echo "train $kd"', 'echo "TRAIN $kd"'))
    out, err = recipe.run()
    assert out == ["TRAIN none", "TRAIN mvq", "table"] and "code run.sh:train changed" in err


ARRAY = """  run_cmd cpu --log "$out_dir/log/JOB" --array 0-2%1 -- bash -c '[[ JOB != 1 || -e go ]]; echo JOB >> ran'
"""


def test_of_an_array_that_did_not_finish_only_what_is_missing_runs_again(recipe):
    recipe.write(SCRIPT.replace('  echo "labels $layer"\n', ARRAY.replace("]];", "]] || exit 4;")))
    ran = recipe.work / "ran"
    _, err = recipe.run(code=4)
    assert "failed with exit code 4: task 1 of 0-2" in err and "stage 2 labels failed with exit code 4" in err
    (recipe.work / "go").touch()
    _, err = recipe.run()
    assert "1 of 3 tasks were finished before" in err and ran.read_text() == "0\n1\n2\n"
    assert not list((recipe.work / "out/.done").glob("*.tasks"))
    recipe.run("--stop-stage", "2", "--force")
    assert ran.read_text() == "0\n1\n2\n" * 2
    # What finished is worth nothing once an option, an input or the code is another, or with --force.
    changes = [["--layer", "5"], ["--layer", "5", "--force"], ["--layer", "5", "--force"]]
    (recipe.work / "go").unlink()
    for options in changes:
        recipe.run("--stop-stage", "2", *options, code=4)
    assert ran.read_text() == "0\n1\n2\n" * 2 + "0\n" * len(changes)
    recipe.run("--stop-stage", "2", "--layer", "5", code=4)
    assert ran.read_text() == "0\n1\n2\n" * 2 + "0\n" * len(changes)


def test_a_stage_that_ends_without_its_output_runs_all_its_tasks_again(recipe):
    script = SCRIPT.replace('  echo "labels $layer"\n', ARRAY).replace('> "$out_dir/l.txt"\n}', "> l.txt\n}")
    recipe.write(script.replace('  echo half > "$out_dir/l.txt"\n', ""))
    for times in (1, 2):
        assert "ended without its output out/l.txt" in recipe.run(code=4)[1]
        assert (recipe.work / "ran").read_text() == "0\n1\n2\n" * times


def test_mistakes_in_a_script_are_named(recipe):
    recipe.write(SCRIPT.replace("      finish\n", ""))
    assert "begin was called again before finish of stage 3 train [none]" in recipe.run(code=2)[1]
    recipe.write(SCRIPT.replace("--input corpus.txt", '--input "$hidden"').replace("hidden=1", "hidden="))
    assert "--input has an empty path" in recipe.run("--force", code=2)[1]
    recipe.write(SCRIPT.replace("'src/*.py'", "'source/*.py'"))
    assert "--code source/*.py matches no file" in recipe.run(code=2)[1]


def test_a_large_folder_is_compared_by_names_sizes_and_times(recipe):
    recipe.write(SCRIPT.replace("--input corpus.txt", "--input corpus"))
    folder = recipe.work / "corpus/sub"
    folder.mkdir(parents=True)
    (folder / "text").write_text("one")
    with open(folder / "a.wav", "wb") as stream:
        stream.truncate(257 * 2**20)  # sparse, so it takes no space
    recipe.run("--stop-stage", "1")
    (marker,) = (recipe.work / "out/.done").glob("1_*")
    assert json.loads(marker.read_text())["inputs"]["corpus"]["sha256"] is None
    assert recipe.run("--stop-stage", "1")[0] == []
    for change in (
        lambda: (folder / "text").write_text("two"),  # the same size
        lambda: (folder / "b.wav").touch(),
        lambda: (folder / "b.wav").unlink(),
        lambda: (folder / "text").rename(folder / "text2"),
    ):
        change()
        out, err = recipe.run("--stop-stage", "1")
        assert out == ["manifests"] and "stage 1 manifests: runs, input corpus changed: " in err
        assert recipe.run("--stop-stage", "1")[0] == []


def test_an_input_folder_that_cannot_be_read_stops_the_stage(recipe):
    recipe.write(SCRIPT.replace("--input corpus.txt", "--input corpus"))
    folder = recipe.work / "corpus/sub"
    folder.mkdir(parents=True)
    for name, target in {"gone": "nowhere", "loop": ".."}.items():
        (folder / name).symlink_to(target)
        _, err = recipe.run(code=4)
        assert "input corpus cannot be read" in err and name in err and "Traceback" not in err
        (folder / name).unlink()


def test_an_interrupted_stage_stops_the_script_and_runs_again(recipe):
    process = recipe.start(SLEEP="sleep 60")
    while process.stdout.readline() != "labels 3\n":
        pass
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
    out, err = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT) and out == ""
    assert "stage 2 labels failed with exit code 130" in err and "run the same line again" in err
    assert recipe.run()[0] == ALL[1:]
