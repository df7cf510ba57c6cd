"""The one command line over the dataclasses of :mod:`icefall_kd.config`.

A command's configuration is a dataclass whose fields are options or groups (dataclasses) of options.  On the
command line and in YAML all options are flat, whatever group they are in: ``--max-duration 100``,
``--max_duration=100``, or ``max-duration: 100`` in the file given by ``--config``.
Precedence: defaults < ``--config`` < flags.  Values are checked against the type hints by jsonargparse.
"""

import argparse
import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import docstring_parser
import jsonargparse
import yaml

from icefall_kd.errors import ConfigError

T = TypeVar("T")
Raw = str | list[str]

_RESERVED = {
    "config": "YAML file of options (flat keys); later files override earlier ones.",
    "print_config": "Print the resolved options as YAML and exit.",
    "help": "Show this help and exit.",
}
_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


@dataclass(frozen=True)
class Option:
    """One option of a command: a field of its configuration class or of one of its groups."""

    name: str
    hint: Any
    default: Any
    doc: str
    group: tuple[str, ...]
    group_doc: str

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is dataclasses.MISSING


def options_of(config_class: type) -> dict[str, Option]:
    """Return all options of a configuration class by name, in the order of definition.

    Raises:
        ConfigError: If two groups define the same name, which would be ambiguous on the command line.
    """
    found: dict[str, Option] = {}
    for option in _walk(config_class, (), None):
        if option.name in _RESERVED:
            raise ConfigError(f"{config_class.__name__}: {option.name!r} is reserved for the command line itself")
        if option.name in found:
            groups = " and ".join(repr(".".join(o.group) or "top level") for o in (found[option.name], option))
            raise ConfigError(f"{config_class.__name__}: {option.name!r} is in two groups, {groups}; rename one")
        found[option.name] = option
    return found


def _walk(config_class: type, group: tuple[str, ...], instance: Any) -> list[Option]:
    hints = typing.get_type_hints(config_class)
    docs = _field_docs(config_class)
    group_doc = (config_class.__doc__ or "").strip().split("\n\n")[0]
    options = []
    for field in dataclasses.fields(config_class):
        if instance is not None:
            default = getattr(instance, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = field.default
        if dataclasses.is_dataclass(hints[field.name]):
            nested = None if default is dataclasses.MISSING else default
            options += _walk(hints[field.name], (*group, field.name), nested)
        else:
            doc = docs.get(field.name, "")
            options.append(Option(field.name, hints[field.name], default, doc, group, group_doc))
    return options


def _field_docs(config_class: type) -> dict[str, str]:
    docs: dict[str, str] = {}
    for cls in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(cls):
            parsed = docstring_parser.parse_from_object(cls)
            docs |= {p.arg_name: " ".join((p.description or "").split()) for p in parsed.params}
    return docs


def parse_config(
    config_class: type[T],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
) -> T:
    """Build a configuration from defaults, ``--config`` files and flags.

    ``--help`` and ``--print-config`` print to stdout and leave the process with exit code 0.

    Args:
        config_class: A dataclass of options and groups.
        argv: Arguments; None: those of the process.
        prog: Name of the command in the help; None: the script's.
        description: First paragraph of the help; None: the docstring of ``config_class``.

    Raises:
        ConfigError: Unknown option (the closest is named), wrong value, missing value, unreadable file.
    """
    options = options_of(config_class)
    flags, config_files, print_config, wants_help = _split_arguments(sys.argv[1:] if argv is None else argv, options)
    if wants_help:
        print(_help(config_class, options, prog, description))
        sys.exit(0)
    values: dict[str, Any] = {}
    for file in config_files:
        for name, raw in _read_yaml(file, options).items():
            values[name] = _convert(options[name], raw, f"{file}: {name}")
    for name, raw in flags.items():
        values[name] = _convert(options[name], raw, options[name].flag)
    try:
        config = _build(config_class, options, values)
    except ConfigError as error:
        if not config_files:
            raise
        # The options are judged together, wherever each is from.
        raise ConfigError(f"{error} (with --config {', '.join(map(str, config_files))})") from error
    if print_config:
        print(yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True), end="")
        sys.exit(0)
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return the options of a configuration as a flat dict of plain JSON types; paths become strings."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= config_to_dict(value)
        else:
            flat[field.name] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def config_from_dict(config_class: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build a configuration from what :func:`config_to_dict` returned; absent options get their defaults.

    Args:
        config_class: A dataclass of options and groups.
        values: Options by name.
        where: The file that they are from, for messages.

    Raises:
        ConfigError: Unknown key or wrong value.
    """
    options = options_of(config_class)
    converted = {}
    prefix = f"{where}: " if where else ""
    for key, value in _flatten(config_class, values).items():
        name = _known(key, options, f"{where or config_class.__name__}: unknown option {key!r}", prefix="")
        converted[name] = _convert(options[name], _raw(value), f"{prefix}{name}")
    try:
        return _build(config_class, options, converted)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def _flatten(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """Lift the members of groups to the top, so that nested dicts (dataclasses.asdict) are understood too."""
    hints = typing.get_type_hints(config_class)
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(hints.get(key)):
            flat |= _flatten(hints[key], value)
        else:
            flat[key] = value
    return flat


def diff_configs(old: Any, new: Any) -> list[str]:
    """Return one line ``"name: old -> new"`` for each option that differs.

    Args:
        old: A configuration, or the dict of one.
        new: The other.
    """
    before, after = (config if isinstance(config, dict) else config_to_dict(config) for config in (old, new))
    lines = []
    for name in [*before, *(key for key in after if key not in before)]:
        texts = [json.dumps(_plain(c[name]), ensure_ascii=False) if name in c else "(absent)" for c in (before, after)]
        if texts[0] != texts[1]:
            lines.append(f"{name}: {texts[0]} -> {texts[1]}")
    return lines


def _split_arguments(argv: Sequence[str], options: dict[str, Option]) -> tuple[dict[str, Raw], list[Path], bool, bool]:
    """Return the flags by option name, the --config files, and whether --print-config and --help were given."""
    flags: dict[str, Raw] = {}
    config_files: list[Path] = []
    print_config = wants_help = False
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            wants_help = True
            continue
        if not token.startswith("--"):
            raise ConfigError(f"unexpected argument {token!r}; options are written --name value or --name=value")
        flag, has_value, value = token.partition("=")
        name = _known(flag[2:], {**options, **dict.fromkeys(_RESERVED)}, f"unknown option {flag}", prefix="--")
        if name == "print_config":
            print_config = True
            continue
        if not has_value:
            is_switch = name in options and _strip_optional(options[name].hint)[0] is bool
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif is_switch:
                value = "true"
            else:
                raise ConfigError(f"{flag} needs a value")
        if name == "config":
            config_files.append(Path(value))
        else:
            flags[name] = value
    return flags, config_files, print_config, wants_help


def _known(key: str, names: dict[str, Any], complaint: str, prefix: str) -> str:
    """Return the option name that ``key`` stands for, or raise with the closest one."""
    name = str(key).replace("-", "_")
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    shown = [prefix + (c.replace("_", "-") if prefix else c) for c in close]
    raise ConfigError(complaint + (f"; did you mean {shown[0]}?" if shown else "; --help lists all options"))


def _read_yaml(file: Path, options: dict[str, Option]) -> dict[str, Raw]:
    try:
        # BaseLoader leaves every scalar a string, so that a file and a flag go through the same conversion.
        text = file.read_text(encoding="utf-8")
        content, node = yaml.load(text, Loader=yaml.BaseLoader), yaml.compose(text, Loader=yaml.BaseLoader)
    except FileNotFoundError:
        raise ConfigError(f"--config {file} does not exist") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file} cannot be read as YAML: {error}") from error
    content = content or {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file} holds a {type(content).__name__}; it must be a mapping of options")
    # Lists in lists are no values of options, and by YAML's aliases a few lines can hold billions of them.
    nested = [key for key, x in content.items() if isinstance(x, list) and not all(isinstance(i, str) for i in x)]
    if nested:
        raise ConfigError(f"{file}: {', '.join(nested)} has a list or mapping in a list; write single values")
    # YAML itself takes the last of two equal keys without a word.
    names = [str(key.value).replace("-", "_") for key, _ in node.value] if content else []
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"{file}: {', '.join(repeated)} is given more than once; keep one line of each")
    values = {}
    for key, value in content.items():
        name = _known(key, options, f"{file}: unknown option {key!r}", prefix="")
        if isinstance(value, dict):
            raise ConfigError(f"{file}: {key} is a mapping; options are flat, without groups")
        values[name] = [str(item) for item in value] if isinstance(value, list) else value
    return values


def _raw(value: Any) -> Raw:
    if isinstance(value, list | tuple):
        return [item if isinstance(item, str) else json.dumps(_plain(item)) for item in value]
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def _strip_optional(hint: Any) -> tuple[Any, bool]:
    """Split ``X | None`` into (X, True); anything else into (hint, False)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        if len(members) == 1 and len(members) < len(typing.get_args(hint)):
            return members[0], True
    return hint, False


def _convert(option: Option, raw: Raw, where: str) -> Any:
    """Convert the text (or list of texts) of an option to its type."""
    hint, optional = _strip_optional(option.hint)
    if optional and isinstance(raw, str) and raw.lower() in ("none", "null", "~", ""):
        return None
    origin = typing.get_origin(hint)
    if origin in (list, tuple):
        items = _split_list(raw) if isinstance(raw, str) else raw
        members = typing.get_args(hint)
        hints = [members[0]] * len(items) if origin is list or members[-1] is Ellipsis else list(members)
        if len(hints) != len(items):
            raise ConfigError(f"{where} is {_show(raw)}; it must have {len(hints)} values, as in a,b")
        return origin(_convert_scalar(h, item, where) for h, item in zip(hints, items, strict=True))
    if isinstance(raw, list):
        raise ConfigError(f"{where} is {_show(raw)}; it must be one {_type_name(option.hint)}, not a list")
    return _convert_scalar(hint, raw, where, " or none" if optional else "")


def _split_list(text: str) -> list[str]:
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    items = [item.strip().strip("\"'") for item in text.split(",")]
    return [item for item in items if item]


def _convert_scalar(hint: Any, text: str, where: str, or_none: str = "") -> Any:
    if hint in (str, Path):
        return hint(text)
    if typing.get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(hint)}
        if text not in choices:
            close = difflib.get_close_matches(text, choices, n=1)
            hint_text = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{where} is {text!r}; it must be one of {', '.join(choices)}{or_none}{hint_text}")
        return choices[text]
    if hint is bool and text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    # A parser of one argument: jsonargparse owns the rules of what text is which type.
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_args([f"--value={text}"]).value
    except argparse.ArgumentError as error:
        raise ConfigError(f"{where} is {text!r}; it must be {_type_name(hint)}{or_none}") from error


def _type_name(hint: Any) -> str:
    inner, optional = _strip_optional(hint)
    suffix = " or none" if optional else ""
    if typing.get_origin(inner) is Literal:
        return "|".join(map(str, typing.get_args(inner))) + suffix
    if typing.get_origin(inner) in (list, tuple):
        names = [_type_name(member) for member in typing.get_args(inner) if member is not Ellipsis]
        return ",".join([*names, "..."] if typing.get_origin(inner) is list else names) + suffix
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(inner, getattr(inner, "__name__", str(inner))) + suffix


def _metavar(hint: Any) -> str:
    inner, _ = _strip_optional(hint)
    if typing.get_origin(inner) in (list, tuple):
        members = [_metavar(member) for member in typing.get_args(inner) if member is not Ellipsis]
        return ",".join([*members, "..."] if typing.get_origin(inner) is list else members)
    if typing.get_origin(inner) is Literal:
        return _type_name(inner)
    return {int: "INT", float: "NUMBER", bool: "BOOL", str: "TEXT", Path: "PATH"}.get(inner, "VALUE")


def _show(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _build(config_class: type[T], options: dict[str, Option], values: dict[str, Any]) -> T:
    missing = [option.flag for option in options.values() if option.required and option.name not in values]
    if missing:
        raise ConfigError(f"required: {', '.join(missing)}")
    return _instantiate(config_class, values, None)


def _instantiate(config_class: type[T], values: dict[str, Any], base: Any) -> T:
    hints = typing.get_type_hints(config_class)
    arguments = {}
    for field in dataclasses.fields(config_class):
        default = field.default if base is None else getattr(base, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            nested = None if default is dataclasses.MISSING else default
            arguments[field.name] = _instantiate(hints[field.name], values, nested)
        elif field.name in values:
            arguments[field.name] = values[field.name]
        elif base is not None:
            arguments[field.name] = default
    return config_class(**arguments)


def _help(config_class: type, options: dict[str, Option], prog: str | None, description: str | None) -> str:
    doc = (config_class.__doc__ or "").strip()
    parser = argparse.ArgumentParser(
        prog=prog, description=description or doc, usage="%(prog)s [--config FILE] [--option value ...]", add_help=False
    )
    groups: dict[str, Any] = {}
    for option in options.values():
        title = option.group_doc.rstrip(".") if option.group else "options"
        group = groups.setdefault(title, parser.add_argument_group(title) if title not in groups else None)
        default = "required" if option.required else f"default: {_show(option.default)}"
        text = f"{option.doc} ({default})".strip().replace("%", "%%")
        group.add_argument(option.flag, metavar=_metavar(option.hint), help=text)
    group = parser.add_argument_group("command line")
    for name, text in _RESERVED.items():
        kind = {"metavar": "FILE"} if name == "config" else {"action": "store_true"}
        group.add_argument(f"--{name.replace('_', '-')}", help=text, **kind)
    return parser.format_help().rstrip()
