"""Rows of an Arrow table as samples, whichever file or dataset they come from.

A caption is text or a list of texts (the first is taken), never a class number. Its bytes are taken as they are, so one
bad caption does not end a shard. All other columns become the JSON of `meta`, but for those that hold bytes.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from index.errors import SourceError, one_line
from pipeline.images import RejectReason
from pipeline.sources.arrow_types import is_list, is_picture, is_text, plain_names
from pipeline.sources.sample import CAPTION_FIELDS, ReadOptions, Sample, Unreadable, encode_caption, pick

ROWS = 32
"""Rows whose pictures are in memory at once."""
IMAGE_COLUMNS = ("image", "jpg", "png", "jpeg", "webp", "img", "bytes", "image_bytes", "picture", "photo")
KEY_COLUMNS = ("key", "__key__")

Fetch = Callable[[str], bytes | None]
"""The picture of a path that stands in place of bytes; None where it may not be opened."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a table mean what."""

    image: str | None
    caption: str
    key: str | None
    rest: tuple[str, ...]
    """What goes to `meta`."""

    @property
    def names(self) -> list[str]:
        """All that need be read."""
        return list(dict.fromkeys([*([self.image] if self.image else []), self.caption, *self.rest]))

    @classmethod
    def of(cls, schema: Any, reading: ReadOptions) -> "Columns":
        """SourceError where a column that the user named is missing or unfit; ValueError without captions."""
        pictures = [field.name for field in schema if is_picture(field.type)]
        texts = [field.name for field in schema if is_text(field.type)]
        image = _named(schema, pictures, reading.image_names, "--image-key", "image bytes")
        caption = _named(schema, texts, reading.caption_names, "--caption-key", "text")
        image = image or pick(pictures, IMAGE_COLUMNS)
        caption = caption or pick([name for name in texts if name != image], CAPTION_FIELDS)
        if caption is None:
            raise ValueError(
                f"no caption column among {', '.join(schema.names)}: "
                f"name it {CAPTION_FIELDS[0]!r}, or give --caption-key"
            )
        return cls(
            image=image,
            caption=caption,
            key=pick(schema.names, KEY_COLUMNS),
            rest=tuple(name for name in plain_names(schema) if name not in (image, caption)),
        )

    def samples(
        self, rows: Any, shard: str, stem: str, first: int, fetch: Fetch | None = None
    ) -> Iterator[Sample | Unreadable]:
        """The rows of an Arrow table or batch, `first` onwards; `stem` names those that have no key."""
        pictures = rows.column(self.image).to_pylist() if self.image else [None] * rows.num_rows
        others = rows.select(list(self.rest)).to_pylist() if self.rest else [{}] * rows.num_rows
        captions = _captions(rows.column(self.caption))
        for number, (picture, caption, row) in enumerate(zip(pictures, captions, others, strict=True), first):
            given = row.get(self.key) if self.key else None
            key = f"{stem}/{number:08d}" if given in (None, "") else str(given)
            try:
                image = _image_bytes(picture, fetch)
            except OSError as error:
                yield Unreadable(key, shard, RejectReason.BROKEN_SHARD, one_line(error, typed=True))
                continue
            yield Sample(key, shard, image, encode_caption(caption), encode_meta(row))


def encode_meta(row: dict[str, Any]) -> bytes:
    """A row as JSON; numbers that JSON has no word for become null."""
    row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(row, default=str, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _named(schema: Any, fit: list[str], given: tuple[str, ...], option: str, what: str) -> str | None:
    if not given:
        return None
    name = pick(schema.names, given)
    if name is None:
        raise SourceError(f"{option} {';'.join(given)!r}: there is no such column; there are {', '.join(schema.names)}")
    if name not in fit:
        raise SourceError(f"{option} {name!r} holds {schema.field(name).type}: give a column of {what}")
    return name


def _captions(column: Any) -> list[Any]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not is_list(column.type):
        column = column.cast(pa.large_binary())
    values: list[Any] = column.to_pylist()
    return values


def _image_bytes(picture: Any, fetch: Fetch | None) -> bytes | None:
    data: bytes | None = picture
    if isinstance(picture, dict):
        data = picture["bytes"]
        if data is None and fetch is not None and picture.get("path"):
            return fetch(picture["path"])
    return data
