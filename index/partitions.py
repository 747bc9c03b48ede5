"""The partitions of an IVF index: seeded k-means on a sample of the training vectors.

Lance trains its own, but from a start that cannot be seeded: two builds of one table would find different neighbours.
Several machines that build parts of one index share these as well.
"""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from index.schema import TRAIN
from index.table import Table

if TYPE_CHECKING:
    import torch

ROWS_PER_PARTITION = 256
"""Sampled for each partition; more change centroids little (faiss stops there too)."""
ITERATIONS = 12
BLOCK = 16_384


def train_partitions(table: Table, count: int, *, seed: int = 0) -> Float32[np.ndarray, "P S"]:
    """Centroids of `count` partitions by Lloyd's iterations; a partition that loses its rows starts at another row."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = np.random.default_rng([seed, count])
    offsets = table.offsets(TRAIN)
    chosen = np.sort(rng.permutation(offsets)[: count * ROWS_PER_PARTITION])
    rows = torch.from_numpy(table.take(chosen, "vector").astype(np.float32)).to(device)
    assert len(rows) >= count, (len(rows), count)
    return np.asarray(lloyd(rows, count, rng).cpu())


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
