"""Folders of pictures and Hugging Face datasets, written by their own writers, and the real data that lies here."""

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
from pipeline.sources import ranges as piece
from pipeline.sources.listing import list_shards
from pipeline.sources.read import count_samples, read_samples
from pipeline.sources.sample import ReadOptions, Sample, Unreadable

REAL = Path(__file__).parents[2] / "shared" / "data"


def png(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(data, "png")
    return data.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def read_all(source: str, reading: ReadOptions = ReadOptions()) -> list[Sample]:  # noqa: B008
    samples = [sample for shard in list_shards([source], reading) for sample in read_samples(shard, reading)]
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
    asked = []

    def refuse(self, address):
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: refuse(None, address))
    yield
    assert asked == []


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Lock files of `datasets` go to a folder of the test; its bars stay away."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# --- folders -----------------------------------------------------------------------------------------------------


def test_captions_beside_pictures(tmp_path):
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


def test_pieces_cover_a_folder_once(tmp_path, monkeypatch):
    monkeypatch.setattr(piece, "SIZE", 40)
    folder = write(tmp_path / "x", {f"{n:03d}.{e}": str(n).encode() for n in range(100) for e in ("png", "txt")})
    shards = list_shards([folder])
    assert shards == [f"{folder}#0-40", f"{folder}#40-80", f"{folder}#80-100"]
    assert [count_samples(shard) for shard in shards] == [40, 40, 20]
    assert [sample.caption for sample in read_all(folder)] == [str(n).encode() for n in range(100)]


def test_a_folder_that_shrank_is_told(tmp_path):
    folder = write(tmp_path / "x", {f"{n}.png": png(n) for n in range(3)})
    (shard,) = list_shards([folder])
    (tmp_path / "x" / "0.png").unlink()
    assert list_shards([folder]) == [f"{folder}#0-2"]
    (broken,) = read_samples(shard)
    assert (broken.reason, "was changed" in broken.detail) == (RejectReason.UNREADABLE_SHARD, True)


def test_a_picture_that_vanished_is_one_broken_sample(tmp_path):
    folder = write(tmp_path / "x", {f"{n}.{e}": png(n) for n in range(3) for e in ("png", "txt")})
    (shard,) = list_shards([folder])
    (tmp_path / "x" / "1.txt").unlink()
    zero, one, two = read_samples(shard)
    assert isinstance(one, Unreadable)
    assert (one.key, one.reason) == ("1.png", RejectReason.UNREADABLE_SHARD)
    assert (zero.key, two.key) == ("0.png", "2.png")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_files_of_an_imagefolder(tmp_path, kind):
    folder = write(tmp_path / "x", {"train/0.png": png(0), "train/s/1.png": png(1), "test/0.png": png(2), "9.png": b""})
    for split, records in {
        "train": [("0.png", "zero", "null"), ("s/1.png", 'one, "quoted"\nline', "eins")],
        "test": [("./0.png", "other", "zwei")],
    }.items():
        table = [dict(zip(("file_name", "text", "alt"), record, strict=True)) for record in records]
        path = tmp_path / "x" / split / f"metadata.{kind}"
        if kind == "csv":
            datasets.Dataset.from_list(table).to_csv(path)
        elif kind == "jsonl":
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


def test_a_caption_beside_a_picture_comes_before_the_metadata(tmp_path):
    files = {"0.png": png(0), "0.txt": b"beside", "metadata.csv": b"file_name,text\n0.png,row\n"}
    (sample,) = read_all(write(tmp_path, files))
    assert sample.caption == b"beside"
    (sample,) = read_all(str(tmp_path), ReadOptions(caption_key="text"))
    assert sample.caption == b"row"


def test_csv_that_is_not_utf8_spoils_its_own_rows_only(tmp_path):
    files = {
        "0.png": png(0),
        "1.png": png(1),
        "metadata.csv": b"\xef\xbb\xbffile_name,text\n0.png,caf\xe9\n1.png,tea\n",
    }
    bad, good = read_all(write(tmp_path, files))
    assert good.caption == b"tea"
    with pytest.raises(UnicodeDecodeError):
        bad.caption.decode()


def test_metadata_that_cannot_be_read_is_a_mistake(tmp_path):
    with pytest.raises(SourceError, match=r"metadata\.parquet cannot be read: "):
        list_shards([write(tmp_path, {"0.png": png(0), "metadata.parquet": b"PAR1"})])


def test_files_output_of_img2dataset(tmp_path):
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


def test_a_folder_at_another_file_system():
    import fsspec

    files = fsspec.filesystem("memory")
    for name, data in {"a[1].png": png(1), "a[1].txt": b"one", "sub/b.png": png(2), "sub/b.txt": b"two"}.items():
        files.pipe_file(f"/pictures/{name}", data)
    assert list_shards(["memory://pictures"]) == ["memory:///pictures#0-2"]
    assert [(s.key, s.caption) for s in read_all("memory://pictures")] == [("a[1].png", b"one"), ("sub/b.png", b"two")]


# --- saved datasets ----------------------------------------------------------------------------------------------


def test_a_saved_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(piece, "SIZE", 40)
    rows(100).save_to_disk(tmp_path / "saved", num_shards=3)
    shards = list_shards([str(tmp_path / "saved")])
    assert shards == [f"{tmp_path}/saved#{piece}" for piece in ("0-40", "40-80", "80-100")]
    assert [count_samples(shard) for shard in shards] == [40, 40, 20]
    samples = read_all(str(tmp_path / "saved"))
    assert [s.key for s in samples] == [f"saved/{n:08d}" for n in range(100)]
    assert [s.image for s in samples] == [png(n) for n in range(100)]
    assert [s.caption for s in samples] == [f"caption {n}".encode() for n in range(100)]
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


def test_a_saved_dataset_elsewhere_and_by_column():
    rows(3).rename_column("caption", "alt").save_to_disk("memory://saved/here")
    (shard,) = list_shards(["memory://saved/here"])
    assert shard == "memory:///saved/here#0-3"
    assert [s.caption for s in read_samples(shard, ReadOptions(caption_key="alt"))] == [
        f"caption {n}".encode() for n in range(3)
    ]
    (broken,) = read_samples(shard)
    assert "image, alt, label" in broken.detail
    with pytest.raises(SourceError, match="there are image, alt, label"):
        list(read_samples(shard, ReadOptions(caption_key="words")))


def test_a_damaged_saved_dataset_is_told_at_once(tmp_path):
    rows(3).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(SourceError, match="no dataset that can be loaded"):
        list_shards([str(tmp_path / "saved")])


# --- streamed datasets -------------------------------------------------------------------------------------------


@pytest.fixture
def parquets(tmp_path) -> str:
    """A folder as it lies on the hub: two files to train, one to test."""
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
    folder = write(tmp_path / "my pictures", {f"train/{n}.png": png(n) for n in range(3)})
    records = [{"file_name": f"{n}.png", "text": f"caption {n}"} for n in range(3)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write(tmp_path / "my pictures", {"train/metadata.jsonl": lines.encode()})
    samples = read_all(f"hf:{folder}")
    assert [s.image for s in samples] == [png(n) for n in range(3)]
    assert [s.caption for s in samples] == [b"caption 0", b"caption 1", b"caption 2"]


def test_a_relative_folder_is_the_same_from_everywhere(parquets, monkeypatch, no_network):
    monkeypatch.chdir(Path(parquets).parent)
    assert list_shards(["hf:./data"]) == list_shards([f"hf:{parquets}"])


def test_a_streamed_dataset_opens_only_its_own_files(tmp_path, no_network):
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
        ("hf:{}?split=dev", "no split 'dev': add .* one of test, train|no split 'dev': add .* one of train, test"),
        ("hf:{}?name=other", "cannot be loaded: "),
        ("hf:{}?splits=train", "splits is unknown"),
        ("hf:{}/nowhere", "cannot be loaded: "),
        ("hf:", "names no dataset"),
    ],
)
def test_mistakes_in_a_name_are_told_in_one_line(parquets, source, message, no_network):
    with pytest.raises(SourceError, match=message) as said:
        list_shards([source.format(parquets)])
    assert "\n" not in str(said.value)


def test_splits_are_asked_for_where_none_is_for_training(parquets, no_network):
    folder = Path(parquets) / "data"
    for path in folder.glob("train-0000*"):
        path.rename(folder / path.name.replace("train", "validation"))
    with pytest.raises(SourceError, match="add \\?split= and one of"):
        list_shards([f"hf:{parquets}"])
    (folder / "test-00000-of-00001.parquet").unlink()
    assert list_shards([f"hf:{parquets}"]) == [f"hf:{parquets}?split=validation&shard={n}/2" for n in range(2)]


def test_a_hub_name_is_pinned_to_its_commit(parquets, monkeypatch):
    asked = []

    class Hub:
        def dataset_info(self, name, revision=None):
            asked.append((name, revision))
            return type("Info", (), {"sha": "abc123"})

    def load(name, config, *, revision, streaming):
        asked.append((name, config, revision, streaming))
        return real(parquets, streaming=True)

    real = datasets.load_dataset
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(datasets, "load_dataset", load)
    first, second = list_shards(["hf:owner/data?revision=main&name=the config"])
    assert first == "hf:owner/data?name=the+config&split=train&revision=abc123&shard=0/2"
    assert asked == [("owner/data", "main"), ("owner/data", "the config", "abc123", True)]
    assert next(iter(read_samples(second))).caption == b"caption 40"
    assert asked[2:] == []


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch):
    class Hub:
        def dataset_info(self, name, revision=None):
            raise ConnectionError("no\nroute")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(SourceError, match="hf:owner/data cannot be found: ConnectionError: no route"):
        list_shards(["hf:owner/data"])


# --- real data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shards"), [("noto-emoji", 4), ("nlvr", 4), ("mnist", 7), ("coco-captions", 1)])
def test_real_data(name, shards):
    if not (REAL / name).is_dir():
        pytest.skip(f"{REAL / name} is not on this machine")
    found = list_shards([str(REAL / name)])
    assert len(found) == shards
    samples = list(read_samples(found[0]))
    assert len(samples) == count_samples(found[0])
    assert all(isinstance(sample, Sample) and sample.caption for sample in samples)
    assert len({sample.key for sample in samples}) == len(samples)
    if name == "coco-captions":
        assert {sample.image for sample in samples} == {None}
    else:
        assert all(sample.image.startswith(b"\x89PNG") for sample in samples)
    json.loads(samples[-1].meta)
