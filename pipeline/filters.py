"""Which sound samples a user does not want: too small, too long, too narrow, by their metadata, or twice.

A filtered sample is not a broken one: it is counted by its reason and leaves no row in the rejects table.
"""

import ast
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from index.errors import OptionError

DEDUP = ("image", "pair")


class FilterReason(StrEnum):
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

    def __init__(self, reason: FilterReason) -> None:
        """Say why."""
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Filters:
    """What a sample must be like; None asks nothing."""

    min_image_size: int | None = None
    """Pixels of the shorter side of the original picture, at least."""
    max_aspect_ratio: float | None = None
    """Longer side over shorter side, at most."""
    min_caption_length: int | None = None
    """Characters, at least."""
    max_caption_length: int | None = None
    """Characters, at most."""
    filter: str | None = None
    """An expression over the fields of the JSON sidecar and `caption`, in Python's syntax, such as
    `aesthetic > 5 and pwatermark < 0.8`. A sample without the fields that it asks for is filtered."""
    dedup: str | None = None
    """image: the first of equal pictures is kept. pair: the first of equal pictures with equal captions."""

    def __post_init__(self) -> None:
        """Refuse what cannot be asked."""
        for name in ("min_image_size", "min_caption_length", "max_caption_length"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise OptionError(f"--{name.replace('_', '-')} {given} filters nothing: give a number above 0")
        if self.max_aspect_ratio is not None and self.max_aspect_ratio < 1:
            raise OptionError(f"--max-aspect-ratio {self.max_aspect_ratio:g}: give longer over shorter side, 1 or more")
        if self.dedup is not None and self.dedup not in DEDUP:
            raise OptionError(f"--dedup {self.dedup!r} is unknown: choose one of {', '.join(DEDUP)}")
        if self.filter is not None:
            try:
                ast.parse(self.filter.strip(), mode="eval")
            except SyntaxError as error:
                raise OptionError(
                    f"--filter {self.filter!r} is no expression ({error.msg}): "
                    "write for instance 'aesthetic > 5 and pwatermark < 0.8', or lang == 'en'"
                ) from error

    def check_caption(self, caption: str) -> None:
        """Filtered where the caption is too short or too long."""
        if self.min_caption_length is not None and len(caption) < self.min_caption_length:
            raise Filtered(FilterReason.SHORT_CAPTION)
        if self.max_caption_length is not None and len(caption) > self.max_caption_length:
            raise Filtered(FilterReason.LONG_CAPTION)

    def check_meta(self, fields: dict[str, Any], caption: str) -> None:
        """Filtered where the expression does not hold; OptionError where it can hold for no sample."""
        if self.filter is None:
            return
        import simpleeval

        names = {**fields, "caption": caption}
        evaluator = simpleeval.EvalWithCompoundTypes(names=names, functions={"len": len})
        missing = (simpleeval.NameNotDefined, simpleeval.AttributeDoesNotExist, KeyError, TypeError, ZeroDivisionError)
        try:
            holds = evaluator.eval(self.filter)
        except missing as error:
            raise Filtered(FilterReason.METADATA_MISSING) from error
        except simpleeval.InvalidExpression as error:
            raise OptionError(f"--filter {self.filter!r} cannot be used: {error}") from error
        if not holds:
            raise Filtered(FilterReason.METADATA)

    def check_size(self, width: int, height: int) -> None:
        """Filtered where the picture is too small or too narrow."""
        short, long = sorted((width, height))
        if self.min_image_size is not None and short < self.min_image_size:
            raise Filtered(FilterReason.SMALL_SIDE)
        if self.max_aspect_ratio is not None and long > self.max_aspect_ratio * max(short, 1):
            raise Filtered(FilterReason.WIDE_ASPECT)
