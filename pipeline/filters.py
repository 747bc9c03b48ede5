"""Filters: drop valid samples by image size, caption length, JSON metadata, or as exact duplicates.

A filtered sample is counted by its reason and is not stored anywhere; what cannot be encoded is rejected instead, for
one of the reasons in rejects.py.
"""

import ast
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from index.errors import OptionError, one_line

DEDUP = ("image", "pair")


class FilterReason(StrEnum):
    """Why a sample was filtered out; the value is what a report counts."""

    SMALL_SIDE = "small_side"
    """The shorter side is below --min-image-size."""
    WIDE_ASPECT = "wide_aspect"
    """The aspect ratio is above --max-aspect-ratio."""
    SHORT_CAPTION = "short_caption"
    """The caption is shorter than --min-caption-length."""
    LONG_CAPTION = "long_caption"
    """The caption is longer than --max-caption-length."""
    METADATA = "metadata"
    """The --filter expression is false."""
    METADATA_MISSING = "metadata_missing"
    """The --filter expression cannot be evaluated: this sample lacks a field, or its value has the wrong type."""
    DUPLICATE = "duplicate"
    """An earlier sample has the same image (--dedup image), or the same image and caption (--dedup pair)."""


class Filtered(Exception):
    """Raised for a sample that a filter drops."""

    def __init__(self, reason: FilterReason) -> None:
        """Keep the reason, by which filtered samples are counted."""
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Filters:
    """The conditions that a sample must meet; None switches a condition off."""

    min_image_size: int | None = None
    """Minimum of the original image's shorter side, in pixels."""
    max_aspect_ratio: float | None = None
    """Maximum of longer side over shorter side."""
    min_caption_length: int | None = None
    """Minimum length of the caption, in characters."""
    max_caption_length: int | None = None
    """Maximum length of the caption, in characters."""
    filter: str | None = None
    """A Python expression over the fields of the JSON sidecar and `caption`, such as
    `aesthetic > 5 and pwatermark < 0.8`. A sample that lacks one of the fields is filtered out."""
    dedup: str | None = None
    """image: keep the first of samples with equal image bytes. pair: with equal image bytes and equal captions."""

    def __post_init__(self) -> None:
        """Raise OptionError if a value is out of range or the expression is not valid Python."""
        for name in ("min_image_size", "min_caption_length", "max_caption_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name.replace('_', '-')} {value} is out of range: use a whole number above 0")
        if self.max_aspect_ratio is not None and self.max_aspect_ratio < 1:
            raise OptionError(
                f"--max-aspect-ratio {self.max_aspect_ratio:g} is out of range: "
                "use longer side over shorter side, 1 or more"
            )
        if self.dedup is not None and self.dedup not in DEDUP:
            raise OptionError(f"--dedup {self.dedup!r} is unknown: choose one of {', '.join(DEDUP)}")
        if self.filter is not None:
            try:
                ast.parse(self.filter.strip(), mode="eval")
            except SyntaxError as error:
                raise OptionError(
                    f"--filter {self.filter!r} is not a Python expression ({error.msg}): "
                    "use for instance \"aesthetic > 5 and lang == 'en'\""
                ) from error

    def check_caption(self, caption: str) -> None:
        """Raise Filtered if the caption is too short or too long."""
        if self.min_caption_length is not None and len(caption) < self.min_caption_length:
            raise Filtered(FilterReason.SHORT_CAPTION)
        if self.max_caption_length is not None and len(caption) > self.max_caption_length:
            raise Filtered(FilterReason.LONG_CAPTION)

    def check_meta(self, fields: dict[str, Any], caption: str) -> None:
        """Raise Filtered if the expression is false, OptionError if it cannot be evaluated for any sample."""
        if self.filter is None:
            return
        import simpleeval

        names = {**fields, "caption": caption}
        evaluator = simpleeval.EvalWithCompoundTypes(names=names, functions={"len": len})
        missing = (simpleeval.NameNotDefined, simpleeval.AttributeDoesNotExist, KeyError, TypeError, ZeroDivisionError)
        try:
            is_kept = evaluator.eval(self.filter)
        except missing as error:
            raise Filtered(FilterReason.METADATA_MISSING) from error
        except simpleeval.InvalidExpression as error:
            raise OptionError(
                f"--filter {self.filter!r} cannot be evaluated: {one_line(error).rstrip('.')}: "
                "use the sidecar's fields, caption, len() and Python's operators only"
            ) from error
        if not is_kept:
            raise Filtered(FilterReason.METADATA)

    def check_size(self, width: int, height: int) -> None:
        """Raise Filtered if the original image, of a size in pixels, is too small or its aspect ratio too large."""
        short, long = sorted((width, height))
        if self.min_image_size is not None and short < self.min_image_size:
            raise Filtered(FilterReason.SMALL_SIDE)
        if self.max_aspect_ratio is not None and long > self.max_aspect_ratio * max(short, 1):
            raise Filtered(FilterReason.WIDE_ASPECT)
