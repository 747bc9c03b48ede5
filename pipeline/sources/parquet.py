"""Read a parquet file whose rows hold image bytes: plain, or Hugging Face's struct{bytes, path}.

It is read page by page, because a row group may be larger than memory (pyarrow's `pre_buffer` would load it whole). A
path without bytes is a missing image: it names a file on the machine that wrote the parquet. Of a parquet on the hub it
may name a file of the same dataset.
"""

from collections.abc import Iterator
from typing import Any

from index.table.storage import is_local
from pipeline.sources.columns import ROWS_PER_READ, Columns, ReadFile
from pipeline.sources.dataset_images import read_image
from pipeline.sources.hub import repository_of
from pipeline.sources.identity import file_identity
from pipeline.sources.sample import ReadOptions, Sample, Unreadable, path_of

EXTENSIONS = (".parquet",)
BUFFER_BYTES = 1 << 20
REMOTE_BUFFER_BYTES = 8 << 20
"""Bytes of each column that one request reads, of a file on this machine and of one elsewhere."""


def count_samples(shard: str, options: ReadOptions) -> int | None:
    """Return the number of rows, from the file's footer."""
    import pyarrow.parquet as pq

    with _open(shard, options) as file, pq.ParquetFile(file) as table:
        return int(table.metadata.num_rows)


def identity(shard: str, options: ReadOptions) -> str:
    """Return the file's hash as its store gives it, or its name, size and time of change."""
    return file_identity(shard, options)


def read_samples(shard: str, options: ReadOptions) -> Iterator[Sample | Unreadable]:
    """Yield the rows in their order."""
    import pyarrow.parquet as pq

    stem = path_of(shard).rsplit("/", 1)[-1].removesuffix(".parquet")
    buffer_size = BUFFER_BYTES if is_local(shard) else REMOTE_BUFFER_BYTES
    with _open(shard, options) as file, pq.ParquetFile(file, buffer_size=buffer_size, pre_buffer=False) as table:
        columns = Columns.of(table.schema_arrow, options)
        position = 0
        for batch in table.iter_batches(batch_size=ROWS_PER_READ, columns=columns.names):
            yield from columns.samples(batch, shard, stem, position, options, _read_file(shard, options))
            position += batch.num_rows


def _read_file(shard: str, options: ReadOptions) -> ReadFile | None:
    root = repository_of(shard)
    return None if root is None else lambda path: read_image(root, path, options.max_sample_bytes)


def _open(shard: str, options: ReadOptions) -> Any:
    """Open a file so that only those of its bytes are fetched that are asked for: fsspec reads megabytes ahead."""
    files, path = options.storage.files(shard)
    return files.open(path, "rb") if is_local(shard) else files.open(path, "rb", cache_type="none")
