"""Nearest pairs, a batch of queries at a time: approximate through LanceDB, or exact on the device.

Both search the training rows only and return the pairs themselves, because a trainer needs their latents, not their
names. Distances are squared L2 between query and stored vector.
"""

import asyncio
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Float32, Int

from index.search.exact import VectorBlocks
from index.table.schema import TRAIN
from index.table.table import Table, column_array


@dataclass(frozen=True, eq=False, slots=True)
class RetrievedPairs:
    """The K nearest pairs of each of B queries, nearest first."""

    row: Int[np.ndarray, "B K"]
    """Lance row ids."""
    distance: Float32[np.ndarray, "B K"]
    text: Float16[np.ndarray, "B K T"]
    latent: Float16[np.ndarray, "B K L"]


@runtime_checkable
class NeighborSearch(Protocol):
    """Whatever finds the nearest training pairs of queries."""

    def nearest(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> RetrievedPairs:
        """The k nearest pairs of each query."""
        ...


class ApproximateSearch:
    """Approximate search in the table's LanceDB index, the whole batch in one shared scan.

    With `refine_factor` r it asks for r times as many rows and orders them by their exact distance. LanceDB's own refinement
    would leave the shared scan. LanceDB is asked through its asynchronous interface, which takes queries as arrays; the
    other one makes lists of Python numbers of them, which costs as much as the search.
    """

    def __init__(self, table: Table, *, nprobes: int | None = None, refine_factor: int | None = None) -> None:
        """Search `table` with its stored nprobes and refine_factor unless told otherwise."""
        index = table.meta.index
        self._table = asyncio.run(table.lancedb_async())
        self._nprobes = nprobes or (index.nprobes if index else None)
        self._refine = refine_factor or (index.refine_factor if index else 1)

    def _query(self, queries: Float32[np.ndarray, "B S"], k: int):  # type: ignore[no-untyped-def]
        query = self._table.query().where(f"split = '{TRAIN}'").nearest_to(list(queries))
        query = query.limit(k * self._refine).with_row_id()
        if self._nprobes is not None:
            query = query.nprobes(self._nprobes)
        return query.select(["text", "latent", "_distance", *(["vector"] if self._refine > 1 else [])])

    def nearest(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> RetrievedPairs:
        """The k nearest pairs of each query; where fewer were reached, the last one is repeated."""
        # A single query would be answered by another plan, which prunes differently and now and then finds another row.
        asked = queries if len(queries) > 1 else queries.repeat(2, axis=0)

        async def ask() -> pa.Table:
            return await self._query(asked, k).to_arrow()

        found = asyncio.run(ask())
        owner, distance = found["query_index"].to_numpy(), found["_distance"].to_numpy()
        order = np.arange(len(owner))
        if self._refine > 1:
            distance = np.square(column_array(found["vector"]).astype(np.float32) - asked[owner]).sum(1)
            order = np.lexsort((distance, owner))
        # A filtered search may return fewer than k rows for a query: regroup by query instead of reshaping.
        first = np.searchsorted(owner, np.arange(len(queries)))
        count = np.searchsorted(owner, np.arange(len(queries)), side="right") - first
        assert count.min() >= 1, "a query found nothing"
        place = order[first[:, None] + np.minimum(np.arange(k), count[:, None] - 1)]
        text, latent = (column_array(found[name]) for name in ("text", "latent"))
        return RetrievedPairs(
            row=found["_rowid"].to_numpy().astype(np.int64)[place],
            distance=distance[place],
            text=text[place],
            latent=latent[place],
        )

    def plan(self, queries: Float32[np.ndarray, "B S"]) -> str:
        """How LanceDB answers such a batch; `ANNIvfBatch` is the shared scan."""

        async def explain() -> str:
            return str(await self._query(queries, 1).explain_plan())

        return asyncio.run(explain())


class ExactSearch:
    """Exact search over the training vectors: the oracle, and the right choice for small tables.

    They are held on the device; where that would take more than `memory` bytes each batch of queries reads them anew.
    """

    def __init__(self, table: Table, device: str = "cpu", memory: int | None = None) -> None:
        """Find the training rows of `table`, and read them if they fit."""
        rows = table.dataset().to_table(columns=[], filter=f"split = '{TRAIN}'", with_row_id=True)
        self.row: Int[np.ndarray, N] = rows["_rowid"].to_numpy().astype(np.int64)
        """Lance row ids of the training rows, in the table's order."""
        self._order = np.argsort(self.row)
        self._table, self._offsets = table, table.positions(TRAIN)
        self._blocks = VectorBlocks(table, memory=memory, device=device)
        self._held = {name: table.column(name) for name in ("text", "latent")} if self._blocks.held else {}

    def position_of(self, row: Int[np.ndarray, "*B"]) -> Int[np.ndarray, "*B"]:
        """Positions among the training rows of Lance row ids."""
        return self._order[np.searchsorted(self.row, row, sorter=self._order)]

    def distances(
        self, queries: Float32[np.ndarray, "B S"], place: Int[np.ndarray, "B K"]
    ) -> Float32[np.ndarray, "B K"]:
        """Exact squared distances of queries to the training rows at some positions."""
        vectors = self._blocks.take(place.ravel()).reshape(*place.shape, -1)
        return np.asarray(np.square(vectors - queries[:, None, :]).sum(-1))

    def nearest_positions(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> Int[np.ndarray, "B K"]:
        """Positions among the training rows of the k nearest, nearest first."""
        return np.asarray(self._blocks.nearest(queries, k)[1].cpu())

    def nearest(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> RetrievedPairs:
        """The k nearest pairs of each query."""
        place = self.nearest_positions(queries, k)
        return RetrievedPairs(
            row=self.row[place],
            distance=self.distances(queries, place),
            text=self.of("text", place),
            latent=self.of("latent", place),
        )

    def of(self, column: str, place: Int[np.ndarray, "*B"]) -> Float16[np.ndarray, "*B D"]:
        """The `text` or `latent` of the training rows at some positions."""
        if column in self._held:
            return np.asarray(self._held[column][place])
        taken = self._table.take(self._offsets[place.ravel()], column)
        return np.asarray(taken.reshape(*place.shape, -1))


def open_search(table: Table, *, exact: bool = False, device: str = "cpu") -> NeighborSearch:
    """The search that `table` was indexed for, or the exact one."""
    if exact or table.meta.uses_exact_search:
        return ExactSearch(table, device)
    return ApproximateSearch(table)
