"""Reading folders of images, saved Hugging Face datasets and streamed ones, as other programs write them."""

import io
import json
import socket
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from index.errors import SourceError
from pipeline.rejects import RejectReason
from pipeline.sources.listing import list_shards
from pipeline.sources.read import count_samples, read_samples, shard_identity
from pipeline.sources.sample import ReadOptions, Sample, Unreadable


def png(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (number // 256, number % 256, 0)).save(data, "png")
    return data.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def read_all(source: str, options: ReadOptions = ReadOptions()) -> list[Sample]:  # noqa: B008
    samples = [sample for shard in list_shards([source], options) for sample in read_samples(shard, options)]
    assert all(isinstance(sample, Sample) for sample in samples), samples
    return samples


def rows(count: int, first: int = 0) -> datasets.Dataset:
    features = {"image": datasets.Image(), "caption": datasets.Value("string")}
    labels = datasets.ClassLabel(names=["even", "odd"])
    return datasets.Dataset.from_list(
        [
            {"image": {"bytes": png(n), "path": None}, "caption": f"caption {n}", "label": n % 2}
            for n in range(first, first + count)
        ],
        features=datasets.Features(**features, label=labels),
    )


@pytest.fixture
def no_network(monkeypatch):
    addresses = []

    def refuse(self, address):
        addresses.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: refuse(None, address))
    yield
    assert addresses == []


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Keep the lock files of `datasets` in a folder of the test, and hide its progress bars."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# --- folders -----------------------------------------------------------------------------------------------------


def test_captions_in_sidecar_files(tmp_path):
    files = {
        "b.png": png(1),
        "b.txt": b"second",
        "b.json": b'{"url":  "u"}',
        "a.JPG": png(2),
        "a.Caption": b"first",
        "deep/er/c.d.webp": png(3),
        "deep/er/c.d.json": b'{"caption": "third"}',
        "e.gif": png(4),
        ".hidden.png": png(5),
        ".git/f.png": png(6),
        "readme.md": b"",
    }
    folder = write(tmp_path / "x", files)
    assert list_shards([folder]) == [f"{folder}#0-4"]
    assert count_samples(f"{folder}#0-4") == 4
    a, b, c, e = read_all(folder)
    assert (a.key, a.image, a.caption, a.meta) == ("a.JPG", png(2), b"first", b"{}")
    assert (b.key, b.image, b.caption, b.meta) == ("b.png", png(1), b"second", b'{"url":  "u"}')
    assert (c.key, c.caption, c.meta) == ("deep/er/c.d.webp", b"third", b'{"caption": "third"}')
    assert (e.key, e.image, e.caption, e.meta) == ("e.gif", png(4), None, b"{}")
    assert {sample.shard for sample in (a, b, c, e)} == {f"{folder}#0-4"}


@pytest.mark.slow
def test_ranges_cover_a_large_folder_once(tmp_path):
    folder = write(tmp_path / "x", {f"{n:04d}.{e}": str(n).encode() for n in range(2100) for e in ("png", "txt")})
    shards = list_shards([folder])
    assert shards == [f"{folder}#0-1000", f"{folder}#1000-2000", f"{folder}#2000-2100"]
    assert [count_samples(shard) for shard in shards] == [1000, 1000, 100]
    assert [sample.caption for sample in read_all(folder)] == [str(n).encode() for n in range(2100)]


def test_a_folder_that_shrank_is_an_unreadable_shard(tmp_path):
    folder = write(tmp_path / "x", {f"{n}.png": png(n) for n in range(3)})
    (shard,) = list_shards([folder])
    (tmp_path / "x" / "0.png").unlink()
    assert list_shards([folder]) == [f"{folder}#0-2"]
    (rest,) = read_samples(shard)
    assert rest.reason == RejectReason.UNREADABLE_SHARD
    assert "has 2 samples and this shard needs 3: the source was changed" in rest.detail


def test_a_sidecar_that_vanished_is_one_unreadable_sample(tmp_path):
    folder = write(tmp_path / "x", {f"{n}.{e}": png(n) for n in range(3) for e in ("png", "txt")})
    (shard,) = list_shards([folder])
    (tmp_path / "x" / "1.txt").unlink()
    zero, one, two = read_samples(shard)
    assert isinstance(one, Unreadable)
    assert (one.key, one.reason) == ("1.png", RejectReason.UNREADABLE_SHARD)
    assert (zero.key, two.key) == ("0.png", "2.png")


@pytest.mark.parametrize("extension", ["csv", "jsonl", "parquet"])
def test_metadata_files_of_an_imagefolder(tmp_path, extension):
    folder = write(tmp_path / "x", {"train/0.png": png(0), "train/s/1.png": png(1), "test/0.png": png(2), "9.png": b""})
    for split, records in {
        "train": [("0.png", "zero", "null"), ("s/1.png", 'one, "quoted"\nline', "eins")],
        "test": [("./0.png", "other", "zwei")],
    }.items():
        table = [dict(zip(("file_name", "text", "alt"), record, strict=True)) for record in records]
        path = tmp_path / "x" / split / f"metadata.{extension}"
        if extension == "csv":
            datasets.Dataset.from_list(table).to_csv(path)
        elif extension == "jsonl":
            path.write_text("not json\n[]\n" + "".join(json.dumps(record) + "\n" for record in table))
        else:
            pq.write_table(pa.Table.from_pylist(table), path)
    lost, other, zero, one = read_all(folder)
    assert (lost.key, lost.caption, lost.meta) == ("9.png", None, b"{}")
    assert (other.key, other.caption) == ("test/0.png", b"other")
    assert (zero.key, zero.caption, zero.image) == ("train/0.png", b"zero", png(0))
    assert (one.key, one.caption) == ("train/s/1.png", b'one, "quoted"\nline')
    assert json.loads(zero.meta) == {"file_name": "0.png", "text": "zero", "alt": "null"}
    assert [s.caption for s in read_all(folder, ReadOptions(caption_key="alt"))] == [None, b"zwei", b"null", b"eins"]


def test_a_caption_file_comes_before_the_metadata_file(tmp_path):
    files = {"0.png": png(0), "0.txt": b"file", "metadata.csv": b"file_name,text\n0.png,row\n"}
    (sample,) = read_all(write(tmp_path, files))
    assert sample.caption == b"file"
    (sample,) = read_all(str(tmp_path), ReadOptions(caption_key="text"))
    assert sample.caption == b"row"


def test_bytes_that_are_not_utf8_in_a_csv_affect_one_caption(tmp_path):
    files = {
        "0.png": png(0),
        "1.png": png(1),
        "metadata.csv": b"\xef\xbb\xbffile_name,text\n0.png,caf\xe9\n1.png,tea\n",
    }
    latin1, good = read_all(write(tmp_path, files))
    assert good.caption == b"tea"
    with pytest.raises(UnicodeDecodeError):
        latin1.caption.decode()


def test_an_unreadable_metadata_file_is_an_error(tmp_path):
    with pytest.raises(SourceError, match=r"metadata\.parquet cannot be read \(.*\): fix or remove"):
        list_shards([write(tmp_path, {"0.png": png(0), "metadata.parquet": b"PAR1"})])


def test_a_folder_written_by_img2dataset(tmp_path):
    files = {}
    for n in range(2):
        files |= {
            f"00000/{n:09d}.jpg": png(n),
            f"00000/{n:09d}.txt": f"c{n}".encode(),
            f"00000/{n:09d}.json": b'{"n":1}',
        }
    folder = write(tmp_path, {**files, "00000_stats.json": b'{"count": 2}'})
    pq.write_table(pa.table({"key": ["000000000", "000000001"], "caption": ["c0", "c1"]}), tmp_path / "00000.parquet")
    assert list_shards([folder]) == [f"{folder}#0-2"]
    zero, one = read_all(folder)
    assert (zero.key, zero.image, zero.caption, zero.meta) == ("00000/000000000.jpg", png(0), b"c0", b'{"n":1}')
    assert one.caption == b"c1"


def test_a_folder_on_another_fsspec_file_system():
    import fsspec

    files = fsspec.filesystem("memory")
    for name, data in {"a[1].png": png(1), "a[1].txt": b"one", "sub/b.png": png(2), "sub/b.txt": b"two"}.items():
        files.pipe_file(f"/images/{name}", data)
    assert list_shards(["memory://images"]) == ["memory:///images#0-2"]
    assert [(s.key, s.caption) for s in read_all("memory://images")] == [("a[1].png", b"one"), ("sub/b.png", b"two")]


# --- saved datasets ----------------------------------------------------------------------------------------------


def test_a_saved_dataset(tmp_path):
    rows(1100).save_to_disk(tmp_path / "saved", num_shards=3)
    shards = list_shards([str(tmp_path / "saved")])
    assert shards == [f"{tmp_path}/saved#0-1000", f"{tmp_path}/saved#1000-1100"]
    assert [count_samples(shard) for shard in shards] == [1000, 100]
    samples = read_all(str(tmp_path / "saved"))
    assert [s.key for s in samples] == [f"saved/{n:08d}" for n in range(1100)]
    assert [s.image for s in samples] == [png(n) for n in range(1100)]
    assert [s.caption for s in samples] == [f"caption {n}".encode() for n in range(1100)]
    assert samples[3].meta == b'{"label": 1}'


def test_all_splits_of_a_saved_dataset(tmp_path):
    datasets.DatasetDict(train=rows(3), test=rows(2, 3)).save_to_disk(tmp_path / "saved#1")
    folder = str(tmp_path / "saved#1")
    assert list_shards([folder]) == [f"{folder}/train#0-3", f"{folder}/test#0-2"]
    assert [s.key for s in read_all(folder)] == [
        *(f"train/{n:08d}" for n in range(3)),
        "test/00000000",
        "test/00000001",
    ]
    assert [s.caption for s in read_all(f"{folder}/test")] == [b"caption 3", b"caption 4"]


def test_a_saved_dataset_on_another_file_system_with_a_given_column():
    rows(3).rename_column("caption", "alt").save_to_disk("memory://saved/here")
    (shard,) = list_shards(["memory://saved/here"])
    assert shard == "memory:///saved/here#0-3"
    assert [s.caption for s in read_samples(shard, ReadOptions(caption_key="alt"))] == [
        f"caption {n}".encode() for n in range(3)
    ]
    (rest,) = read_samples(shard)
    assert "no caption column among image, alt, label" in rest.detail
    with pytest.raises(SourceError, match="'title' is not a column: choose one of image, alt, label"):
        list(read_samples(shard, ReadOptions(caption_key="title")))


def test_a_damaged_saved_dataset_is_an_error_when_listed(tmp_path):
    rows(3).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(SourceError, match=r"cannot be loaded by datasets\.load_from_disk"):
        list_shards([str(tmp_path / "saved")])


# --- streamed datasets -------------------------------------------------------------------------------------------


@pytest.fixture
def parquets(tmp_path) -> str:
    """A folder laid out as on the hub: two files of the train split, one of the test split."""
    for number in range(2):
        rows(40, 40 * number).to_parquet(tmp_path / "data" / "data" / f"train-{number:05d}-of-00002.parquet")
    rows(5, 80).to_parquet(tmp_path / "data" / "data" / "test-00000-of-00001.parquet")
    return str(tmp_path / "data")


def test_a_streamed_folder_of_parquets(parquets, no_network):
    shards = list_shards([f"hf:{parquets}"])
    assert shards == [f"hf:{parquets}?split=train&shard={n}/2" for n in range(2)]
    assert [count_samples(shard) for shard in shards] == [None, None]
    samples = read_all(f"hf:{parquets}")
    assert [s.caption for s in samples] == [f"caption {n}".encode() for n in range(80)]
    assert [s.image for s in samples] == [png(n) for n in range(80)]
    assert [s.key for s in samples[39:41]] == ["train-00000-of-00002/00000039", "train-00001-of-00002/00000000"]
    assert samples[3].meta == b'{"label": 1}'
    (shard,) = list_shards([f"hf:{parquets}?split=test"])
    assert [s.caption for s in read_samples(shard)] == [f"caption {n}".encode() for n in range(80, 85)]


def test_a_streamed_imagefolder(tmp_path, no_network):
    folder = write(tmp_path / "my images", {f"train/{n}.png": png(n) for n in range(3)})
    records = [{"file_name": f"{n}.png", "text": f"caption {n}"} for n in range(3)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write(tmp_path / "my images", {"train/metadata.jsonl": lines.encode()})
    samples = read_all(f"hf:{folder}")
    assert [s.image for s in samples] == [png(n) for n in range(3)]
    assert [s.caption for s in samples] == [b"caption 0", b"caption 1", b"caption 2"]


@pytest.mark.parametrize("count", [3, 100])
def test_a_streamed_webdataset_is_read_whole(tmp_path, no_network, write_tar, count):
    for name, first in (("train-0.tar", 0), ("train-1.tar", count)):
        keys = range(first, first + count)
        write_tar(tmp_path / name, [(f"{n:04}.{e}", d) for n in keys for e, d in (("png", png(n)), ("txt", b"%d" % n))])
    samples = read_all(f"hf:{tmp_path}")
    assert [(s.image, s.caption) for s in samples] == [(png(n), b"%d" % n) for n in range(2 * count)]
    one, two = list_shards([f"hf:{tmp_path}"])
    assert shard_identity(one) == shard_identity(one) != shard_identity(two)


def test_a_relative_folder_is_listed_by_its_absolute_path(parquets, monkeypatch, no_network):
    monkeypatch.chdir(Path(parquets).parent)
    assert list_shards(["hf:./data"]) == list_shards([f"hf:{parquets}"])


def test_a_streamed_dataset_reads_only_its_own_files(tmp_path, no_network):
    inside, outside = tmp_path / "data" / "in.png", tmp_path / "out.png"
    write(tmp_path, {"data/in.png": png(1), "out.png": png(2)})
    image = [{"bytes": None, "path": str(path)} for path in (inside, outside, tmp_path / "data" / "gone.png")]
    table = datasets.Dataset.from_dict({"photo": image, "caption": ["a", "b", "c"]}).cast_column(
        "photo", datasets.Image()
    )
    pq.write_table(table.data.table, tmp_path / "data" / "a.parquet")
    (shard,) = list_shards([f"hf:{tmp_path}/data"])
    one, two, gone = read_samples(shard)
    assert (one.image, two.image) == (png(1), None)
    assert (gone.key, gone.reason) == ("train-00000-of-00001/00000002", RejectReason.UNREADABLE_SHARD)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:{}?split=dev", "no split 'dev': choose one of (test, train|train, test)"),
        ("hf:{}?name=other", "cannot be loaded by datasets.load_dataset: "),
        ("hf:{}?splits=train", "parameter splits is unknown"),
        ("hf:{}/nowhere", "cannot be loaded by datasets.load_dataset: "),
        ("hf:", "'hf:' is not a dataset URI"),
    ],
)
def test_an_invalid_dataset_uri_is_a_one_line_error(parquets, source, message, no_network):
    with pytest.raises(SourceError, match=message) as caught:
        list_shards([source.format(parquets)])
    assert "\n" not in str(caught.value)


def test_the_split_must_be_given_if_there_are_several_and_none_is_train(parquets, no_network):
    folder = Path(parquets) / "data"
    for path in folder.glob("train-0000*"):
        path.rename(folder / path.name.replace("train", "validation"))
    with pytest.raises(SourceError, match=r"has no split 'train': choose one of .*, as in 'hf:.*\?split="):
        list_shards([f"hf:{parquets}"])
    (folder / "test-00000-of-00001.parquet").unlink()
    assert list_shards([f"hf:{parquets}"]) == [f"hf:{parquets}?split=validation&shard={n}/2" for n in range(2)]
