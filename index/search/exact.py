"""Exact search over the training rows: the ground truth of recall, and the right choice for small tables."""

import numpy as np
from jaxtyping import Float16, Float32, Int

from index.search.blocks import VectorBlocks
from index.search.memory import available_bytes, held_bytes
from index.search.neighbors import NearestRows, RetrievedPairs
from index.table.rows import RowReader
from index.table.schema import TRAIN
from index.table.table import Table

AT_ONCE = 256
"""Queries whose distances are computed at a time."""


class ExactSearch:
    """Compare every query with all training rows of a table.

    Positions count the training rows from 0 in table order; row ids are Lance's.
    """

    def __init__(
        self, table: Table, device: str = "cpu", memory: int | None = None, *, blocks: VectorBlocks | None = None
    ) -> None:
        """Hold the vectors, and text embeddings and latents, if they fit into `memory` bytes (None: what is free).

        Vectors that do not fit are read again for each batch of queries. `blocks` replaces the ones made from
        `device` and `memory`.
        """
        self.blocks = VectorBlocks(table, memory=memory, device=device) if blocks is None else blocks
        self.row_ids = RowReader.of(table).row_ids(table.positions(TRAIN))
        """Row ids of the training rows, in table order."""
        ascending = bool((self.row_ids[1:] > self.row_ids[:-1]).all())
        self._by_id = None if ascending else np.argsort(self.row_ids)
        self._table = table
        if self.blocks.in_memory:
            room = available_bytes() if memory is None else held_bytes(memory) - self.blocks.num_bytes
            table.hold(("text", "latent"), room)

    def positions_of(self, row_ids: Int[np.ndarray, "*B"]) -> Int[np.ndarray, "*B"]:
        """Return the positions of rows among the training rows."""
        if self._by_id is None:
            return np.searchsorted(self.row_ids, row_ids)
        return self._by_id[np.searchsorted(self.row_ids, row_ids, sorter=self._by_id)]

    def distances(
        self, queries: Float32[np.ndarray, "B S"], positions: Int[np.ndarray, "B K"]
    ) -> Float32[np.ndarray, "B K"]:
        """Return the exact squared distances of each query to K training rows."""
        return distances_of(self.blocks, queries, positions)

    def nearest_positions(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> Int[np.ndarray, "B K"]:
        """Return the positions of the `k` nearest training rows of each query, nearest first."""
        return np.asarray(self.blocks.nearest(queries, k)[1].cpu())

    def nearest(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> RetrievedPairs:
        """Return the `k` nearest pairs of each query."""
        positions = self.nearest_positions(queries, k)
        return RetrievedPairs(
            row_id=self.row_ids[positions],
            distance=self.distances(queries, positions),
            text=self.take(positions, "text"),
            latent=self.take(positions, "latent"),
        )

    def nearest_rows(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> NearestRows:
        """Return the rows of the same pairs, without reading text embeddings and latents."""
        positions = self.nearest_positions(queries, k)
        return NearestRows(self.row_ids[positions], self.distances(queries, positions))

    def take(self, positions: Int[np.ndarray, "*B"], column: str) -> Float16[np.ndarray, "*B D"]:
        """Return the `text` or `latent` column of training rows; order and repeats are kept."""
        rows = self._table.take(self.blocks.table_positions[positions.ravel()], column)
        return np.asarray(rows.reshape(*positions.shape, -1))


def distances_of(
    blocks: VectorBlocks, queries: Float32[np.ndarray, "B S"], positions: Int[np.ndarray, "B K"]
) -> Float32[np.ndarray, "B K"]:
    """Return the exact squared distances of each query to the rows of `blocks` at K positions."""
    parts = [np.empty((0, positions.shape[1]), np.float32)]
    at_once = max(1, AT_ONCE // max(positions.shape[1], 1))
    for start in range(0, len(queries), at_once):
        rows = positions[start : start + at_once]
        vectors = blocks.take(rows.ravel()).reshape(*rows.shape, -1)
        vectors -= queries[start : start + at_once, None, :]
        parts.append(np.square(vectors, out=vectors).sum(-1))
    return np.concatenate(parts)
