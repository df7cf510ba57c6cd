import dataclasses
import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from icefall_kd import cli, config
from icefall_kd.cli import config_from_dict, config_to_dict, diff_configs, options_of, parse_config
from icefall_kd.errors import ConfigError, run_main


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some group."""

    max_duration: float = 200.0
    """Seconds of audio
    a batch: 100 % of it."""
    parts: list[str] = field(default_factory=lambda: ["train"])
    """Parts."""
    layers: list[int] = field(default_factory=list)
    snr: tuple[float, float] = (10.0, 20.0)
    noise: Path | None = None
    steps: int | None = None
    kind: Literal["none", "mvq"] = "none"
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.max_duration < 1:
            raise ConfigError(f"--max-duration is {self.max_duration}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command."""

    teacher: str = "tiny"
    group: Group = Group(max_duration=100.0)


@pytest.mark.parametrize(
    "arguments",
    [["--max-duration", "3"], ["--max_duration", "3"], ["--max-duration=3"], ["--max_duration=3.0"]],
)
def test_dashes_underscores_and_equals_signs_mean_the_same(arguments):
    assert parse_config(Command, arguments).group.max_duration == 3.0


def test_defaults_are_those_of_the_group_instance():
    assert parse_config(Command, []) == Command()
    assert parse_config(Command, ["--steps", "5"]).group.max_duration == 100.0


def test_values_of_every_type():
    arguments = "--parts a,b --layers -1,2 --snr [5,1e1] --noise d/e --steps none --kind mvq --shuffle 0 --teacher 1.0"
    assert parse_config(Command, arguments.split()) == Command(
        teacher="1.0",
        group=Group(
            max_duration=100.0, parts=["a", "b"], layers=[-1, 2], snr=(5.0, 10.0), noise=Path("d/e"), kind="mvq",
            shuffle=False,
        ),
    )
    assert parse_config(Command, ["--shuffle", "false", "--shuffle"]).group.shuffle is True
    assert parse_config(Command, ["--parts="]).group.parts == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-durtion", "3"], "unknown option --max-durtion; did you mean --max-duration?"),
        (["--kind", "mvk"], "--kind is 'mvk'; it must be one of none, mvq; did you mean mvq?"),
        (["--steps", "3.5"], "--steps is '3.5'; it must be an integer or none"),
        (["--snr", "1"], "--snr is 1; it must have 2 values, as in a,b"),
        (["--layers", "1,x"], "--layers is 'x'; it must be an integer"),
        (["--max-duration", "0.5"], "--max-duration is 0.5; it must be at least 1"),
        (["--max-duration"], "--max-duration needs a value"),
        (["--shuffle", "maybe"], "--shuffle is 'maybe'; it must be true or false"),
        (["stray"], "unexpected argument 'stray'; options are written --name value or --name=value"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml does not exist"),
    ],
)
def test_errors_name_the_option_the_value_and_the_remedy(arguments, message):
    with pytest.raises(ConfigError) as raised:
        parse_config(Command, arguments)
    assert str(raised.value) == message


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("max-duration: 7\nsteps: 9\nparts: [a, b]\nlayers: [1, -2]\nnoise: null\nsnr: 1,2e0\n")
    group = parse_config(Command, ["--steps", "10", "--config", str(file)]).group
    assert (group.max_duration, group.steps, group.parts, group.layers) == (7.0, 10, ["a", "b"], [1, -2])
    assert (group.noise, group.snr, group.kind) == (None, (1.0, 2.0), "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_durations: 1", r"unknown option 'max_durations'; did you mean max_duration\?"),
        ("group: {steps: 1}", "unknown option 'group'"),
        ("steps: {a: 1}", "steps is a mapping; options are flat"),
        ("- a", "holds a list; it must be a mapping"),
        ("a: [", "cannot be read as YAML"),
        ("kind: [none]", "kind is none; it must be one none|mvq, not a list"),
        ("steps: 1\nkind: mvq\nsteps: 2", "x.yaml: steps is given more than once; keep one line of each"),
        ("max-duration: 1\nmax_duration: 2", "max_duration is given more than once"),
    ],
)
def test_errors_of_a_config_file_name_the_file(tmp_path, content, message):
    file = tmp_path / "x.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        parse_config(Command, [f"--config={file}"])
    assert "x.yaml" in str(raised.value)


def test_help_shows_the_docstring_of_each_field(capsys):
    with pytest.raises(SystemExit) as left:
        parse_config(Command, ["--help"], prog="train.py", description="Train.")
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert "usage: train.py" in out and "--max-duration NUMBER" in out and "--kind none|mvq" in out
    assert "Seconds of audio a batch: 100 % of it. (default: 100.0)" in " ".join(out.split())


def test_print_config_is_a_config_file(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse_config(Command, ["--print-config", "--steps=4", "--noise=n", "--layers=3"])
    out = capsys.readouterr().out
    assert yaml.safe_load(out)["steps"] == 4
    (tmp_path / "x.yaml").write_text(out)
    again = parse_config(Command, ["--config", str(tmp_path / "x.yaml")])
    assert again == Command(group=Group(max_duration=100.0, steps=4, noise=Path("n"), layers=[3]))


def test_a_required_option():
    @dataclass(frozen=True, kw_only=True)
    class Needs:
        out_dir: Path

    assert parse_config(Needs, ["--out-dir=x"]).out_dir == Path("x")
    with pytest.raises(ConfigError, match="required: --out-dir"):
        parse_config(Needs, [])


def test_a_name_in_two_groups_is_an_error_at_once():
    @dataclass(frozen=True, kw_only=True)
    class Other:
        steps: int = 1

    made = dataclasses.make_dataclass(
        "Twice", [("group", Group, Group()), ("other", Other, Other())], frozen=True, kw_only=True
    )
    with pytest.raises(ConfigError, match="Twice: 'steps' is in two groups, 'group' and 'other'"):
        parse_config(made, [])


def all_config_classes():
    return [c for c in vars(config).values() if dataclasses.is_dataclass(c) and isinstance(c, type)]


@pytest.mark.parametrize("config_class", all_config_classes())
def test_every_configuration_has_unique_documented_options_and_survives_json(config_class):
    options = options_of(config_class)
    assert [name for name, option in options.items() if not option.doc] == []
    if any(option.required for option in options.values()):
        return
    default = parse_config(config_class, [])
    assert config_from_dict(config_class, config_to_dict(default)) == default
    assert config_from_dict(config_class, dataclasses.asdict(default)) == default


def test_differences_are_named():
    old, new = Command(), parse_config(Command, ["--noise=x", "--parts=a,b"])
    assert diff_configs(old, old) == []
    assert diff_configs(old, new) == ['parts: ["train"] -> ["a", "b"]', 'noise: null -> "x"']
    assert diff_configs({"a": 1}, {"b": 2}) == ["a: 1 -> (absent)", "b: (absent) -> 2"]
    with pytest.raises(ConfigError, match=r"unknown option 'part'; did you mean parts\?"):
        config_from_dict(Command, {"part": 1})


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (config.TrainConfig, f"--{name} {value}")
        for name, value in (
            ("base-lr", "nan"), ("max-duration", "nan"), ("max-steps", 0), ("keep-epochs", 0), ("max-skips", -1),
            ("valid-interval", 0), ("max-tokens", 0), ("start-epoch", 0), ("num-epochs", 0), ("accum-grad", 0),
        )
    ]
    + [
        (config.DecodeConfig, f"--{name} {value}")
        for name, value in (
            ("beam-size", 0), ("nbest", 0), ("avg", 0), ("epoch", 0), ("iter", -1), ("bootstrap", -1),
            ("max-duration", 0), ("temperature", 0), ("temperature", "nan"),
        )
    ],
)  # fmt: skip
def test_impossible_numbers_are_refused_with_their_option(command, arguments):
    with pytest.raises(ConfigError, match=f"{arguments.split()[0]} is .*; it must be"):
        parse_config(command, arguments.split())


def test_a_full_disk_is_no_bug(caplog):
    def write(code):
        raise OSError(code, os.strerror(code), "x.json")

    with pytest.raises(SystemExit) as left:
        run_main(lambda: write(errno.ENOSPC))
    assert left.value.code == 2
    assert "cannot write x.json: No space left on device; make room and run this again" in caplog.text
    with pytest.raises(PermissionError):
        run_main(lambda: write(errno.EACCES))


def test_usage_errors_leave_with_exit_code_2():
    with pytest.raises(SystemExit) as left:
        run_main(lambda: cli.parse_config(Command, ["--nope=1"]))
    assert left.value.code == 2
