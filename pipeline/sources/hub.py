"""`hf:NAME?name=CONFIG&split=SPLIT&revision=REV`: a dataset of the Hugging Face hub, or of a local folder, streamed.

NAME alone takes the only configuration and the split `train`. One shard is one file of the dataset, written
`hf:NAME?...&shard=I/N`; listing pins the commit, so that a run that is taken up again reads the same data. Nothing is
downloaded beyond what is read. A picture that the rows name by its path is read if it belongs to the dataset itself.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlencode

from index.errors import SourceError, one_line
from pipeline.sources.columns import ROWS, Columns
from pipeline.sources.sample import ReadOptions, Sample, Unreadable

SCHEME = "hf:"
OPTIONS = ("name", "split", "revision", "shard")


@dataclass(frozen=True, slots=True)
class _Address:
    place: str
    """Folder or hub id."""
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    shard: str | None = None

    @classmethod
    def parse(cls, text: str) -> "_Address":
        place, mark, query = text.removeprefix(SCHEME).rpartition("?")
        if not mark:
            place, query = query, ""
        options = dict(parse_qsl(query, keep_blank_values=True))
        unknown = ", ".join(sorted(set(options) - set(OPTIONS)))
        if not place or unknown or (mark and not options):
            known = "write hf:NAME?name=CONFIG&split=SPLIT&revision=REV, each of the three where needed"
            raise SourceError(f"{text!r} names no dataset{f' ({unknown} is unknown)' if unknown else ''}: {known}")
        return cls(place, **options)

    def __str__(self) -> str:
        options = {option: value for option in OPTIONS if (value := getattr(self, option))}
        return f"{SCHEME}{self.place}?{urlencode(options, safe='/')}"

    @property
    def is_folder(self) -> bool:
        return os.path.isdir(self.place)

    def pinned(self) -> "_Address":
        """The same wherever and whenever it is read."""
        if self.is_folder or self.place.startswith(("/", ".")):
            return replace(self, place=os.path.abspath(self.place))
        from huggingface_hub import HfApi

        return replace(self, revision=HfApi().dataset_info(self.place, revision=self.revision).sha)

    def fetch(self, path: str) -> bytes | None:
        """A picture of the dataset, which may lie in an archive; None for a path to elsewhere."""
        import fsspec

        origin = path.rpartition("::")[2]
        if self.is_folder:
            inside = os.path.realpath(origin).startswith(os.path.join(os.path.realpath(self.place), ""))
        else:
            inside = origin.startswith(f"hf://datasets/{self.place}@")
        if not inside:
            return None
        with fsspec.open(path, "rb") as file:
            data: bytes = file.read()
        return data


def list_shards(source: str, reading: ReadOptions) -> list[str]:
    """The files of one split."""
    given = _Address.parse(source)
    _splits.cache_clear()
    try:
        address = given.pinned()
    except Exception as error:  # the hub client raises whatever its connection meets
        raise SourceError(f"{source} cannot be found: {one_line(error, typed=True)}") from error
    splits = _splits(address.place, address.name, address.revision)
    split = given.split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if split not in splits:
        raise SourceError(f"{source} has no split {split!r}: add ?split= and one of {', '.join(splits)}")
    total = splits[split].num_shards
    return [str(replace(address, split=split, shard=f"{index}/{total}")) for index in range(total)]


def count_samples(shard: str, reading: ReadOptions) -> int | None:
    """Only reading tells."""
    return None


def read_samples(shard: str, reading: ReadOptions) -> Iterator[Sample | Unreadable]:
    """The rows in their order."""
    address = _Address.parse(shard)
    index, _, total = (address.shard or "").partition("/")
    if not (index.isdecimal() and total.isdecimal() and address.split):
        raise SourceError(f"{shard!r} is not a shard: list the source first")
    stream = _splits(address.place, address.name, address.revision)[address.split]
    if stream.num_shards != int(total):
        raise ValueError(f"{stream.num_shards} files and not {total}: the dataset was changed")
    stem = f"{address.split}-{int(index):05d}-of-{int(total):05d}"
    number, columns = 0, None
    for rows in stream.shard(int(total), int(index)).with_format("arrow").iter(ROWS):
        columns = columns or Columns.of(rows.schema, reading)
        yield from columns.samples(rows, shard, stem, number, address.fetch)
        number += rows.num_rows


@lru_cache(maxsize=2)
def _splits(place: str, name: str | None, revision: str | None) -> dict[str, Any]:
    import datasets

    try:
        return dict(datasets.load_dataset(place, name, revision=revision, streaming=True))
    except Exception as error:  # datasets raises whatever its builders and the hub's client meet
        raise SourceError(f"{SCHEME}{place} cannot be loaded: {one_line(error, typed=True)}") from error
