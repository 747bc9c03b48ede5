"""Bad input is data: every sample becomes a row, is filtered, or stands in the rejects table with its reason."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from index.errors import OptionError, SourceError, TableError
from index.table.table import open_table
from pipeline import images
from pipeline.encoders import DiffusersAutoencoder, TransformersTextEncoder


def saved(image: Image.Image, kind: str = "png", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
PNG, JPEG = saved(NOISE), saved(NOISE, "jpeg")


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG whose header promises a size that its few bytes do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def frames() -> bytes:
    return saved(NOISE, "gif", save_all=True, append_images=[NOISE.rotate(90)])


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(NOISE, "jpeg", exif=exif)


ENCODED = {
    "plain": PNG,
    "upper.case": None,  # its members are KEY.PNG and KEY.TXT, below
    "cmyk": saved(NOISE.convert("CMYK"), "jpeg"),
    "palette_with_transparency": saved(NOISE.convert("RGBA").quantize(8), transparency=0),
    "sixteen_bit": saved(Image.fromarray(np.full((40, 40), 25700, np.uint16))),
    "gray": saved(NOISE.convert("L")),
    "bilevel": saved(NOISE.convert("1")),
    "animated": frames(),
    "turned": turned(),
    "webp": saved(NOISE, "webp"),
    "one_pixel": saved(Image.new("RGB", (1, 1))),
    "thin": saved(Image.new("RGB", (1, 3000))),
}
REJECTED = {
    "truncated_png": ({"png": PNG[: len(PNG) // 2]}, "unreadable_image"),
    "truncated_jpeg": ({"jpg": JPEG[: len(JPEG) // 2]}, "unreadable_image"),
    "header_only": ({"png": PNG[:20]}, "unreadable_image"),
    "zero_bytes": ({"png": b""}, "empty_image"),
    "html": ({"jpg": b"<html>404</html>"}, "unreadable_image"),
    "svg": ({"png": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, "unreadable_image"),
    "bomb": ({"png": png_that_claims(60_000, 60_000)}, "image_too_large"),
    "absurd": ({"png": png_that_claims(2_000_000_000, 1)}, "image_too_large"),
    "no_height": ({"png": png_that_claims(10, 0)}, "unreadable_image"),
    "no_picture": ({"png": None}, "missing_image"),
    "no_caption": ({"txt": None}, "missing_caption"),
    "blank_caption": ({"txt": b" \n\t"}, "empty_caption"),
    "latin_caption": ({"txt": b"caf\xe9"}, "caption_not_utf8"),
    "broken_json": ({"json": b'{"url": '}, "broken_metadata"),
    "json_list": ({"json": b"[1, 2]"}, "broken_metadata"),
    "json_not_utf8": ({"json": b'{"a": "\xe9"}'}, "broken_metadata"),
    "json_bottomless": ({"json": b'{"a":' * 100_000}, "broken_metadata"),
    "../../escape": ({}, "unsafe_name"),
    "/etc/passwd": ({}, "unsafe_name"),
    "inside/../../out": ({}, "unsafe_name"),
    "twice": ({}, "duplicate_key"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory, write_tar, encode_shapes):
    """The table of a tar in which everything goes wrong, once."""
    folder = tmp_path_factory.mktemp("bad")
    members = []
    for key, picture in ENCODED.items():
        if picture is not None:
            members += [(f"{key}.png", picture), (f"{key}.txt", b"a caption"), (f"{key}.json", b'{"n": 1}')]
    members += [("upper.PNG", PNG), ("upper.TXT", b"a caption"), ("./dotted.png", PNG), ("./dotted.txt", b"a caption")]
    for key, (changes, _) in REJECTED.items():
        sample = {"png": PNG, "txt": b"a caption", "json": b"{}"}
        if "jpg" in changes:
            del sample["png"]
        times = 2 if key == "twice" else 1
        for _ in range(times):
            members += [(f"{key}.{end}", data) for end, data in (sample | changes).items() if data is not None]
    write_tar(folder / "source" / "00000.tar", members)
    write_tar(
        folder / "source" / "00001.tar", [(f"{n}.{e}", d) for n in range(9) for e, d in (("png", PNG), ("txt", b"x"))]
    )
    cut = folder / "source" / "00001.tar"
    cut.write_bytes(cut.read_bytes()[: 5 * (512 + 4 * 1024 + 1024) + 700])
    return encode_shapes(folder / "source", folder / "t.lance", max_reject_rate=0.9)


@pytest.mark.parametrize("key", [*(set(ENCODED) - {"upper.case"}), "upper", "dotted", "twice"])
def test_what_is_odd_but_sound_is_encoded(bad, content, key):
    assert [row["key"] for row in content(bad.table)].count(key) == 1


@pytest.mark.parametrize("key", REJECTED)
def test_what_is_broken_stands_in_the_rejects_table(bad, rejects, key):
    (row,) = (row for row in rejects(bad.table) if row["key"] == key)
    assert row["reason"] == REJECTED[key][1]
    assert row["shard"].endswith("00000.tar")
    assert row["detail"]


def test_a_truncated_tar_gives_what_it_holds(bad, rejects, content):
    (row,) = (row for row in rejects(bad.table) if row["key"] == "")
    assert row["reason"] == "broken_shard"
    assert row["shard"].endswith("00001.tar")
    whole = [row for row in content(bad.table) if row["shard"].endswith("00001.tar")]
    assert 1 <= len(whole) < 9
    assert {row["caption"] for row in whole} == {"x"}


def test_no_sample_is_lost(bad, content, rejects):
    report = bad.report
    assert len(content(bad.table)) == report["rows"] == len(ENCODED) + 2 + 4
    assert (
        len(rejects(bad.table)) == report["rejected"] == sum(report["rejects_by_reason"].values()) == len(REJECTED) + 1
    )


def test_sizes_are_those_of_the_original(bad, content):
    sizes = {row["key"]: (row["width"], row["height"]) for row in content(bad.table)}
    assert (sizes["thin"], sizes["one_pixel"], sizes["plain"]) == ((1, 3000), (1, 1), (40, 40))


@pytest.mark.parametrize(
    ("encoder", "reason"), [(DiffusersAutoencoder, "bad_latent"), (TransformersTextEncoder, "bad_embedding")]
)
def test_what_the_encoders_spoil_is_rejected(shapes, encode_shapes, rejects, tmp_path, monkeypatch, encoder, reason):
    whole = encoder.encode

    def broken(self, batch):
        out = np.array(whole(self, batch))
        if len(out) > 4:
            out[1], out[2], out[3] = np.nan, 0, 1e6
        return out

    monkeypatch.setattr(encoder, "encode", broken)
    result = encode_shapes(shapes, tmp_path / "t.lance", limit=32)
    found = rejects(result.table)
    assert [row["reason"] for row in found] == [reason] * 3
    assert sorted(row["detail"] for row in found) == ["all zero", *["not finite in float16"] * 2]
    assert result.report["rows"] == 29


def test_too_many_rejects_stop_the_run_before_publishing(shapes, write_tar, encode_shapes, tmp_path):
    good = [(f"{n}.{e}", d) for n in range(9) for e, d in (("png", PNG + bytes(n)), ("txt", b"x"))]
    write_tar(tmp_path / "source" / "a.tar", [*good, ("bad.png", b"?"), ("bad.txt", b"x")])
    message = r"^1 of 10 samples were rejected \(unreadable_image 1\), above --max-reject-rate 0.05: nothing was pub"
    with pytest.raises(SourceError, match=message):
        encode_shapes(tmp_path / "source", tmp_path / "t.lance", max_reject_rate=0.05)
    with pytest.raises(TableError, match="no table at"):
        open_table(tmp_path / "t.lance")
    # Allowing more goes on from what was encoded.
    assert encode_shapes(tmp_path / "source", tmp_path / "t.lance", max_reject_rate=0.5).report["rejected"] == 1


def test_a_bomb_is_not_opened(monkeypatch, write_tar, encode_shapes, rejects, tmp_path):
    """Its pixels are never asked for: the header is enough."""
    asked = []
    monkeypatch.setattr(
        images, "to_rgb", lambda image, whole=images.to_rgb: (asked.append(image.size), whole(image))[1]
    )
    members = [("a.png", PNG), ("a.txt", b"x"), ("b.png", png_that_claims(11_000, 11_000)), ("b.txt", b"x")]
    table = encode_shapes(write_tar(tmp_path / "a.tar", members), tmp_path / "t.lance", val_fraction=0.0).table
    assert [row["detail"] for row in rejects(table)] == ["11000x11000 is over 100,000,000 pixels"]
    assert set(asked) == {(40, 40)}


@pytest.fixture
def varied(tmp_path, write_tar):
    """Samples of several sizes, captions, scores, and copies across two shards."""
    pictures = [saved(NOISE.resize((w, h))) for w, h in ((40, 40), (20, 40), (12, 12))]
    one = [
        ("a", pictures[0], b"a long caption", {"aesthetic": 6.0}),
        ("b", pictures[1], b"a long caption", {"aesthetic": 4.0}),
        ("c", pictures[2], b"a long caption", {"aesthetic": 7.0}),
        ("d", pictures[0], b"hi", {"aesthetic": 9.0}),
    ]
    two = [
        ("e", pictures[0], b"a long caption", {"aesthetic": 6.0}),
        ("f", pictures[0], b"another caption", {}),
        ("g", b"broken", b"a long caption", {"aesthetic": 6.0}),
        ("h", b"broken", b"a long caption", {"aesthetic": 6.0}),
    ]
    for name, samples in (("1.tar", one), ("2.tar", two)):
        members = []
        for key, picture, caption, fields in samples:
            members += [(f"{key}.png", picture), (f"{key}.txt", caption), (f"{key}.json", json.dumps(fields).encode())]
        write_tar(tmp_path / "varied" / name, members)
    return tmp_path / "varied"


@pytest.mark.parametrize(
    ("options", "kept", "counted"),
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
def test_filters_count_by_reason_apart_from_rejects(varied, encode_shapes, content, tmp_path, options, kept, counted):
    result = encode_shapes(varied, tmp_path / "t.lance", val_fraction=0.0, **options)
    assert "".join(row["key"] for row in sorted(content(result.table), key=lambda row: row["key"])) == kept
    assert result.report["filtered_by_reason"] == counted
    assert result.report["rejects_by_reason"].keys() <= {"unreadable_image"}
    assert result.report["rows"] + result.report["rejected"] + result.report["filtered"] == 8


def test_appended_rejects_join_those_before(varied, encode_shapes, rejects, write_tar, tmp_path):
    write_tar(varied / "0.tar", [("z.png", b"?"), ("z.txt", b"x"), ("y.png", PNG), ("y.txt", b"x")])
    first = encode_shapes(varied / "0.tar", tmp_path / "t.lance", val_fraction=0.0)
    assert [row["key"] for row in rejects(first.table)] == ["z"]
    added = encode_shapes(varied, tmp_path / "t.lance", val_fraction=0.0, append=True)
    assert sorted(row["key"] for row in rejects(added.table)) == ["g", "h", "z"]
    assert (added.report["rows"], added.report["rejected"]) == (6, 2)


def test_copies_are_found_by_any_number_of_workers(varied, encode_shapes, content, tmp_path):
    tables = [
        encode_shapes(varied, tmp_path / f"{workers}.lance", val_fraction=0.0, dedup="image", num_workers=workers).table
        for workers in (1, 2)
    ]
    assert content(tables[0]) == content(tables[1])


def test_a_filter_that_leaves_nothing_says_so(varied, encode_shapes, tmp_path):
    with pytest.raises(SourceError, match=r"8 filtered \(metadata_missing 8\): nothing was published"):
        encode_shapes(varied, tmp_path / "t.lance", filter="aesthetics > 5")


def test_an_expression_that_cannot_be_used_is_one_line(varied, encode_shapes, tmp_path):
    with pytest.raises(OptionError, match=r"^--filter 'open\(1\)' cannot be used: Function 'open' not defined"):
        encode_shapes(varied, tmp_path / "t.lance", filter="open(1)")
