"""Read samples from Arrow rows, whichever file or dataset the rows come from.

A caption is a string or a list of strings, never a class label. Captions are read as bytes, so
that one that is not UTF-8 is rejected alone and does not end the shard. All other columns become the JSON of `meta`,
except those that contain bytes.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from index.errors import SourceError, one_line
from index.reach import is_out_of_reach
from pipeline.rejects import Rejected, RejectReason
from pipeline.sources.sample import (
    CAPTION_FIELDS,
    ReadOptions,
    Sample,
    Unreadable,
    encode_captions,
    match_name,
    path_of,
)

ROWS_PER_READ = 32
"""Rows whose images are in memory at once."""
IMAGE_COLUMNS = ("image", "jpg", "png", "jpeg", "webp", "img", "bytes", "image_bytes", "picture", "photo")
KEY_COLUMNS = ("key", "__key__")

URL_COLUMN = re.compile("|".join(["url", "uri", "link", "src", *IMAGE_COLUMNS]), re.IGNORECASE)
"""Of columns that may hold URLs of images instead of images."""
HTTP = ("http://", "https://")

ReadFile = Callable[[str], bytes | None]
"""Read the image at a path that a row holds instead of bytes; None if the path may not be opened."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a table hold the image, the caption, the key and the metadata."""

    image: str | None
    caption: str
    key: str | None
    meta: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Return the columns to read."""
        return list(dict.fromkeys([*([self.image] if self.image else []), self.caption, *self.meta]))

    @classmethod
    def of(cls, schema: Any, options: ReadOptions) -> "Columns":
        """Choose the columns of an Arrow schema.

        Raises SourceError if a column that the user named is missing or has the wrong type, and ValueError if none of
        the usual caption columns is there.
        """
        images = [field.name for field in schema if is_image_type(field.type)]
        texts = [field.name for field in schema if is_text_type(field.type)]
        image = _named_column(schema, images, options.image_keys, "--image-key", "image bytes")
        caption = _named_column(schema, texts, options.caption_keys, "--caption-key", "text")
        image = image or match_name(images, IMAGE_COLUMNS)
        caption = caption or match_name([name for name in texts if name != image], CAPTION_FIELDS)
        if caption is None:
            raise ValueError(
                f"no caption column among {', '.join(schema.names)}: "
                f"rename it to {CAPTION_FIELDS[0]!r}, or set --caption-key"
            )
        return cls(
            image=image,
            caption=caption,
            key=match_name(schema.names, KEY_COLUMNS),
            meta=tuple(name for name in columns_without_bytes(schema) if name not in (image, caption)),
        )

    def samples(
        self, rows: Any, shard: str, stem: str, first: int, options: ReadOptions, read_file: ReadFile | None = None
    ) -> Iterator[Sample | Unreadable]:
        """Yield the rows of an Arrow table or batch as samples.

        A row without a key is named after `stem` and its position, which is `first` for the first row. Raises
        SourceError if there are URLs of images instead of images.
        """
        images = rows.column(self.image).to_pylist() if self.image else [None] * rows.num_rows
        if first == 0:
            self._refuse_urls(rows, images, shard)
        metas = rows.select(list(self.meta)).to_pylist() if self.meta else [{}] * rows.num_rows
        captions = _captions(rows.column(self.caption))
        for position, (value, caption, meta) in enumerate(zip(images, captions, metas, strict=True), first):
            key = meta.get(self.key) if self.key else None
            has_own_key = key not in (None, "")
            key = str(key) if has_own_key else f"{stem}/{position:08d}"
            try:
                image = _image_bytes(value, read_file)
            except Rejected as rejected:
                yield Unreadable(key, shard, rejected.reason, rejected.detail)
                continue
            except FileNotFoundError as error:
                yield Unreadable(key, shard, RejectReason.UNREADABLE_SHARD, one_line(error, typed=True))
                continue
            except OSError as error:
                if is_out_of_reach(error):
                    raise
                yield Unreadable(key, shard, RejectReason.UNREADABLE_SHARD, one_line(error, typed=True))
                continue
            yield from options.samples(
                key, shard, image, encode_captions(caption), encode_meta(meta), has_own_key=has_own_key
            )

    def _refuse_urls(self, rows: Any, images: list[Any], shard: str) -> None:
        """Raise SourceError if no row has an image, and a column holds URLs of them."""
        if any(_image_bytes(value, None) is not None for value in images):
            return
        columns = {self.image: images} if self.image else {}
        columns |= {name: rows.column(name).to_pylist() for name in self.meta if URL_COLUMN.search(name)}
        for name, values in columns.items():
            paths = [value.get("path") if isinstance(value, dict) else value for value in values]
            if paths and all(isinstance(each, str) and each.startswith(HTTP) for each in paths):
                raise SourceError(
                    f"column {name!r} of {path_of(shard)} holds URLs of images: download them first, for instance with "
                    f"`img2dataset --url_list FILE --url_col {name} --caption_col {self.caption} --output_format "
                    "webdataset --output_folder DIR`, and name DIR as the source"
                )


def encode_meta(row: dict[str, Any]) -> bytes:
    """Return a row as JSON; NaN and infinity, which JSON does not have, become null."""
    row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(row, default=str, ensure_ascii=False).encode("utf-8", "surrogatepass")


def columns_without_bytes(schema: Any) -> list[str]:
    """Return the names of the columns that contain no bytes."""
    return [field.name for field in schema if not contains_bytes(field.type)]


def is_image_type(arrow_type: Any) -> bool:
    """Return whether a column can hold images: bytes, or Hugging Face's struct{bytes, path}."""
    import pyarrow as pa

    if pa.types.is_struct(arrow_type) and arrow_type.get_field_index("bytes") >= 0:
        arrow_type = arrow_type.field("bytes").type
    return is_bytes_type(arrow_type)


def is_text_type(arrow_type: Any) -> bool:
    """Return whether a column can hold captions: strings, bytes, or lists of these; not numbers or class labels."""
    import pyarrow as pa

    if is_list_type(arrow_type) or pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    is_string = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(arrow_type) for check in is_string) or is_bytes_type(arrow_type)


def is_list_type(arrow_type: Any) -> bool:
    """Return whether an Arrow type is a list of any layout."""
    import pyarrow as pa

    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(check(arrow_type) for check in is_list)


def is_bytes_type(arrow_type: Any) -> bool:
    """Return whether an Arrow type is binary of any layout."""
    import pyarrow as pa

    is_binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(check(arrow_type) for check in is_binary)


def contains_bytes(arrow_type: Any) -> bool:
    """Return whether an Arrow type contains binary data at any depth."""
    import pyarrow as pa

    if is_list_type(arrow_type):
        return contains_bytes(arrow_type.value_type)
    if pa.types.is_struct(arrow_type):
        return any(contains_bytes(arrow_type.field(i).type) for i in range(arrow_type.num_fields))
    return is_bytes_type(arrow_type)


def _named_column(schema: Any, fitting: list[str], keys: tuple[str, ...], option: str, content: str) -> str | None:
    """Return the column that the user named; raises SourceError if it is missing or not one of the `fitting`."""
    if not keys:
        return None
    name = match_name(schema.names, keys)
    if name is None:
        raise SourceError(f"{option} {';'.join(keys)!r} is not a column: choose one of {', '.join(schema.names)}")
    if name not in fitting:
        others = f": choose one of {', '.join(fitting)}" if fitting else ""
        if option == "--image-key":
            others += "; if it holds URLs, download the images first, for instance with img2dataset"
        raise SourceError(f"{option} {name!r} is a column of {schema.field(name).type}, not of {content}{others}")
    return name


def _captions(column: Any) -> list[Any]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    bytes_type = pa.large_list(pa.large_binary()) if is_list_type(column.type) else pa.large_binary()
    column = column.cast(bytes_type)
    values: list[Any] = column.to_pylist()
    return values


def _image_bytes(value: Any, read_file: ReadFile | None) -> bytes | None:
    data: bytes | None = value
    if isinstance(value, dict):
        data = value["bytes"]
        if data is None and read_file is not None and value.get("path"):
            return read_file(value["path"])
    return data
