"""Listing the shards of a source, and reading tars and parquet files as other programs write them."""

import gzip
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from index.errors import SourceError
from pipeline.rejects import RejectReason
from pipeline.sources.listing import list_shards
from pipeline.sources.read import count_samples, read_samples
from pipeline.sources.sample import ReadOptions, Sample, Unreadable


def png(color=(255, 0, 0), side=8) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, side), color).save(data, "png")
    return data.getvalue()


def write_tar(path, members: dict[str, bytes] | list[tuple[str, bytes]]):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def names(shards: list[str]) -> list[str]:
    return [shard.rsplit("/", 1)[1] for shard in shards]


# --- listing -----------------------------------------------------------------------------------------------------


def test_a_folder_lists_tars_and_not_their_metadata_parquets(tmp_path):
    for name in ("00001.tar", "00000.tar", "00000.parquet", "00000_stats.json", "more.parquet"):
        (tmp_path / name).write_bytes(b"")
    assert names(list_shards([str(tmp_path)])) == ["00000.tar", "00001.tar", "more.parquet"]


def test_gzipped_tars_are_listed_and_hidden_files_are_not(tmp_path):
    for name in ("a.tar.gz", "a.parquet", "b.tgz", "._b.tgz", ".part.tar", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    assert names(list_shards([str(tmp_path)])) == ["a.tar.gz", "b.tgz"]


def test_subfolders_are_searched_if_the_folder_itself_has_no_shards(tmp_path):
    for name in ("data/x/00000.tar", "data/x/00000.parquet", "data/train-0.parquet", "data/.cache/old.tar", "a/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    shards = list_shards([str(tmp_path)])
    assert shards == [str(tmp_path / "data/train-0.parquet"), str(tmp_path / "data/x/00000.tar")]
    assert list_shards([str(tmp_path / "data")]) == [str(tmp_path / "data/train-0.parquet")]


def test_braces_and_globs_list_each_shard_once(tmp_path):
    for number in range(4):
        (tmp_path / f"{number:05d}.tar").write_bytes(b"")
    shards = list_shards([f"{tmp_path}/{{00000..00002}}.tar", f"{tmp_path}/*1.tar"])
    assert names(shards) == ["00000.tar", "00001.tar", "00002.tar"]


def test_brace_patterns_of_many_names_list_those_that_exist(tmp_path):
    for number in (3, 40, 70):
        (tmp_path / f"{number:05d}.tar").write_bytes(b"")
    assert names(list_shards([f"{tmp_path}/{{00000..00099}}.tar"])) == ["00003.tar", "00040.tar", "00070.tar"]
    with pytest.raises(SourceError, match="no shards at"):
        list_shards([f"{tmp_path}/nowhere/{{00000..00099}}.tar"])


def test_a_glob_can_match_folders(tmp_path):
    for name in ("part-0/a.tar", "part-1/b.parquet", "other/c.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert names(list_shards([f"{tmp_path}/part-*"])) == ["a.tar", "b.parquet"]


@pytest.mark.parametrize("name", ["a#b", "50%20", "a#0-1", "braces{1,2}", "glob[1]", "it's ü"])
def test_special_characters_in_paths_are_literal(tmp_path, name):
    folder = tmp_path / name
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "x#1.png").write_bytes(png())
    (folder / "images" / "x#1.txt").write_bytes(b"image")
    write_tar(folder / "a#1.tar", {"x.png": png(), "x.txt": b"tar"})
    pq.write_table(pa.table({"jpg": [png()], "text": ["parquet"]}), folder / "b%20.parquet")
    shards = list_shards([str(folder), str(folder / "images"), str(folder / "b%20.parquet")])
    assert shards == [str(folder / "a#1.tar"), str(folder / "b%20.parquet"), f"{folder / 'images'}#0-1"]
    samples = [sample for shard in shards for sample in read_samples(shard)]
    assert [sample.caption for sample in samples] == [b"tar", b"parquet", b"image"]
    assert [sample.key for sample in samples] == ["x", "b%20/00000000", "x#1.png"]
    assert {sample.image for sample in samples} == {png()}


def test_shards_on_another_fsspec_file_system(tmp_path):
    import fsspec

    local = write_tar(tmp_path / "a.tar", {"x.png": png(), "x.txt": b"a caption"})
    with fsspec.open("memory://bucket/a.tar", "wb") as file, open(local, "rb") as source:
        file.write(source.read())
    assert list_shards(["memory://bucket/*.tar"]) == ["memory:///bucket/a.tar"]
    (sample,) = read_samples("memory:///bucket/a.tar")
    assert (sample.image, sample.caption) == (png(), b"a caption")


@pytest.mark.parametrize("source", ["nowhere", "nowhere/*.tar", "{a,b}.tar"])
def test_a_source_without_shards_is_an_error(source):
    with pytest.raises(SourceError, match="no shards at"):
        list_shards([source])


def test_an_empty_folder_and_an_unbalanced_pattern_are_errors(tmp_path):
    with pytest.raises(SourceError, match="no shards at"):
        list_shards([str(tmp_path)])
    with pytest.raises(SourceError, match="brace pattern"):
        list_shards([f"{tmp_path}/{{00000..00009.tar"])


def test_a_file_with_another_extension_is_an_error(tmp_path):
    path = tmp_path / "images.zip"
    path.write_bytes(b"")
    with pytest.raises(SourceError, match=r"images\.zip' is not a shard: use \.tar, .* or \.parquet"):
        list_shards([str(path)])


@pytest.mark.parametrize("error", [PermissionError("Access\nDenied"), FileNotFoundError("no bucket")])
def test_an_unreachable_store_is_a_one_line_error(monkeypatch, error):
    from fsspec.implementations.memory import MemoryFileSystem

    def refuse(self, path, **options):
        raise error

    monkeypatch.setattr(MemoryFileSystem, "exists", refuse)
    with pytest.raises(SourceError, match=rf"cannot be listed \({type(error).__name__}: ") as caught:
        list_shards(["memory://bucket"])
    assert "\n" not in str(caught.value)


# --- tars --------------------------------------------------------------------------------------------------------


def test_tar_samples_keep_their_order_and_sidecars(tmp_path):
    sidecar = b'{"url": "x",  "score": 1.50}'
    shard = write_tar(
        tmp_path / "a.tar",
        {"b.jpg": png(), "b.txt": b"second letter", "b.json": sidecar, "a.PNG": png((0, 0, 1)), "c.txt": b"no image"},
    )
    b, a, c = read_samples(shard)
    assert (b.key, b.caption, b.meta) == ("b", b"second letter", sidecar)
    assert b.image == png()
    assert (a.key, a.caption, a.meta) == ("a", None, b"{}")
    assert a.image == png((0, 0, 1))
    assert (c.image, c.caption) == (None, b"no image")


@pytest.mark.parametrize("extension", ["tar", "tar.gz", "tgz"])
def test_tars_written_by_webdataset(tmp_path, extension):
    from webdataset import TarWriter

    shard = str(tmp_path / f"a.{extension}")
    with TarWriter(shard) as writer:
        for number in range(3):
            fields = {"txt": f"caption {number}", "json": {"number": number}}
            writer.write({"__key__": f"d.1/{number:03d}", "png": png((number, 0, 0)), **fields})
    samples = list(read_samples(shard))
    assert [s.key for s in samples] == ["d.1/000", "d.1/001", "d.1/002"]
    assert [s.caption for s in samples] == [b"caption 0", b"caption 1", b"caption 2"]
    assert [json.loads(s.meta) for s in samples] == [{"number": 0}, {"number": 1}, {"number": 2}]
    assert [s.image for s in samples] == [png((number, 0, 0)) for number in range(3)]


def test_a_gzipped_tar_is_detected_by_its_content(tmp_path):
    plain = write_tar(tmp_path / "plain.tar", {"x.png": png(), "x.txt": b"a caption"})
    (tmp_path / "a.tar").write_bytes(gzip.compress(read_bytes(plain)))
    (sample,) = read_samples(str(tmp_path / "a.tar"))
    assert sample.caption == b"a caption"


def read_bytes(path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def test_folders_and_special_members_are_skipped(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("./d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("./d/l.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in ("./__meta__/x.json", "./d/README", "./d/._a.png", "./d/a.png", "./d/a.cls"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    link, sample = read_samples(str(path))
    assert (link.key, link.reason) == ("d/l", RejectReason.UNSUPPORTED_MEMBER)
    assert (sample.key, sample.image) == ("d/a", b"abc")


@pytest.mark.parametrize(
    ("caption_key", "members", "expected"),
    [
        (None, {"caption": b"c", "json": b'{"caption": "j"}'}, b"c"),
        (None, {"json": b'{"caption": "j", "alt": "a"}'}, b"j"),
        (None, {"json": b'{"text": ["first", "second"]}'}, b"first"),
        (None, {"json": b'{"caption": null}'}, None),
        (None, {"json": b"[1]"}, None),
        (None, {"json": b"\xff{"}, None),
        (None, {"json": b'{"caption": "\\ud800"}'}, b"\xed\xa0\x80"),
        ("alt", {"txt": b"t", "json": b'{"caption": "j", "alt": "a"}'}, b"a"),
        ("alt;txt", {"txt": b"t", "json": b'{"caption": "j", "alt": "a"}'}, b"t"),
        (".blip", {"txt": b"t", "blip": b"b"}, b"b"),
        ("blip", {"txt": b"t", "json": b'{"caption": "j"}'}, None),
    ],
)
def test_a_caption_is_found_by_extension_or_sidecar_field(tmp_path, caption_key, members, expected):
    shard = write_tar(tmp_path / "a.tar", {"x.png": png(), **{f"x.{k}": v for k, v in members.items()}})
    (sample,) = read_samples(shard, ReadOptions(caption_key=caption_key))
    assert sample.caption == expected
    assert sample.meta == members.get("json", b"{}")


def test_an_image_is_found_by_extension(tmp_path):
    shard = write_tar(tmp_path / "a.tar", {"x.jpg": b"1", "x.mask.png": b"2", "x.webp": b"3", "y.jpg": b"4"})
    assert [s.image for s in read_samples(shard)] == [b"1", b"4"]
    assert [s.image for s in read_samples(shard, ReadOptions(image_key="mask.png;jpg"))] == [b"2", b"4"]
    assert [s.image for s in read_samples(shard, ReadOptions(image_key="webp"))] == [b"3", None]


def test_repeated_keys_are_rejected(tmp_path):
    members = [("a.png", b"1"), ("a.txt", b"one"), ("a.png", b"2"), ("a.txt", b"two"), ("b.png", b"3"), ("a.txt", b"4")]
    first, again, b, late = read_samples(write_tar(tmp_path / "a.tar", members))
    assert (first.key, first.image, first.caption) == ("a", b"1", b"one")
    assert (b.key, b.image) == ("b", b"3")
    for sample in (again, late):
        assert (sample.key, sample.reason) == ("a", RejectReason.DUPLICATE_KEY)


@pytest.mark.parametrize(
    "key", ["/etc/x", "../x", "a/../../x", "C:/x", "C:\\x", "\\\\host\\x", "a\nb", "a\x85", "a\udcff"]
)
def test_unsafe_keys_are_rejected_and_reported_in_printable_form(tmp_path, key):
    shard = write_tar(
        tmp_path / "a.tar", {f"{key}.png": png(), f"{key}.txt": b"t", "good.png": png(), "good.txt": b"t"}
    )
    unsafe, good = read_samples(shard)
    assert isinstance(unsafe, Unreadable)
    assert unsafe.reason == RejectReason.UNSAFE_NAME
    assert unsafe.key.encode().decode().isprintable()
    assert good.key == "good"


def test_keys_with_dots_spaces_and_unicode_are_safe(tmp_path):
    keys = ["a/b", "a..x/y", "ünï", "日本", "a\u200bb", "a b"]
    table = pa.table({"key": keys, "image": [png()] * len(keys), "caption": ["c"] * len(keys)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [sample.key for sample in read_samples(str(tmp_path / "a.parquet"))] == keys


def test_a_truncated_tar_yields_its_whole_samples_and_an_unreadable_rest(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, {f"{i}.{e}": b"x" * 700 for i in range(9) for e in ("txt", "png")})
    path.write_bytes(path.read_bytes()[:9000])
    *samples, last = read_samples(str(path))
    assert len(samples) >= 1
    assert all(isinstance(sample, Sample) for sample in samples)
    assert isinstance(last, Unreadable)
    assert last.detail


@pytest.mark.parametrize("is_gzip", [False, True])
def test_a_tar_cut_at_any_byte_never_yields_half_a_sample(tmp_path, is_gzip):
    rng = np.random.default_rng(0)
    members = {f"{i}.{e}": rng.bytes(700) for i in range(4) for e in ("png", "txt", "json")}
    data = read_bytes(write_tar(tmp_path / "whole.tar", members))
    ends = 4 * 3 * (512 + 1024)
    assert not any(data[ends:])
    path = tmp_path / "a.tar"
    data = gzip.compress(data, mtime=0) if is_gzip else data[: ends + 512]
    for length in range(0, len(data), 256):
        path.write_bytes(data[:length])
        *samples, last = read_samples(str(path))
        assert (last.key, last.reason) == ("", RejectReason.UNREADABLE_SHARD), length
        assert len(samples) in ({length // 4608, length // 4608 - 1} if not is_gzip else range(5))
        for sample in samples:
            expected = (members[f"{sample.key}.png"], members[f"{sample.key}.txt"], members[f"{sample.key}.json"])
            assert (sample.image, sample.caption, sample.meta) == expected
        if len(samples) < 4 and "may be incomplete" in last.detail:
            assert repr(str(len(samples))) in last.detail
    path.write_bytes(data)
    assert [sample.key for sample in read_samples(str(path))] == ["0", "1", "2", "3"]


def test_a_damaged_header_is_not_taken_for_the_end_of_a_tar(tmp_path):
    path = tmp_path / "a.tar"
    data = bytearray(read_bytes(write_tar(path, {f"{i}.{e}": b"x" * 700 for i in range(3) for e in ("png", "txt")})))
    data[2 * 1536 + 100] ^= 1
    path.write_bytes(data)
    (rest,) = read_samples(str(path))
    assert "damaged at byte 3,072" in rest.detail
    assert "'0'" in rest.detail


@pytest.mark.parametrize("content", [b"", b"not a tar at all" * 100])
def test_a_file_that_is_not_a_tar_is_one_unreadable_shard(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    (rest,) = read_samples(str(path))
    assert (rest.key, rest.shard, rest.reason) == ("", str(path), RejectReason.UNREADABLE_SHARD)
    assert count_samples(str(path)) is None


# --- sidecar files of a tar --------------------------------------------------------------------------------------


def test_the_parquet_of_a_tar_serves_samples_without_caption_and_sidecar(tmp_path):
    members = {"000.jpg": b"0", "001.jpg": b"1", "001.txt": b"its own", "002.jpg": b"2"}
    shard = write_tar(tmp_path / "00000.tar", members)
    rows = {"key": ["000", "001", "009"], "caption": ["zero", "one", "nine"], "raw": [b"", b"", b""]}
    pq.write_table(
        pa.table({**rows, "status": ["success", "success", "failed_to_download"]}), tmp_path / "00000.parquet"
    )
    zero, one, two = read_samples(shard)
    assert (zero.caption, json.loads(zero.meta)) == (b"zero", {"key": "000", "caption": "zero", "status": "success"})
    assert (one.caption, one.meta) == (b"its own", b"{}")
    assert (two.caption, two.meta) == (None, b"{}")
    assert count_samples(shard) == 2


def test_samples_are_counted_by_the_sidecar_files_of_a_tar(tmp_path):
    shard = write_tar(tmp_path / "00000.tar", {"000.jpg": b"0"})
    stats = tmp_path / "00000_stats.json"
    assert count_samples(shard) is None
    pq.write_table(pa.table({"key": ["0", "1", "2"]}), tmp_path / "00000.parquet")
    assert count_samples(shard) == 3
    stats.write_text('{"count": 10}')
    assert count_samples(shard) == 10
    stats.write_text('{"count": 10, "successes": 7}')
    assert count_samples(shard) == 7
    stats.write_text("{")
    assert count_samples(shard) is None


# --- parquets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_images_as_structs_and_as_bytes(tmp_path, struct):
    images = [png(), png((0, 255, 0))]
    image = [{"bytes": data, "path": None} for data in images] if struct else images
    table = pa.table({"image": image, "caption": ["one", None], "label": [7, 8]})
    pq.write_table(table, tmp_path / "train-00000.parquet")
    one, two = read_samples(str(tmp_path / "train-00000.parquet"))
    assert (one.key, one.image, one.caption) == ("train-00000/00000000", images[0], b"one")
    assert json.loads(one.meta) == {"label": 7}
    assert (two.key, two.caption) == ("train-00000/00000001", None)
    assert count_samples(str(tmp_path / "train-00000.parquet")) == 2


def test_a_parquet_without_captions_names_its_columns(tmp_path):
    pq.write_table(pa.table({"image": [b""], "label": np.arange(1)}), tmp_path / "a.parquet")
    (rest,) = read_samples(str(tmp_path / "a.parquet"))
    assert isinstance(rest, Unreadable)
    assert "image, label" in rest.detail


def test_parquet_columns_are_found_by_their_usual_or_given_names(tmp_path):
    table = pa.table(
        {"a": [b"1"], "b": [{"bytes": b"2", "path": "b.png"}], "Text": ["usual"], "alt": ["other"], "n": [1]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    shard = str(tmp_path / "a.parquet")
    (usual,) = read_samples(shard)
    assert (usual.image, usual.caption, json.loads(usual.meta)) == (None, b"usual", {"alt": "other", "n": 1})
    (named,) = read_samples(shard, ReadOptions(image_key="jpg;b", caption_key="alt"))
    assert (named.image, named.caption, json.loads(named.meta)) == (b"2", b"other", {"Text": "usual", "n": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ReadOptions(image_key="photo"), r"--image-key 'photo' is not a column: .* image, caption, label"),
        (
            ReadOptions(caption_key="alt;title"),
            r"--caption-key 'alt;title' is not a column: .* image, caption, label",
        ),
        (
            ReadOptions(caption_key="label"),
            r"--caption-key 'label' is a column of int64, not of text: .* image, caption",
        ),
        (
            ReadOptions(image_key="caption"),
            r"--image-key 'caption' is a column of string, not of image bytes: .* image",
        ),
    ],
)
def test_a_given_column_that_does_not_fit_is_an_error(tmp_path, options, message):
    pq.write_table(pa.table({"image": [png()], "caption": ["c"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=message):
        list(read_samples(str(tmp_path / "a.parquet"), options))


def test_parquet_captions_of_every_arrow_type(tmp_path):
    latin1 = pa.array([b"caf\xe9", b"good"]).cast(pa.binary()).view(pa.string())
    columns = {
        "list": pa.array([["first", "second"], []]),
        "dictionary": pa.array(["x", None]).dictionary_encode(),
        "large": pa.array(["x", ""], pa.large_string()),
        "binary": pa.array([b"x", b"y"]),
        "not_utf8": latin1,
        "list_not_utf8": pa.array([[b"caf\xe9"], [b"good"]]).cast(pa.list_(pa.binary())).view(pa.list_(pa.string())),
        "fixed_list": pa.array([["a", "b"], ["c", "d"]], pa.list_(pa.string(), 2)),
    }
    captions_by_type = {}
    for name, captions in columns.items():
        pq.write_table(pa.table({"image": [png(), png()], "caption": captions}), tmp_path / f"{name}.parquet")
        captions_by_type[name] = [sample.caption for sample in read_samples(str(tmp_path / f"{name}.parquet"))]
    assert captions_by_type == {
        "list": [b"first", None],
        "dictionary": [b"x", None],
        "large": [b"x", b""],
        "binary": [b"x", b"y"],
        "not_utf8": [b"caf\xe9", b"good"],
        "list_not_utf8": [b"caf\xe9", b"good"],
        "fixed_list": [b"a", b"c"],
    }


def test_a_path_without_bytes_is_a_missing_image(tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    image = [{"bytes": None, "path": str(tmp_path / "secret.png")}, None]
    pq.write_table(pa.table({"image": image, "caption": ["a", "b"]}), tmp_path / "a.parquet")
    assert [sample.image for sample in read_samples(str(tmp_path / "a.parquet"))] == [None, None]


def test_the_meta_of_a_parquet_row_is_json_without_bytes(tmp_path):
    rows = {"image": [png()], "caption": ["c"], "mask": [b"1"], "crops": [[{"bytes": b"1"}]], "score": [float("nan")]}
    pq.write_table(pa.table({**rows, "key": ["k"], "day": pa.array([0], pa.date32())}), tmp_path / "a.parquet")
    (sample,) = read_samples(str(tmp_path / "a.parquet"))
    assert sample.key == "k"
    assert sample.meta == b'{"score": null, "key": "k", "day": "1970-01-01"}'


def test_keys_count_rows_through_all_row_groups(tmp_path):
    table = pa.table({"image": [png()] * 100, "caption": [f"c{i}" for i in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=33)
    keys = [sample.key for sample in read_samples(str(tmp_path / "a.parquet"))]
    assert keys == [f"a/{number:08d}" for number in range(100)]


def test_a_damaged_parquet_is_one_unreadable_shard(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png()], "caption": ["c"]}), path)
    path.write_bytes(path.read_bytes()[:-20])
    (rest,) = read_samples(str(path))
    assert (rest.key, rest.reason) == ("", RejectReason.UNREADABLE_SHARD)
    assert count_samples(str(path)) is None
