"""What the versions of a table share in one process: caches of metadata and indexes, and columns held in memory.

A command that needs rows again and again reads their columns once, if they fit. A column counts as held in every
version that has it in the same files, with the same rows deleted.
"""

import hashlib
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    import lance
    import lancedb

REMOTE_BYTES = 2**29
"""Columns of a table on an object store that a process of training or evaluation holds."""
TEXT_BYTES = 256
"""What a value of variable length is taken for."""


class Shared:
    """Caches and columns of all versions of one table."""

    def __init__(self) -> None:
        import lance

        self.lance = lance.Session()
        self._lancedb: dict[int | None, lancedb.Session] = {}
        self._columns: dict[str, tuple[str, Any]] = {}

    def lancedb(self, cache_bytes: int | None = None) -> "lancedb.Session":
        """Return LanceDB's caches that keep at most `cache_bytes` of indexes; None is its default, 6 GiB."""
        import lancedb

        if cache_bytes not in self._lancedb:
            size = {} if cache_bytes is None else {"index_cache_size_bytes": cache_bytes}
            self._lancedb[cache_bytes] = lancedb.Session(**size)
        return self._lancedb[cache_bytes]

    def column(self, name: str, digest: str) -> Any:
        """Return what was kept of the column with this digest, None if nothing was."""
        kept, content = self._columns.get(name, ("", None))
        return content if kept == digest else None

    def keep(self, name: str, digest: str, content: Any) -> None:
        """Keep what was read of a column, in place of what was read of it in other versions."""
        self._columns[name] = digest, content


def column_digest(dataset: "lance.LanceDataset", name: str) -> str:
    """Return what tells the content of a column, row after row, from that in other versions, from metadata alone."""
    number = next((field.id() for field in dataset.lance_schema.fields() if field.name() == name), None)
    digest = hashlib.sha256()
    for fragment in dataset.get_fragments():
        meta = fragment.metadata
        files = [file.path for file in meta.files if number in file.fields]
        digest.update(repr((meta.id, files, meta.physical_rows, meta.deletion_file, meta.overlays)).encode())
    return digest.hexdigest()


def value_bytes(kind: pa.DataType) -> int:
    """Return what a value of a column takes in memory, about."""
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size * kind.value_type.bit_width // 8)
    return int(kind.byte_width) if pa.types.is_fixed_size_binary(kind) else TEXT_BYTES
