"""Shards are listed and read as their makers wrote them."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from index.errors import SourceError
from pipeline.sources import Broken, Sample, list_shards, read_samples


def png(colour=(255, 0, 0), side=8) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(data, "png")
    return data.getvalue()


def write_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_a_folder_gives_tars_without_their_metadata_parquets(tmp_path):
    for name in ("00001.tar", "00000.tar", "00000.parquet", "00000_stats.json", "more.parquet"):
        (tmp_path / name).write_bytes(b"")
    found = list_shards([str(tmp_path)])
    assert [f.rsplit("/", 1)[1] for f in found] == ["00000.tar", "00001.tar", "more.parquet"]


def test_braces_globs_and_repeats(tmp_path):
    for number in range(4):
        (tmp_path / f"{number:05d}.tar").write_bytes(b"")
    found = list_shards([f"{tmp_path}/{{00000..00002}}.tar", f"{tmp_path}/*1.tar"])
    assert [f.rsplit("/", 1)[1] for f in found] == ["00000.tar", "00001.tar", "00002.tar"]


def test_other_file_systems(tmp_path):
    import fsspec

    local = write_tar(tmp_path / "a.tar", {"x.png": png(), "x.txt": b"words"})
    with fsspec.open("memory://bucket/a.tar", "wb") as file, open(local, "rb") as source:
        file.write(source.read())
    assert list_shards(["memory://bucket/*.tar"]) == ["memory:///bucket/a.tar"]
    (sample,) = read_samples("memory:///bucket/a.tar")
    assert (sample.image, sample.caption) == (png(), b"words")


@pytest.mark.parametrize("given", ["nowhere", "nowhere/*.tar", "{a,b}.tar"])
def test_nothing_found_is_said(given):
    with pytest.raises(SourceError, match="no shards at"):
        list_shards([given])


def test_a_file_that_is_no_shard_is_refused(tmp_path):
    path = tmp_path / "pictures.zip"
    path.write_bytes(b"")
    with pytest.raises(SourceError, match=r"\.tar or \.parquet"):
        list_shards([str(path)])


def test_tar_samples_keep_order_and_sidecar(tmp_path):
    sidecar = b'{"url": "x",  "score": 1.50}'
    shard = write_tar(
        tmp_path / "a.tar",
        {"b.jpg": png(), "b.txt": b"second letter", "b.json": sidecar, "a.PNG": png((0, 0, 1)), "c.txt": b"no picture"},
    )
    b, a, c = read_samples(shard)
    assert (b.key, b.caption, b.meta) == ("b", b"second letter", sidecar.decode())
    assert b.image == png()
    assert (a.key, a.caption, a.meta) == ("a", None, "{}")
    assert a.image == png((0, 0, 1))
    assert (c.image, c.caption) == (None, b"no picture")


def test_a_truncated_tar_gives_what_it_holds_and_says_so(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, {f"{i}.{e}": b"x" * 700 for i in range(9) for e in ("txt", "png")})
    path.write_bytes(path.read_bytes()[:9000])
    *whole, last = read_samples(str(path))
    assert len(whole) >= 1
    assert all(isinstance(sample, Sample) for sample in whole)
    assert isinstance(last, Broken)
    assert last.detail


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_as_hugging_face_writes_it_and_plain(tmp_path, struct):
    pictures = [png(), png((0, 255, 0))]
    image = [{"bytes": data, "path": None} for data in pictures] if struct else pictures
    table = pa.table({"image": image, "caption": ["one", None], "label": [7, 8]})
    pq.write_table(table, tmp_path / "train-00000.parquet")
    one, two = read_samples(str(tmp_path / "train-00000.parquet"))
    assert (one.key, one.image, one.caption) == ("train-00000/00000000", pictures[0], b"one")
    assert json.loads(one.meta) == {"label": 7}
    assert (two.key, two.caption) == ("train-00000/00000001", None)


def test_parquet_without_captions_says_what_it_has(tmp_path):
    pq.write_table(pa.table({"image": [b""], "label": np.arange(1)}), tmp_path / "a.parquet")
    (broken,) = read_samples(str(tmp_path / "a.parquet"))
    assert isinstance(broken, Broken)
    assert "image, label" in broken.detail
