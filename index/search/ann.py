"""Approximate search through the table's LanceDB index, and the choice between approximate and exact search."""

import asyncio
import os
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int

from index.errors import OptionError
from index.search.blocks import CACHE_BLOCK_ROWS, vector_bytes
from index.search.exact import ExactSearch
from index.search.memory import MAX_ROWS, available_bytes, held_bytes
from index.search.neighbors import NearestRows, NeighborSearch, RetrievedPairs
from index.search.sharded import ShardedSearch
from index.table.rows import RowReader
from index.table.schema import HELDOUT, TRAIN
from index.table.table import Table

DIVIDED_BYTES = 2**28
"""Vectors that each process of a training run holds whole; more are divided among them."""
TOO_FEW = 1e-6
"""Fraction of queries of which so many neighbors are held out that they are searched again."""
MOST_MORE = 32
"""Most neighbors that are searched for in place of held-out ones."""


class ApproximateSearch:
    """Search the LanceDB index of a table, a whole batch of queries in one shared scan.

    LanceDB filters before it searches, with a mask of all rows that it makes anew for each batch, so that a batch takes
    longer the more rows there are. So the index is searched without a filter for a few neighbors more, and those of
    them that are held out are left out; queries that then have too few are searched once more, with the filter.

    With a refine factor r, r * k rows are fetched and reordered by exact distance here: LanceDB's own refinement leaves
    the shared scan. Queries go through LanceDB's asynchronous interface, which takes arrays; the synchronous one turns
    them into lists of Python floats, which costs as much as the search.
    """

    def __init__(
        self, table: Table, *, nprobes: int | None = None, refine_factor: int | None = None, memory: int | None = None
    ) -> None:
        """Open the index of `table`; `nprobes` and `refine_factor` default to those stored in its metadata.

        At most `memory` bytes of the index are kept (None: 6 GiB); what does not fit is read again.
        """
        index = table.meta.index
        self._table, self._rows = table, RowReader.of(table)
        self._index = asyncio.run(table.lancedb_async(memory))
        self._nprobes = nprobes or (index.nprobes if index else None)
        self._refine_factor = refine_factor or (index.refine_factor if index else 1)
        self._more = more_neighbors(table.count(TRAIN), table.dataset().count_rows())

    def nearest(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> RetrievedPairs:
        """Return the `k` nearest pairs of each query; if a query reaches fewer, its last one is repeated."""
        rows = self.nearest_rows(queries, k)
        text, latent = self._rows.take(rows.row_id.ravel(), ("text", "latent"))
        shape = (*rows.row_id.shape, -1)
        return RetrievedPairs(rows.row_id, rows.distance, text=text.reshape(shape), latent=latent.reshape(shape))

    def nearest_rows(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> NearestRows:
        """Return the rows of the same pairs, without reading text embeddings and latents."""
        found = self._search(queries, k * self._refine_factor)
        query, row_id, distance = found.query, found.row_id, found.distance
        order = np.arange(len(query))
        if self._refine_factor > 1:
            (vectors,) = self._rows.take(row_id, ["vector"])
            distance = np.square(vectors.astype(np.float32) - queries[query]).sum(1)
            order = np.lexsort((distance, query))
        first, count = found.of_each(len(queries))
        assert count.min() >= 1, "a query returned no rows"
        # A search may find fewer than k rows for a query.
        chosen = order[first[:, None] + np.minimum(np.arange(k), count[:, None] - 1)]
        return NearestRows(row_id[chosen], distance[chosen])

    def _search(self, queries: Float32[np.ndarray, "B S"], count: int) -> "_Found":
        """Return the `count` nearest training rows of each query, or as many as it reaches, query by query."""
        found = self._run(queries, count + self._more)
        if not self._more:
            return found
        _, reached = found.of_each(len(queries))
        found = found.keep(self._table.is_in_split(self._rows.positions(found.row_id), TRAIN))
        _, left = found.of_each(len(queries))
        again = np.flatnonzero((left < count) & (reached == count + self._more))
        if len(again):
            filtered = self._run(queries[again], count, filtered=True)
            found = found.keep(~np.isin(found.query, again)).join(filtered._replace(query=again[filtered.query]))
        return found.first(count)

    def _run(self, queries: Float32[np.ndarray, "B S"], count: int, *, filtered: bool = False) -> "_Found":
        # LanceDB plans a single query differently from a batch: it prunes otherwise and may return another row.
        batch = queries if len(queries) > 1 else queries.repeat(2, axis=0)

        async def search() -> pa.Table:
            return await self._query(batch, count, filtered=filtered).to_arrow()

        rows = asyncio.run(search())
        columns = (rows[name].to_numpy() for name in ("query_index", "_rowid", "_distance"))
        query, row_id, distance = columns
        found = _Found(query.astype(np.int64), row_id.astype(np.int64), distance)
        return found.keep(found.query < len(queries))

    def explain_plan(self, queries: Float32[np.ndarray, "B S"]) -> str:
        """Return LanceDB's plan for a batch of queries; `ANNIvfBatch` in it is the shared scan."""

        async def explain() -> str:
            return str(await self._query(queries, 1 + self._more).explain_plan())

        return asyncio.run(explain())

    def _query(self, queries: Float32[np.ndarray, "B S"], count: int, *, filtered: bool = False):  # type: ignore[no-untyped-def]
        query = self._index.query().nearest_to(list(queries)).limit(count).with_row_id()
        if filtered:
            # Of the two, this is the mask of fewer rows.
            query = query.where(f"NOT (split = '{HELDOUT}')")
        if self._nprobes is not None:
            query = query.nprobes(self._nprobes)
        return query.select(["_distance"])


class _Found(NamedTuple):
    """Rows that queries have found, ordered by query, then distance."""

    query: Int[np.ndarray, "N"]
    row_id: Int[np.ndarray, "N"]
    distance: Float32[np.ndarray, "N"]

    def of_each(self, count: int) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B"]]:
        """Return where the rows of each of `count` queries begin, and how many there are."""
        first, end = (np.searchsorted(self.query, np.arange(count), side=side) for side in ("left", "right"))
        return first, end - first

    def keep(self, chosen: Bool[np.ndarray, "N"]) -> "_Found":
        """Return some of the rows."""
        return _Found(*(each[chosen] for each in self))

    def first(self, count: int) -> "_Found":
        """Return the first `count` rows of each query."""
        rank = np.arange(len(self.query)) - np.searchsorted(self.query, self.query)
        return self.keep(rank < count)

    def join(self, other: "_Found") -> "_Found":
        """Return the rows of both, which are of different queries."""
        query, row_id, distance = (np.concatenate(pair) for pair in zip(self, other, strict=True))
        order = np.argsort(query, kind="stable")
        return _Found(query[order], row_id[order], distance[order])


def more_neighbors(train_rows: int, rows: int) -> int:
    """Return how many more neighbors to search for, so that seldom too few are left without the held-out ones."""
    if train_rows == rows:
        return 0
    heldout = (rows - train_rows) / rows
    return int(min(np.ceil(np.log(TOO_FEW) / np.log(heldout)), MOST_MORE))


def open_search(
    table: Table,
    *,
    exact: bool = False,
    device: str = "cpu",
    memory: int | None = None,
    process: int = 0,
    num_processes: int = 1,
) -> NeighborSearch:
    """Open the search that a table was indexed for, or exact search on `device` if `exact` is set.

    Exact search holds the rows in memory if they fit into `memory` bytes, else it reads them again for each batch of
    queries. Without a limit, as in training, it must hold them: several processes divide the rows of a large table.
    Raises OptionError if they do not fit on the device.
    """
    if not (exact or table.meta.uses_exact_search):
        return ApproximateSearch(table, memory=memory)
    if memory is None:
        rows = table.dataset().count_rows(filter=f"split = '{TRAIN}'")
        divided = num_processes > 1 and vector_bytes(table, rows) > DIVIDED_BYTES
        _check_fits(table, -(-rows // num_processes) if divided else rows, device)
        if divided:
            return ShardedSearch(table, device, process, num_processes)
    return ExactSearch(table, device, memory)


def _check_fits(table: Table, rows: int, device: str) -> None:
    """Raise OptionError if the vectors of a number of rows do not fit on a device, with all of its processes."""
    import torch

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if torch.device(device).type == "cpu" else 1
    block_rows = CACHE_BLOCK_ROWS.get(torch.device(device).type, MAX_ROWS)
    needed, free = processes * vector_bytes(table, rows, block_rows), available_bytes(device)
    if needed > held_bytes(free):
        dim = table.meta.geometry.vector_dim
        raise OptionError(
            f"exact search holds {processes * rows:,} vectors of {dim:,} numbers on {device}, {needed / 2**30:.3g} "
            f"GiB, and may use {held_bytes(free) / 2**30:.3g} of {free / 2**30:.3g} GiB that are free: use --search "
            f"ann after `pipeline build-index {table.uri}`, or more GPUs, among which the rows are divided"
        )
