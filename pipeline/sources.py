"""Where image-caption pairs come from: list shards, read samples.

A shard is one file: a tar in the WebDataset / img2dataset layout (KEY.png|jpg|webp, KEY.txt, KEY.json), or a parquet
file with image bytes (raw, or Hugging Face's struct{bytes, path}). Samples come in the file's order, undecoded: what
is wrong with one of them is said by whoever decodes it. Any fsspec URI can be a source.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from index.errors import SourceError

SHARD_ENDINGS = (".tar", ".parquet")
IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
IMAGE_COLUMNS = ("image", "jpg", "png", "img", "bytes")
CAPTION_COLUMNS = ("caption", "text", "txt", "sentence", "prompt")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image-caption pair as it was read."""

    key: str
    """Its name within the source."""
    shard: str
    image: bytes | None
    caption: bytes | None
    meta: str
    """Its JSON sidecar, unchanged; `{}` where there is none."""


@dataclass(frozen=True, slots=True)
class Broken:
    """The rest of a shard that could not be read."""

    shard: str
    detail: str


def list_shards(sources: Sequence[str]) -> list[str]:
    """The shards behind folders, files, globs and brace patterns, sorted; SourceError where there is none."""
    import braceexpand
    from fsspec.core import url_to_fs

    found: dict[str, None] = {}
    for source in sources:
        shards: list[str] = []
        for pattern in braceexpand.braceexpand(source):
            files, path = url_to_fs(pattern)
            if files.isdir(path):
                names = sorted(files.ls(path, detail=False))
                tars = {name.removesuffix(".tar") for name in names if name.endswith(".tar")}
                # img2dataset puts a parquet of metadata beside every tar; its rows stand in the tar already.
                matches = [n for n in names if n.endswith(SHARD_ENDINGS) and n.removesuffix(".parquet") not in tars]
            else:
                matches = sorted(files.glob(path))
            shards += [files.unstrip_protocol(m).removeprefix("file://") for m in matches]
        if not shards:
            raise SourceError(
                f"no shards at {source!r}: give .tar or .parquet files, a folder of them, or a pattern such as "
                "'data/{00000..00009}.tar'"
            )
        for shard in shards:
            if not shard.endswith(SHARD_ENDINGS):
                raise SourceError(f"{shard!r} is not a shard: its name must end in {' or '.join(SHARD_ENDINGS)}")
        found |= dict.fromkeys(shards)
    return list(found)


def read_samples(shard: str) -> Iterator[Sample | Broken]:
    """The samples of one shard, in its order; where it cannot be read on, a last `Broken`."""
    read = _read_tar if shard.endswith(".tar") else _read_parquet
    try:
        yield from read(shard)
    except Exception as error:  # whatever tarfile, pyarrow or a file system raise, the shard ends here
        yield Broken(shard, f"{type(error).__name__}: {error}")


def _read_tar(shard: str) -> Iterator[Sample]:
    import fsspec
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    with fsspec.open(shard, "rb") as file:
        members = ({**member, "__url__": shard} for member in tar_file_iterator(file))
        for group in group_by_keys(members):
            image = next((group[ending] for ending in IMAGE_ENDINGS if ending in group), None)
            meta = group.get("json", b"{}").decode("utf-8", "replace")
            yield Sample(group["__key__"], shard, image, group.get("txt"), meta)


def _read_parquet(shard: str) -> Iterator[Sample]:
    import fsspec
    import pyarrow.parquet as pq

    with fsspec.open(shard, "rb") as file:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        image = next((name for name in IMAGE_COLUMNS if name in names), None)
        caption = next((name for name in CAPTION_COLUMNS if name in names), None)
        if caption is None:
            raise SourceError(f"no caption column among {', '.join(names)}: name it {CAPTION_COLUMNS[0]!r}")
        number = 0
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield _row_sample(row, shard, f"{number:08d}", image, caption)
                number += 1


def _row_sample(row: dict[str, Any], shard: str, number: str, image: str | None, caption: str) -> Sample:
    picture, words = row.pop(image) if image else None, row.pop(caption)
    if isinstance(picture, dict):
        picture = picture.get("bytes")
    stem = shard.rsplit("/", 1)[-1].removesuffix(".parquet")
    return Sample(
        key=str(row.get("key") or f"{stem}/{number}"),
        shard=shard,
        image=picture,
        caption=None if words is None else str(words).encode(),
        meta=json.dumps(row, default=str, ensure_ascii=False),
    )
