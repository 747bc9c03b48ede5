"""List the shards of a source: files, folders, globs and brace patterns at any fsspec URI, or a dataset of the hub.

A folder means the first of these that it has: tars and parquets directly in it; a saved dataset; tars and parquets
at any depth; images. What a pattern names and does not exist is skipped. `passed_over` counts the files of folders that
are not read.
"""

import contextlib
import glob
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from index.background import look_up
from index.errors import SourceError
from index.reach import describe, is_out_of_reach, retried, status_of
from index.table.storage import is_local
from pipeline.sources import folder, hub, parquet, saved, streamed, tar
from pipeline.sources.metadata import METADATA_FILES
from pipeline.sources.sample import ReadOptions, path_of

EXTENSIONS = (*tar.EXTENSIONS, *parquet.EXTENSIONS)
HTTP = ("http://", "https://")
MAX_LOOKUPS = 16
"""A brace pattern of more names lists the names' folders instead of looking up each name."""


def list_shards(sources: Sequence[str], options: ReadOptions | None = None) -> list[str]:
    """Return the shards of all sources, in order and without repeats; raises SourceError if a source has none."""
    options = options or ReadOptions()
    shards: dict[str, None] = {}
    hub.forget()
    for source in sources:
        with _listing(source):
            list_source = streamed.list_shards if hub.is_dataset(source) else _list_paths
            if source.startswith(hub.SCHEME):
                matches = retried(path_of(source), partial(list_source, source, options))
            else:
                matches = list_source(source, options)
        if not matches:
            if not source.startswith(hub.SCHEME):
                options.storage.check_bucket(source)
            raise SourceError(
                f"no shards at {path_of(source)!r}: use .tar or .parquet files, a folder of them or of images, a "
                "pattern such as 'data/{00000..00009}.tar', or hf:NAME"
            )
        shards |= dict.fromkeys(matches)
    return list(shards)


def passed_over(sources: Sequence[str], options: ReadOptions | None = None) -> dict[str, int]:
    """Return how many files of the sources' folders are not read, by extension, the most frequent first.

    Hidden files and links to folders, which are not followed, are counted as `hidden` and `link`.
    """
    options = options or ReadOptions()
    counts: Counter[str] = Counter()
    for source in sources:
        if hub.is_dataset(source):
            continue
        with _listing(source):
            for files, path, uri in _matches(source, options):
                if not _is_shard(files, path, uri):
                    used = _used_files(files, path, uri, options)
                    listed = folder.list_files(uri, options.storage)
                    counts.update(_kind(name, info.is_link) for name, info in listed.items() if name not in used)
    return dict(counts.most_common())


@contextlib.contextmanager
def _listing(source: str) -> Iterator[None]:
    """Raise SourceError for whatever a store answers while a source is listed, and for an address of a web page."""
    if (as_source := hub.from_web_address(source)) is not None:
        raise SourceError(f"{path_of(source)!r} is a page of the hub: a dataset of it is '{as_source}'")
    try:
        yield
    except Exception as error:
        if isinstance(error, SourceError) or not (isinstance(error, OSError) or is_out_of_reach(error)):
            raise
        raise SourceError(
            f"{path_of(source)!r} cannot be listed ({describe(error)}): check the path, your access rights and "
            "--storage-option"
        ) from error


def _kind(name: str, is_link: bool) -> str:
    if folder.is_hidden(name):
        return "hidden"
    base = posixpath.basename(name).lower()
    extension = next((each for each in tar.EXTENSIONS if base.endswith(each)), posixpath.splitext(base)[1])
    return "link" if is_link and not extension else extension or "no extension"


def _list_paths(source: str, options: ReadOptions) -> list[str]:
    """Return the shards of a path or pattern, in the order of their names; none if nothing exists there."""
    shards: list[str] = []
    for files, path, uri in _matches(source, options):
        if _is_shard(files, path, uri):
            shards.append(uri)
        elif files.isdir(path):
            shards += _list_folder(files, path, uri, options)
        else:
            name = path_of(uri)
            raise SourceError(f"{name!r} is not a shard: use .tar, .tar.gz, .tgz or .parquet files, or a folder")
    return shards


def _is_shard(files: Any, path: str, uri: str) -> bool:
    return path_of(uri).endswith(EXTENSIONS) and not (is_local(uri) and files.isdir(path))


def _matches(source: str, options: ReadOptions) -> Iterator[tuple[Any, str, str]]:
    """Yield the file system, path and URI of what a path or pattern names."""
    import braceexpand

    patterns, is_hub = [source], source.startswith(hub.FILES)
    if "{" in source and (is_hub or not options.storage.exists(source)):
        try:
            patterns = list(braceexpand.braceexpand(source))
        except ValueError as error:
            raise SourceError(
                f"{source!r} is not a brace pattern ({describe(error)}): use for instance 'data/{{00000..00009}}.tar'"
            ) from error
    if source.startswith(HTTP) and not glob.has_magic(path_of(source).replace("?", "")):
        yield from _http_files(patterns, options)
        return
    listings: dict[str, set[str]] | None = {} if is_hub or len(patterns) > MAX_LOOKUPS else None
    for pattern in map(hub.pinned_uri, patterns):
        files, path = options.storage.files(pattern)
        for match in _existing(files, path, listings):
            yield files, match, files.unstrip_protocol(match).removeprefix("file://")


def _http_files(urls: Sequence[str], options: ReadOptions) -> Iterator[tuple[Any, str, str]]:
    """Yield those of many URLs that exist; a web server has no listings to look them up in.

    Raises the server's error if it answers anything but that a file is there or not.
    """

    def exists(url: str) -> bool:
        files, path = options.storage.files(url)
        try:
            retried(path_of(url), lambda: files.info(path))
        except FileNotFoundError as error:
            if status_of(error) in (404, 410):
                return False
            raise
        return True

    found = list(look_up(exists, urls))
    for url, is_there in zip(urls, found, strict=True):
        if is_there:
            yield *options.storage.files(url), url


def _existing(files: Any, path: str, listings: dict[str, set[str]] | None) -> list[str]:
    """Return the paths that a path or glob names, looked up in the `listings` of their folders if these are kept."""
    if listings is not None and path.endswith(EXTENSIONS) and not glob.has_magic(path):
        parent = path.rpartition("/")[0]
        if parent not in listings:
            listings[parent] = set(files.ls(parent, detail=False)) if files.isdir(parent) else set()
        return [path] if path in listings[parent] else []
    return [path] if files.exists(path) else sorted(files.glob(path))


def _list_folder(files: Any, path: str, uri: str, options: ReadOptions) -> list[str]:
    folder.list_files.cache_clear()
    if direct := _direct_shards(files, path):
        return [f"{uri}/{name}" for name in direct]
    if saved.is_saved_dataset(uri, options.storage):
        return saved.list_shards(uri, options)
    return [f"{uri}/{name}" for name in _nested_shards(uri, options)] or folder.list_shards(uri, options)


def _used_files(files: Any, path: str, uri: str, options: ReadOptions) -> set[str]:
    """Return the files of a folder that its shards consist of."""
    shards = _direct_shards(files, path)
    if not shards and saved.is_saved_dataset(uri, options.storage):
        listed = folder.list_files(uri, options.storage)
        return {name for name in listed if name.endswith((".arrow", *saved.DATASET_FILES, saved.DATASET_DICT_FILE))}
    shards = shards or _nested_shards(uri, options)
    if not shards:
        return folder.used_files(uri, options)
    stems = {tar.strip_extension(name) for name in shards if name.endswith(tar.EXTENSIONS)}
    return {*shards, *(f"{stem}{end}" for stem in stems for end in (".parquet", "_stats.json"))}


def _direct_shards(files: Any, path: str) -> list[str]:
    types = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["type"] for entry in files.ls(path, detail=True)}
    folders = {name for name, entry_type in types.items() if entry_type == "directory"}
    return _shards_among(set(types) - folders, folders)


def _nested_shards(uri: str, options: ReadOptions) -> list[str]:
    nested = folder.list_files(uri, options.storage)
    folders = {name[:end] for name in nested for end, letter in enumerate(name) if letter == "/"}
    return _shards_among(nested, folders)


def _shards_among(names: Iterable[str], folders: set[str]) -> list[str]:
    """Return the tars and parquets, sorted, without the parquets that hold the metadata of a tar or folder."""
    visible = sorted(name for name in names if name.endswith(EXTENSIONS) and not folder.is_hidden(name))
    with_metadata = folders | {tar.strip_extension(name) for name in visible if name.endswith(tar.EXTENSIONS)}
    return [
        name
        for name in visible
        if name.removesuffix(".parquet") not in with_metadata and name.rsplit("/", 1)[-1] not in METADATA_FILES
    ]
