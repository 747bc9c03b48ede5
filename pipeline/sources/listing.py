"""Sources that a path names: files, folders, globs and brace patterns, at any fsspec URI.

A folder means the tars and parquets in it, or else a saved dataset, or else the tars and parquets at any depth, or else
its pictures. Brace patterns may name many thousand files, so their folders are listed once rather than each file asked
for; what a pattern names and is not there is left out.
"""

import glob
from collections.abc import Iterable
from typing import Any

from index.errors import SourceError
from index.table.storage import is_local
from pipeline.sources import folder, parquet, saved, tar
from pipeline.sources.metadata import METADATA
from pipeline.sources.sample import ReadOptions

EXTENSIONS = (*tar.EXTENSIONS, *parquet.EXTENSIONS)
MANY = 16


def list_shards(source: str, reading: ReadOptions) -> list[str]:
    """The shards behind a source, in the order of their names; none where nothing is there."""
    import braceexpand

    patterns = [source]
    if not reading.storage.exists(source):
        try:
            patterns = list(braceexpand.braceexpand(source))
        except ValueError as error:
            raise SourceError(f"{source!r} is no brace pattern: {error}") from error
    known: dict[str, set[str]] | None = {} if len(patterns) > MANY else None
    shards: list[str] = []
    for pattern in patterns:
        files, path = reading.storage.files(pattern)
        for match in _matches(files, path, known):
            uri = files.unstrip_protocol(match).removeprefix("file://")
            if uri.endswith(EXTENSIONS) and not (is_local(uri) and files.isdir(match)):
                shards.append(uri)
            elif files.isdir(match):
                shards += _list_folder(files, match, uri, reading)
            else:
                raise SourceError(f"{uri!r} is not a shard: give .tar or .parquet files (.tar.gz, .tgz), or a folder")
    return shards


def _matches(files: Any, path: str, known: dict[str, set[str]] | None) -> list[str]:
    if known is not None and path.endswith(EXTENSIONS) and not glob.has_magic(path):
        parent = path.rpartition("/")[0]
        if parent not in known:
            known[parent] = set(files.ls(parent, detail=False)) if files.isdir(parent) else set()
        return [path] if path in known[parent] else []
    return [path] if files.exists(path) else sorted(files.glob(path))


def _list_folder(files: Any, path: str, uri: str, reading: ReadOptions) -> list[str]:
    types = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["type"] for entry in files.ls(path, detail=True)}
    folders = {name for name, kind in types.items() if kind == "directory"}
    if own := _shards_among(set(types) - folders, folders):
        return [f"{uri}/{name}" for name in own]
    if saved.is_saved(uri, reading.storage):
        return saved.list_shards(uri, reading)
    folder.tree.cache_clear()
    nested = folder.tree(uri, reading.storage)
    folders = {name[:end] for name in nested for end, letter in enumerate(name) if letter == "/"}
    return [f"{uri}/{name}" for name in _shards_among(nested, folders)] or folder.list_shards(uri, reading)


def _shards_among(names: Iterable[str], folders: set[str]) -> list[str]:
    """The tars and parquets, sorted; not parquets of metadata, which lie beside a tar or folder of the same name."""
    visible = sorted(name for name in names if name.endswith(EXTENSIONS) and not folder.is_hidden(name))
    described = folders | {tar.stem(name) for name in visible if name.endswith(tar.EXTENSIONS)}
    return [
        name
        for name in visible
        if name.removesuffix(".parquet") not in described and name.rsplit("/", 1)[-1] not in METADATA
    ]
