"""Every picture becomes square RGB pixels or is rejected for the right reason."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline import images
from pipeline.images import decode_image, quiet_pillow
from pipeline.rejects import Rejected, RejectReason
from pipeline.sources.sample import decode_caption


@pytest.fixture(autouse=True)
def _quiet():
    quiet_pillow()


def saved(image: Image.Image, kind: str = "png", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def test_a_picture_of_the_right_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(saved(Image.fromarray(pixels)), 32).pixels, pixels)


def test_a_wide_picture_is_cropped_at_the_center():
    image = Image.new("RGB", (90, 30), "red")
    image.paste("blue", (30, 0, 60, 30))
    picture = decode_image(saved(image), 30)
    assert (picture.width, picture.height) == (90, 30)
    assert (picture.pixels == (0, 0, 255)).all()


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (16, 16), "red")
    image.paste("blue", (0, 0, 16, 8))  # blue above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = decode_image(saved(image, "jpeg", exif=exif, quality=95), 16).pixels
    assert pixels[2, 8, 0] > 200
    assert pixels[13, 8, 2] > 200


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    assert (decode_image(saved(image), 8).pixels == 255).all()


@pytest.mark.parametrize(
    ("image", "value"),
    [
        (Image.new("L", (8, 8), 100), 100),
        (Image.new("1", (8, 8), 1), 255),
        (Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)), 100),
    ],
    ids=["gray", "bilevel", "16-bit"],
)
def test_grays_become_rgb(image, value):
    assert (decode_image(saved(image), 8).pixels == value).all()


def test_cmyk_becomes_rgb():
    pixels = decode_image(saved(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "jpeg"), 8).pixels
    assert (pixels > 250).all()


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = saved(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert (decode_image(data, 8).pixels[0, 0] == (255, 0, 0)).all()


whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, RejectReason.MISSING_IMAGE),
        (b"", RejectReason.EMPTY_IMAGE),
        (b"<html>not found</html>", RejectReason.UNREADABLE_IMAGE),
        (whole[: len(whole) // 2], RejectReason.UNREADABLE_IMAGE),
        (whole[:20], RejectReason.UNREADABLE_IMAGE),
    ],
    ids=["none", "empty", "html", "truncated", "header"],
)
def test_what_is_no_picture_is_rejected(data, reason):
    with pytest.raises(Rejected) as caught:
        decode_image(data, 32)
    assert caught.value.reason is reason
    assert caught.value.detail


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 63)
    with pytest.raises(Rejected) as caught:
        decode_image(saved(Image.new("RGB", (8, 8))), 8)
    assert caught.value.reason is RejectReason.IMAGE_TOO_LARGE
    assert "8x8" in caught.value.detail


def test_captions():
    assert decode_caption(" naïve café \n".encode()) == "naïve café"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, RejectReason.MISSING_CAPTION),
        (b" \n", RejectReason.EMPTY_CAPTION),
        (b"caf\xe9", RejectReason.CAPTION_NOT_UTF8),
    ],
)
def test_captions_are_rejected(data, reason):
    with pytest.raises(Rejected) as caught:
        decode_caption(data)
    assert caught.value.reason is reason
