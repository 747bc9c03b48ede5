"""What every reader gives, and how it is told where the picture and the caption stand.

The same names are tried for files beside each other, for columns and for fields of a JSON sidecar. A name that the user
gave is the only one that is tried: a sample without it has no caption, rather than one from elsewhere.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from index.table.storage import Storage
from pipeline.images import RejectReason

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "jfif", "avif")
CAPTION_EXTENSIONS = ("txt", "caption", "cap")
CAPTION_FIELDS = ("caption", "text", "txt", "sentence", "prompt", "captions", "sentences", "description")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image-caption pair as it was read, undecoded."""

    key: str
    """Its name within the source; no two samples of a shard have the same."""
    shard: str
    image: bytes | None
    caption: bytes | None
    meta: bytes
    """Its JSON sidecar, unchanged; `{}` where there is none."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A sample, or the rest of a shard, that could not be read."""

    key: str
    """Empty for the rest of a shard."""
    shard: str
    reason: RejectReason
    detail: str


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How samples are read. Pickled to workers."""

    image_key: str | None = None
    """Column or file ending of the picture, several in order as `jpg;png`; None tries the usual ones."""
    caption_key: str | None = None
    """Column, file ending or JSON field of the caption, several in order as `txt;alt`; None tries the usual ones."""
    storage: Storage = field(default_factory=Storage)

    @property
    def image_names(self) -> tuple[str, ...]:
        """What the user gave, if anything."""
        return _names(self.image_key)

    @property
    def caption_names(self) -> tuple[str, ...]:
        """What the user gave, if anything."""
        return _names(self.caption_key)

    @property
    def image_extensions(self) -> tuple[str, ...]:
        """Endings of file names, in lower case without the dot, the best one first."""
        return tuple(name.lower() for name in self.image_names) or IMAGE_EXTENSIONS

    @property
    def caption_extensions(self) -> tuple[str, ...]:
        """Endings of file names, in lower case without the dot, the best one first."""
        return tuple(name.lower() for name in self.caption_names) or CAPTION_EXTENSIONS

    def caption_of(self, *sidecars: bytes | None) -> bytes | None:
        """The caption in the first JSON sidecar that has one."""
        for sidecar in sidecars:
            fields = _fields(sidecar)
            name = pick(fields, self.caption_names or CAPTION_FIELDS)
            if name is not None:
                return encode_caption(fields[name])
        return None


def pick(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The first wanted name that is there, as it is written there; case counts only where both cases stand."""
    names = list(names)
    lower = {name.lower(): name for name in reversed(names)}
    return next((w if w in names else lower[w.lower()] for w in wanted if w in names or w.lower() in lower), None)


def encode_caption(value: Any) -> bytes | None:
    """A caption as bytes: the first of several, None where there is none; what is not UTF-8 is left so."""
    while isinstance(value, list):
        value = value[0] if value else None
    if value is None or isinstance(value, bytes):
        return value
    return str(value).encode("utf-8", "surrogatepass")


def _names(given: str | None) -> tuple[str, ...]:
    return tuple(name.strip().removeprefix(".") for name in given.split(";")) if given else ()


def _fields(sidecar: bytes | None) -> dict[str, Any]:
    try:
        fields = json.loads(sidecar or b"{}")
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
