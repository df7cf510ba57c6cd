"""Rules of the house that a search can check."""

import ast
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@cache
def files() -> tuple[Path, ...]:
    """Every file of the repository that is tracked, or new and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    return tuple(path for name in result.stdout.split("\0") if name and (path := REPO / name).exists())


def relative(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@cache
def python_files() -> dict[str, ast.Module]:
    return {relative(p): ast.parse(p.read_text(encoding="utf-8")) for p in files() if p.suffix == ".py"}


def imported_modules(tree: ast.Module) -> set[str]:
    """Return the top-level names of all imports, wherever they stand."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_torch_load_stands_in_one_place_and_loads_weights_only():
    calls = [
        (relative(path), line.strip())
        for path in files()
        if path.suffix == ".py" and path != Path(__file__)
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\btorch\.load\(", line)
    ]
    # The fuzz test takes saved files apart to damage them.
    places = ("icefall_kd/train/checkpoint.py", "tests/faults/mutate.py")
    assert [call for call in calls if call[0] not in places] == []
    assert [line for _, line in calls if "weights_only=True" not in line] == []


def test_nobody_imports_what_the_house_refuses():
    refused = {"pickle", "dill", "joblib", "torchaudio", "fairseq"}
    found = {
        # A test may ask whether an object reaches a loader's worker process.
        name: imported_modules(tree) & (refused - {"pickle"} if name.startswith("tests/") else refused)
        for name, tree in python_files().items()
    }
    assert {name: modules for name, modules in found.items() if modules} == {}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Return all calls with the names of their functions, as "tarfile.open"; of any other object as ".open"."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute):
                owner = function.value.id if isinstance(function.value, ast.Name) else ""
                found.append((f"{owner}.{function.attr}", node))
            elif isinstance(function, ast.Name):
                found.append((function.id, node))
    return found


def keyword(call: ast.Call, name: str) -> str | None:
    """Return the text of a keyword argument."""
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


RUNS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "shutil.unpack_archive"),
    *("pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "shelve.open"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
}
LOADERS = (None, "yaml.SafeLoader", "yaml.CSafeLoader", "yaml.BaseLoader")


def refused_calls(tree: ast.AST) -> list[str]:
    """Return the calls that run what they read, as "line: call"."""
    found = []
    for name, call in calls(tree):
        method, remote = name.rpartition(".")[2], keyword(call, "trust_remote_code")
        if (
            name in RUNS
            or (method == "extractall" and keyword(call, "filter") != "'data'")
            or (name in ("yaml.load", "yaml.compose") and keyword(call, "Loader") not in LOADERS[1:])
            or keyword(call, "allow_pickle") not in (None, "False")
            or keyword(call, "shell") not in (None, "False")
            or remote not in (None, "False")
            or (method == "from_pretrained" and remote is None)
        ):
            found.append(f"{call.lineno}: {ast.unparse(call)[:60]}")
    return found


def test_nothing_that_is_read_is_run():
    """No call in the library and its tools unpickles, evaluates, starts a shell or unpacks an archive."""
    ours = {name: tree for name, tree in python_files().items() if not name.startswith("tests/")}
    assert len(ours) > 200
    assert {name: found for name, tree in ours.items() if (found := refused_calls(tree))} == {}
    # A file of Python that the user names is imported in one place; archives are looked into in three.
    where = defaultdict(set)
    for name, tree in ours.items():
        for function, _ in calls(tree):
            if (method := function.rpartition(".")[2]) in ("exec_module", "import_module"):
                where[method].add(name)
        for module in imported_modules(tree) & {"tarfile", "zipfile"}:
            where[module].add(name)
    assert where == {
        "exec_module": {"icefall_kd/teachers/own.py"},
        "import_module": {"icefall_kd/runtime/optional.py"},
        "tarfile": {"icefall_kd/data/corpora.py", "icefall_kd/data/shar.py"},
        "zipfile": {"icefall_kd/train/checkpoint.py"},
    }


def test_the_search_for_calls_that_run_what_they_read_finds_them():
    bad = [
        "eval(text)", "exec(text)", "os.system(text)", "subprocess.run(text, shell=True)", "tar.extractall(folder)",
        "shutil.unpack_archive(a)", "yaml.load(text)", "yaml.load(text, Loader=yaml.Loader)", "yaml.full_load(text)",
        "np.load(file, allow_pickle=True)", "AutoModel.from_pretrained(x)", "pickle.loads(content)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "f(shell=flag)",
    ]  # fmt: skip
    good = [
        "yaml.safe_load(text)", "yaml.load(text, Loader=yaml.BaseLoader)", "re.compile(text)", "model.eval()",
        "subprocess.run(words)", "AutoModel.from_pretrained(x, trust_remote_code=False)", "np.load(file)",
        "ast.literal_eval(text)",
    ]  # fmt: skip
    assert [line for line in bad if not refused_calls(ast.parse(line))] == []
    assert [line for line in good if refused_calls(ast.parse(line))] == []


def test_no_shell_script_evaluates_text():
    """No eval, and no text of a variable as the command of a shell; what runs tasks is told its command as words."""
    pattern = re.compile(r"(^|[;&|(\s])(eval|source <\(|(ba)?sh -c [\"$])")
    found = [
        f"{relative(path)}:{n}"
        for path in files()
        if path.suffix == ".sh" or relative(path) == ".ci/run"
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line.split("#")[0])
    ]
    assert found == []


def test_an_optional_dependency_is_imported_in_one_module():
    optional = {"k2", "fast_rnnt", "kaldifeat", "espeakng_loader", "pypinyin", "h5py", "sklearn"}
    optional |= {"onnx", "onnxruntime", "sherpa_onnx", "espnet", "espnet2", "matplotlib", "flashlight"}
    alone = ("local/onnx_mask_predict.py", "local/onnx_cif.py")  # show what runs an export without this project
    assert not any("icefall_kd" in module for name in alone for module in imported_modules(python_files()[name]))
    where = defaultdict(set)
    for name, tree in python_files().items():
        if not name.startswith("tests/") and name not in alone:
            for module in imported_modules(tree) & optional:
                where[module].add(name)
    assert {module: names for module, names in where.items() if len(names) > 1} == {}


def test_no_error_is_swallowed():
    found = []
    for name, tree in python_files().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            if broad and all(isinstance(statement, ast.Pass) for statement in node.body):
                found.append(f"{name}:{node.lineno}")
    assert found == []


def test_the_packages_that_shell_stages_load_import_nothing():
    for name in ("icefall_kd/__init__.py", "icefall_kd/runtime/__init__.py"):
        assert imported_modules(python_files()[name]) == set(), name
    standard = set(sys.stdlib_module_names) | {"icefall_kd"}
    runtime = [f"icefall_kd/runtime/{name}.py" for name in ("files", "jobs", "slurm")]
    for name in ("icefall_kd/errors.py", *runtime, "local/stage_marker.py", "local/submit.py"):
        assert imported_modules(python_files()[name]) <= standard, name


def test_every_test_folder_is_in_one_step():
    """The steps of local/test_all.sh collect every test file once."""
    text = (REPO / "local/test_all.sh").read_text(encoding="utf-8")
    steps = [line.split() for line in re.search(r'^steps="\n(.*?)^"', text, re.MULTILINE | re.DOTALL)[1].splitlines()]
    assert [name for name, _, *folders in steps if not folders] == ["unit"]  # it takes what the others do not name
    named = [folder for _, _, *folders in steps for folder in folders]
    assert len(named) == len(set(named)) and all(any((REPO / "tests" / f).glob("test_*.py")) for f in named)
    # What the script makes of them, with a Python that prints its arguments.
    script = text.replace('"${VENV:-.venv}/bin/python" -m pytest', "echo pytest")
    script = script.replace("${BASH_SOURCE[0]}", "local/test_all.sh")
    done = subprocess.run(["bash", "-c", script], cwd=REPO, capture_output=True, text=True, check=True)
    calls = [line.split() for line in done.stdout.splitlines() if line.startswith("pytest ")]
    assert len(calls) == len(steps)
    collected = []
    for call in calls:
        ignored = {word.removeprefix("--ignore=") for word in call if word.startswith("--ignore=")}
        for folder in (word for word in call if word.startswith("tests")):
            inside = (p for p in files() if p.name.startswith("test_") and p.is_relative_to(REPO / folder))
            collected += [p for p in inside if not any(p.is_relative_to(REPO / other) for other in ignored)]
    everything = [p for p in files() if re.match(r"tests/(.*/)?test_[^/]*\.py$", relative(p))]
    assert sorted(collected) == sorted(everything)
    unknown = subprocess.run(["bash", "local/test_all.sh", "unti"], cwd=REPO, capture_output=True, text=True)
    assert unknown.returncode == 2 and "no step is called 'unti'; there are unit" in unknown.stderr


def test_there_are_no_symbolic_links():
    assert [relative(path) for path in files() if path.is_symlink()] == []


def test_no_path_of_one_machine():
    pattern = re.compile(r"(?<![\w.}~$)-])/(work|root|home|Users|mnt)/\w")
    found = []
    for path in files():
        if path == Path(__file__) or path.name in (".gitignore", "LICENSE"):
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{relative(path)}:{n}" for n, line in enumerate(lines, 1) if pattern.search(line)]
    assert found == []


def test_every_shell_script_passes_shellcheck():
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    scripts = [str(path) for path in files() if path.suffix == ".sh" or relative(path) == ".ci/run"]
    assert scripts
    result = subprocess.run([shellcheck, *scripts], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_every_script_with_a_shebang_can_be_executed_and_stops_at_errors():
    for path in files():
        if path.suffix in (".sh", ".py") and path.read_bytes().startswith(b"#!"):
            assert path.stat().st_mode & 0o100, f"{relative(path)}: chmod +x"
            if path.suffix == ".sh":
                text = path.read_text(encoding="utf-8")
                hands_over = re.search(r"^exec ", text, re.MULTILINE)  # to a script that sets them
                assert hands_over or "\nset -euo pipefail\n" in text, relative(path)
