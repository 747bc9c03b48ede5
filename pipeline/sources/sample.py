"""What every reader yields, the options that tell it where the image and the caption are, and their encodings.

The same names are tried as file extensions, as column names and as fields of a JSON sidecar. If the user gives a name,
no other is tried: a sample without it has no caption, rather than a caption from another field.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from index.errors import one_line
from index.table.storage import Storage
from pipeline.rejects import Rejected, RejectReason

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "jfif", "avif")
CAPTION_EXTENSIONS = ("txt", "caption", "cap")
CAPTION_FIELDS = ("caption", "text", "txt", "sentence", "prompt", "captions", "sentences", "description")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image-caption pair as stored in its source, not decoded."""

    key: str
    """Its name in the source, unique within the shard."""
    shard: str
    image: bytes | None
    caption: bytes | None
    meta: bytes
    """Its JSON sidecar, unchanged; `{}` if there is none."""
    has_own_key: bool = True
    """False if the key is only the sample's position, which is another one once its source has grown."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A sample, or the rest of a shard, that cannot be read."""

    key: str
    """Empty for the rest of a shard."""
    shard: str
    reason: RejectReason
    detail: str


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Where the image and the caption of a sample are, and how its storage is reached. Pickled to workers."""

    image_key: str | None = None
    """Column or file extension of the image, or several in order of preference, `jpg;png`; None: the usual names."""
    caption_key: str | None = None
    """Column, file extension or sidecar field of the caption, or several, `txt;alt`; None: the usual names."""
    storage: Storage = field(default_factory=Storage)

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Split `image_key` at its semicolons; empty if it is None."""
        return _split_keys(self.image_key)

    @property
    def caption_keys(self) -> tuple[str, ...]:
        """Split `caption_key` at its semicolons; empty if it is None."""
        return _split_keys(self.caption_key)

    @property
    def image_extensions(self) -> tuple[str, ...]:
        """Return the file extensions of images, in lower case without the dot, in order of preference."""
        return tuple(key.lower() for key in self.image_keys) or IMAGE_EXTENSIONS

    @property
    def caption_extensions(self) -> tuple[str, ...]:
        """Return the file extensions of captions, in lower case without the dot, in order of preference."""
        return tuple(key.lower() for key in self.caption_keys) or CAPTION_EXTENSIONS

    def find_caption(self, *sidecars: bytes | None) -> bytes | None:
        """Return the caption field of the first JSON sidecar that has one, or None."""
        for sidecar in sidecars:
            fields = _parse_fields(sidecar)
            name = match_name(fields, self.caption_keys or CAPTION_FIELDS)
            if name is not None:
                return encode_caption(fields[name])
        return None


def match_name(names: Iterable[str], candidates: Sequence[str]) -> str | None:
    """Return the name that matches the first possible candidate: exactly, or else without regard to case."""
    names = list(names)
    by_lower = {name.lower(): name for name in reversed(names)}
    matches = (c if c in names else by_lower.get(c.lower()) for c in candidates)
    return next((name for name in matches if name is not None), None)


def encode_caption(value: Any) -> bytes | None:
    """Return a caption as bytes, the first of a list of captions; bytes are kept as they are, UTF-8 or not."""
    while isinstance(value, list):
        value = value[0] if value else None
    if value is None or isinstance(value, bytes):
        return value
    return str(value).encode("utf-8", "surrogatepass")


def decode_caption(data: bytes | None) -> str:
    """Return a caption without surrounding whitespace; raises Rejected if it is missing, empty or not UTF-8."""
    if data is None:
        raise Rejected(
            RejectReason.MISSING_CAPTION, "no caption file, member, column value or sidecar field: see --caption-key"
        )
    try:
        caption = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise Rejected(RejectReason.CAPTION_NOT_UTF8, one_line(error)) from error
    if not caption:
        raise Rejected(RejectReason.EMPTY_CAPTION, f"{len(data)} bytes of whitespace")
    return caption


def decode_meta(data: bytes) -> dict[str, Any]:
    """Return the fields of a JSON sidecar; raises Rejected if it is not a JSON object in UTF-8."""
    try:
        fields = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Rejected(RejectReason.UNREADABLE_METADATA, one_line(error)) from error
    if not isinstance(fields, dict):
        raise Rejected(
            RejectReason.UNREADABLE_METADATA, f"the sidecar holds a JSON {type(fields).__name__}, not an object"
        )
    return fields


def _split_keys(keys: str | None) -> tuple[str, ...]:
    return tuple(key.strip().removeprefix(".") for key in keys.split(";")) if keys else ()


def _parse_fields(sidecar: bytes | None) -> dict[str, Any]:
    try:
        fields = json.loads(sidecar or b"{}")
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
