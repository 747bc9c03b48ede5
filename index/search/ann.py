"""Approximate search through the table's LanceDB index, and the choice between approximate and exact search."""

import asyncio
import os
from functools import cached_property

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int

from index.errors import OptionError
from index.search.blocks import CACHE_BLOCK_ROWS, vector_bytes
from index.search.exact import ExactSearch
from index.search.memory import MAX_ROWS, available_bytes, held_bytes
from index.search.neighbors import NearestRows, NeighborSearch, RetrievedPairs
from index.search.sharded import ShardedSearch
from index.table.rows import RowReader
from index.table.schema import TRAIN
from index.table.table import Table, column_array

DIVIDED_BYTES = 2**28
"""Vectors that each process of a training run holds whole; more are divided among them."""
PAIR = ("text", "latent")
"""What is read of a row that was found, unless the table holds it in memory."""


class ApproximateSearch:
    """Search the LanceDB index of a table, a whole batch of queries in one shared scan.

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
        self._source, self._table = table, asyncio.run(table.lancedb_async(memory))
        self._nprobes = nprobes or (index.nprobes if index else None)
        self._refine_factor = refine_factor or (index.refine_factor if index else 1)

    def nearest(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> RetrievedPairs:
        """Return the `k` nearest pairs of each query; if a query reaches fewer, its last one is repeated."""
        held = all(map(self._source.holds, PAIR))
        rows, chosen, distance = self._search(queries, k, () if held else PAIR)
        row_id = _row_ids(rows)[chosen]
        if held:
            found = self._rows.take(row_id.ravel(), PAIR)
            text, latent = (column.reshape(*row_id.shape, -1) for column in found)
        else:
            text, latent = (column_array(rows[name])[chosen] for name in PAIR)
        return RetrievedPairs(row_id=row_id, distance=distance, text=text, latent=latent)

    def nearest_rows(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> NearestRows:
        """Return the rows of the same pairs, without reading text embeddings and latents."""
        rows, chosen, distance = self._search(queries, k, ())
        return NearestRows(_row_ids(rows)[chosen], distance)

    def _search(
        self, queries: Float32[np.ndarray, "B S"], k: int, columns: tuple[str, ...]
    ) -> tuple[pa.Table, Int[np.ndarray, "B K"], Float32[np.ndarray, "B K"]]:
        """Return the rows of all queries, which of them are the `k` nearest of each, and their distances."""
        # LanceDB plans a single query differently from a batch: it prunes otherwise and may return another row.
        batch = queries if len(queries) > 1 else queries.repeat(2, axis=0)

        async def search() -> pa.Table:
            return await self._query(batch, k, columns).to_arrow()

        rows = asyncio.run(search())
        query, distance = rows["query_index"].to_numpy(), rows["_distance"].to_numpy()
        order = np.arange(len(query))
        if self._refine_factor > 1:
            if "vector" in rows.column_names:
                vectors = column_array(rows["vector"])
            else:
                (vectors,) = self._rows.take(_row_ids(rows), ["vector"])
            distance = np.square(vectors.astype(np.float32) - batch[query]).sum(1)
            order = np.lexsort((distance, query))
        # A filtered search may return fewer than k rows for a query: regroup by query instead of reshaping.
        first = np.searchsorted(query, np.arange(len(queries)))
        count = np.searchsorted(query, np.arange(len(queries)), side="right") - first
        assert count.min() >= 1, "a query returned no rows"
        chosen = order[first[:, None] + np.minimum(np.arange(k), count[:, None] - 1)]
        return rows, chosen, distance[chosen]

    def explain_plan(self, queries: Float32[np.ndarray, "B S"]) -> str:
        """Return LanceDB's plan for a batch of queries; `ANNIvfBatch` in it is the shared scan."""

        async def explain() -> str:
            return str(await self._query(queries, 1, PAIR).explain_plan())

        return asyncio.run(explain())

    def _query(self, queries: Float32[np.ndarray, "B S"], k: int, columns: tuple[str, ...]):  # type: ignore[no-untyped-def]
        query = self._table.query().where(f"split = '{TRAIN}'").nearest_to(list(queries))
        query = query.limit(k * self._refine_factor).with_row_id()
        if self._nprobes is not None:
            query = query.nprobes(self._nprobes)
        compared = ["vector"] if self._refine_factor > 1 and not self._source.holds("vector") else []
        return query.select([*columns, "_distance", *compared])

    @cached_property
    def _rows(self) -> RowReader:
        return RowReader(self._source)


def _row_ids(rows: pa.Table) -> Int[np.ndarray, "N"]:
    return np.asarray(rows["_rowid"].to_numpy().astype(np.int64))


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
        rows = len(table.positions(TRAIN))
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
