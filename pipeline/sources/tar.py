"""A tar in the WebDataset / img2dataset layout: KEY.jpg, KEY.txt and KEY.json one after the other.

Members are read with `tarfile` rather than webdataset's iterator: both stop without a word at a damaged header or where
the file was cut between two members, and only here that place can be looked at. Every archive ends with a block of
zeros; where it does not, the last sample may lack a member and is not given. As in webdataset a key ends at the first
dot, endings are taken in lower case, and members named `__like_this__` are left out.

Beside img2dataset's NNNNN.tar lie NNNNN_stats.json, which says how many samples there are, and NNNNN.parquet, which has
the metadata of samples that carry none in the tar.
"""

import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from pipeline.sources.arrow_types import plain_names
from pipeline.sources.columns import encode_meta
from pipeline.sources.sample import ReadOptions, Sample, Unreadable

EXTENSIONS = (".tar", ".tar.gz", ".tgz")
MEMBER = re.compile(r"(?P<key>(?:.*/|)[^./]+)\.(?P<ending>[^/]+)", re.DOTALL)
SPECIAL = re.compile(r"__[^/]*__($|/)")


def stem(shard: str) -> str:
    """The name without its ending, which files beside it share."""
    return shard.removesuffix(".tgz").removesuffix(".gz").removesuffix(".tar")


def count_samples(shard: str, reading: ReadOptions) -> int | None:
    """As img2dataset wrote it down beside the tar."""
    stats = reading.storage.read_json(f"{stem(shard)}_stats.json")
    if isinstance(stats, dict):
        counted = stats.get("successes", stats.get("count"))
        if isinstance(counted, int):
            return counted
    rows = _rows_beside(shard, reading, columns=["status"])
    if rows is None:
        return None
    return int(rows.column("status").to_pylist().count("success") if rows.num_columns else rows.num_rows)


def read_samples(shard: str, reading: ReadOptions) -> Iterator[Sample | Unreadable]:
    """The samples in the order of the tar."""
    wanted = {*reading.image_extensions, *reading.caption_extensions, "json"}
    rows: dict[str, bytes] | None = None
    with reading.storage.open(shard) as file:
        for key, members in _groups(_Watched(file), wanted):
            image = next((members[ending] for ending in reading.image_extensions if ending in members), None)
            caption = next((members[ending] for ending in reading.caption_extensions if ending in members), None)
            sidecar = members.get("json")
            if caption is None and sidecar is None:
                rows = _metadata_beside(shard, reading) if rows is None else rows
                sidecar = rows.get(key.rsplit("/", 1)[-1])
            if caption is None:
                caption = reading.caption_of(sidecar)
            yield Sample(key, shard, image, caption, b"{}" if sidecar is None else sidecar)


class _Watched:
    """The uncompressed bytes of a tar, of which the last few blocks are kept."""

    def __init__(self, file: Any) -> None:
        import gzip

        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        self._file = gzip.GzipFile(fileobj=file) if zipped else file
        self._kept, self._end = b"", 0

    def read(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        self._kept, self._end = (self._kept + data)[-2 * tarfile.RECORDSIZE :], self._end + len(data)
        return data

    def block(self, offset: int) -> bytes:
        start = offset - (self._end - len(self._kept))
        return self._kept[start : start + tarfile.BLOCKSIZE]


def _groups(file: _Watched, wanted: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Consecutive members of one key; an ending that comes again begins a new group."""
    key, group = "", dict[str, bytes]()
    try:
        with tarfile.open(fileobj=file, mode="r|") as tar:  # type: ignore[call-overload]
            for info in tar:
                tar.members = []  # or every header would stay in memory
                name = info.name.removeprefix("./")
                member = MEMBER.fullmatch(name)
                if member is None or not info.isreg() or SPECIAL.match(name):
                    continue
                ending = member["ending"].lower()
                if group and (member["key"] != key or ending in group):
                    yield key, group
                    group = {}
                key = member["key"]
                data = tar.extractfile(info)
                group[ending] = data.read() if data is not None and ending in wanted else b""
            if file.block(tar.offset) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"cut off or damaged at byte {tar.offset:,}")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        lost = f"; {key!r} may be incomplete and is left out" if key else ""
        raise tarfile.ReadError(f"{error}{lost}") from error
    if group:
        yield key, group


def _metadata_beside(shard: str, reading: ReadOptions) -> dict[str, bytes]:
    rows = _rows_beside(shard, reading)
    return {str(row.get("key")): encode_meta(row) for row in rows.to_pylist()} if rows is not None else {}


def _rows_beside(shard: str, reading: ReadOptions, columns: list[str] | None = None) -> Any:
    import pyarrow.parquet as pq

    path = f"{stem(shard)}.parquet"
    if not reading.storage.exists(path):
        return None
    with reading.storage.open(path) as file, pq.ParquetFile(file) as table:
        names = plain_names(table.schema_arrow)
        return table.read([name for name in names if columns is None or name in columns])
