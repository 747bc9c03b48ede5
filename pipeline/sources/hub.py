"""Stream a dataset of the Hugging Face hub or of a local folder: `hf:NAME?name=CONFIG&split=SPLIT&revision=REV`.

NAME alone means the only configuration, and the split `train`. A shard is one file of the dataset, written
`hf:NAME?...&shard=I/N`. Listing pins the commit, so that a run that is resumed reads the same data. Nothing is
downloaded beyond what is read. A row may hold the path of its image instead of the bytes: the image is read if the
path is inside the dataset, and is missing otherwise.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlencode

from index.errors import SourceError, one_line
from pipeline.sources.columns import ROWS_PER_READ, Columns
from pipeline.sources.sample import ReadOptions, Sample, Unreadable

SCHEME = "hf:"
PARAMETERS = ("name", "split", "revision", "shard")


@dataclass(frozen=True, slots=True)
class _HubURI:
    """A parsed `hf:` URI; fields are named as the arguments of `datasets.load_dataset`."""

    path: str
    """Folder or hub id."""
    name: str | None = None
    """Configuration of the dataset."""
    split: str | None = None
    revision: str | None = None
    shard: str | None = None
    """I/N: file I, counted from 0, of the N files of the split."""

    @classmethod
    def parse(cls, uri: str) -> "_HubURI":
        path, mark, query = uri.removeprefix(SCHEME).rpartition("?")
        if not mark:
            path, query = query, ""
        parameters = dict(parse_qsl(query, keep_blank_values=True))
        unknown = ", ".join(sorted(set(parameters) - set(PARAMETERS)))
        if not path or unknown or (mark and not parameters):
            reason = f"parameter {unknown} is unknown" if unknown else "the dataset's name or a parameter is missing"
            raise SourceError(
                f"{uri!r} is not a dataset URI ({reason}): use hf:NAME?name=CONFIG&split=SPLIT&revision=REV, "
                "where each of the three parameters is optional"
            )
        return cls(path, **parameters)

    def __str__(self) -> str:
        parameters = {name: value for name in PARAMETERS if (value := getattr(self, name))}
        return f"{SCHEME}{self.path}?{urlencode(parameters, safe='/')}"

    @property
    def is_folder(self) -> bool:
        return os.path.isdir(self.path)

    def pin(self) -> "_HubURI":
        """Return the URI that means the same data everywhere and later: an absolute path or a commit."""
        if self.is_folder or self.path.startswith(("/", ".")):
            return replace(self, path=os.path.abspath(self.path))
        from huggingface_hub import HfApi

        return replace(self, revision=HfApi().dataset_info(self.path, revision=self.revision).sha)

    def read_file(self, path: str) -> bytes | None:
        """Read an image of the dataset, which may be in an archive; None if the path is outside the dataset."""
        import fsspec

        origin = path.rpartition("::")[2]
        if self.is_folder:
            is_inside = os.path.realpath(origin).startswith(os.path.join(os.path.realpath(self.path), ""))
        else:
            is_inside = origin.startswith(f"hf://datasets/{self.path}@")
        if not is_inside:
            return None
        with fsspec.open(path, "rb") as file:
            data: bytes = file.read()
        return data


def list_shards(source: str, options: ReadOptions) -> list[str]:
    """Return the files of one split; raises SourceError if the dataset or the split does not exist."""
    given = _HubURI.parse(source)
    _load_splits.cache_clear()
    try:
        uri = given.pin()
    except Exception as error:  # the hub client raises exceptions of any class
        raise SourceError(
            f"{source} is not found on the hub ({one_line(error, typed=True)}): check its name and the connection, and "
            "log in with `hf auth login` if it is private"
        ) from error
    splits = _load_splits(uri.path, uri.name, uri.revision)
    split = given.split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if split not in splits:
        example = replace(given, split=next(iter(splits), "SPLIT"))
        raise SourceError(f"{source} has no split {split!r}: choose one of {', '.join(splits)}, as in '{example}'")
    total = splits[split].num_shards
    return [str(replace(uri, split=split, shard=f"{index}/{total}")) for index in range(total)]


def count_samples(shard: str, options: ReadOptions) -> int | None:
    """Return None: the number of rows is known only after reading."""
    return None


def read_samples(shard: str, options: ReadOptions) -> Iterator[Sample | Unreadable]:
    """Yield the rows in their order; raises ValueError if the dataset has another number of files by now."""
    uri = _HubURI.parse(shard)
    index, _, total = (uri.shard or "").partition("/")
    if not (index.isdecimal() and total.isdecimal() and uri.split):
        raise SourceError(f"{shard!r} is not a shard: use one that `list_shards` returns, with &split= and &shard=I/N")
    dataset = _load_splits(uri.path, uri.name, uri.revision)[uri.split]
    if dataset.num_shards != int(total):
        raise ValueError(
            f"the split has {dataset.num_shards} files and this shard needs {total}: the dataset was changed after it "
            "was listed"
        )
    stem = f"{uri.split}-{int(index):05d}-of-{int(total):05d}"
    position, columns = 0, None
    for rows in dataset.shard(int(total), int(index)).with_format("arrow").iter(ROWS_PER_READ):
        columns = columns or Columns.of(rows.schema, options)
        yield from columns.samples(rows, shard, stem, position, uri.read_file)
        position += rows.num_rows


@lru_cache(maxsize=2)
def _load_splits(path: str, name: str | None, revision: str | None) -> dict[str, Any]:
    import datasets

    try:
        return dict(datasets.load_dataset(path, name, revision=revision, streaming=True))
    except Exception as error:  # datasets raises exceptions of any class
        raise SourceError(
            f"{SCHEME}{path} cannot be loaded by datasets.load_dataset: {one_line(error, typed=True)}"
        ) from error
