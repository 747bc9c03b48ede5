"""Read a tar in the WebDataset / img2dataset layout: KEY.jpg, KEY.txt and KEY.json next to each other.

As in WebDataset, a key ends at the first dot of the file name, extensions are matched in lower case, and members named
`__like_this__` are skipped. Members are read with `tarfile` rather than webdataset's iterator, because both end
silently at a damaged header and at a cut between two members, and only with `tarfile` the end can be checked: an
archive ends with a block of zeros. If there is none, the last sample may lack a member and is not yielded.

img2dataset writes two files next to NNNNN.tar: NNNNN_stats.json with the number of samples, and NNNNN.parquet with the
metadata, which is used for samples that have none in the tar.
"""

import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from pipeline.sources.columns import columns_without_bytes, encode_meta
from pipeline.sources.sample import ReadOptions, Sample, Unreadable

EXTENSIONS = (".tar", ".tar.gz", ".tgz")
MEMBER = re.compile(r"(?P<key>(?:.*/|)[^./]+)\.(?P<extension>[^/]+)", re.DOTALL)
SPECIAL = re.compile(r"__[^/]*__($|/)")


def strip_extension(shard: str) -> str:
    """Return a tar's name without its extension: the stem that its sidecar files share."""
    return shard.removesuffix(".tgz").removesuffix(".gz").removesuffix(".tar")


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


def read_samples(shard: str, options: ReadOptions) -> Iterator[Sample | Unreadable]:
    """Yield the samples in the order of the tar; raises tarfile.ReadError if it is truncated or damaged."""
    extensions = {*options.image_extensions, *options.caption_extensions, "json"}
    rows: dict[str, bytes] | None = None
    with options.storage.open(shard) as file:
        for key, members in _group_by_key(_TarBytes(file), extensions):
            image = _first_member(members, options.image_extensions)
            caption = _first_member(members, options.caption_extensions)
            sidecar = members.get("json")
            if caption is None and sidecar is None:
                rows = _sidecar_rows(shard, options) if rows is None else rows
                sidecar = rows.get(key.rsplit("/", 1)[-1])
            if caption is None:
                caption = options.find_caption(sidecar)
            yield Sample(key, shard, image, caption, b"{}" if sidecar is None else sidecar)


class _TarBytes:
    """The uncompressed bytes of a tar, of which the last two records are kept for a look at its end."""

    def __init__(self, file: Any) -> None:
        import gzip

        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        self._file = gzip.GzipFile(fileobj=file) if is_gzip else file
        self._tail, self._end = b"", 0

    def read(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        self._tail, self._end = (self._tail + data)[-2 * tarfile.RECORDSIZE :], self._end + len(data)
        return data

    def block(self, offset: int) -> bytes:
        """Return the block at a byte offset in the tail."""
        start = offset - (self._end - len(self._tail))
        return self._tail[start : start + tarfile.BLOCKSIZE]


def _first_member(members: dict[str, bytes], extensions: tuple[str, ...]) -> bytes | None:
    return next((members[extension] for extension in extensions if extension in members), None)


def _group_by_key(file: _TarBytes, extensions: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield consecutive members of one key, by extension; a repeated extension begins a new group.

    Only members with one of the `extensions` are read, the others are empty.
    """
    key, group = "", dict[str, bytes]()
    try:
        with tarfile.open(fileobj=file, mode="r|") as tar:  # type: ignore[call-overload]
            for info in tar:
                tar.members = []  # or the headers of all members would stay in memory
                name = info.name.removeprefix("./")
                member = MEMBER.fullmatch(name)
                if member is None or not info.isreg() or SPECIAL.match(name):
                    continue
                extension = member["extension"].lower()
                if group and (member["key"] != key or extension in group):
                    yield key, group
                    group = {}
                key = member["key"]
                data = tar.extractfile(info)
                group[extension] = data.read() if data is not None and extension in extensions else b""
            if file.block(tar.offset) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"truncated or damaged at byte {tar.offset:,}")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        lost = f"; sample {key!r} may be incomplete and is skipped" if key else ""
        raise tarfile.ReadError(f"{error}{lost}") from error
    if group:
        yield key, group


def _sidecar_rows(shard: str, options: ReadOptions) -> dict[str, bytes]:
    """Return the rows of the parquet next to a tar as JSON, by key; none if there is no such file."""
    rows = _sidecar_table(shard, options)
    return {str(row.get("key")): encode_meta(row) for row in rows.to_pylist()} if rows is not None else {}


def _sidecar_table(shard: str, options: ReadOptions, columns: list[str] | None = None) -> Any:
    import pyarrow.parquet as pq

    path = f"{strip_extension(shard)}.parquet"
    if not options.storage.exists(path):
        return None
    with options.storage.open(path) as file, pq.ParquetFile(file) as table:
        names = columns_without_bytes(table.schema_arrow)
        return table.read([name for name in names if columns is None or name in columns])
