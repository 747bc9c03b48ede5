"""Decode image bytes into square 8-bit RGB pixels.

An image is rotated by its EXIF orientation, composited onto white if it has an alpha channel, converted to RGB, resized
so that its shorter side fits, and center-cropped. Its size is checked before anything is decompressed.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from index.errors import one_line
from pipeline.filters import Filtered
from pipeline.rejects import Rejected, RejectReason

if TYPE_CHECKING:
    import PIL.Image

MAX_PIXELS = 100_000_000


@dataclass(frozen=True, eq=False, slots=True)
class DecodedImage:
    """The cropped pixels of an image, and its size in pixels before resizing."""

    pixels: UInt8[np.ndarray, "H W 3"]
    width: int
    height: int


def decode_image(
    data: bytes | None, image_size: int, check_size: Callable[[int, int], None] | None = None
) -> DecodedImage:
    """Decode an image to a square of `image_size` pixels; raises Rejected if it cannot be decoded or is too large.

    `check_size(width, height)` is called before anything is decompressed, and may raise Filtered or Rejected.
    """
    from PIL import Image, ImageOps

    if data is None:
        raise Rejected(RejectReason.MISSING_IMAGE, "no image file, member or column value")
    if not data:
        raise Rejected(RejectReason.EMPTY_IMAGE, "0 bytes")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise Rejected(RejectReason.IMAGE_TOO_LARGE, f"{width}x{height} is over {MAX_PIXELS:,} pixels")
            if check_size is not None:
                check_size(width, height)
            # A JPEG is decoded at a lower resolution, of at least twice the target size, which is faster.
            opened.draft(None, (2 * image_size, 2 * image_size))
            image = to_rgb(ImageOps.exif_transpose(opened))
            square = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    except (Rejected, Filtered):
        raise
    except Image.DecompressionBombError as error:
        raise Rejected(RejectReason.IMAGE_TOO_LARGE, one_line(error)) from error
    except Exception as error:  # Pillow's decoders raise exceptions of any class for bad bytes
        raise Rejected(RejectReason.UNREADABLE_IMAGE, one_line(error, typed=True)) from error
    return DecodedImage(np.asarray(square), width, height)


def to_rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """Convert a Pillow image of any mode to 8-bit RGB: 16-bit gray is rescaled, alpha is composited onto white."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    return image.convert("RGB")


def quiet_pillow() -> None:
    """Silence Pillow's warnings in this process: those that matter become reject reasons."""
    warnings.filterwarnings("ignore", module="PIL")
