"""Search vectors that no index can serve well: not finite, zero, or equal to another one."""

from dataclasses import dataclass

import numpy as np

from index.table.schema import TRAIN
from index.table.table import Table, column_array


@dataclass(frozen=True, kw_only=True)
class VectorIntegrity:
    """Counts of unusable training vectors."""

    nonfinite_vectors: int
    """Vectors with a NaN or an infinity."""
    zero_vectors: int
    duplicate_vectors: int
    """Vectors equal to an earlier one."""


def check_vectors(table: Table) -> VectorIntegrity:
    """Count the unusable training vectors of a table in one pass over them."""
    weights = np.random.default_rng(0).integers(2**64, size=table.meta.geometry.vector_dim, dtype=np.uint64)
    hashes, nonfinite, zero = [np.empty(0, np.uint64)], 0, 0
    for batch in table.scan(["vector"], TRAIN):
        vectors = column_array(batch["vector"])
        nonfinite += int((~np.isfinite(vectors).all(1)).sum())
        zero += int((vectors == 0).all(1).sum())
        # Adding zero turns -0 into +0, so that equal vectors have equal bits.
        hashes.append((vectors + np.float16(0)).view(np.uint16).astype(np.uint64) @ weights)
    hashed = np.concatenate(hashes)
    duplicates = len(hashed) - len(np.unique(hashed))
    return VectorIntegrity(nonfinite_vectors=nonfinite, zero_vectors=zero, duplicate_vectors=duplicates)
