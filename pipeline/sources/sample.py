"""What every reader yields, the options that tell it where the image and the caption are, and their encodings.

The same names are tried as file extensions, as column names and as fields of a JSON sidecar. If the user gives a name,
no other is tried: a sample without it has no caption, rather than a caption from another field.
"""

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from index.errors import OptionError, one_line
from index.ranges import check_choices
from index.reach import OnWait
from index.table.storage import Storage
from pipeline.images import IMAGE_EXTENSIONS, NOT_OPENED
from pipeline.rejects import Rejected, RejectReason

CAPTION_EXTENSIONS = ("txt", "caption", "cap")
CAPTIONS = ("first", "all")
MAX_SAMPLE_BYTES = 256 * 2**20
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
    """Its JSON sidecar, unchanged but for a byte order mark; `{}` if there is none."""
    caption_number: int = 0
    """Position of its caption among those of the image."""
    unused_captions: int = 0
    """Further captions of the image, which `captions="first"` leaves out."""
    note: str = ""
    """What may be the reason if the caption is missing."""
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
    count: int | None = 1
    """How many samples cannot be read; None if nothing says how many are left in the shard."""
    caption_number: int = 0
    """Position of the caption among those of the image."""


Caption = bytes | Rejected | None
"""A caption as stored, why it is none, or None if there is none."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Where the image and the caption of a sample are, and how its storage is reached. Pickled to workers."""

    image_key: str | None = None
    """Column or file extension of the image, or several in order of preference, `jpg;png`; None: the usual names."""
    caption_key: str | None = None
    """Column, file extension or sidecar field of the caption, or several, `txt;alt`; None: the usual names."""
    storage: Storage = field(default_factory=Storage)
    captions: str = "first"
    """Of an image with several captions: first, or all as one sample each, with the keys KEY, KEY#1, KEY#2, ..."""
    max_sample_bytes: int = MAX_SAMPLE_BYTES
    """A sample whose files are larger is rejected without reading or decompressing it."""
    on_wait: OnWait | None = field(default=None, compare=False)
    """Is told what is waited for while a store is away."""

    def __post_init__(self) -> None:
        """Raise OptionError if a value is not allowed."""
        check_choices(self, captions=CAPTIONS)
        if self.max_sample_bytes < 1:
            raise OptionError(f"--max-sample-mb {self.max_sample_bytes / 2**20:g} is out of range: use more than 0")

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

    def not_opened(self, extension: str) -> str | None:
        """Return the detail of an image whose extension says that its format is not opened, else None."""
        if extension not in NOT_OPENED or extension in self.image_extensions:
            return None
        return f".{extension} images are not opened: convert them to PNG, JPEG or WebP"

    def find_captions(self, *sidecars: bytes | None) -> list[Caption]:
        """Return the captions in the caption field of the first JSON sidecar that has one; empty if none has."""
        for sidecar in sidecars:
            fields = _parse_fields(sidecar)
            name = match_name(fields, self.caption_keys or CAPTION_FIELDS)
            if name is not None:
                return encode_captions(fields[name])
        return []

    def samples(
        self,
        key: str,
        shard: str,
        image: bytes | None,
        captions: Sequence[Caption],
        meta: bytes | None,
        note: str = "",
        *,
        has_own_key: bool = True,
    ) -> Iterator[Sample | Unreadable]:
        """Yield an image with its first caption, or one sample for each if all are wanted.

        A caption that is not text, or a sample that is too large, is yielded as Unreadable.
        """
        meta = b"{}" if meta is None else meta.removeprefix(codecs.BOM_UTF8)
        is_all = self.captions == "all"
        size = len(image or b"") + len(meta) + sum(len(each) for each in captions if isinstance(each, bytes))
        chosen = captions if is_all else captions[:1]
        for number, caption in enumerate(chosen or [None]):
            name = f"{key}#{number}" if number else key
            if size > self.max_sample_bytes:
                yield Unreadable(name, shard, RejectReason.SAMPLE_TOO_LARGE, self.too_large(size), 1, number)
            elif isinstance(caption, Rejected):
                yield Unreadable(name, shard, caption.reason, caption.detail, 1, number)
            else:
                unused = 0 if is_all else max(0, len(captions) - 1)
                yield Sample(name, shard, image, caption, meta, number, unused, note, has_own_key)

    def too_large(self, size: int | None) -> str:
        """Return the detail of a sample that is larger than allowed; its `size` in bytes may be unknown."""
        what = "more" if size is None else f"{size:,} bytes"
        return f"{what} than --max-sample-mb {self.max_sample_bytes / 2**20:g} allows"


def path_of(uri: str) -> str:
    """Return a URI without the query of a presigned http URL, which is a secret and hides the extension."""
    return uri.partition("?")[0] if uri.startswith(("http://", "https://")) else uri


def match_name(names: Iterable[str], candidates: Sequence[str]) -> str | None:
    """Return the name that matches the first possible candidate: exactly, or else without regard to case."""
    names = list(names)
    by_lower = {name.lower(): name for name in reversed(names)}
    matches = (c if c in names else by_lower.get(c.lower()) for c in candidates)
    return next((name for name in matches if name is not None), None)


def encode_captions(value: Any) -> list[Caption]:
    """Return a caption, or each of a list of captions, as bytes; what is not text becomes its reject."""
    if isinstance(value, list):
        return [_encode_caption(each) for each in value]
    return [] if value is None else [_encode_caption(value)]


def _encode_caption(value: Any) -> Caption:
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    text = json.dumps(value, default=str)[:100]
    return Rejected(RejectReason.CAPTION_NOT_TEXT, f"the caption is {text}, of type {type(value).__name__}, not text")


def decode_caption(data: bytes | None, note: str = "") -> str:
    """Return a caption without byte order mark and surrounding whitespace.

    Raises Rejected if it is missing, empty or not UTF-8; `note` is what else to say if it is missing.
    """
    if data is None:
        where = "no caption file, member, column value or sidecar field"
        raise Rejected(RejectReason.MISSING_CAPTION, f"{where}: {note or 'see --caption-key'}")
    try:
        caption = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        hint = ": it is UTF-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
        raise Rejected(RejectReason.CAPTION_NOT_UTF8, one_line(error) + hint) from error
    if not caption:
        raise Rejected(RejectReason.EMPTY_CAPTION, f"{len(data)} bytes of whitespace")
    return caption


def decode_meta(data: bytes) -> dict[str, Any]:
    """Return the fields of a JSON sidecar; raises Rejected if it is not a JSON object in UTF-8."""
    try:
        fields = json.loads(data.decode("utf-8-sig"))
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
        fields = json.loads((sidecar or b"{}").removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
