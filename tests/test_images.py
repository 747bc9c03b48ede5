"""Images of every mode and format become square RGB pixels; bad images and captions are rejected by reason."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.filters import Filtered, FilterReason
from pipeline.images import decode_image, quiet_pillow
from pipeline.rejects import Rejected, RejectReason
from pipeline.sources.sample import decode_caption, decode_meta


@pytest.fixture(autouse=True)
def _quiet():
    quiet_pillow()


def encoded(image: Image.Image, file_format: str = "png", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, file_format, **options)
    return data.getvalue()


def test_an_image_of_the_target_size_is_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encoded(Image.fromarray(pixels)), 32).pixels, pixels)


def test_a_wide_image_is_center_cropped():
    image = Image.new("RGB", (90, 30), "red")
    image.paste("blue", (30, 0, 60, 30))
    decoded = decode_image(encoded(image), 30)
    assert (decoded.width, decoded.height) == (90, 30)
    assert (decoded.pixels == (0, 0, 255)).all()


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (16, 16), "red")
    image.paste("blue", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # rotated by 180 degrees
    pixels = decode_image(encoded(image, "jpeg", exif=exif, quality=95), 16).pixels
    assert pixels[2, 8, 0] > 200
    assert pixels[13, 8, 2] > 200


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_composited_onto_white(mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    assert (decode_image(encoded(image), 8).pixels == 255).all()


@pytest.mark.parametrize(
    ("image", "value"),
    [
        (Image.new("L", (8, 8), 100), 100),
        (Image.new("1", (8, 8), 1), 255),
        (Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)), 100),
    ],
    ids=["gray", "bilevel", "16-bit"],
)
def test_gray_images_become_rgb(image, value):
    assert (decode_image(encoded(image), 8).pixels == value).all()


def test_cmyk_becomes_rgb():
    pixels = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "jpeg"), 8).pixels
    assert (pixels > 250).all()


def test_the_first_frame_of_an_animation_is_decoded():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert (decode_image(data, 8).pixels[0, 0] == (255, 0, 0)).all()


PNG = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, RejectReason.MISSING_IMAGE),
        (b"", RejectReason.EMPTY_IMAGE),
        (b"<html>not found</html>", RejectReason.UNREADABLE_IMAGE),
        (PNG[: len(PNG) // 2], RejectReason.UNREADABLE_IMAGE),
        (PNG[:20], RejectReason.UNREADABLE_IMAGE),
    ],
    ids=["none", "empty", "html", "truncated", "header"],
)
def test_a_bad_image_is_rejected_by_reason(data, reason):
    with pytest.raises(Rejected) as caught:
        decode_image(data, 32)
    assert caught.value.reason is reason
    assert caught.value.detail


def test_an_image_with_too_many_pixels_is_rejected_by_its_header():
    data = encoded(Image.new("1", (10_001, 10_000)))
    with pytest.raises(Rejected) as caught:
        decode_image(data[:100], 8)  # of the pixel data hardly anything is left
    assert caught.value.reason is RejectReason.IMAGE_TOO_LARGE
    assert caught.value.detail == "10001x10000 is over 100,000,000 pixels"


def test_the_size_check_sees_the_original_size_before_decoding():
    sizes = []

    def check_size(width, height):
        sizes.append((width, height))
        raise Filtered(FilterReason.SMALL_SIDE)

    with pytest.raises(Filtered):
        decode_image(PNG[:100], 8, check_size)
    assert sizes == [(64, 64)]


def test_captions_are_stripped():
    assert decode_caption(" naïve café \n".encode()) == "naïve café"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, RejectReason.MISSING_CAPTION),
        (b" \n", RejectReason.EMPTY_CAPTION),
        (b"caf\xe9", RejectReason.CAPTION_NOT_UTF8),
    ],
)
def test_a_bad_caption_is_rejected_by_reason(data, reason):
    with pytest.raises(Rejected) as caught:
        decode_caption(data)
    assert caught.value.reason is reason


def test_sidecar_fields():
    assert decode_meta('{"city": "Zürich", "score": 1.5}'.encode()) == {"city": "Zürich", "score": 1.5}


@pytest.mark.parametrize("data", [b'{"url": ', b"[1, 2]", b'{"a": "\xe9"}', b""], ids=["cut", "list", "bytes", "empty"])
def test_a_bad_sidecar_is_rejected(data):
    with pytest.raises(Rejected) as caught:
        decode_meta(data)
    assert caught.value.reason is RejectReason.UNREADABLE_METADATA
