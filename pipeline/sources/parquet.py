"""Read a parquet file whose rows hold image bytes: plain, or Hugging Face's struct{bytes, path}.

It is read page by page, because a row group may be larger than memory (pyarrow's `pre_buffer` would load it whole). A
path without bytes is a missing image: it names a file on the machine that wrote the parquet.
"""

from collections.abc import Iterator

from pipeline.sources.columns import ROWS_PER_READ, Columns
from pipeline.sources.identity import file_identity
from pipeline.sources.sample import ReadOptions, Sample, Unreadable, path_of

EXTENSIONS = (".parquet",)
BUFFER_BYTES = 1 << 20
"""Bytes of each column that one request reads."""


def count_samples(shard: str, options: ReadOptions) -> int | None:
    """Return the number of rows, from the file's footer."""
    import pyarrow.parquet as pq

    with options.storage.open(shard) as file, pq.ParquetFile(file) as table:
        return int(table.metadata.num_rows)


def identity(shard: str, options: ReadOptions) -> str:
    """Return the file's hash as its store gives it, or its name, size and time of change."""
    return file_identity(shard, options)


def read_samples(shard: str, options: ReadOptions) -> Iterator[Sample | Unreadable]:
    """Yield the rows in their order."""
    import pyarrow.parquet as pq

    stem = path_of(shard).rsplit("/", 1)[-1].removesuffix(".parquet")
    with options.storage.open(shard) as file, pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False) as table:
        columns = Columns.of(table.schema_arrow, options)
        position = 0
        for batch in table.iter_batches(batch_size=ROWS_PER_READ, columns=columns.names):
            yield from columns.samples(batch, shard, stem, position, options)
            position += batch.num_rows
