"""List and read a dataset of the Hugging Face hub or of a local folder: `hf:NAME?name=CONFIG&split=SPLIT`.

NAME alone means the only configuration, and the split `train`. `datasets` says which files those are. Of a repository
of the hub, parquet files, tars and folders of images are then read by their own readers, at the commit; anything else,
and local folders, is streamed by `datasets`, where a shard is one file, `hf:NAME?...&shard=I/N`. Nothing is downloaded
beyond what is read.
"""

import hashlib
import posixpath
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from index.errors import SourceError, one_line
from index.reach import is_out_of_reach, retried
from index.table.storage import Storage
from pipeline.sources import folder, parquet, tar
from pipeline.sources.columns import ROWS_PER_READ, Columns
from pipeline.sources.dataset_images import read_image
from pipeline.sources.hub import FILES, SCHEME, DatasetURI, check_not_refused
from pipeline.sources.identity import FileInfo
from pipeline.sources.metadata import METADATA_FILES
from pipeline.sources.sample import ReadOptions, Sample, Unreadable

MAX_FOLDERS = 8
"""Files in more folders are looked up in one listing of the repository instead of one of each folder."""


def list_shards(source: str, options: ReadOptions) -> list[str]:
    """Return the files of one split; raises SourceError if the dataset or the split does not exist."""
    given = DatasetURI.parse(source)
    _load_builder.cache_clear()
    _load_splits.cache_clear()
    uri = given.pin()
    try:
        builder = retried(source, lambda: _load_builder(uri.path, uri.name, uri.revision))
        files = (
            {} if uri.is_folder else {str(name): list(each) for name, each in (builder.config.data_files or {}).items()}
        )
        splits = {} if files else _load_splits(uri.path, uri.name, uri.revision)
    except SourceError:
        raise
    except Exception as error:  # datasets and the hub client raise exceptions of any class
        if not uri.is_folder:
            check_not_refused(uri)
        raise _not_loaded(uri.path, error) from error
    split = _choose_split(source, given, files or splits)
    uri = replace(uri, split=split)
    if files:
        _list_folders(uri.root, files[split], options.storage)
        if shards := _own_shards(files[split], options):
            return shards
        splits = _load_splits(uri.path, uri.name, uri.revision)
    total = splits[split].num_shards
    return [str(replace(uri, shard=f"{index}/{total}")) for index in range(total)]


def _choose_split(source: str, given: DatasetURI, splits: Mapping[str, Any]) -> str:
    split = given.split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if split not in splits:
        example = replace(given, split=next(iter(splits), "SPLIT"))
        raise SourceError(f"{source} has no split {split!r}: choose one of {', '.join(splits)}, as in '{example}'")
    return split


def _list_folders(root: str, files: Sequence[str], storage: Storage) -> None:
    """List the folders of files once, which tells the hash of each."""
    repository, path = storage.files(root)
    _adopt_listing(repository, path)
    folders = {posixpath.dirname(name) for name in files}
    if len(folders) > MAX_FOLDERS:
        repository.find(path)
    else:
        for each in folders:
            repository.ls(each.removeprefix(FILES))


def _adopt_listing(repository: Any, root: str) -> None:
    """Take over what `datasets` has listed in the file system of this thread."""
    import datasets
    from huggingface_hub import HfFileSystem

    listed = HfFileSystem(endpoint=datasets.config.HF_ENDPOINT, token=None).dircache
    for name, entries in list(listed.items()):
        if name == root or name.startswith(f"{root}/"):
            repository.dircache.setdefault(name, entries)


def _own_shards(files: Sequence[str], options: ReadOptions) -> list[str]:
    """Return the shards of files that our own readers read; none if `datasets` must."""
    files = list(dict.fromkeys(files))
    if any(all(name.endswith(each) for name in files) for each in (parquet.EXTENSIONS, tar.EXTENSIONS)):
        return files
    images = {name for name in files if _is_image(name, options)}
    if not images or any(name not in images and posixpath.basename(name) not in METADATA_FILES for name in files):
        return []
    parent = FILES + posixpath.commonpath([posixpath.dirname(name).removeprefix(FILES) for name in files])
    folder.list_files.cache_clear()
    below = {name for name in folder.list_files(parent, options.storage) if not folder.is_hidden(name)}
    # Files of several splits in one folder: only datasets knows which is which.
    is_whole = {f"{parent}/{name}" for name in below if _is_image(name, options)} == images
    return folder.list_shards(parent, options) if is_whole else []


def _is_image(name: str, options: ReadOptions) -> bool:
    return name.rpartition(".")[2].lower() in options.image_extensions


def count_samples(shard: str, options: ReadOptions) -> int | None:
    """Return None: the number of rows is known only after reading."""
    return None


def identity(shard: str, options: ReadOptions) -> str:
    """Return a hash of the hashes that the hub gives for the files of the shard, or of its commit if it gives none."""
    uri = DatasetURI.parse(shard)
    parts: list[str] = []
    for path in _files_of(_shard_of(uri)):
        files, name = options.storage.files(path.rpartition("::")[2])
        info = FileInfo.of(files.info(name))
        parts.append(f"{path.partition('::')[0] if '::' in path else ''} {info.hash or info.state}")
    if not parts and uri.revision is None:  # of a local folder: nothing tells it from itself after a change
        parts.append(f"{uuid.uuid4()}")
    text = "\n".join(parts) or f"{uri.revision} {uri.split} {uri.shard}"
    return hashlib.sha256(f"{uri.name} {uri.split}\n{text}".encode()).hexdigest()[:32]


def read_samples(shard: str, options: ReadOptions) -> Iterator[Sample | Unreadable]:
    """Yield the rows in their order; raises ValueError if the dataset has another number of files by now."""
    uri = DatasetURI.parse(shard)
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
            rows, shard, stem, position, options, lambda path: read_image(uri.root, path, options.max_sample_bytes)
        )
        position += rows.num_rows


def _shard_of(uri: DatasetURI) -> Any:
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
def _load_builder(path: str, name: str | None, revision: str | None) -> Any:
    import datasets

    # An outage is waited for by reach.py, which says so; datasets would be silent for minutes.
    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    return datasets.load_dataset_builder(path, name, revision=revision)


@lru_cache(maxsize=2)
def _load_splits(path: str, name: str | None, revision: str | None) -> dict[str, Any]:
    return dict(_load_builder(path, name, revision).as_streaming_dataset())
