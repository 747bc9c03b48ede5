"""Bad input does not stop a run: every sample becomes a row, is filtered, or is rejected with its reason."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from index.errors import OptionError, SourceError, TableError
from index.table.table import open_table
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.text import TransformersTextEncoder
from pipeline.rejects import RejectReason


def encoded(image: Image.Image, file_format: str = "png", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, file_format, **options)
    return data.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
PNG, JPEG = encoded(NOISE), encoded(NOISE, "jpeg")


def png_with_header(width: int, height: int) -> bytes:
    """Return a PNG whose header states a size for which it has hardly any pixel data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def animation() -> bytes:
    return encoded(NOISE, "gif", save_all=True, append_images=[NOISE.rotate(90)])


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(NOISE, "jpeg", exif=exif)


ENCODED = {
    "plain": PNG,
    "cmyk": encoded(NOISE.convert("CMYK"), "jpeg"),
    "palette_with_alpha": encoded(NOISE.convert("RGBA").quantize(8), transparency=0),
    "sixteen_bit": encoded(Image.fromarray(np.full((40, 40), 25700, np.uint16))),
    "gray": encoded(NOISE.convert("L")),
    "bilevel": encoded(NOISE.convert("1")),
    "animated": animation(),
    "exif_rotated": rotated_by_exif(),
    "webp": encoded(NOISE, "webp"),
    "one_pixel": encoded(Image.new("RGB", (1, 1))),
    "thin": encoded(Image.new("RGB", (1, 3000))),
}
REJECTED = {
    "truncated_png": ({"png": PNG[: len(PNG) // 2]}, "unreadable_image"),
    "truncated_jpeg": ({"jpg": JPEG[: len(JPEG) // 2]}, "unreadable_image"),
    "header_only": ({"png": PNG[:20]}, "unreadable_image"),
    "zero_bytes": ({"png": b""}, "empty_image"),
    "html": ({"jpg": b"<html>404</html>"}, "unreadable_image"),
    "svg": ({"png": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, "unsupported_format"),
    "large": ({"png": png_with_header(11_000, 11_000)}, "image_too_large"),
    "huge": ({"png": png_with_header(60_000, 60_000)}, "image_too_large"),
    "absurd": ({"png": png_with_header(2_000_000_000, 1)}, "image_too_large"),
    "no_height": ({"png": png_with_header(10, 0)}, "unreadable_image"),
    "no_image": ({"png": None}, "missing_image"),
    "no_caption": ({"txt": None}, "missing_caption"),
    "blank_caption": ({"txt": b" \n\t"}, "empty_caption"),
    "latin_caption": ({"txt": b"caf\xe9"}, "caption_not_utf8"),
    "truncated_json": ({"json": b'{"url": '}, "unreadable_metadata"),
    "number_caption": ({"txt": None, "json": b'{"caption": 7}'}, "caption_not_text"),
    "sample_over_the_cap": ({"x": None, "json": b'{"a": "' + b"x" * 1_200_000 + b'"}'}, "sample_too_large"),
    "json_list": ({"json": b"[1, 2]"}, "unreadable_metadata"),
    "json_not_utf8": ({"json": b'{"a": "\xe9"}'}, "unreadable_metadata"),
    "deep_json": ({"json": b'{"a":' * 100_000}, "unreadable_metadata"),
    "../../escape": ({}, "unsafe_name"),
    "/etc/passwd": ({}, "unsafe_name"),
    "inside/../../out": ({}, "unsafe_name"),
    "twice": ({}, "duplicate_key"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory, write_tar, encode_shapes):
    """The table of a tar with one sample of every fault, and of a truncated tar."""
    folder = tmp_path_factory.mktemp("bad")
    members = []
    for key, image in ENCODED.items():
        members += [(f"{key}.png", image), (f"{key}.txt", b"a caption"), (f"{key}.json", b'{"n": 1}')]
    members += [("upper.PNG", PNG), ("upper.TXT", b"a caption"), ("./dotted.png", PNG), ("./dotted.txt", b"a caption")]
    for key, (changes, _) in REJECTED.items():
        sample = {"png": PNG, "txt": b"a caption", "json": b"{}"}
        if "jpg" in changes:
            del sample["png"]
        sample = {extension: data for extension, data in (sample | changes).items() if data is not None}
        members += [(f"{key}.{extension}", data) for extension, data in sample.items()] * (2 if key == "twice" else 1)
    write_tar(folder / "source" / "00000.tar", members)
    write_tar(
        folder / "source" / "00001.tar", [(f"{n}.{e}", d) for n in range(9) for e, d in (("png", PNG), ("txt", b"x"))]
    )
    truncated = folder / "source" / "00001.tar"
    truncated.write_bytes(truncated.read_bytes()[: 5 * (512 + 4 * 1024 + 1024) + 700])
    return encode_shapes(folder / "source", folder / "t.lance", max_reject_rate=0.9, max_sample_mb=1.0)


@pytest.mark.parametrize("key", [*ENCODED, "upper", "dotted", "twice"])
def test_an_unusual_but_valid_sample_is_encoded(bad, content, key):
    assert [row["key"] for row in content(bad.table)].count(key) == 1


@pytest.mark.parametrize("key", REJECTED)
def test_a_bad_sample_is_in_the_rejects_table_with_its_reason(bad, rejects, key):
    (row,) = (row for row in rejects(bad.table) if row["key"] == key)
    assert row["reason"] == REJECTED[key][1]
    assert row["shard"].endswith("00000.tar")
    assert row["detail"]


def test_a_truncated_tar_yields_its_whole_samples(bad, rejects, content):
    (row,) = (row for row in rejects(bad.table) if row["key"] == "")
    assert row["reason"] == "unreadable_shard"
    assert row["shard"].endswith("00001.tar")
    rows = [row for row in content(bad.table) if row["shard"].endswith("00001.tar")]
    assert 1 <= len(rows) < 9
    assert {row["caption"] for row in rows} == {"x"}


def test_rows_and_rejects_add_up_to_the_samples(bad, content, rejects):
    report = bad.report
    assert len(content(bad.table)) == report["rows"] == len(ENCODED) + 3 + 4
    assert (
        len(rejects(bad.table)) == report["rejected"] == sum(report["rejects_by_reason"].values()) == len(REJECTED) + 1
    )


def test_width_and_height_are_those_of_the_original_image(bad, content):
    sizes = {row["key"]: (row["width"], row["height"]) for row in content(bad.table)}
    assert (sizes["thin"], sizes["one_pixel"], sizes["plain"]) == ((1, 3000), (1, 1), (40, 40))


@pytest.mark.parametrize(
    ("encoder", "method", "reason"),
    [(DiffusersAutoencoder, "encode", "bad_latent"), (TransformersTextEncoder, "encode_counted", "bad_embedding")],
)
def test_bad_encoder_outputs_are_rejected(
    shapes, encode_shapes, rejects, tmp_path, monkeypatch, encoder, method, reason
):
    encode = getattr(encoder, method)

    def corrupted(self, batch):
        output = encode(self, batch)
        out = output[0] if isinstance(output, tuple) else output
        if len(out) > 4:
            out[1], out[2], out[3] = np.nan, 0, 1e6
        return output

    monkeypatch.setattr(encoder, method, corrupted)
    result = encode_shapes(shapes, tmp_path / "t.lance", limit=32)
    rows = rejects(result.table)
    assert [row["reason"] for row in rows] == [reason] * 3
    assert sorted(row["detail"] for row in rows) == ["all zero", *["not finite in float16"] * 2]
    assert result.report["rows"] == 29


@pytest.mark.slow
def test_too_many_rejects_stop_the_run_before_it_commits(shapes, write_tar, encode_shapes, tmp_path):
    good = [(f"{n}.{e}", d) for n in range(9) for e, d in (("png", PNG + bytes(n)), ("txt", b"x"))]
    write_tar(tmp_path / "source" / "a.tar", [*good, ("bad.png", b"?"), ("bad.txt", b"x")])
    detail = r"not an image: it begins with b'\?'"
    reasons = rf"unreadable_image 1; for example bad of {tmp_path}/source/a.tar: unreadable_image, {detail}"
    message = rf"^1 of 10 samples were rejected \({reasons}\), above --max-reject-rate 0.05: nothing was pub"
    with pytest.raises(SourceError, match=message):
        encode_shapes(tmp_path / "source", tmp_path / "t.lance", max_reject_rate=0.05)
    with pytest.raises(TableError, match="no table at"):
        open_table(tmp_path / "t.lance")
    # With a higher limit the run resumes from the shards that are encoded.
    assert encode_shapes(tmp_path / "source", tmp_path / "t.lance", max_reject_rate=0.5).report["rejected"] == 1


def test_every_reject_reason_is_tested():
    elsewhere = {RejectReason.UNREADABLE_SHARD, RejectReason.BAD_LATENT, RejectReason.BAD_EMBEDDING}
    elsewhere |= {RejectReason.NOT_GROUPED, RejectReason.UNSUPPORTED_MEMBER}  # tests/test_accounting.py
    assert {reason for _, reason in REJECTED.values()} | elsewhere == set(RejectReason)


@pytest.fixture
def varied(tmp_path, write_tar):
    """Samples with several sizes, captions and scores, and with duplicates across two shards."""
    images = [encoded(NOISE.resize((w, h))) for w, h in ((40, 40), (20, 40), (12, 12))]
    one = [
        ("a", images[0], b"a long caption", {"aesthetic": 6.0}),
        ("b", images[1], b"a long caption", {"aesthetic": 4.0}),
        ("c", images[2], b"a long caption", {"aesthetic": 7.0}),
        ("d", images[0], b"hi", {"aesthetic": 9.0}),
    ]
    two = [
        ("e", images[0], b"a long caption", {"aesthetic": 6.0}),
        ("f", images[0], b"another caption", {}),
        ("g", b"not an image", b"a long caption", {"aesthetic": 6.0}),
        ("h", b"not an image", b"a long caption", {"aesthetic": 6.0}),
    ]
    for name, samples in (("1.tar", one), ("2.tar", two)):
        members = []
        for key, image, caption, fields in samples:
            members += [(f"{key}.png", image), (f"{key}.txt", caption), (f"{key}.json", json.dumps(fields).encode())]
        write_tar(tmp_path / "varied" / name, members)
    return tmp_path / "varied"


@pytest.mark.parametrize(
    ("options", "kept", "counts"),
    [
        ({}, "abcdef", {}),
        ({"min_image_size": 20}, "abdef", {"small_side": 1}),
        ({"max_aspect_ratio": 1.5}, "acdef", {"wide_aspect": 1}),
        ({"min_caption_length": 3}, "abcef", {"short_caption": 1}),
        ({"max_caption_length": 14}, "abcde", {"long_caption": 1}),
        ({"filter": "aesthetic > 5"}, "acde", {"metadata": 1, "metadata_missing": 1}),
        ({"dedup": "image"}, "abc", {"duplicate": 4}),
        ({"dedup": "pair"}, "abcdf", {"duplicate": 2}),
        ({"dedup": "image", "min_caption_length": 3}, "abc", {"duplicate": 3, "short_caption": 1}),
        ({"dedup": "image", "filter": "aesthetic > 8 or aesthetic < 5"}, "bd", {"metadata": 5, "metadata_missing": 1}),
    ],
)
def test_filtered_samples_are_counted_by_reason(varied, encode_shapes, content, tmp_path, options, kept, counts):
    result = encode_shapes(varied, tmp_path / "t.lance", val_fraction=0.0, **options)
    assert "".join(row["key"] for row in sorted(content(result.table), key=lambda row: row["key"])) == kept
    assert result.report["filtered_by_reason"] == counts
    assert result.report["rejects_by_reason"].keys() <= {"unreadable_image"}
    assert result.report["rows"] + result.report["rejected"] + result.report["filtered"] == 8


def test_append_adds_to_the_rejects_table(varied, encode_shapes, rejects, write_tar, tmp_path):
    write_tar(varied / "0.tar", [("z.png", b"?"), ("z.txt", b"x"), ("y.png", PNG), ("y.txt", b"x")])
    first = encode_shapes(varied / "0.tar", tmp_path / "t.lance", val_fraction=0.0)
    assert [row["key"] for row in rejects(first.table)] == ["z"]
    added = encode_shapes(varied, tmp_path / "t.lance", val_fraction=0.0, append=True)
    assert sorted(row["key"] for row in rejects(added.table)) == ["g", "h", "z"]
    assert (added.report["rows"], added.report["rejected"]) == (6, 2)


@pytest.mark.slow
def test_dedup_does_not_depend_on_the_number_of_workers(varied, encode_shapes, content, tmp_path):
    tables = [
        encode_shapes(varied, tmp_path / f"{workers}.lance", val_fraction=0.0, dedup="image", num_workers=workers).table
        for workers in (1, 2)
    ]
    assert content(tables[0]) == content(tables[1])


def test_a_filter_that_drops_every_sample_is_an_error(varied, encode_shapes, tmp_path):
    with pytest.raises(SourceError, match=r"8 filtered \(metadata_missing 8\): nothing was published"):
        encode_shapes(varied, tmp_path / "t.lance", filter="aesthetics > 5")


def test_an_expression_that_cannot_be_evaluated_is_a_one_line_error(varied, encode_shapes, tmp_path):
    with pytest.raises(OptionError, match=r"^--filter 'open\(1\)' cannot be evaluated: Function 'open' not defined"):
        encode_shapes(varied, tmp_path / "t.lance", filter="open(1)")
