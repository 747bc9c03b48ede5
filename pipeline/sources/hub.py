"""Stream a dataset of the Hugging Face hub or of a local folder: `hf:NAME?name=CONFIG&split=SPLIT&revision=REV`.

NAME alone means the only configuration, and the split `train`. A shard is one file of the dataset, written
`hf:NAME?...&shard=I/N`. Listing pins the commit, so that a run that is resumed reads the same data. Nothing is
downloaded beyond what is read. A row may hold the path of its image instead of the bytes: the image is read if the
path is inside the dataset, and is missing otherwise.
"""

import hashlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlencode

from index.errors import SourceError, one_line
from index.reach import is_out_of_reach, retried
from pipeline.rejects import Rejected, RejectReason
from pipeline.sources.columns import ROWS_PER_READ, Columns
from pipeline.sources.identity import FileInfo
from pipeline.sources.sample import ReadOptions, Sample, Unreadable

SCHEME = "hf:"
ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "lzma", "zstd", "lz4")
"""Protocols that may stand before `::` in the path of an image."""
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

    def read_file(self, path: str, max_bytes: int) -> bytes | None:
        """Read an image of the dataset, which may be in an archive; None if the path is outside the dataset.

        Raises Rejected if it is larger than `max_bytes`.
        """
        import fsspec

        if not self._is_inside(path):
            return None
        with fsspec.open(path, "rb") as file:
            data: bytes = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise Rejected(RejectReason.SAMPLE_TOO_LARGE, ReadOptions(max_sample_bytes=max_bytes).too_large(None))
        return data

    def _is_inside(self, path: str) -> bool:
        """Return whether a path that a row holds leads to a file of the dataset, through archives only.

        fsspec opens a chain `a::b::c` from its end, but any link may name another store: `file:///secret::hf://...`.
        """
        *archives, origin = path.split("::")
        if any(link.partition("://")[0] not in ARCHIVES for link in archives):
            return False
        if self.is_folder:
            return os.path.realpath(origin).startswith(os.path.join(os.path.realpath(self.path), ""))
        return origin.startswith(f"hf://datasets/{self.path}@") and ".." not in origin.split("/")


def list_shards(source: str, options: ReadOptions) -> list[str]:
    """Return the files of one split; raises SourceError if the dataset or the split does not exist."""
    given = _HubURI.parse(source)
    _load_splits.cache_clear()
    try:
        uri = retried(source, given.pin)
    except SourceError:
        raise
    except Exception as error:  # the hub client raises exceptions of any class
        raise SourceError(
            f"{source} is not found on the hub ({one_line(error, typed=True)}): check its name and the connection, and "
            "log in with `hf auth login` if it is private"
        ) from error
    try:
        splits = retried(source, lambda: _load_splits(uri.path, uri.name, uri.revision))
    except SourceError:
        raise
    except Exception as error:
        raise _not_loaded(uri.path, error) from error
    split = given.split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if split not in splits:
        example = replace(given, split=next(iter(splits), "SPLIT"))
        raise SourceError(f"{source} has no split {split!r}: choose one of {', '.join(splits)}, as in '{example}'")
    total = splits[split].num_shards
    return [str(replace(uri, split=split, shard=f"{index}/{total}")) for index in range(total)]


def count_samples(shard: str, options: ReadOptions) -> int | None:
    """Return None: the number of rows is known only after reading."""
    return None


def identity(shard: str, options: ReadOptions) -> str:
    """Return a hash of the hashes that the hub gives for the files of the shard, or of its commit if it gives none."""
    uri = _HubURI.parse(shard)
    parts: list[str] = []
    for path in _files_of(_shard_of(uri)):
        files, name = options.storage.files(path.rpartition("::")[2])
        info = files.info(name)
        lfs = info.get("lfs") or {}
        digest = lfs.get("sha256") or info.get("blob_id") or FileInfo.of(info).state
        parts.append(f"{path.partition('::')[0] if '::' in path else ''} {digest}")
    if not parts and uri.revision is None:  # of a local folder: nothing tells it from itself after a change
        parts.append(f"{uuid.uuid4()}")
    text = "\n".join(parts) or f"{uri.revision} {uri.split} {uri.shard}"
    return hashlib.sha256(f"{uri.name} {uri.split}\n{text}".encode()).hexdigest()[:32]


def read_samples(shard: str, options: ReadOptions) -> Iterator[Sample | Unreadable]:
    """Yield the rows in their order; raises ValueError if the dataset has another number of files by now."""
    uri = _HubURI.parse(shard)
    dataset = _shard_of(uri)
    index, _, total = (uri.shard or "").partition("/")
    stem = f"{uri.split}-{int(index):05d}-of-{int(total):05d}"
    position, columns = 0, None
    if (
        dataset.features is not None
    ):  # in one order: rows of a streamed WebDataset differ in it, and would not fit together
        columns = Columns.of(dataset.features.arrow_schema, options)
        dataset = dataset.select_columns(columns.names)
    for rows in dataset.with_format("arrow").iter(ROWS_PER_READ):
        columns = columns or Columns.of(rows.schema, options)
        yield from columns.samples(
            rows, shard, stem, position, options, lambda path: uri.read_file(path, options.max_sample_bytes)
        )
        position += rows.num_rows


def _shard_of(uri: _HubURI) -> Any:
    """Return one file of a split as a streamed dataset; raises ValueError if their number has changed."""
    index, _, total = (uri.shard or "").partition("/")
    if not (index.isdecimal() and total.isdecimal() and uri.split):
        raise SourceError(f"'{uri}' is not a shard: use one that `list_shards` returns, with &split= and &shard=I/N")
    try:
        dataset = _load_splits(uri.path, uri.name, uri.revision)[uri.split]
    except Exception as error:
        if is_out_of_reach(error):
            raise
        raise _not_loaded(uri.path, error) from error
    if dataset.num_shards != int(total):
        raise ValueError(
            f"the split has {dataset.num_shards} files and this shard needs {total}: the dataset was changed after it "
            "was listed"
        )
    return dataset.shard(int(total), int(index))


def _files_of(dataset: Any) -> list[str]:
    """Return the files of a streamed dataset; empty if datasets does not tell them in the usual place."""
    arguments = getattr(getattr(dataset, "_ex_iterable", None), "kwargs", {})
    found: Any = next((arguments[name] for name in ("files", "original_files", "tar_paths") if arguments.get(name)), [])
    return [str(each) for each in found] if all(isinstance(each, str) for each in found) else []


def _not_loaded(path: str, error: Exception) -> SourceError:
    return SourceError(f"{SCHEME}{path} cannot be loaded by datasets.load_dataset: {one_line(error, typed=True)}")


@lru_cache(maxsize=2)
def _load_splits(path: str, name: str | None, revision: str | None) -> dict[str, Any]:
    import datasets

    # An outage is waited for by reach.py, which says so; datasets would be silent for minutes.
    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    return dict(datasets.load_dataset(path, name, revision=revision, streaming=True))
