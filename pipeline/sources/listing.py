"""List the shards of a source: files, folders, globs and brace patterns at any fsspec URI, or a dataset of the hub.

A folder means the first of these that it has: tars and parquets directly in it; a saved dataset; tars and parquets
at any depth; images. What a pattern names and does not exist is skipped.
"""

import glob
from collections.abc import Iterable, Sequence
from typing import Any

from index.errors import SourceError, one_line
from index.table.storage import is_local
from pipeline.sources import folder, hub, parquet, saved, tar
from pipeline.sources.sample import ReadOptions

EXTENSIONS = (*tar.EXTENSIONS, *parquet.EXTENSIONS)
STORE_PACKAGES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "s3fs")
"""Packages whose own exceptions mean that an object store cannot be reached or denies access."""
MAX_LOOKUPS = 16
"""A brace pattern of more names lists the names' folders instead of looking up each name."""


def list_shards(sources: Sequence[str], options: ReadOptions | None = None) -> list[str]:
    """Return the shards of all sources, in order and without repeats; raises SourceError if a source has none."""
    options = options or ReadOptions()
    shards: dict[str, None] = {}
    for source in sources:
        list_one = hub.list_shards if source.startswith(hub.SCHEME) else _list_paths
        try:
            matches = list_one(source, options)
        except Exception as error:
            if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in STORE_PACKAGES:
                raise
            raise SourceError(
                f"{source!r} cannot be listed ({one_line(error, typed=True)}): check the path, your access rights and "
                "--storage-option"
            ) from error
        if not matches:
            raise SourceError(
                f"no shards at {source!r}: use .tar or .parquet files, a folder of them or of images, a pattern such "
                "as 'data/{00000..00009}.tar', or hf:NAME"
            )
        shards |= dict.fromkeys(matches)
    return list(shards)


def _list_paths(source: str, options: ReadOptions) -> list[str]:
    """Return the shards of a path or pattern, in the order of their names; none if nothing exists there."""
    import braceexpand

    patterns = [source]
    if not options.storage.exists(source):
        try:
            patterns = list(braceexpand.braceexpand(source))
        except ValueError as error:
            raise SourceError(
                f"{source!r} is not a brace pattern ({one_line(error)}): use for instance 'data/{{00000..00009}}.tar'"
            ) from error
    listings: dict[str, set[str]] | None = {} if len(patterns) > MAX_LOOKUPS else None
    shards: list[str] = []
    for pattern in patterns:
        files, path = options.storage.files(pattern)
        for match in _existing(files, path, listings):
            uri = files.unstrip_protocol(match).removeprefix("file://")
            if uri.endswith(EXTENSIONS) and not (is_local(uri) and files.isdir(match)):
                shards.append(uri)
            elif files.isdir(match):
                shards += _list_folder(files, match, uri, options)
            else:
                raise SourceError(f"{uri!r} is not a shard: use .tar, .tar.gz, .tgz or .parquet files, or a folder")
    return shards


def _existing(files: Any, path: str, listings: dict[str, set[str]] | None) -> list[str]:
    """Return the paths that a path or glob names, looked up in the `listings` of their folders if these are kept."""
    if listings is not None and path.endswith(EXTENSIONS) and not glob.has_magic(path):
        parent = path.rpartition("/")[0]
        if parent not in listings:
            listings[parent] = set(files.ls(parent, detail=False)) if files.isdir(parent) else set()
        return [path] if path in listings[parent] else []
    return [path] if files.exists(path) else sorted(files.glob(path))


def _list_folder(files: Any, path: str, uri: str, options: ReadOptions) -> list[str]:
    types = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["type"] for entry in files.ls(path, detail=True)}
    folders = {name for name, entry_type in types.items() if entry_type == "directory"}
    if direct := _shards_among(set(types) - folders, folders):
        return [f"{uri}/{name}" for name in direct]
    if saved.is_saved_dataset(uri, options.storage):
        return saved.list_shards(uri, options)
    folder.list_files.cache_clear()
    nested = folder.list_files(uri, options.storage)
    folders = {name[:end] for name in nested for end, letter in enumerate(name) if letter == "/"}
    return [f"{uri}/{name}" for name in _shards_among(nested, folders)] or folder.list_shards(uri, options)


def _shards_among(names: Iterable[str], folders: set[str]) -> list[str]:
    """Return the tars and parquets, sorted, without the parquets that hold the metadata of a tar or folder."""
    visible = sorted(name for name in names if name.endswith(EXTENSIONS) and not folder.is_hidden(name))
    with_metadata = folders | {tar.strip_extension(name) for name in visible if name.endswith(tar.EXTENSIONS)}
    return [
        name
        for name in visible
        if name.removesuffix(".parquet") not in with_metadata and name.rsplit("/", 1)[-1] not in folder.METADATA_FILES
    ]
