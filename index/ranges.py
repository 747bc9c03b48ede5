"""Ranges of numeric options, written once: `num_workers: Annotated[int, COUNT]` in a config and in a command.

A config checks its fields by `check_ranges` when it is made, a command its options while it parses them, so nothing is
read or written before a number is found to be out of range. nan and infinity are in no range.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, get_type_hints

from index.errors import OptionError

MACHINE_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Range:
    """The finite numbers from `least`, or above it if `above`, to `most`."""

    least: float | int
    most: float | int = math.inf
    above: bool = False

    def __contains__(self, value: float | int) -> bool:
        """Return whether a number is finite and in the range."""
        return math.isfinite(value) and self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        """Return the range in words, to follow `use`; a limit that no sensible value reaches is left out."""
        low = f"a number above {self.least:g}" if self.above else f"{self.least:g}"
        if self.most >= MACHINE_LIMIT:
            return low if self.above else f"{low} or more"
        return f"{low} and at most {self.most:g}" if self.above else f"a number from {low} to {self.most:g}"

    def check(self, option: str, value: Any) -> None:
        """Raise OptionError unless a number, or each of a list of numbers, is in the range; None is not checked."""
        values = value if isinstance(value, list | tuple) else [value]
        if not values or any(each not in self for each in values if each is not None):
            shown = ",".join(f"{each:g}" if isinstance(each, float) else str(each) for each in values)
            too_large = any(MACHINE_LIMIT <= self.most < each < math.inf for each in values if each is not None)
            limit = f", at most {self.most}" if too_large else ""
            raise OptionError(f"{option} {shown or repr('')} is out of range: use {self}{limit}")


COUNT = Range(1, MACHINE_LIMIT)
COUNT_FROM_0 = Range(0, MACHINE_LIMIT)
TOTAL = Range(1, 10**15)
"""Of what a whole run reads, draws or trains on."""
SEED = Range(0, 2**63 - 1)
FRACTION = Range(0, 1)
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
PROCESSES = Range(1, 4096)
PIXELS = Range(8, 16384)
"""Side of an image."""


def ranges_of(annotated: type | Callable[..., Any]) -> Iterator[tuple[str, Range]]:
    """Iterate over the names of fields or parameters that are annotated with a range, with their ranges."""
    for name, hint in get_type_hints(annotated, include_extras=True).items():
        for metadata in getattr(hint, "__metadata__", ()):
            if isinstance(metadata, Range):
                yield name, metadata


def check_ranges(config: Any) -> None:
    """Raise OptionError if a field of a config is outside of its range."""
    for name, allowed in ranges_of(type(config)):
        allowed.check(option_of(name), getattr(config, name))


def check_choices(config: Any, **choices: Collection[str]) -> None:
    """Raise OptionError if a field of a config, by name, is not one of its choices."""
    for name, allowed in choices.items():
        if (value := getattr(config, name)) not in allowed:
            raise OptionError(f"{option_of(name)} {value!r} is unknown: choose one of {', '.join(allowed)}")


def option_of(name: str) -> str:
    """Return the command-line option of a field."""
    return f"--{name.replace('_', '-')}"
