"""Filters: drop valid samples by image size, caption length, JSON metadata, or as exact duplicates.

A filtered sample is counted by its reason and is not stored anywhere; what cannot be encoded is rejected instead, for
one of the reasons in rejects.py.
"""

import ast
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any

from index.errors import OptionError, one_line
from index.ranges import COUNT, TOTAL, Range, check_choices, check_ranges

DEDUP = ("image", "pair")
MAX_PIXELS = 50_000_000
"""Pixels of an image that are decoded by default."""
FUNCTIONS = {"len": len}
"""What an expression may call by name; methods of strings are allowed too."""


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
    """The --filter expression cannot be evaluated: this sample lacks a field, or its value does not fit."""
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

    min_image_size: Annotated[int | None, COUNT] = None
    """Minimum of the original image's shorter side, in pixels."""
    max_aspect_ratio: Annotated[float | None, Range(1)] = None
    """Maximum of longer side over shorter side."""
    min_caption_length: Annotated[int | None, COUNT] = None
    """Minimum length of the caption, in characters."""
    max_caption_length: Annotated[int | None, COUNT] = None
    """Maximum length of the caption, in characters."""
    filter: str | None = None
    """A Python expression over the fields of the JSON sidecar and `caption`, such as
    `aesthetic > 5 and pwatermark < 0.8`. A sample that lacks one of the fields is filtered out."""
    dedup: str | None = None
    """image: keep the first of samples with equal image bytes. pair: with equal image bytes and equal captions."""
    max_pixels: Annotated[int, TOTAL] = MAX_PIXELS
    """An image of more pixels is rejected before it is decompressed."""

    def __post_init__(self) -> None:
        """Raise OptionError if a value is out of range, or if the expression cannot be evaluated for any sample."""
        check_ranges(self)
        if self.dedup is not None:
            check_choices(self, dedup=DEDUP)
        if self.filter is not None:
            _parse(self.filter)

    def check_caption(self, caption: str) -> None:
        """Raise Filtered if the caption is too short or too long."""
        if self.min_caption_length is not None and len(caption) < self.min_caption_length:
            raise Filtered(FilterReason.SHORT_CAPTION)
        if self.max_caption_length is not None and len(caption) > self.max_caption_length:
            raise Filtered(FilterReason.LONG_CAPTION)

    def check_meta(self, fields: dict[str, Any], caption: str) -> None:
        """Raise Filtered if the expression is false, or cannot be evaluated with the fields of this sample."""
        if self.filter is None:
            return
        try:
            is_kept = bool(_evaluator({**fields, "caption": caption}).eval(self.filter, _parse(self.filter)))
        except Exception as error:  # whatever a sample's values raise concerns that sample alone
            raise Filtered(FilterReason.METADATA_MISSING) from error
        if not is_kept:
            raise Filtered(FilterReason.METADATA)

    def check_size(self, width: int, height: int) -> None:
        """Raise Filtered if the original image, of a size in pixels, is too small or its aspect ratio too large."""
        short, long = sorted((width, height))
        if self.min_image_size is not None and short < self.min_image_size:
            raise Filtered(FilterReason.SMALL_SIDE)
        if self.max_aspect_ratio is not None and long > self.max_aspect_ratio * max(short, 1):
            raise Filtered(FilterReason.WIDE_ASPECT)


def _evaluator(names: dict[str, Any]) -> Any:
    import simpleeval

    return simpleeval.EvalWithCompoundTypes(names=names, functions=FUNCTIONS)


@lru_cache(maxsize=16)
def _parse(expression: str) -> ast.expr:
    """Parse a --filter expression once per process; raises OptionError if no sample could be evaluated with it."""
    try:
        parsed = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise OptionError(
            f"--filter {expression!r} is not a Python expression ({getattr(error, 'msg', None) or one_line(error)}): "
            "use for instance \"aesthetic > 5 and lang == 'en'\""
        ) from error
    try:
        _check(parsed)
    except Exception as error:
        raise OptionError(
            f"--filter {expression!r} cannot be evaluated: {one_line(error).rstrip('.')}: "
            "use the sidecar's fields, caption, len() and Python's operators only"
        ) from error
    return parsed


def _check(node: ast.AST) -> None:
    """Raise an exception for a part of an expression that is not allowed, or that fails without any sample's data."""
    import simpleeval

    evaluator = _evaluator({})
    for part in ast.walk(node):
        if isinstance(part, ast.expr) and type(part) not in evaluator.nodes:
            raise ValueError(f"{type(part).__name__} is not allowed")
        if isinstance(part, ast.operator | ast.unaryop | ast.cmpop) and type(part) not in evaluator.operators:
            raise ValueError(f"operator {type(part).__name__} is not allowed")
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id not in FUNCTIONS:
            raise ValueError(f"Function {part.func.id!r} not defined")
        if isinstance(part, ast.Call) and not isinstance(part.func, ast.Name | ast.Attribute):
            raise ValueError("only functions and methods by name can be called")
        if isinstance(part, ast.Attribute) and (
            part.attr.startswith(tuple(simpleeval.DISALLOW_PREFIXES)) or part.attr in simpleeval.DISALLOW_METHODS
        ):
            raise ValueError(f"Attribute {part.attr!r} is not allowed")
        if isinstance(part, ast.expr) and not any(isinstance(each, ast.Name) for each in ast.walk(part)):
            evaluator.eval("", part)
