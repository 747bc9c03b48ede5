"""Decode image bytes into square 8-bit RGB pixels.

An image is turned upright by its EXIF orientation, composited onto white if it has an alpha channel, converted to RGB,
resized so that its shorter side fits, and center-cropped. Its size is checked before anything is decompressed. Large
images are converted and reduced strip by strip, and a process decodes no more at a time than fits into
`MAX_DECODED_BYTES`, whatever the number of its threads.
"""

import contextlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from index.errors import one_line
from pipeline.filters import MAX_PIXELS, Filtered
from pipeline.rejects import Rejected, RejectReason

if TYPE_CHECKING:
    import PIL.Image

FORMATS = {
    "PNG": ("png", "apng"),
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "GIF": ("gif",),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif", "avifs"),
    "JPEG2000": ("jp2", "j2k", "jpx", "jpf", "j2c", "jpc"),
    "PPM": ("ppm", "pgm", "pbm", "pnm", "pfm"),
    "ICO": ("ico",),
    "MPO": ("mpo",),
    "DIB": ("dib",),
    "PCX": ("pcx",),
    "QOI": ("qoi",),
    "SGI": ("sgi", "rgb", "bw"),
    "TGA": ("tga", "vda", "icb", "vst"),
}
"""Pillow's formats that are opened, with their file extensions, in order of preference. Its other plugins are left out:
EPS and WMF start programs or draw what is not an image, PSD, FITS and the like have no one brightness, and the rest are
rare and little tested against bytes of strangers. TGA has no magic number, so it comes last."""
PLUGIN_FORMATS = {"HEIF": ("heic", "heif", "hif"), "JXL": ("jxl",)}
"""Formats that a plugin adds if it is installed; their images are rejected otherwise, and the reject names it."""
PLUGINS = {"HEIF": ("pillow_heif", "pillow-heif"), "JXL": ("pillow_jxl", "pillow-jxl-plugin")}
"""Format -> the plugin's module and the name to install it by."""
NOT_OPENED = (
    "svg",
    "svgz",
    "eps",
    "ps",
    "psd",
    "ai",
    "wmf",
    "emf",
    "dng",
    "cr2",
    "nef",
    "arw",
    "raw",
    "exr",
    "hdr",
    "dds",
)
"""Extensions of images in formats that are not opened: such files are samples too, and are rejected."""
IMAGE_EXTENSIONS = tuple(extension for extensions in (FORMATS | PLUGIN_FORMATS).values() for extension in extensions)
"""Extensions of the images of a folder or tar, in order of preference, in lower case without the dot."""

MAX_DECODED_BYTES = 768 * 2**20
"""Of all images that a process decodes at the same time; an image that needs more is decoded alone."""
STRIP_BYTES = 8 * 2**20
"""Of the pixels that are converted at a time."""
BLOCK_BYTES = 64 * 2**20
"""Of memory that Pillow asks for at a time, at most."""
REDUCING_GAP = 3
"""How many times the target size an image still has after whole rows and columns were averaged."""
CODEC_FACTOR = {"PNG": 1, "BMP": 1, "DIB": 1, "PPM": 1, "TGA": 1, "JPEG2000": 4}
"""How many times the decoded bytes a decoder is assumed to need, 3 for all others; checked for PNG only."""
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""EXIF orientation -> the `PIL.Image.Transpose` that undoes it."""


@dataclass(frozen=True, eq=False, slots=True)
class DecodedImage:
    """The cropped pixels of an image, and the size in pixels of the upright image before resizing."""

    pixels: UInt8[np.ndarray, "H W 3"]
    width: int
    height: int


def decode_image(
    data: bytes | None,
    image_size: int,
    check_size: Callable[[int, int], None] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> DecodedImage:
    """Decode an image to a square of `image_size` pixels; raises Rejected if it cannot be decoded or is too large.

    `check_size(width, height)` is called before anything is decompressed, and may raise Filtered or Rejected.
    """
    from PIL import Image

    if data is None:
        raise Rejected(RejectReason.MISSING_IMAGE, "no image file, member or column value")
    if not data:
        raise Rejected(RejectReason.EMPTY_IMAGE, "0 bytes")
    try:
        with _open(data) as opened:
            width, height = _checked_size(opened, max_pixels)
            if check_size is not None:
                check_size(width, height)
            # A JPEG is decoded at a lower resolution, of at least twice the target size, which is faster.
            opened.draft(None, (2 * image_size, 2 * image_size))
            with _budget.reserve(_decoder_bytes(opened)):
                opened.load()
                if opened.format == "ICO":  # its image may have another size than its directory says
                    width, height = _checked_size(opened, max_pixels)
                orientation = _orientation(opened)
                square = _to_square(opened, image_size)
                opened.close()  # frees its pixels
            if orientation in UPRIGHT:  # a center crop is the same before and after the turn
                square = square.transpose(Image.Transpose(UPRIGHT[orientation]))
            if orientation in (5, 6, 7, 8):
                width, height = height, width
    except (Rejected, Filtered):
        raise
    except Image.DecompressionBombError as error:
        raise Rejected(RejectReason.IMAGE_TOO_LARGE, one_line(error)) from error
    except Exception as error:  # Pillow's decoders raise exceptions of any class for bad bytes
        raise Rejected(RejectReason.UNREADABLE_IMAGE, one_line(error, typed=True)) from error
    return DecodedImage(np.asarray(square), width, height)


@lru_cache(maxsize=1)
def opened_formats() -> tuple[str, ...]:
    """Return the names of the formats that Pillow may open here, those of installed plugins included."""
    from PIL import Image

    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # MPO is opened as JPEG; Pillow may lack a codec
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
        formats.append("HEIF")
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401  # it registers itself

        formats.append("JXL")
    return tuple(formats)


@contextlib.contextmanager
def pillow_kept() -> Iterator[None]:
    """Give Pillow's settings and the filters of warnings back as they were before the block."""
    from PIL import Image

    core = Image.core  # type: ignore[attr-defined]
    before = Image.MAX_IMAGE_PIXELS, core.get_block_size()
    with warnings.catch_warnings():
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before[0]
            core.set_block_size(before[1])


def quiet_pillow(max_pixels: int = MAX_PIXELS) -> None:
    """Set up Pillow in this process: silence its warnings, since those that matter become reject reasons.

    Pillow's own limit, of twice this number, is set too: an icon may hold an image of another size than it says.
    """
    from PIL import Image

    warnings.filterwarnings("ignore", module="PIL")
    Image.MAX_IMAGE_PIXELS = max_pixels
    # Blocks this large go back to the operating system when they are freed; smaller ones stay with the thread.
    Image.core.set_block_size(BLOCK_BYTES)  # type: ignore[attr-defined]


def _open(data: bytes) -> "PIL.Image.Image":
    from PIL import Image, UnidentifiedImageError

    name = _known_format(data)
    if name is not None and name not in opened_formats():
        fix = f"pip install {PLUGINS[name][1]}" if name in PLUGINS else "convert it to PNG, JPEG or WebP"
        raise Rejected(RejectReason.UNSUPPORTED_FORMAT, f"{name} is not opened: {fix}")
    try:
        return Image.open(io.BytesIO(data), formats=opened_formats())
    except UnidentifiedImageError as error:
        raise Rejected(RejectReason.UNREADABLE_IMAGE, f"not an image: it begins with {data[:16]!r}") from error


def _known_format(data: bytes) -> str | None:
    """Return the name of a format that only a plugin opens, or none, by the magic number."""
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        return None if data[8:12] in (b"mif1", b"msf1") and b"avif" in data[12:64] else "HEIF"
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        return "JXL"
    if data.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "EPS"
    if data.startswith(b"8BPS"):
        return "PSD"
    if data.startswith(b"%PDF"):
        return "PDF"
    start = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return "SVG" if start.startswith(b"<svg") or (start.startswith(b"<?xml") and b"<svg" in start) else None


def _orientation(image: "PIL.Image.Image") -> int:
    """Return the EXIF orientation of a loaded image; 1, upright, if there is none or the EXIF data are damaged."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # the pixels are sound, whatever stands beside them
        return 1


def _checked_size(image: "PIL.Image.Image", max_pixels: int) -> tuple[int, int]:
    width, height = image.size
    if width * height > max_pixels:
        raise Rejected(RejectReason.IMAGE_TOO_LARGE, f"{width}x{height} is over {max_pixels:,} pixels")
    return width, height


def _to_square(image: "PIL.Image.Image", image_size: int) -> "PIL.Image.Image":
    """Center-crop and resize a loaded image to a square in RGB."""
    from PIL import Image

    factor = max(1, min(image.size) // (REDUCING_GAP * image_size))
    small = _to_small_rgb(image, factor)
    # In fractions of a pixel: the last row and column of `small` may stand for less than the others.
    width, height = image.width / factor, image.height / factor
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return small.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)


def _to_small_rgb(image: "PIL.Image.Image", factor: int) -> "PIL.Image.Image":
    """Convert a loaded image to RGB, averaged over squares of `factor` pixels.

    It is done strip by strip, so that no second image of the original size is ever in memory.
    """
    from PIL import Image

    convert = _converter(image)
    rows = max(1, STRIP_BYTES // (4 * image.width * factor)) * factor
    if image.height <= rows:
        return convert(image).reduce(factor)
    small = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        small.paste(convert(strip).reduce(factor), (0, top // factor))
    return small


def _converter(image: "PIL.Image.Image") -> Callable[["PIL.Image.Image"], "PIL.Image.Image"]:
    """Return what converts strips of an image to 8-bit RGB; raises Rejected if its brightness is not defined."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG", "JPEG2000")):
        is_inverted = image.format == "TIFF" and image.tag_v2.get(262) == 0  # type: ignore[attr-defined]
        transparent = image.info.get("transparency")

        def from_gray16(strip: "PIL.Image.Image") -> "PIL.Image.Image":
            return _gray16_to_rgb(strip, transparent, is_inverted=is_inverted)

        return from_gray16
    if image.mode == "F":
        low, high = image.getextrema()
        if not 0 <= low <= high <= 1:  # type: ignore[operator]  # false for NaN too
            raise Rejected(
                RejectReason.UNREADABLE_IMAGE, f"float pixels from {low} to {high}: only 0 to 1 has a known brightness"
            )
        return _float_to_rgb
    if image.mode.startswith("I"):
        raise Rejected(
            RejectReason.UNREADABLE_IMAGE, f"{image.format} of 32-bit or signed integers: their brightness is not known"
        )
    return _alpha_to_rgb


def _gray16_to_rgb(
    image: "PIL.Image.Image", transparent: int | None, *, is_inverted: bool = False
) -> "PIL.Image.Image":
    from PIL import Image

    values = np.asarray(image).astype(np.int32)
    gray = (values + 128) // 257
    gray = 255 - gray if is_inverted else gray
    if isinstance(transparent, int):
        gray = np.where(values == transparent, 255, gray)
    return Image.fromarray(gray.clip(0, 255).astype(np.uint8)).convert("RGB")


def _float_to_rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    from PIL import Image

    return Image.fromarray((np.asarray(image) * 255).round().astype(np.uint8)).convert("RGB")


def _alpha_to_rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    from PIL import Image

    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    return image.convert("RGB")


def _decoder_bytes(image: "PIL.Image.Image") -> int:
    """Return how much memory an opened image needs at most while it is decoded."""
    bytes_per_pixel = {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if image.mode.startswith("I;16") else 4)
    return image.width * image.height * bytes_per_pixel * CODEC_FACTOR.get(image.format or "", 3)


class _Budget:
    """Bytes that the threads of a process share: a thread waits until what it needs is free, or until it is alone."""

    def __init__(self, total: int) -> None:
        self.total, self.used, self.changed = total, 0, threading.Condition()

    @contextlib.contextmanager
    def reserve(self, amount: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: not self.used or self.used + amount <= self.total)
            self.used += amount
        try:
            yield
        finally:
            with self.changed:
                self.used -= amount
                self.changed.notify_all()


_budget = _Budget(MAX_DECODED_BYTES)
