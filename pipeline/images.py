"""Bytes -> pixels, safely, and the closed list of reasons for which a sample is rejected.

A picture is turned upright by its EXIF tag, laid on white where it is transparent, converted to 8-bit RGB, scaled so
that its shorter side fits, and cropped at the center. Its size is checked before anything is decompressed.
"""

import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from pipeline.filters import Filtered

if TYPE_CHECKING:
    import PIL.Image

MAX_PIXELS = 100_000_000


class RejectReason(StrEnum):
    """Why a sample is in the rejects table; nothing else stands there."""

    BROKEN_SHARD = "broken_shard"
    DUPLICATE_KEY = "duplicate_key"
    UNSAFE_NAME = "unsafe_name"
    BROKEN_METADATA = "broken_metadata"
    MISSING_IMAGE = "missing_image"
    EMPTY_IMAGE = "empty_image"
    UNREADABLE_IMAGE = "unreadable_image"
    IMAGE_TOO_LARGE = "image_too_large"
    MISSING_CAPTION = "missing_caption"
    EMPTY_CAPTION = "empty_caption"
    CAPTION_NOT_UTF8 = "caption_not_utf8"
    BAD_LATENT = "bad_latent"
    BAD_EMBEDDING = "bad_embedding"


class Rejected(Exception):
    """This sample cannot be encoded."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        """Say why, and what exactly was met."""
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, eq=False, slots=True)
class Picture:
    """A decoded picture, and the size that it had."""

    pixels: UInt8[np.ndarray, "H W 3"]
    width: int
    height: int


def decode_caption(data: bytes | None) -> str:
    """The caption's text without surrounding blanks; Rejected where there is none."""
    if data is None:
        raise Rejected(RejectReason.MISSING_CAPTION, "no .txt member or caption column")
    try:
        caption = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise Rejected(RejectReason.CAPTION_NOT_UTF8, str(error)) from error
    if not caption:
        raise Rejected(RejectReason.EMPTY_CAPTION, f"{len(data)} bytes of blanks")
    return caption


def decode_meta(data: bytes) -> dict[str, Any]:
    """The sidecar's fields; Rejected where it is no JSON object in UTF-8."""
    try:
        fields = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Rejected(RejectReason.BROKEN_METADATA, str(error)) from error
    if not isinstance(fields, dict):
        raise Rejected(RejectReason.BROKEN_METADATA, f"a JSON {type(fields).__name__}, not an object")
    return fields


def decode_image(data: bytes | None, size: int, check_size: Callable[[int, int], None] | None = None) -> Picture:
    """A square picture of `size` pixels; Rejected where the bytes are no picture or too large a one.

    `check_size` sees width and height before anything is decompressed, and may raise on its own account.
    """
    from PIL import Image, ImageOps

    if data is None:
        raise Rejected(RejectReason.MISSING_IMAGE, "no image member or column")
    if not data:
        raise Rejected(RejectReason.EMPTY_IMAGE, "0 bytes")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise Rejected(RejectReason.IMAGE_TOO_LARGE, f"{width}x{height} is over {MAX_PIXELS:,} pixels")
            if check_size is not None:
                check_size(width, height)
            # A JPEG is decoded at a lower resolution where that is still twice what is wanted.
            opened.draft(None, (2 * size, 2 * size))
            image = to_rgb(ImageOps.exif_transpose(opened))
            square = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    except (Rejected, Filtered):
        raise
    except Image.DecompressionBombError as error:
        raise Rejected(RejectReason.IMAGE_TOO_LARGE, str(error)) from error
    except Exception as error:  # Pillow's decoders raise whatever they meet; all of it is this sample's fault
        raise Rejected(RejectReason.UNREADABLE_IMAGE, f"{type(error).__name__}: {error}") from error
    return Picture(np.asarray(square), width, height)


def quiet_pillow() -> None:
    """Keep Pillow's warnings of odd pictures to itself, in this process: what matters of them becomes a reason."""
    warnings.filterwarnings("ignore", module="PIL")


def to_rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """An 8-bit RGB image of any Pillow image: 16-bit grays scaled, transparency laid on white."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, layer)
    return image.convert("RGB")
