"""The partitions of an IVF index: seeded k-means on a sample of the training vectors.

Lance trains its own, but from a start that cannot be seeded: two builds of one table would find different neighbors.
Several machines that build parts of one index share these as well.
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
"""Sampled for each partition; more change centroids little (faiss stops there too)."""
ITERATIONS = 12
BLOCK = 16_384
ASSIGNED = pa.schema([("row_id", pa.uint64()), ("partition", pa.uint32())])
"""As Lance reads it."""


def train_partitions(table: Table, count: int, *, seed: int = 0) -> Float32[np.ndarray, "P S"]:
    """Centroids of `count` partitions by Lloyd's iterations; a partition that loses its rows starts at another row."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = np.random.default_rng([seed, count])
    offsets = table.positions(TRAIN)
    chosen = np.sort(rng.permutation(offsets)[: count * ROWS_PER_PARTITION])
    rows = torch.from_numpy(table.take(chosen, "vector").astype(np.float32)).to(device)
    assert len(rows) >= count, (len(rows), count)
    return np.asarray(lloyd(rows, count, rng).cpu())


@contextmanager
def assigned(
    table: Table, centroids: Float32[np.ndarray, "P S"], fragments: Sequence[int] | None = None
) -> Iterator[str]:
    """The path of a file that tells Lance the partition of each row, of some fragments or all.

    Lance would find them itself, in float16 arithmetic where the vectors are float16: 150 s for a million rows of 256,
    here 8 s (two cores; a GPU is used where there is one).
    """
    import lance
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    centers, dataset = torch.from_numpy(centroids).to(device), table.dataset()
    some = None if fragments is None else [dataset.get_fragment(number) for number in fragments]

    def batches() -> Iterator[pa.RecordBatch]:
        scanner = dataset.scanner(columns=["vector"], fragments=some, with_row_id=True, batch_size=BLOCK)
        for batch in scanner.to_batches():
            rows = torch.from_numpy(column_array(batch["vector"]).astype(np.float32)).to(device)
            owner = owners(rows, centers).cpu().numpy().astype(np.uint32)
            yield pa.record_batch([batch["_rowid"], pa.array(owner)], schema=ASSIGNED)

    with TemporaryDirectory() as folder:
        path = f"{folder}/partitions.lance"
        # Lance wants one fragment in one file.
        reader = pa.RecordBatchReader.from_batches(ASSIGNED, batches())
        lance.write_dataset(reader, path, max_rows_per_file=2**31, max_bytes_per_file=2**40)
        yield path


def lloyd(rows: "torch.Tensor", count: int, rng: np.random.Generator) -> "torch.Tensor":
    """The centroids (P D) of `count` clusters of rows (N D)."""
    import torch

    centroids = rows[torch.from_numpy(rng.permutation(len(rows))[:count]).to(rows.device)]
    for _ in range(ITERATIONS):
        owner = owners(rows, centroids)
        size = torch.bincount(owner, minlength=count)
        total = torch.zeros_like(centroids).index_add_(0, owner, rows)
        restart = rows[torch.from_numpy(rng.integers(len(rows), size=count)).to(rows.device)]
        centroids = torch.where(size[:, None] > 0, total / size.clamp(min=1)[:, None], restart)
    return centroids


def owners(rows: "torch.Tensor", centroids: "torch.Tensor") -> "torch.Tensor":
    """The nearest of the centroids (P D) to each row (N D), the first of equals: N."""
    import torch

    half_squares = centroids.square().sum(1) / 2
    return torch.cat([torch.addmm(-half_squares, block, centroids.T).argmax(1) for block in torch.split(rows, BLOCK)])
