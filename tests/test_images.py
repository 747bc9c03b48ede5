"""Images of every mode and format become square RGB pixels; bad images and captions are rejected by reason."""

import io
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline import images
from pipeline.filters import Filtered, FilterReason
from pipeline.images import FORMATS, decode_image, quiet_pillow
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
    data = encoded(Image.new("1", (10_001, 5_000)))
    with pytest.raises(Rejected) as caught:
        decode_image(data[:100], 8)  # of the pixel data hardly anything is left
    assert caught.value.reason is RejectReason.IMAGE_TOO_LARGE
    assert caught.value.detail == "10001x5000 is over 50,000,000 pixels"
    assert decode_image(data, 8, max_pixels=50_005_000).width == 10_001


def test_an_icon_that_holds_a_larger_image_than_it_says_is_rejected():
    inner = encoded(Image.new("1", (11_000, 11_000)))
    header = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22)
    with pytest.raises(Rejected) as caught:
        decode_image(header + inner, 8)
    assert caught.value.reason is RejectReason.IMAGE_TOO_LARGE


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"])
def test_a_large_image_is_reduced_strip_by_strip_to_what_pillow_gives(mode):
    rng = np.random.default_rng(0)
    base = Image.fromarray(rng.integers(0, 256, (20, 15, 3), dtype=np.uint8)).resize(
        (1500, 2000), Image.Resampling.BICUBIC
    )
    if mode == "I;16":
        image = Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
        expected = base.convert("L").convert("RGB")
    else:
        image = base.convert(mode)
        expected = Image.open(io.BytesIO(encoded(image, "tiff"))).convert("RGB")
    data = encoded(image, "tiff")
    expected = np.asarray(ImageOps.fit(expected, (32, 32), Image.Resampling.BICUBIC)).astype(int)
    decoded = decode_image(data, 32)
    assert (decoded.width, decoded.height) == (1500, 2000)
    assert np.abs(decoded.pixels.astype(int) - expected).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["jpeg", "png", "webp", "tiff"])
def test_width_and_height_are_those_of_the_upright_image(orientation, file_format):
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, file_format, exif=exif, **({"quality": 95} if file_format in ("jpeg", "webp") else {}))
    decoded = decode_image(data, 32)
    assert (decoded.width, decoded.height) == ((32, 64) if orientation >= 5 else (64, 32))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert (decoded.width, decoded.height) == upright.size
    expected = np.asarray(ImageOps.fit(upright, (32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(decoded.pixels - expected).mean() < 2


@pytest.mark.parametrize("file_format", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"\xff" * 40, b""])
def test_damaged_exif_data_do_not_reject_an_image(file_format, exif):
    image = Image.new("RGB", (16, 8), "red")
    options = {} if file_format == "tiff" else {"exif": exif}
    decoded = decode_image(encoded(image, file_format, **options), 8)
    assert (decoded.width, decoded.height) == (16, 8)
    assert decoded.pixels[..., 0].min() > 240


def transparent_gray16() -> bytes:
    """A 16-bit gray PNG of the values 25,700 and 0, of which 0 is transparent."""
    data = encoded(Image.fromarray(np.array([[25_700] * 8, [0] * 8] * 4, np.uint16)))
    chunk = b"tRNS" + struct.pack(">H", 0)
    return data[:33] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def test_gray_images_of_16_bits_with_a_transparent_value():
    pixels = decode_image(transparent_gray16(), 8).pixels
    assert (pixels[0] == 100).all()
    assert (pixels[1] == 255).all()


@pytest.mark.parametrize(
    ("array", "outcome"),
    [
        (np.full((8, 8), 0.5, np.float32), 128),
        (np.full((8, 8), 1.0, np.float32), 255),
        (np.full((8, 8), 128.0, np.float32), "only 0 to 1 has a known brightness"),
        (np.full((8, 8), np.nan, np.float32), "only 0 to 1 has a known brightness"),
        (np.full((8, 8), 2**30, np.int32), "brightness is not known"),
        (np.full((8, 8), 100, np.int32), "brightness is not known"),
        (np.full((8, 8), 100 * 257, np.uint16), 100),
    ],
)
def test_the_brightness_of_tiffs(array, outcome):
    data = encoded(Image.fromarray(array), "tiff")
    if isinstance(outcome, int):
        assert (decode_image(data, 8).pixels == outcome).all()
        return
    with pytest.raises(Rejected, match=outcome) as caught:
        decode_image(data, 8)
    assert caught.value.reason is RejectReason.UNREADABLE_IMAGE


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [
        *(
            (name, "RGB")
            for name in [
                "PNG",
                "JPEG",
                "WEBP",
                "BMP",
                "GIF",
                "TIFF",
                "AVIF",
                "JPEG2000",
                "PPM",
                "ICO",
                "MPO",
                "DIB",
                "PCX",
                "QOI",
                "SGI",
                "TGA",
            ]
        ),
        ("PPM", "I;16"),
        ("JPEG2000", "I;16"),
    ],
)
def test_every_format_that_is_opened(file_format, mode):
    gray = Image.fromarray(np.full((32, 32), 100 * 257, np.uint16))
    image = gray if mode == "I;16" else Image.new("RGB", (32, 32), (100, 100, 100))
    decoded = decode_image(encoded(image, file_format), 32)
    assert (decoded.width, decoded.height) == (32, 32)
    assert np.abs(decoded.pixels.astype(int) - 100).max() <= 4
    assert file_format in FORMATS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(64), "HEIF is not opened: pip install pillow-heif"),
        (b"\xff\x0a" + bytes(64), "JXL is not opened: pip install pillow-jxl-plugin"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64), "JXL is not opened"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS is not opened: convert it"),
        (b"\xc5\xd0\xd3\xc6" + bytes(64), "EPS is not opened"),
        (b"<?xml version='1.0'?><svg/>", "SVG is not opened"),
        (b"8BPS" + bytes(64), "PSD is not opened"),
    ],
)
def test_a_format_that_is_not_opened_is_named(data, message):
    with pytest.raises(Rejected, match=message) as caught:
        decode_image(data, 8)
    assert caught.value.reason is RejectReason.UNSUPPORTED_FORMAT


def test_no_program_is_started(tmp_path, monkeypatch):
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    eps = encoded(Image.new("RGB", (8, 8)), "eps")
    for data in (eps, b"\0" + eps, eps.replace(b"%!PS", b"%?PS")):
        with pytest.raises(Rejected):
            decode_image(data, 8)
    assert not (tmp_path / "started").exists()


def test_threads_share_a_budget_of_decoded_bytes():
    budget, running, most = images._Budget(100), [], []
    lock = threading.Lock()

    def work(amount: int) -> None:
        with budget.reserve(amount):
            with lock:
                running.append(amount)
                most.append(sum(running))
            time.sleep(0.005)
            with lock:
                running.remove(amount)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, [40, 60, 100, 250, 30, 10] * 8))
    assert max(most) == 250  # alone, because it would never fit
    assert max(total for total in most if total != 250) <= 100
    assert budget.used == 0


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
        (b"\xef\xbb\xbf", RejectReason.EMPTY_CAPTION),
        ("café".encode("utf-16"), RejectReason.CAPTION_NOT_UTF8),
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
