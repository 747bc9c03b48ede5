"""What of a source a table does not have yet: the identity of shards, compared with those of the table's ledger.

A shard is skipped if the ledger says that the same content was read to its end under the same options. Its folder may
be another one. Every other shard is read, and its samples are compared with the table's rows (present.py).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlencode

from index.table.ledger import LedgerEntry
from index.table.storage import Storage
from pipeline.sources.hub import SCHEME
from pipeline.sources.listing import EXTENSIONS
from pipeline.sources.ranges import SampleRange
from pipeline.sources.sample import ReadOptions

LOOKUP_THREADS = 16
RANGE = re.compile(r"#\d+-\d+$")
TIMES = ("ETag", "etag", "mtime", "last_modified", "LastModified", "created", "updated")
"""What file systems call the version of a file, best first."""
WRITTEN = (".lance", ".encode", ".reports", ".lock")
"""Ends of the names of what an encode run writes."""


def shard_identity(shard: str, options: ReadOptions) -> str:
    """Return what tells a shard's content from other content, without reading it; empty if it cannot be looked up.

    A file has its size, with its ETag on an object store and its time of change otherwise. A range of a folder has the
    names, sizes and times of all of the folder's files.
    """
    storage = options.storage
    try:
        if shard.startswith(SCHEME):
            path = shard.removeprefix(SCHEME).rpartition("?")[0]
            # On the hub the name of a shard has the commit in it.
            return f"{_folder_identity(path, storage)} {shard}" if os.path.isdir(path) else shard
        if shard.endswith(EXTENSIONS):
            files, path = storage.files(shard)
            return _file_identity(files.info(path))
        sample_range = SampleRange.parse(shard)
        listing = _folder_identity(sample_range.folder, storage)
        return f"{listing} {sample_range.start}-{sample_range.stop}" if listing else ""
    except Exception:  # every file system has errors of its own; reading the shard reports them
        return ""


def shard_identities(shards: Sequence[str], options: ReadOptions) -> list[str]:
    """Return the identities of shards as of now."""
    _folder_identity.cache_clear()
    with ThreadPoolExecutor(LOOKUP_THREADS) as pool:
        return list(pool.map(lambda shard: shard_identity(shard, options), shards))


def shards_to_read(
    shards: Sequence[str], identities: Sequence[str], entries: Iterable[LedgerEntry], options: str
) -> list[str]:
    """Return the shards that no run of the ledger has read to their end under these options."""
    known = {_content(each.shard, each.identity) for each in entries if each.complete and each.options == options}
    return [
        shard
        for shard, identity in zip(shards, identities, strict=True)
        if not identity or _content(shard, identity) not in known
    ]


def source_of(shard: str) -> tuple[str, int]:
    """Return what a shard is a part of, a file, folder or dataset, and the position at which the part ends."""
    if shard.startswith(SCHEME):
        path, _, query = shard.rpartition("?")
        parameters = {name: value for name, value in parse_qsl(query) if name not in ("revision", "shard")}
        return f"{path}?{urlencode(parameters)}", 0
    if RANGE.search(shard):
        sample_range = SampleRange.parse(shard)
        return sample_range.folder, sample_range.stop
    return shard, 0


def _content(shard: str, identity: str) -> tuple[str, str]:
    # Files of one size and time are common, for instance after `tar -x`, so that the name of the file counts too.
    return "" if shard.startswith(SCHEME) else shard.rstrip("/").rsplit("/", 1)[-1], identity


def _file_identity(info: dict[str, Any]) -> str:
    if isinstance(info.get("mtime"), float) and "ino" in info:
        return f"{info['size']} bytes, mtime {os.stat(info['name']).st_mtime_ns}"
    version = next((info[name] for name in TIMES if info.get(name)), "")
    return f"{info['size']} bytes, {version}" if version else ""


@lru_cache(maxsize=64)
def _folder_identity(folder: str, storage: Storage) -> str:
    files, path = storage.files(folder)
    start = len(path.rstrip("/")) + 1
    listing = [
        (name[start:], _file_identity(info))
        for name, info in sorted(files.find(path, detail=True).items())
        # The table that is being written may be in the folder of its own source.
        if not any(part.endswith(WRITTEN) for part in name[start:].split("/"))
    ]
    if not all(identity for _, identity in listing):
        return ""
    return hashlib.sha256(json.dumps(listing).encode("utf-8", "surrogatepass")).hexdigest()[:32]
