"""The partitions of an IVF index: seeded k-means on a sample of the training vectors.

Lance trains its own partitions, but from a start that cannot be seeded: two builds of one table would retrieve
different neighbors. Machines that build segments of one index also share these centroids.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Float32

from index.search.memory import held_bytes, rows_at_once
from index.table.rows import RowReader
from index.table.schema import TRAIN
from index.table.table import IO_BUFFER_BYTES, Table, column_array
from index.terminal import print_status

if TYPE_CHECKING:
    import torch

ROWS_PER_PARTITION = 256
"""Sampled rows per partition; more of them change the centroids little (faiss has the same limit)."""
FEW_ROWS_PER_PARTITION = 39
"""Sampled rows per partition below which faiss warns that the centroids will be poor."""
ITERATIONS = 12
BLOCK_ROWS = 16_384
CENTROID_COPIES = 8
"""What centroids, their sums and restarts take, in rows of the sample, which is float16."""
PARTITION_SCHEMA = pa.schema([("row_id", pa.uint64()), ("partition", pa.uint32())])
"""What Lance expects of precomputed partitions."""


def train_centroids(
    table: Table, num_partitions: int, *, seed: int = 0, memory: int | None = None
) -> Float32[np.ndarray, "P S"]:
    """Return the centroids of the training vectors' partitions; the same seed gives the same centroids.

    The sample takes at most the greater part of `memory` bytes (None: no limit).
    """
    import torch

    rng = np.random.default_rng([seed, num_partitions])
    count = num_partitions * ROWS_PER_PARTITION
    if memory is not None:
        per_row = 2 * table.meta.geometry.vector_dim
        count = max(num_partitions, min(count, held_bytes(memory) // per_row - CENTROID_COPIES * num_partitions))
    sample = np.sort(rng.permutation(table.positions(TRAIN))[:count])
    if len(sample) == count < FEW_ROWS_PER_PARTITION * num_partitions:
        print_status(
            f"warning: {num_partitions:,} partitions are trained on the {count:,} rows that fit into the memory limit, "
            f"fewer than {FEW_ROWS_PER_PARTITION} for each: raise --max-memory-gb for an index that needs fewer nprobes"
        )
    parts = [sample[start : start + BLOCK_ROWS] for start in range(0, len(sample), BLOCK_ROWS)]
    assert len(sample) >= num_partitions, (len(sample), num_partitions)
    rows = torch.empty(0)
    for start, part in zip(range(0, len(sample), BLOCK_ROWS), parts, strict=True):
        taken = torch.from_numpy(table.take(part, "vector"))
        if not start:
            rows = torch.empty((len(sample), taken.shape[1]), dtype=taken.dtype, device=fastest_device())
        rows[start : start + len(part)] = taken
    return np.asarray(k_means(rows, num_partitions, rng).cpu())


@contextmanager
def partition_file(
    table: Table,
    centroids: Float32[np.ndarray, "P S"],
    fragments: Sequence[int] | None = None,
    memory: int | None = None,
) -> Iterator[str]:
    """Write a temporary Lance file with the partition of each row of some fragments (or all) and yield its path.

    As many rows are compared at a time as `memory` bytes allow (None: 16,384).

    Lance would assign the rows itself, in float16 arithmetic if the vectors are float16: 150 s for a million rows of
    256 dimensions, against 8 s here (two cores; a GPU is used if there is one).
    """
    import lance
    import torch

    device = fastest_device()
    centers = torch.from_numpy(centroids).to(device)
    at_once = BLOCK_ROWS
    if memory is not None:
        at_once = min(at_once, rows_at_once(memory, 4 * len(centroids) + 14 * centroids.shape[1]))

    def batches() -> Iterator[pa.RecordBatch]:
        for row_ids, vectors in _numbered_vectors(table, fragments, at_once):
            partition = nearest_centroid(torch.from_numpy(vectors).to(device), centers).cpu().numpy().astype(np.uint32)
            yield pa.record_batch([row_ids, pa.array(partition)], schema=PARTITION_SCHEMA)

    with TemporaryDirectory() as folder:
        path = f"{folder}/partitions.lance"
        # Lance reads one fragment in one file only.
        reader = pa.RecordBatchReader.from_batches(PARTITION_SCHEMA, batches())
        lance.write_dataset(reader, path, max_rows_per_file=2**31, max_bytes_per_file=2**40)
        yield path


def _numbered_vectors(
    table: Table, fragments: Sequence[int] | None, at_once: int
) -> Iterator[tuple[pa.Array, Float16[np.ndarray, "B S"]]]:
    """Iterate over row ids and vectors of some fragments (None: all), at most `at_once` rows of one at a time."""
    reader, dataset = RowReader.of(table), table.dataset()
    if fragments is None and table.holds("vector") and not reader.has_deletions:
        for start, end in pairwise(reader.starts.tolist()):
            for first in range(start, end, at_once):
                rows = np.arange(first, min(first + at_once, end))
                yield pa.array(reader.row_ids(rows).astype(np.uint64)), table.take(rows, "vector")
        return
    scanner = dataset.scanner(
        columns=["vector"],
        fragments=None if fragments is None else [dataset.get_fragment(fragment) for fragment in fragments],
        with_row_id=True,
        batch_size=at_once,
        batch_readahead=1,
        io_buffer_size=IO_BUFFER_BYTES,
    )
    for batch in scanner.to_batches():
        yield batch["_rowid"], column_array(batch["vector"])


def k_means(rows: "torch.Tensor", count: int, rng: np.random.Generator) -> "torch.Tensor":
    """Return `count` centroids (P D) of rows (N D) by Lloyd's algorithm; an empty cluster restarts at a random row.

    Rows may be float16; centroids are float32.
    """
    import torch

    centroids = rows[torch.from_numpy(rng.permutation(len(rows))[:count]).to(rows.device)].float()
    for _ in range(ITERATIONS):
        cluster = nearest_centroid(rows, centroids)
        size = torch.bincount(cluster, minlength=count)
        total = torch.zeros_like(centroids)
        for block, assigned in zip(*(torch.split(each, _block_rows(count)) for each in (rows, cluster)), strict=True):
            total.index_add_(0, assigned, block.float())
        restart = rows[torch.from_numpy(rng.integers(len(rows), size=count)).to(rows.device)]
        centroids = torch.where(size[:, None] > 0, total.div_(size.clamp(min=1)[:, None]), restart)
    return centroids


def nearest_centroid(rows: "torch.Tensor", centroids: "torch.Tensor") -> "torch.Tensor":
    """Return the index (N) of the centroid (P D) nearest to each row (N D), the first of equally near ones."""
    import torch

    half_squares = centroids.square().sum(1) / 2
    blocks = torch.split(rows, _block_rows(len(centroids)))
    return torch.cat([torch.addmm(-half_squares, block.float(), centroids.T).argmax(1) for block in blocks])


def _block_rows(num_centroids: int) -> int:
    """Return how many rows to compare with centroids at a time: fewer for more of them, in at most 16 MB of scores."""
    return max(64, min(BLOCK_ROWS, 2**22 // num_centroids))


def fastest_device() -> str:
    """Return `cuda` if a GPU is available, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
