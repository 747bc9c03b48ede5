"""A folder of pictures, at any depth, with captions beside them or in metadata files.

Beside NAME.jpg may lie NAME.txt and NAME.json; metadata.csv, metadata.jsonl and metadata.parquet are those of Hugging
Face's imagefolder, with a column `file_name` relative to themselves. A sample's key is the picture's path in the
folder. Hidden files are skipped. Pieces count along the sorted pictures, so the folder must stay as it is during a run;
each process lists it once.
"""

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from index.errors import one_line
from index.table.storage import Storage
from pipeline.images import RejectReason
from pipeline.sources.columns import ROWS
from pipeline.sources.metadata import METADATA, read_records
from pipeline.sources.ranges import SampleRange, cut
from pipeline.sources.sample import ReadOptions, Sample, Unreadable


@lru_cache(maxsize=2)
def tree(folder: str, storage: Storage) -> tuple[str, ...]:
    """Every visible file below a folder, relative to it, sorted."""
    files, path = storage.files(folder)
    start = len(path.rstrip("/")) + 1
    return tuple(sorted(name for found in files.find(path) if not is_hidden(name := found[start:])))


def is_hidden(path: str) -> bool:
    """Whether a file, or a folder on the way to it, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.split("/"))


def list_shards(folder: str, reading: ReadOptions) -> list[str]:
    """Pieces of the folder; none where it has no pictures."""
    _listing.cache_clear()
    return cut(folder, len(_listing(folder, reading).images))


def count_samples(shard: str, reading: ReadOptions) -> int | None:
    """As the shard's name tells."""
    return SampleRange.parse(shard).size


def read_samples(shard: str, reading: ReadOptions) -> Iterator[Sample | Unreadable]:
    """The pictures in the order of their paths."""
    piece = SampleRange.parse(shard)
    listing = _listing(piece.folder, reading)
    piece.check(len(listing.images))
    files, root = reading.storage.files(piece.folder)
    for start in range(piece.start, piece.stop, ROWS):
        images = listing.images[start : min(start + ROWS, piece.stop)]
        parts = [(name, *listing.companions(name, reading)) for name in images]
        names = list(dict.fromkeys(name for part in parts for name in part if name))
        contents = files.cat_ranges([posixpath.join(root, name) for name in names], None, None, on_error="return")
        data = dict(zip(names, contents, strict=True))
        for image, caption, sidecar in parts:
            errors = [data[n] for n in (image, caption, sidecar) if n and isinstance(data[n], Exception)]
            if errors:
                yield Unreadable(image, shard, RejectReason.BROKEN_SHARD, one_line(errors[0], typed=True))
                continue
            record, beside = listing.records.get(image), data[sidecar] if sidecar else None
            words = data[caption] if caption else reading.caption_of(record, beside)
            meta = next((text for text in (beside, record) if text is not None), b"{}")
            yield Sample(image, shard, data[image], words, meta)


@dataclass(frozen=True, slots=True)
class _Listing:
    images: tuple[str, ...]
    others: dict[str, str]
    """Captions and sidecars as they are written, by their names with the ending in lower case."""
    records: dict[str, bytes]
    """Rows of metadata files as JSON, by picture."""

    def companions(self, image: str, reading: ReadOptions) -> tuple[str | None, str | None]:
        """The files of a picture's caption and of its sidecar."""
        stem = posixpath.splitext(image)[0]
        captions = (self.others.get(f"{stem}.{ending}") for ending in reading.caption_extensions)
        return next(filter(None, captions), None), self.others.get(f"{stem}.json")


@lru_cache(maxsize=2)
def _listing(folder: str, reading: ReadOptions) -> _Listing:
    images: list[str] = []
    others, records = dict[str, str](), dict[str, bytes]()
    wanted = {*reading.caption_extensions, "json"}
    for name in tree(folder, reading.storage):
        stem, ending = posixpath.splitext(name)
        ending = ending[1:].lower()
        if ending in reading.image_extensions:
            images.append(name)
        elif ending in wanted:
            others[f"{stem}.{ending}"] = name
        if posixpath.basename(name) in METADATA:
            place = posixpath.dirname(name)
            for file_name, record in read_records(posixpath.join(folder, name), reading.storage):
                records[posixpath.normpath(posixpath.join(place, file_name))] = record
    return _Listing(tuple(images), others, records)
