"""Read a tar in the WebDataset / img2dataset layout: KEY.jpg, KEY.txt and KEY.json next to each other.

As in WebDataset, a key ends at the first dot of the file name, extensions are matched in lower case, and members named
`__like_this__` are skipped. A tar whose members of one key are not next to each other cannot be read as a stream: each
such sample is rejected once. tar_members.py reads the members.

img2dataset writes two files next to NNNNN.tar: NNNNN_stats.json with the number of samples, and NNNNN.parquet with the
metadata, which is used for samples that have none in the tar. If the tar holds fewer samples than they say, the others
are missed.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from pipeline.rejects import RejectReason
from pipeline.sources.columns import columns_without_bytes, encode_meta
from pipeline.sources.identity import file_identity
from pipeline.sources.sample import ReadOptions, Sample, Unreadable, path_of
from pipeline.sources.tar_members import Links, read_groups

EXTENSIONS = (".tar", ".tar.gz", ".tgz")
NOT_GROUPED = "its files are not next to each other, not grouped: sort the tar"


def strip_extension(shard: str) -> str:
    """Return a tar's name without its extension: the stem that its sidecar files share."""
    return path_of(shard).removesuffix(".tgz").removesuffix(".gz").removesuffix(".tar")


def count_samples(shard: str, options: ReadOptions) -> int | None:
    """Return the number of samples that img2dataset recorded next to the tar, or None if there is no such file."""
    stats = options.storage.read_json(f"{strip_extension(shard)}_stats.json")
    if isinstance(stats, dict):
        count = stats.get("successes", stats.get("count"))
        if isinstance(count, int):
            return count
    rows = _sidecar_table(shard, options, columns=["status"])
    if rows is None:
        return None
    return int(rows.column("status").to_pylist().count("success") if rows.num_columns else rows.num_rows)


def identity(shard: str, options: ReadOptions) -> str:
    """Return the file's hash as its store gives it, or its name, size and time of change."""
    return file_identity(shard, options)


def read_samples(shard: str, options: ReadOptions) -> Iterator[Sample | Unreadable]:
    """Yield the samples in the order of the tar; raises tarfile.ReadError if it is truncated or damaged."""
    extensions = {*options.image_extensions, *options.caption_extensions, "json"}
    refused = set[str]()
    rows: dict[str, bytes] | None = None
    with options.storage.open(shard) as file, contextlib.closing(Links(shard, extensions, options)) as links:
        for group in read_groups(file, extensions, links, options):
            key, members = group.key, group.members
            if key in refused:
                continue
            sidecar = members.get("json")
            captions = [members[name] for name in options.caption_extensions if name in members][:1]
            if not captions and sidecar is None:
                rows = _sidecar_rows(shard, options) if rows is None else rows
                sidecar = rows.get(key.rsplit("/", 1)[-1])
            found = captions or options.find_captions(sidecar)
            image = next((members[name] for name in options.image_extensions if name in members), None)
            if group.fault is not None:
                yield Unreadable(key, shard, group.fault.reason, group.fault.detail)
            elif (image is None or not found) and links.is_scattered(key):
                refused.add(key)
                yield Unreadable(key, shard, RejectReason.NOT_GROUPED, NOT_GROUPED)
            elif image is None and (detail := next(filter(None, map(options.not_opened, members)), None)):
                yield Unreadable(key, shard, RejectReason.UNSUPPORTED_FORMAT, detail)
            else:
                yield from options.samples(key, shard, image, found, sidecar)


def _sidecar_rows(shard: str, options: ReadOptions) -> dict[str, bytes]:
    """Return the rows of the parquet next to a tar as JSON, by key; none if there is no such file."""
    rows = _sidecar_table(shard, options)
    return {str(row.get("key")): encode_meta(row) for row in rows.to_pylist()} if rows is not None else {}


def _sidecar_table(shard: str, options: ReadOptions, columns: list[str] | None = None) -> Any:
    import pyarrow.parquet as pq

    path = f"{strip_extension(shard)}.parquet"
    files, name = options.storage.files(path)
    if not files.isfile(name):
        return None
    with options.storage.open(path) as file, pq.ParquetFile(file) as table:
        names = columns_without_bytes(table.schema_arrow)
        return table.read([name for name in names if columns is None or name in columns])
