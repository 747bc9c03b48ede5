"""Any list of samples, written as any kind of source, comes back whole and in order; cut anywhere, as whole samples."""

import gzip
import io
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.rejects import RejectReason
from pipeline.sources.listing import list_shards
from pipeline.sources.read import read_samples
from pipeline.sources.sample import Sample, Unreadable

Pair = tuple[bytes, str]

captions = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), max_size=40)
pairs = st.lists(st.tuples(st.binary(max_size=1500), captions), min_size=1, max_size=12)


def tar_of(samples: list[Pair]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for number, (image, caption) in enumerate(samples):
            for name, content in ((f"{number:03}.png", image), (f"{number:03}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def write_tar(folder: Path, samples: list[Pair]) -> Path:
    path = folder / "a.tar"
    path.write_bytes(tar_of(samples))
    return path


def write_gzip(folder: Path, samples: list[Pair]) -> Path:
    path = folder / "a.tar.gz"
    path.write_bytes(gzip.compress(tar_of(samples), mtime=0))
    return path


def write_parquet(folder: Path, samples: list[Pair]) -> Path:
    table = pa.table({"image": [image for image, _ in samples], "text": [caption for _, caption in samples]})
    pq.write_table(table, folder / "a.parquet", row_group_size=5)
    return folder / "a.parquet"


def write_folder(folder: Path, samples: list[Pair]) -> Path:
    for number, (image, caption) in enumerate(samples):
        (folder / f"{number:03}.png").write_bytes(image)
        (folder / f"{number:03}.txt").write_bytes(caption.encode())
    return folder


def write_saved(folder: Path, samples: list[Pair]) -> Path:
    import datasets

    columns = {"image": [image for image, _ in samples], "text": [caption for _, caption in samples]}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "saved")
    return folder / "saved"


WRITERS = [write_tar, write_gzip, write_parquet, write_folder, write_saved]


def read(source: Path) -> list[Sample | Unreadable]:
    return [sample for shard in list_shards([str(source)]) for sample in read_samples(shard)]


def content(samples: list[Sample | Unreadable]) -> list[Pair]:
    assert all(isinstance(sample, Sample) for sample in samples), samples
    return [(sample.image, sample.caption.decode()) for sample in samples]


def few(examples: int) -> Callable:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITERS)
@few(25)
@given(samples=pairs)
def test_samples_come_back_whole_and_in_order(write, samples):
    with tempfile.TemporaryDirectory() as folder:
        assert content(read(write(Path(folder), samples))) == samples


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_tar, write_gzip, write_parquet])
@few(40)
@given(samples=pairs, fraction=st.floats(0, 1, exclude_max=True), drawn=st.data())
def test_a_file_cut_anywhere_gives_a_prefix_of_whole_samples_and_one_reject(write, samples, fraction, drawn):
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), samples)
        data = path.read_bytes()
        path.write_bytes(data[: int(fraction * len(data))])
        found = read(path)
    rests = [sample for sample in found if isinstance(sample, Unreadable)]
    assert len(rests) <= 1
    assert found[len(found) - len(rests) :] == rests
    whole = content(found[: len(found) - len(rests)])
    assert whole == samples[: len(whole)]
    if rests:
        assert (rests[0].key, rests[0].reason) == ("", RejectReason.UNREADABLE_SHARD)
    else:
        assert len(whole) == len(samples)


@pytest.mark.slow
@few(40)
@given(parts=st.lists(pairs, min_size=1, max_size=3), is_gzip=st.booleans())
def test_concatenated_tars_hold_the_samples_of_all(parts, is_gzip):
    numbered = [tar_of(part) for part in parts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(b"".join(gzip.compress(each) if is_gzip else each for each in numbered))
        found = list(read_samples(str(path)))
    assert len(found) == sum(len(part) for part in parts)
    repeated = [sample for sample in found if isinstance(sample, Unreadable)]
    assert {sample.reason for sample in repeated} <= {RejectReason.DUPLICATE_KEY}
    longest = [sample for sample in found if isinstance(sample, Sample)]
    assert len(longest) == max(len(part) for part in parts)


@pytest.mark.slow
@few(60)
@given(samples=pairs, data=st.data())
def test_a_tar_with_a_changed_byte_never_raises_and_never_loses_count(samples, data):
    content_of_tar = bytearray(tar_of(samples))
    position = data.draw(st.integers(0, len(content_of_tar) - 1))
    content_of_tar[position] ^= 1 << data.draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(content_of_tar)
        found = list(read_samples(str(path)))
    assert found
    assert len(found) >= len(samples) or found[-1].key == ""
