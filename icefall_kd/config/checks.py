"""Checks that several groups of options share."""

from icefall_kd.errors import ConfigError


def at_least(config: object, **minima: float) -> None:
    """Raise a ConfigError for the first field below its minimum."""
    for name, minimum in minima.items():
        value = getattr(config, name)
        if value is not None and not value >= minimum:  # NaN is below everything
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {minimum}")
