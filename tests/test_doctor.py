import os
import subprocess
import sys

import pytest

from icefall_kd import doctor
from icefall_kd.errors import ConfigError


def check_named(name: str) -> doctor.Check:
    return next(check for check in doctor.checks() if check.name == name)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("raise OSError('libk2.so: undefined symbol: _ZN3c10')", "undefined symbol"),
        ("raise ImportError('No module named _k2')", "No module named _k2"),
        ("raise Exception('anything [red]else[/]')", "anything"),
        ("class Odd(BaseException): pass\nraise Odd('odd')", "odd"),
        ("import sys; sys.exit(0)", "exit code 0"),
        ("import os; os.abort()", "killed by signal 6"),
        ("x = 1", "no attribute 'rnnt_loss_pruned'"),
    ],
)
def test_a_broken_k2_is_one_line_of_the_table(tmp_path, monkeypatch, content, reason):
    (tmp_path / "k2.py").write_text(content + "\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    finding = doctor.run_check(check_named("k2"))
    assert finding.state == "broken"
    assert reason in finding.detail


def test_what_is_not_installed_is_missing(monkeypatch):
    absent = doctor._package("no_such_module", "1", "optional")
    assert doctor.run_check(absent).state == "missing"
    assert doctor.run_check(doctor._teacher("x", "no-such-teacher", "pip")).state == "missing"
    assert doctor.run_check(doctor.Check(group="tools", name="x", command="no-such-program")).state == "missing"


def test_the_remedy_names_the_wheel_for_this_torch():
    remedy = check_named("k2").remedy
    assert f"cp3{sys.version_info.minor}" in remedy and "+cpu.torch2." in remedy
    assert "local/make_k2_env.sh" in remedy and "\n" not in remedy


def test_the_whole_command_with_a_broken_k2(tmp_path):
    (tmp_path / "k2.py").write_text("raise RuntimeError('compiled for another torch')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}
    result = subprocess.run(
        [sys.executable, "-m", "icefall_kd.doctor", "k2", "kaldialign", "safetensors"],
        env=environment, capture_output=True, text=True, timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "RuntimeError: compiled for another torch" in result.stdout
    assert "Everything required works." in result.stdout
    assert str(tmp_path) not in result.stdout


def test_a_broken_requirement_is_exit_code_4(monkeypatch, capsys):
    broken = doctor.Check(group="required", name="lhotse", code="raise ImportError('gone')")
    optional = doctor.Check(group="optional", name="k2", code="raise ImportError('gone')")
    monkeypatch.setattr(doctor, "checks", lambda: [broken, optional])
    assert doctor.main([]) == 4
    assert "Required, but not working: lhotse." in capsys.readouterr().out


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="knows no k3"):
        doctor.main(["k3"])
