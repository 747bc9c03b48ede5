"""Which sound samples a user does not want: too small, too long, too narrow, by their metadata, or twice.

A filtered sample is not a broken one: it is counted by its reason and leaves no row in the rejects table.
"""

import ast
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from index.errors import OptionError

DEDUP = ("image", "pair")


class Dropped(StrEnum):
    """Why a sample was filtered."""

    SMALL_SIDE = "small_side"
    WIDE_ASPECT = "wide_aspect"
    SHORT_CAPTION = "short_caption"
    LONG_CAPTION = "long_caption"
    METADATA = "metadata"
    METADATA_MISSING = "metadata_missing"
    DUPLICATE = "duplicate"


class Filtered(Exception):
    """This sample is not wanted."""

    def __init__(self, reason: Dropped) -> None:
        """Say why."""
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Filters:
    """What a sample must be like; None asks nothing."""

    min_side: int | None = None
    """Pixels of the shorter side of the original picture, at least."""
    max_aspect: float | None = None
    """Longer side over shorter side, at most."""
    min_caption: int | None = None
    """Characters, at least."""
    max_caption: int | None = None
    """Characters, at most."""
    where: str | None = None
    """An expression over the fields of the JSON sidecar and `caption`, in Python's syntax, such as
    `aesthetic > 5 and pwatermark < 0.8`. A sample without the fields that it asks for is filtered."""
    dedup: str | None = None
    """image: the first of equal pictures is kept. pair: the first of equal pictures with equal captions."""

    def __post_init__(self) -> None:
        """Refuse what cannot be asked."""
        for name in ("min_side", "min_caption", "max_caption"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise OptionError(f"--{name.replace('_', '-')} {given} filters nothing: give a number above 0")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise OptionError(f"--max-aspect {self.max_aspect:g}: give longer over shorter side, 1 or more")
        if self.dedup is not None and self.dedup not in DEDUP:
            raise OptionError(f"--dedup {self.dedup!r} is unknown: choose one of {', '.join(DEDUP)}")
        if self.where is not None:
            try:
                ast.parse(self.where.strip(), mode="eval")
            except SyntaxError as error:
                raise OptionError(
                    f"--where {self.where!r} is no expression ({error.msg}): "
                    "write for instance 'aesthetic > 5 and pwatermark < 0.8', or lang == 'en'"
                ) from error

    def check_caption(self, caption: str) -> None:
        """Filtered where the caption is too short or too long."""
        if self.min_caption is not None and len(caption) < self.min_caption:
            raise Filtered(Dropped.SHORT_CAPTION)
        if self.max_caption is not None and len(caption) > self.max_caption:
            raise Filtered(Dropped.LONG_CAPTION)

    def check_meta(self, fields: dict[str, Any], caption: str) -> None:
        """Filtered where the expression does not hold; OptionError where it can hold for no sample."""
        if self.where is None:
            return
        import simpleeval

        names = {**fields, "caption": caption}
        evaluator = simpleeval.EvalWithCompoundTypes(names=names, functions={"len": len})
        missing = (simpleeval.NameNotDefined, simpleeval.AttributeDoesNotExist, KeyError, TypeError, ZeroDivisionError)
        try:
            holds = evaluator.eval(self.where)
        except missing as error:
            raise Filtered(Dropped.METADATA_MISSING) from error
        except simpleeval.InvalidExpression as error:
            raise OptionError(f"--where {self.where!r} cannot be used: {error}") from error
        if not holds:
            raise Filtered(Dropped.METADATA)

    def check_size(self, width: int, height: int) -> None:
        """Filtered where the picture is too small or too narrow."""
        short, long = sorted((width, height))
        if self.min_side is not None and short < self.min_side:
            raise Filtered(Dropped.SMALL_SIDE)
        if self.max_aspect is not None and long > self.max_aspect * max(short, 1):
            raise Filtered(Dropped.WIDE_ASPECT)
