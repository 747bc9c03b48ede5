"""A parquet file with image bytes: raw, or Hugging Face's struct{bytes, path}.

Read page by page, so that a row group may be larger than memory (pyarrow's own `pre_buffer` would load it whole). A
path without bytes is a missing picture: it names a file of the machine that wrote it.
"""

from collections.abc import Iterator

from pipeline.sources.columns import ROWS, Columns
from pipeline.sources.sample import ReadOptions, Sample, Unreadable

EXTENSIONS = (".parquet",)
BUFFER = 1 << 20
"""Bytes of each column that are asked for at once."""


def count_samples(shard: str, reading: ReadOptions) -> int | None:
    """The number of rows, from the file's footer."""
    import pyarrow.parquet as pq

    with reading.storage.open(shard) as file, pq.ParquetFile(file) as table:
        return int(table.metadata.num_rows)


def read_samples(shard: str, reading: ReadOptions) -> Iterator[Sample | Unreadable]:
    """The rows in their order."""
    import pyarrow.parquet as pq

    stem = shard.rsplit("/", 1)[-1].removesuffix(".parquet")
    with reading.storage.open(shard) as file, pq.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False) as table:
        columns = Columns.of(table.schema_arrow, reading)
        number = 0
        for batch in table.iter_batches(batch_size=ROWS, columns=columns.names):
            yield from columns.samples(batch, shard, stem, number)
            number += batch.num_rows
