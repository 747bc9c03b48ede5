"""The partitions of an IVF index: seeded k-means on a sample of the training vectors.

Lance trains its own partitions, but from a start that cannot be seeded: two builds of one table would retrieve
different neighbors. Machines that build segments of one index also share these centroids.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from index.table.schema import TRAIN
from index.table.table import Table, column_array

if TYPE_CHECKING:
    import torch

ROWS_PER_PARTITION = 256
"""Sampled rows per partition; more of them change the centroids little (faiss has the same limit)."""
ITERATIONS = 12
BLOCK_ROWS = 16_384
PARTITION_SCHEMA = pa.schema([("row_id", pa.uint64()), ("partition", pa.uint32())])
"""What Lance expects of precomputed partitions."""


def train_centroids(table: Table, num_partitions: int, *, seed: int = 0) -> Float32[np.ndarray, "P S"]:
    """Return the centroids of the training vectors' partitions; the same seed gives the same centroids."""
    import torch

    rng = np.random.default_rng([seed, num_partitions])
    sample = np.sort(rng.permutation(table.positions(TRAIN))[: num_partitions * ROWS_PER_PARTITION])
    rows = torch.from_numpy(table.take(sample, "vector").astype(np.float32)).to(fastest_device())
    assert len(rows) >= num_partitions, (len(rows), num_partitions)
    return np.asarray(k_means(rows, num_partitions, rng).cpu())


@contextmanager
def partition_file(
    table: Table, centroids: Float32[np.ndarray, "P S"], fragments: Sequence[int] | None = None
) -> Iterator[str]:
    """Write a temporary Lance file with the partition of each row of some fragments (or all) and yield its path.

    Lance would assign the rows itself, in float16 arithmetic if the vectors are float16: 150 s for a million rows of
    256 dimensions, against 8 s here (two cores; a GPU is used if there is one).
    """
    import lance
    import torch

    device = fastest_device()
    centers, dataset = torch.from_numpy(centroids).to(device), table.dataset()
    selected = None if fragments is None else [dataset.get_fragment(fragment) for fragment in fragments]

    def batches() -> Iterator[pa.RecordBatch]:
        scanner = dataset.scanner(columns=["vector"], fragments=selected, with_row_id=True, batch_size=BLOCK_ROWS)
        for batch in scanner.to_batches():
            rows = torch.from_numpy(column_array(batch["vector"]).astype(np.float32)).to(device)
            partition = nearest_centroid(rows, centers).cpu().numpy().astype(np.uint32)
            yield pa.record_batch([batch["_rowid"], pa.array(partition)], schema=PARTITION_SCHEMA)

    with TemporaryDirectory() as folder:
        path = f"{folder}/partitions.lance"
        # Lance reads one fragment in one file only.
        reader = pa.RecordBatchReader.from_batches(PARTITION_SCHEMA, batches())
        lance.write_dataset(reader, path, max_rows_per_file=2**31, max_bytes_per_file=2**40)
        yield path


def k_means(rows: "torch.Tensor", count: int, rng: np.random.Generator) -> "torch.Tensor":
    """Return `count` centroids (P D) of rows (N D) by Lloyd's algorithm; an empty cluster restarts at a random row."""
    import torch

    centroids = rows[torch.from_numpy(rng.permutation(len(rows))[:count]).to(rows.device)]
    for _ in range(ITERATIONS):
        cluster = nearest_centroid(rows, centroids)
        size = torch.bincount(cluster, minlength=count)
        total = torch.zeros_like(centroids).index_add_(0, cluster, rows)
        restart = rows[torch.from_numpy(rng.integers(len(rows), size=count)).to(rows.device)]
        centroids = torch.where(size[:, None] > 0, total / size.clamp(min=1)[:, None], restart)
    return centroids


def nearest_centroid(rows: "torch.Tensor", centroids: "torch.Tensor") -> "torch.Tensor":
    """Return the index (N) of the centroid (P D) nearest to each row (N D), the first of equally near ones."""
    import torch

    half_squares = centroids.square().sum(1) / 2
    blocks = torch.split(rows, BLOCK_ROWS)
    return torch.cat([torch.addmm(-half_squares, block, centroids.T).argmax(1) for block in blocks])


def fastest_device() -> str:
    """Return `cuda` if a GPU is available, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
