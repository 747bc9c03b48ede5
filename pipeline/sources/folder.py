"""Read a folder of images, at any depth, with captions in sidecar files or in metadata files.

NAME.jpg may have the sidecars NAME.txt (its caption) and NAME.json. A metadata.csv, metadata.jsonl or metadata.parquet
file is that of Hugging Face's imagefolder: its column `file_name` is relative to the file. metadata.py reads them. The
key of a sample is the image's path in the folder; an image that a metadata file names and the folder does not have is a
sample too, and is rejected. Hidden files are skipped. Ranges count the sorted samples, so the folder must not change
during a run; each process lists it once.
"""

import hashlib
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from index.errors import one_line
from index.reach import is_out_of_reach
from index.table.storage import Storage
from pipeline.images import NOT_OPENED
from pipeline.rejects import Rejected, RejectReason
from pipeline.sources.columns import ROWS_PER_READ
from pipeline.sources.identity import FileInfo
from pipeline.sources.metadata import METADATA_FILES, Row, read_metadata
from pipeline.sources.ranges import SampleRange, split_into_ranges
from pipeline.sources.sample import Caption, ReadOptions, Sample, Unreadable


def list_shards(folder: str, options: ReadOptions) -> list[str]:
    """Return the ranges of the folder's samples; none if it has no images."""
    _scan.cache_clear()
    contents = _scan(folder, options)
    return split_into_ranges(folder, len(contents.images)) if len(contents.images) > len(contents.missing) else []


def count_samples(shard: str, options: ReadOptions) -> int | None:
    """Return the number of samples, from the shard's name."""
    return SampleRange.parse(shard).num_samples


def identity(shard: str, options: ReadOptions) -> str:
    """Return a hash of the names, sizes and states of the files of the range, and of their rows of metadata."""
    contents, names = _range(shard, options)
    digest = hashlib.sha256()
    for image in names:
        for name in (image, *contents.sidecars_of(image, options)):
            if name is not None and (info := contents.files.get(name)) is not None:
                digest.update(f"{name}\0{info.state}\n".encode("utf-8", "surrogatepass"))
        for row in contents.rows.get(image, ()):
            digest.update(row.json)
    return digest.hexdigest()[:32]


def read_samples(shard: str, options: ReadOptions) -> Iterator[Sample | Unreadable]:
    """Yield the images in the order of their paths."""
    contents, names = _range(shard, options)
    folder = SampleRange.parse(shard).folder
    for start in range(0, len(names), ROWS_PER_READ):
        images = names[start : start + ROWS_PER_READ]
        files = {image: contents.files_of(image, options) for image in images}
        wanted = [name for each in files.values() if not isinstance(each, Rejected) for name in each]
        data = _read_files(folder, wanted, options)
        for image in images:
            names_or_fault = files[image]
            if isinstance(names_or_fault, Rejected):
                yield Unreadable(image, shard, names_or_fault.reason, names_or_fault.detail)
                continue
            error = next((data[name] for name in names_or_fault if isinstance(data[name], Exception)), None)
            if error is not None:
                yield Unreadable(image, shard, RejectReason.UNREADABLE_SHARD, one_line(error, typed=True))
                continue
            yield from _samples(shard, image, contents, data, options)


def _samples(
    shard: str, image: str, contents: "_Contents", data: Mapping[str, Any], options: ReadOptions
) -> Iterator[Sample | Unreadable]:
    caption_file, json_file = contents.sidecars_of(image, options)
    sidecar, rows = data[json_file] if json_file else None, contents.rows.get(image, ())
    if caption_file is None and (fault := next((row.fault for row in rows if row.fault), None)):
        yield Unreadable(image, shard, RejectReason.UNREADABLE_METADATA, fault)
        return
    captions: list[Caption] = [data[caption_file]] if caption_file else []
    captions = captions or [caption for row in rows for caption in options.find_captions(row.json)]
    captions = captions or options.find_captions(sidecar)
    meta = next((record for record in (sidecar, *(row.json for row in rows)) if record is not None), None)
    note = "; ".join(contents.faults) if not captions else ""
    yield from options.samples(image, shard, data[image], captions, meta, note)


def used_files(folder: str, options: ReadOptions) -> set[str]:
    """Return the files that the samples of a folder consist of."""
    contents = _scan(folder, options)
    sidecars = {name for image in contents.images for name in contents.sidecars_of(image, options) if name}
    metadata = {name for name in contents.files if posixpath.basename(name) in METADATA_FILES}
    return {*contents.images, *sidecars, *metadata}


@lru_cache(maxsize=2)
def list_files(folder: str, storage: Storage) -> dict[str, FileInfo]:
    """Return all files below a folder by their paths relative to it, sorted, hidden ones included."""
    files, path = storage.files(folder)
    start = len(path.rstrip("/")) + 1
    found = files.find(path, detail=True)
    return {match[start:]: FileInfo.of(found[match]) for match in sorted(found)}


def is_hidden(path: str) -> bool:
    """Return whether a file, or a folder that it is in, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.split("/"))


def _range(shard: str, options: ReadOptions) -> tuple["_Contents", tuple[str, ...]]:
    sample_range = SampleRange.parse(shard)
    contents = _scan(sample_range.folder, options)
    sample_range.check(len(contents.images))
    return contents, contents.images[sample_range.start : sample_range.stop]


def _read_files(folder: str, names: list[str], options: ReadOptions) -> dict[str, Any]:
    """Read files together; the content of one that cannot be read is the exception.

    Raises the exception if it is the folder that is out of reach.
    """
    files, root = options.storage.files(folder)
    names = list(dict.fromkeys(names))
    contents = files.cat_ranges([posixpath.join(root, name) for name in names], None, None, on_error="return")
    for content in contents:
        if isinstance(content, Exception) and is_out_of_reach(content):
            is_gone = isinstance(content, FileNotFoundError) and files.exists(root)
            if not is_gone:
                raise content
    return dict(zip(names, contents, strict=True))


@dataclass(frozen=True, slots=True)
class _Contents:
    files: dict[str, FileInfo]
    images: tuple[str, ...]
    sidecars: dict[str, str]
    """Caption and JSON files as they are spelled, by their path with the extension in lower case."""
    rows: dict[str, list[Row]]
    """Rows of metadata files, by image."""
    missing: dict[str, str]
    """The metadata file of each image that the folder does not have."""
    faults: tuple[str, ...]
    """What is wrong with metadata files, so that images may lack their captions."""

    def sidecars_of(self, image: str, options: ReadOptions) -> tuple[str | None, str | None]:
        """Return an image's caption file and JSON file."""
        stem = posixpath.splitext(image)[0]
        captions = (self.sidecars.get(f"{stem}.{extension}") for extension in options.caption_extensions)
        return next(filter(None, captions), None), self.sidecars.get(f"{stem}.json")

    def files_of(self, image: str, options: ReadOptions) -> list[str] | Rejected:
        """Return the files of a sample, or why it is rejected without reading them."""
        if image in self.missing:
            return Rejected(RejectReason.MISSING_IMAGE, f"{self.missing[image]} names it, but there is no such file")
        if (detail := options.not_opened(_extension(image))) is not None:
            return Rejected(RejectReason.UNSUPPORTED_FORMAT, detail)
        names = [image, *(name for name in self.sidecars_of(image, options) if name)]
        size = sum(self.files[name].size or 0 for name in names)
        if size > options.max_sample_bytes:
            return Rejected(RejectReason.SAMPLE_TOO_LARGE, options.too_large(size))
        return names


@lru_cache(maxsize=2)
def _scan(folder: str, options: ReadOptions) -> _Contents:
    files = {name: info for name, info in list_files(folder, options.storage).items() if not is_hidden(name)}
    images, foreign, sidecars = set[str](), list[str](), dict[str, str]()
    rows, missing, faults = dict[str, list[Row]](), dict[str, str](), list[str]()
    sidecar_extensions = {*options.caption_extensions, "json"}
    for name in files:
        extension = _extension(name)
        if extension in options.image_extensions:
            images.add(name)
        elif extension in NOT_OPENED:
            foreign.append(name)
        elif extension in sidecar_extensions:
            sidecars[f"{posixpath.splitext(name)[0]}.{extension}"] = name
    # An image in a format that is not opened is no sample if the same image is there in one that is.
    stems = {posixpath.splitext(name)[0] for name in images}
    images.update(name for name in foreign if posixpath.splitext(name)[0] not in stems)
    for name in files:
        if posixpath.basename(name) not in METADATA_FILES:
            continue
        for row in read_metadata(posixpath.join(folder, name), options, faults):
            image = posixpath.normpath(posixpath.join(posixpath.dirname(name), row.file_name))
            rows.setdefault(image, []).append(row)
            if image not in files:
                missing[image] = name
    named = (image for image in rows if image in files)  # in whatever format: it is decided when they are decoded
    return _Contents(files, tuple(sorted({*images, *missing, *named})), sidecars, rows, missing, tuple(faults))


def _extension(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()
