"""Dials of an objective: read in the type of their default, and refused where they mean nothing."""

from typing import Any

from index.errors import OptionError


def read_dial(name: str, value: Any, default: Any) -> Any:
    """A dial as its objective takes it: a command line knows only numbers and words."""
    if isinstance(default, str):
        if not isinstance(value, str):
            raise OptionError(f"--set {name}={value:g} is a number: give a name, for a folder {name}=./{value:g}")
        return value
    if isinstance(value, str):
        raise OptionError(f"--set {name}={value} is no number: give for instance {name}={default or 0.5}")
    if isinstance(default, bool):
        if value not in (0, 1):
            raise OptionError(f"--set {name}={value:g} is neither no nor yes: give {name}=0 or {name}=1")
        return bool(value)
    if not isinstance(default, int):
        return None if value is None else float(value)
    if not float(value).is_integer():
        raise OptionError(f"--set {name}={value} is no whole number: give for instance {name}={default}")
    return int(value)


def check_shares(objective: object, *names: str) -> None:
    """OptionError where one of these hyperparameters is not from 0 to 1."""
    for name in names:
        if not 0 <= getattr(objective, name) <= 1:
            raise OptionError(f"{name} {getattr(objective, name)!r} is no share: give a number from 0 to 1")


def check_positive(objective: object, *names: str) -> None:
    """OptionError where one of these hyperparameters is not above 0."""
    for name in names:
        if not getattr(objective, name) > 0:
            raise OptionError(f"{name} {getattr(objective, name)!r} is not allowed: give a number above 0")


def check_weights(objective: object, *names: str) -> None:
    """OptionError where one of these hyperparameters is below 0."""
    for name in names:
        if not getattr(objective, name) >= 0:
            raise OptionError(f"{name} {getattr(objective, name)!r} is no weight: give 0 or more")
