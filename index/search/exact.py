"""Exact search over the training rows: the ground truth of recall, and the right choice for small tables."""

import numpy as np
from jaxtyping import Float16, Float32, Int

from index.search.blocks import VectorBlocks
from index.search.neighbors import NearestRows, RetrievedPairs
from index.table.schema import TRAIN
from index.table.table import Table


class ExactSearch:
    """Compare every query with all training rows of a table.

    Positions count the training rows from 0 in table order; row ids are Lance's.
    """

    def __init__(
        self, table: Table, device: str = "cpu", memory: int | None = None, *, blocks: VectorBlocks | None = None
    ) -> None:
        """Hold the vectors, and text embeddings and latents, if they fit into `memory` bytes (None: no limit).

        Vectors that do not fit are read again for each batch of queries. `blocks` replaces the ones made from
        `device` and `memory`.
        """
        rows = table.dataset().to_table(columns=[], filter=f"split = '{TRAIN}'", with_row_id=True)
        self.row_ids: Int[np.ndarray, N] = rows["_rowid"].to_numpy().astype(np.int64)
        """Row ids of the training rows, in table order."""
        self._by_id = np.argsort(self.row_ids)
        self._table, self._table_positions = table, table.positions(TRAIN)
        self.blocks = VectorBlocks(table, memory=memory, device=device) if blocks is None else blocks
        geometry = table.meta.geometry
        columns = 2 * (geometry.text_dim + geometry.latent_dim) * len(self.row_ids)
        held = self.blocks.in_memory and (memory is None or self.blocks.num_bytes + columns <= memory)
        self._columns = {name: table.column(name) for name in ("text", "latent")} if held else {}

    def positions_of(self, row_ids: Int[np.ndarray, "*B"]) -> Int[np.ndarray, "*B"]:
        """Return the positions of rows among the training rows."""
        return self._by_id[np.searchsorted(self.row_ids, row_ids, sorter=self._by_id)]

    def distances(
        self, queries: Float32[np.ndarray, "B S"], positions: Int[np.ndarray, "B K"]
    ) -> Float32[np.ndarray, "B K"]:
        """Return the exact squared distances of each query to K training rows."""
        vectors = self.blocks.take(positions.ravel()).reshape(*positions.shape, -1)
        return np.asarray(np.square(vectors - queries[:, None, :]).sum(-1))

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
        if column in self._columns:
            return np.asarray(self._columns[column][positions])
        rows = self._table.take(self._table_positions[positions.ravel()], column)
        return np.asarray(rows.reshape(*positions.shape, -1))
