"""Checks that several groups of options share."""

from collections.abc import Collection
from dataclasses import fields

from icefall_kd.errors import ConfigError


def at_least(config: object, **minima: float) -> None:
    """Raise a ConfigError for the first field below its minimum."""
    for name, minimum in minima.items():
        value = getattr(config, name)
        if value is not None and not value >= minimum:  # NaN is below everything
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {minimum}")


def refuse_options(group: object, system: str, besides: Collection[str] = ()) -> None:
    """Raise a ConfigError for the first option that is not at its default and of which only ``system`` knows.

    Args:
        group: a group of options, all of which have defaults.
        system: whose options they are.
        besides: those that others read, too.
    """
    usual = type(group)()
    for name in (f.name for f in fields(group) if f.name not in besides):
        if getattr(group, name) != getattr(usual, name):
            raise ConfigError(f"--{name.replace('_', '-')} is of --system {system}; leave it out, or train that system")
