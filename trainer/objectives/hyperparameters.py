"""Hyperparameters of an objective: fields of a dataclass that carry their range, and NAME=VALUE for them.

p: float = positive(2.0)
segment: float = fraction(0.9)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from typing import Any

from index.errors import OptionError


def fraction(default: float) -> Any:
    """Declare a hyperparameter from 0 to 1."""
    return _bounded(default, lambda value: 0 <= value <= 1, "use a number from 0 to 1")


def positive(default: float | int) -> Any:
    """Declare a hyperparameter above 0."""
    return _bounded(default, lambda value: value > 0, "use a number above 0")


def non_negative(default: float) -> Any:
    """Declare a hyperparameter of 0 or more, such as the weight of a loss."""
    return _bounded(default, lambda value: value >= 0, "use 0 or more")


def choice(default: str, choices: Sequence[str]) -> Any:
    """Declare a hyperparameter that is one of some names."""
    return _bounded(default, lambda value: value in choices, f"choose one of {', '.join(choices)}")


def _bounded(default: Any, allowed: Callable[[Any], bool], advice: str) -> Any:
    return field(default=default, metadata={"allowed": allowed, "advice": advice})


def check_hyperparameters(objective: Any) -> None:
    """Raise OptionError if a field of a dataclass is out of its range."""
    for each in fields(objective):
        value = getattr(objective, each.name)
        if each.metadata and not each.metadata["allowed"](value):
            raise OptionError(f"--set {each.name}={value} is out of range: {each.metadata['advice']}")


def parse_hyperparameters(pairs: Sequence[str]) -> dict[str, float | str]:
    """Parse NAME=VALUE pairs; a value is a number if it reads as one.

    Raises:
        OptionError: there is no = in a pair.
    """
    parsed: dict[str, float | str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(f"--set {pair!r} is not NAME=VALUE: use for instance --set p=0.5")
        try:
            parsed[name] = float(value)
        except ValueError:
            parsed[name] = value
    return parsed


def convert_hyperparameters(values: Mapping[str, Any], defaults: Mapping[str, Any], objective: str) -> dict[str, Any]:
    """Convert values, such as numbers that a command line read as floats, to the types of their defaults.

    Raises:
        OptionError: the objective has no such hyperparameter, or its type does not allow the value.
    """
    for name in values:
        if name not in defaults:
            raise OptionError(f"--set {name} is unknown for {objective}: choose one of {', '.join(defaults)}")
    return {name: _convert(name, value, defaults[name]) for name, value in values.items()}


def _convert(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, str):
        if not isinstance(value, str):
            raise OptionError(f"--set {name}={value:g} is a number: use a name, for a folder {name}=./{value:g}")
        return value
    if isinstance(value, str):
        raise OptionError(f"--set {name}={value} is not a number: use for instance {name}={default or 0.5}")
    if isinstance(default, bool):
        if value not in (0, 1):
            raise OptionError(f"--set {name}={value:g} is not a yes or no: use {name}=1 or {name}=0")
        return bool(value)
    if not isinstance(default, int):
        return None if value is None else float(value)
    if not float(value).is_integer():
        raise OptionError(f"--set {name}={value} is not a whole number: use for instance {name}={default}")
    return int(value)
