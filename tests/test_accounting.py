"""Nothing is dropped without a word: every sample offered is read, rejected with a reason, or counted as missed."""

import gzip
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from index.errors import OptionError
from pipeline.rejects import Rejected, RejectReason
from pipeline.sources.listing import list_shards, passed_over
from pipeline.sources.read import read_samples, shard_identity
from pipeline.sources.sample import ReadOptions, Sample, Unreadable, decode_caption, decode_meta

BOM = b"\xef\xbb\xbf"


def encoded(number: int = 0, file_format: str = "png") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(data, file_format)
    return data.getvalue()


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def members_of(keys) -> list[tuple[str, bytes]]:
    return [(f"{key}.{e}", data) for key in keys for e, data in (("png", encoded(1)), ("txt", f"c{key}".encode()))]


def read(path, **options) -> list[Sample | Unreadable]:
    return list(read_samples(str(path), ReadOptions(**options)))


def outcomes(samples) -> list[tuple[str, str]]:
    """The key of each sample and what becomes of it: row, or the reason of its reject."""
    found = []
    for sample in samples:
        try:
            if isinstance(sample, Unreadable):
                raise Rejected(sample.reason, sample.detail)
            decode_caption(sample.caption)
            decode_meta(sample.meta)
            if sample.image is None:
                raise Rejected(RejectReason.MISSING_IMAGE, "")
            found.append((sample.key, "row"))
        except Rejected as rejected:
            found.append((sample.key, str(rejected.reason)))
    return found


# --- tars --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["tar", "gzip"])
def test_concatenated_archives_are_read_on(tmp_path, compress):
    one, two = tar_bytes(members_of("abcde")), tar_bytes(members_of("fghij"))
    (tmp_path / "a.tar").write_bytes(compress(one) + compress(two))
    assert [sample.key for sample in read(tmp_path / "a.tar")] == list("abcdefghij")


def test_what_follows_an_archive_and_is_no_archive_is_one_reject(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes(members_of("ab")) + b"garbage" * 200)
    *samples, rest = read(tmp_path / "a.tar")
    assert outcomes(samples) == [("a", "row"), ("b", "row")]
    assert (rest.key, rest.reason, rest.count) == ("", RejectReason.UNREADABLE_SHARD, None)
    assert "how many samples are missed is unknown" in rest.detail


@pytest.mark.parametrize("extension", ["tar", "tar.gz"])
def test_an_unsorted_tar_gives_one_reject_per_sample_that_says_what_to_do(tmp_path, extension):
    members = [(f"{n}.png", encoded(n)) for n in range(5)] + [(f"{n}.txt", b"c") for n in range(5)]
    data = tar_bytes([*members, *members_of("x")])
    (tmp_path / f"a.{extension}").write_bytes(gzip.compress(data) if extension == "tar.gz" else data)
    samples = read(tmp_path / f"a.{extension}")
    assert outcomes(samples) == [*((str(n), "not_grouped") for n in range(5)), ("x", "row")]
    assert all("not grouped: sort the tar" in sample.detail for sample in samples[:5])


def test_metadata_far_from_its_sample_is_not_lost_without_a_word(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes([*members_of("ab"), ("a.json", b"{}")]))
    assert outcomes(read(tmp_path / "a.tar")) == [("a", "row"), ("b", "row"), ("a", "not_grouped")]


def write_special(path, compress: str, *specials: tarfile.TarInfo) -> str:
    """Write a tar of the sample `a` and of members without content, each with a caption of its own."""
    with tarfile.open(path, f"w:{compress}") as tar:
        for name, data in members_of("a"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for special in specials:
            tar.addfile(special)
            caption = tarfile.TarInfo(special.name.rpartition(".")[0] + ".txt")
            tar.addfile(caption)
    return str(path)


def special(name: str, kind: bytes, target: str = "", **pax) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, target, pax
    return info


@pytest.mark.parametrize("compress", ["", "gz"])
def test_hard_links_are_read_and_others_are_rejected(tmp_path, compress):
    links = [
        special("b.png", tarfile.LNKTYPE, "a.png"),
        special("c.png", tarfile.LNKTYPE, "./a.png"),
        special("d.png", tarfile.LNKTYPE, "gone.png"),
        special("e.png", tarfile.SYMTYPE, "a.png"),
    ]
    a, b, c, d, e = read(write_special(tmp_path / "a.tar", compress, *links))
    assert a.image == b.image == c.image == encoded(1)
    assert [d.reason, e.reason] == [RejectReason.UNSUPPORTED_MEMBER] * 2
    assert "'gone.png'" in d.detail
    assert "symbolic link" in e.detail


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_a_sparse_member_is_refused_and_takes_no_memory(tmp_path, kind):
    size = 300 * 2**20
    if kind == "gnu":
        header = bytearray(tarfile.TarInfo("s.png").tobuf(tarfile.GNU_FORMAT))
        header[156:157] = b"S"
        header[386:398], header[398:410] = b"%011o\0" % 0, b"%011o\0" % 0
        header[483:495] = b"%011o\0" % size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data = bytes(header) + tar_bytes([("s.txt", b"c"), *members_of("z")])
    else:
        pax = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(size), "GNU.sparse.map": "0,0"}
        write_special(tmp_path / "p.tar", "", special("s.png", tarfile.REGTYPE, **pax))
        data = (tmp_path / "p.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data)
    found = {sample.key: sample for sample in read(tmp_path / "a.tar")}
    assert found["s"].reason is RejectReason.UNSUPPORTED_MEMBER
    assert "sparse" in found["s"].detail
    assert len(found) == 2


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["tar", "gzip"])
def test_a_sample_above_the_cap_is_rejected_and_the_next_is_read(tmp_path, compress):
    members = [
        ("big.png", bytes(3 * 2**20)),
        ("big.txt", b"c"),
        ("two.png", bytes(600_000)),
        ("two.txt", bytes(600_000)),
    ]
    (tmp_path / "a.tar").write_bytes(compress(tar_bytes([*members, *members_of("z")])))
    samples = read(tmp_path / "a.tar", max_sample_bytes=2**20)
    assert outcomes(samples) == [("big", "sample_too_large"), ("two", "sample_too_large"), ("z", "row")]
    assert "3,145,728 bytes than --max-sample-mb 1 allows" in samples[0].detail


def test_a_header_that_states_an_absurd_length_is_refused(tmp_path):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2**33
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    (rest,) = read(tmp_path / "a.tar")
    assert "a header of 8,589,934,592 bytes" in rest.detail


def test_a_shard_that_cannot_be_read_counts_as_its_sidecar_says(tmp_path):
    for name in ("0", "1"):
        (tmp_path / f"{name}_stats.json").write_text('{"successes": 60}')
    (tmp_path / "0.tar").write_bytes(tar_bytes([]))
    (tmp_path / "1.tar").write_bytes(tar_bytes(members_of("ab"))[:-9000])
    pq.write_table(pa.table({"image": [b""] * 60}), tmp_path / "2.parquet")
    rests = [read(tmp_path / name)[-1] for name in ("0.tar", "1.tar", "2.parquet")]
    assert [rest.count for rest in rests] == [60, 60 - len(read(tmp_path / "1.tar")) + 1, 60]
    assert "the shard ends early; 60 samples are missed" in rests[0].detail


@pytest.mark.slow
def test_a_run_counts_lost_samples_and_stops_above_the_reject_rate(tmp_path, encode_shapes):
    from index.errors import SourceError

    for name in "abc":
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / f"{name}.tar").write_bytes(tar_bytes([]))
        (tmp_path / "source" / f"{name}_stats.json").write_text('{"count": 60, "successes": 60}')
    good = [(f"{n}.{e}", d) for n in range(60) for e, d in (("png", encoded(n)), ("txt", b"c"))]
    (tmp_path / "source" / "d.tar").write_bytes(tar_bytes(good))
    example = f"for example the end of {tmp_path}/source/a.tar: unreadable_shard, the shard ends early; 60 samples are "
    message = (
        rf"^180 of 240 samples were rejected \(unreadable_shard 180; {example}missed\), above --max-reject-rate 0.1: "
    )
    with pytest.raises(SourceError, match=message):
        encode_shapes(tmp_path / "source", tmp_path / "t.lance", max_reject_rate=0.1)


# --- folders -----------------------------------------------------------------------------------------------------


def write(folder, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def read_all(source: str, **options) -> list[Sample | Unreadable]:
    given = ReadOptions(**options)
    return [sample for shard in list_shards([source], given) for sample in read_samples(shard, given)]


IMAGE_FILES = [
    *("a.png", "b.jpe", "c.ppm", "d.jp2", "e.ico", "f.apng", "g.tga"),
    *("h.HEIC", "i.jxl", "j.svg", "k.j2k", "l.pgm", "m.mpo", "n.qoi"),
]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_with_any_extension_are_samples(tmp_path, kind):
    files = {}
    for name in IMAGE_FILES:
        files |= {name: encoded(), f"{name[0]}.txt": b"c"}
    if kind == "folder":
        samples = read_all(write(tmp_path / "x", files))
    else:
        (tmp_path / "a.tar").write_bytes(tar_bytes(list(files.items())))
        samples = read(tmp_path / "a.tar")
    assert [outcome for _, outcome in outcomes(samples)] == ["row"] * 9 + ["unsupported_format"] + ["row"] * 4


def test_an_image_that_is_not_opened_is_no_sample_beside_one_that_is(tmp_path):
    folder = write(tmp_path, {"a.png": encoded(), "a.svg": b"<svg/>", "b.svg": b"<svg/>"})
    assert outcomes(read_all(folder)) == [("a.png", "missing_caption"), ("b.svg", "unsupported_format")]


def test_a_semicolon_separated_metadata_file(tmp_path):
    folder = write(tmp_path, {"0.png": encoded(), "metadata.csv": BOM + b"file_name;text\n0.png;a, b\n"})
    assert [sample.caption for sample in read_all(folder)] == [b"a, b"]


def test_a_long_caption_in_a_metadata_file(tmp_path):
    folder = write(tmp_path, {"0.png": encoded(), "metadata.csv": b"file_name,text\n0.png," + b"x" * 160_000 + b"\n"})
    assert [len(sample.caption) for sample in read_all(folder)] == [160_000]


def test_a_row_whose_image_is_missing_is_a_reject_that_names_the_file(tmp_path):
    folder = write(
        tmp_path, {"b.png": encoded(), "metadata.csv": b"file_name,text\na.png,one\nb.png,two\nc.png,three\n"}
    )
    samples = read_all(folder)
    assert outcomes(samples) == [("a.png", "missing_image"), ("b.png", "row"), ("c.png", "missing_image")]
    assert "metadata.csv" in samples[0].detail


def test_a_row_with_more_fields_than_the_header_is_a_reject(tmp_path):
    text = b"file_name,text\n0.png,a red, round ball\n1.png,fine\n"
    samples = read_all(write(tmp_path, {"0.png": encoded(), "1.png": encoded(), "metadata.csv": text}))
    assert outcomes(samples) == [("0.png", "unreadable_metadata"), ("1.png", "row")]
    assert "line 2 of metadata.csv has more fields than its header" in samples[0].detail


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", b"image|caption\n0.png|one\n", "metadata.csv has no column 'file_name', only image|caption"),
        ("metadata.jsonl", b"not json\n", "metadata.jsonl has 1 lines that are not JSON objects"),
        ("metadata.jsonl", b'{"text": "one"}\n', "metadata.jsonl has 1 rows without 'file_name'"),
    ],
)
def test_a_missing_caption_names_the_metadata_file_that_could_not_be_used(tmp_path, name, text, message):
    (sample,) = read_all(write(tmp_path, {"0.png": encoded(), name: text}))
    with pytest.raises(Rejected, match="missing_caption") as caught:
        decode_caption(sample.caption, sample.note)
    assert message in caught.value.detail


def test_files_that_are_passed_over_are_counted_by_extension(tmp_path):
    files = {"0.png": encoded(), "0.txt": b"c", "1.jpg": encoded(), "b.zip": b"", "deep/c.ZIP": b"", "d.mp4": b""}
    folder = write(tmp_path / "x", files | {".hidden.png": b"", "LICENSE": b"", "e.tar.bz2": b"", "lone.txt": b""})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "x" / "linked").symlink_to(tmp_path / "elsewhere")
    expected = {".zip": 2, ".mp4": 1, "hidden": 1, "no extension": 1, ".bz2": 1, ".txt": 1, "link": 1}
    assert passed_over([folder]) == expected
    shards = write(
        tmp_path / "y", {"0.tar": b"", "0.parquet": b"", "0_stats.json": b"", "x.png": b"", "deep/1.tar": b""}
    )
    assert passed_over([shards]) == {".tar": 1, ".png": 1}
    assert passed_over([f"{shards}/0.tar"]) == {}


def test_the_report_and_the_dry_run_list_what_is_passed_over(tmp_path, image_encoder, text_encoder):
    from pipeline.config import RuntimeConfig
    from pipeline.encode.plan import plan_encode
    from pipeline.encode.run import encode_dataset

    files = {f"{n}.{e}": d for n in range(8) for e, d in (("png", encoded(n)), ("json", b'{"text": ["a", "b", "c"]}'))}
    folder = write(tmp_path / "x", files | {"movie.mp4": b""})
    runtime = RuntimeConfig(device="cpu", batch_size=4)
    options = {"image_encoder": image_encoder, "text_encoder": text_encoder, "image_size": 32, "val_fraction": 0.0}
    config = plan_encode([folder], options, runtime)
    plan = encode_dataset(config, runtime, str(tmp_path / "t.lance"), dry_run=True, sources=[folder])
    assert plan.report["passed_over"] == {".mp4": 1}
    report = encode_dataset(config, runtime, str(tmp_path / "t.lance"), sources=[folder]).report
    assert report["passed_over"] == {".mp4": 1}
    assert (report["rows"], report["unused_captions"], report["uncounted_shards"]) == (8, 16, 0)


# --- captions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["NaN", "true", "false", "7", "1.5", '{"en": "a"}', '[{"raw": "a"}]', "[1]", "Infinity"]
)
@pytest.mark.parametrize("kind", ["tar", "jsonl"])
def test_a_caption_that_is_not_text_is_rejected(tmp_path, value, kind):
    if kind == "tar":
        record = f'{{"caption": {value}}}'.encode()
        (tmp_path / "a.tar").write_bytes(tar_bytes([("x.png", encoded()), ("x.json", record)]))
        (sample,) = read(tmp_path / "a.tar")
    else:
        line = f'{{"file_name": "x.png", "caption": {value}}}\n'.encode()
        (sample,) = read_all(write(tmp_path, {"x.png": encoded(), "metadata.jsonl": line}))
    assert sample.reason is RejectReason.CAPTION_NOT_TEXT
    assert "not text" in sample.detail


def test_byte_order_marks_are_dropped(tmp_path):
    record = BOM + b'{"caption": "two"}'
    members = [("a.png", encoded()), ("a.txt", BOM + b"one"), ("b.png", encoded()), ("b.json", record)]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    a, b = read(tmp_path / "a.tar")
    assert (decode_caption(a.caption), decode_caption(b.caption)) == ("one", "two")
    assert json.loads(b.meta) == {"caption": "two"}
    lines = BOM + b'{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": "two"}\n'
    samples = read_all(write(tmp_path / "x", {"a.png": encoded(), "b.png": encoded(), "metadata.jsonl": lines}))
    assert [sample.caption for sample in samples] == [b"one", b"two"]
    assert json.loads(samples[0].meta) == {"file_name": "a.png", "text": "one"}


def write_captions(tmp_path, kind: str) -> str:
    """Write one image with three captions and one with one."""
    if kind == "parquet":
        pq.write_table(pa.table({"image": [b"1", b"2"], "captions": [["a", "b", "c"], ["d"]]}), tmp_path / "x.parquet")
        return str(tmp_path / "x.parquet")
    if kind == "tar":
        records = [("0.png", b"1"), ("0.json", b'{"caption": ["a", "b", "c"]}'), ("1.png", b"2"), ("1.txt", b"d")]
        (tmp_path / "x.tar").write_bytes(tar_bytes(records))
        return str(tmp_path / "x.tar")
    rows = "file_name,text\n0.png,a\n0.png,b\n1.png,d\n0.png,c\n"
    return write(tmp_path / "x", {"0.png": b"1", "1.png": b"2", "metadata.csv": rows.encode()})


@pytest.mark.parametrize("kind", ["parquet", "tar", "csv"])
def test_all_captions_of_an_image_or_the_first_and_the_number_of_others(tmp_path, kind):
    source = write_captions(tmp_path, kind)
    first = read_all(source)
    assert [(sample.caption, sample.unused_captions) for sample in first] == [(b"a", 2), (b"d", 0)]
    key, other = (sample.key for sample in first)
    samples = read_all(source, captions="all")
    assert [sample.caption for sample in samples] == [b"a", b"b", b"c", b"d"]
    assert [sample.key for sample in samples] == [key, f"{key}#1", f"{key}#2", other]
    assert [sample.image for sample in samples] == [b"1", b"1", b"1", b"2"]


def test_options_that_are_not_allowed():
    with pytest.raises(OptionError, match="--captions 'some' is unknown: choose one of first, all"):
        ReadOptions(captions="some")
    with pytest.raises(OptionError, match="--max-sample-mb 0 is out of range"):
        ReadOptions(max_sample_bytes=0)


# --- identity ----------------------------------------------------------------------------------------------------


def test_a_shard_is_known_by_what_it_holds_and_not_by_its_folder(tmp_path):
    import shutil

    write(tmp_path / "a", {"0.tar": tar_bytes(members_of("ab"))})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = shard_identity(str(tmp_path / "a" / "0.tar"))
    assert first == shard_identity(str(tmp_path / "b" / "0.tar"))
    (tmp_path / "b" / "0.tar").write_bytes(tar_bytes(members_of("ax")))
    assert first != shard_identity(str(tmp_path / "b" / "0.tar"))


@pytest.mark.slow
def test_the_identity_of_a_range_is_that_of_its_files(tmp_path):
    folder = write(tmp_path / "a", {f"{n:04}.{e}": b"x" for n in range(1100) for e in ("png", "txt")})
    one, two = list_shards([folder])
    before = shard_identity(one), shard_identity(two)
    write(tmp_path / "a", {"1050.txt": b"another caption", "1100.png": b"y"})
    new_one, new_two = list_shards([folder])
    assert (one, two) != (new_one, new_two)
    assert shard_identity(new_one) == before[0]
    assert shard_identity(new_two) != before[1]


def test_the_identity_of_saved_and_of_streamed_datasets(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"image": [b"1", b"2"], "caption": ["a", "b"]})
    rows.save_to_disk(tmp_path / "saved")
    (shard,) = list_shards([str(tmp_path / "saved")])
    assert shard_identity(shard) == shard_identity(shard)
    rows.to_parquet(tmp_path / "data" / "train-0.parquet")
    rows.to_parquet(tmp_path / "data" / "train-1.parquet")
    one, two = list_shards([f"hf:{tmp_path}/data"])
    before = shard_identity(one), shard_identity(two)
    datasets.Dataset.from_dict({"image": [b"1"], "caption": ["other"]}).to_parquet(
        tmp_path / "data" / "train-1.parquet"
    )
    one, two = list_shards([f"hf:{tmp_path}/data"])
    assert shard_identity(one) == before[0]
    assert shard_identity(two) != before[1]
