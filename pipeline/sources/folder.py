"""Read a folder of images, at any depth, with captions in sidecar files or in metadata files.

NAME.jpg may have the sidecars NAME.txt (its caption) and NAME.json. A metadata.csv, metadata.jsonl or metadata.parquet
file is that of Hugging Face's imagefolder: its column `file_name` is relative to the file, and a file without that
column is ignored. The key of a sample is the image's path in the folder. Hidden files are skipped. Ranges count the
sorted images, so the folder must not change during a run; each process lists it once.
"""

import csv
import io
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from index.errors import SourceError, one_line
from index.table.storage import Storage
from pipeline.rejects import RejectReason
from pipeline.sources.columns import ROWS_PER_READ, columns_without_bytes, encode_meta
from pipeline.sources.ranges import SampleRange, split_into_ranges
from pipeline.sources.sample import ReadOptions, Sample, Unreadable

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def list_shards(folder: str, options: ReadOptions) -> list[str]:
    """Return the ranges of the folder's images; none if it has no images."""
    _scan.cache_clear()
    return split_into_ranges(folder, len(_scan(folder, options).images))


def count_samples(shard: str, options: ReadOptions) -> int | None:
    """Return the number of images, from the shard's name."""
    return SampleRange.parse(shard).num_samples


def read_samples(shard: str, options: ReadOptions) -> Iterator[Sample | Unreadable]:
    """Yield the images in the order of their paths."""
    sample_range = SampleRange.parse(shard)
    contents = _scan(sample_range.folder, options)
    sample_range.check(len(contents.images))
    for start in range(sample_range.start, sample_range.stop, ROWS_PER_READ):
        images = contents.images[start : min(start + ROWS_PER_READ, sample_range.stop)]
        sidecars = [contents.sidecars_of(image, options) for image in images]
        data = _read_files(
            sample_range.folder, [*images, *(name for pair in sidecars for name in pair if name)], options
        )
        for image, (caption_file, json_file) in zip(images, sidecars, strict=True):
            files = [data[name] for name in (image, caption_file, json_file) if name]
            error = next((content for content in files if isinstance(content, Exception)), None)
            if error is not None:
                yield Unreadable(image, shard, RejectReason.UNREADABLE_SHARD, one_line(error, typed=True))
                continue
            sidecar, row = data[json_file] if json_file else None, contents.rows.get(image)
            caption = data[caption_file] if caption_file else options.find_caption(row, sidecar)
            meta = next((record for record in (sidecar, row) if record is not None), b"{}")
            yield Sample(image, shard, data[image], caption, meta)


@lru_cache(maxsize=2)
def list_files(folder: str, storage: Storage) -> tuple[str, ...]:
    """Return the paths of all visible files below a folder, relative to it, sorted."""
    files, path = storage.files(folder)
    start = len(path.rstrip("/")) + 1
    return tuple(sorted(name for match in files.find(path) if not is_hidden(name := match[start:])))


def is_hidden(path: str) -> bool:
    """Return whether a file, or a folder that it is in, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.split("/"))


def _read_files(folder: str, names: list[str], options: ReadOptions) -> dict[str, Any]:
    """Read files together; the content of one that cannot be read is the exception."""
    files, root = options.storage.files(folder)
    names = list(dict.fromkeys(names))
    contents = files.cat_ranges([posixpath.join(root, name) for name in names], None, None, on_error="return")
    return dict(zip(names, contents, strict=True))


@dataclass(frozen=True, slots=True)
class _Contents:
    images: tuple[str, ...]
    sidecars: dict[str, str]
    """Caption and JSON files as they are spelled, by their path with the extension in lower case."""
    rows: dict[str, bytes]
    """Rows of metadata files as JSON, by image."""

    def sidecars_of(self, image: str, options: ReadOptions) -> tuple[str | None, str | None]:
        """Return an image's caption file and JSON file."""
        stem = posixpath.splitext(image)[0]
        captions = (self.sidecars.get(f"{stem}.{extension}") for extension in options.caption_extensions)
        return next(filter(None, captions), None), self.sidecars.get(f"{stem}.json")


@lru_cache(maxsize=2)
def _scan(folder: str, options: ReadOptions) -> _Contents:
    images: list[str] = []
    sidecars, rows = dict[str, str](), dict[str, bytes]()
    sidecar_extensions = {*options.caption_extensions, "json"}
    for name in list_files(folder, options.storage):
        stem, extension = posixpath.splitext(name)
        extension = extension[1:].lower()
        if extension in options.image_extensions:
            images.append(name)
        elif extension in sidecar_extensions:
            sidecars[f"{stem}.{extension}"] = name
        if posixpath.basename(name) in METADATA_FILES:
            for file_name, row in _read_metadata(posixpath.join(folder, name), options.storage):
                rows[posixpath.normpath(posixpath.join(posixpath.dirname(name), file_name))] = row
    return _Contents(tuple(images), sidecars, rows)


def _read_metadata(uri: str, storage: Storage) -> Iterator[tuple[str, bytes]]:
    """Yield `file_name` and the row as JSON; raises SourceError if the file cannot be read."""
    read_rows = {".csv": _csv_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}[posixpath.splitext(uri)[1]]
    try:
        with storage.open(uri) as file:
            for fields, line in read_rows(file):
                if isinstance(name := fields.get("file_name"), str):
                    yield name, encode_meta(fields) if line is None else line
    except (csv.Error, ValueError) as error:
        raise SourceError(f"{uri} cannot be read ({one_line(error, typed=True)}): fix or remove the file") from error


def _csv_rows(file: Any) -> Iterator[tuple[dict[Any, Any], None]]:
    # Bytes that are not UTF-8 are kept, so that only the captions with such bytes are rejected.
    with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
        for row in csv.DictReader(text):
            yield row, None


def _json_rows(file: Any) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the lines that are JSON objects; the image of another line has no metadata."""
    for line in file:
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(fields, dict):
            yield fields, line.strip()


def _parquet_rows(file: Any) -> Iterator[tuple[dict[str, Any], None]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        for row in table.read(columns_without_bytes(table.schema_arrow)).to_pylist():
            yield row, None
