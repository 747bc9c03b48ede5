"""Exact search whose rows are divided among the processes of a training run.

Process r of P holds the vectors of the training rows r, r + P, r + 2P, ... A search is a round in which all take part:
they gather the queries of all, search them among their own rows, gather the best, and each keeps those of its queries.
So all processes must search as often, in the same order, one search at a time; a process that stops searching ends the
round of the others by `close`. Rounds have a group of their own on the CPU (gloo), which training does not wait for.
"""

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float16, Float32, Int

from index.errors import RunError
from index.search.blocks import MAX_QUERIES, VectorBlocks
from index.search.exact import distances_of
from index.search.neighbors import NearestRows, RetrievedPairs
from index.table.rows import RowReader
from index.table.table import Table

if TYPE_CHECKING:
    import torch

ROUND_LIMIT = timedelta(hours=2)
"""A round lasts until the slowest process searches again: as long as training takes a checkpoint or a preview."""
CLOSE_LIMIT = timedelta(minutes=1)
"""How long to wait for the others at the end; a process that failed never comes."""


class ShardedSearch:
    """Compare every query with all training rows, each process with its part of them."""

    def __init__(self, table: Table, device: str, process: int, num_processes: int) -> None:
        """Hold this process's vectors on a device; all processes of torch's default group must do so together."""
        import torch.distributed as dist

        self._table, self._process, self._num_processes = table, process, num_processes
        self._blocks = VectorBlocks(table, device=device, stride=num_processes, first=process)
        self._row_ids = RowReader.of(table).row_ids(self._blocks.train_positions)
        self._group = dist.new_group(backend="gloo", timeout=ROUND_LIMIT)
        self._ended = False

    def nearest(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> RetrievedPairs:
        """Return the `k` nearest pairs of each query.

        Raises RunError if another process has stopped searching.
        """
        distance, positions = self._round(queries, k)
        return RetrievedPairs(
            row_id=self._row_ids[positions],
            distance=distance,
            text=self._take(positions, "text"),
            latent=self._take(positions, "latent"),
        )

    def nearest_rows(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> NearestRows:
        """Return the rows of the same pairs, without reading text embeddings and latents."""
        distance, positions = self._round(queries, k)
        return NearestRows(self._row_ids[positions], distance)

    def _round(
        self, queries: Float32[np.ndarray, "B S"], k: int
    ) -> tuple[Float32[np.ndarray, "B K"], Int[np.ndarray, "B K"]]:
        """Return squared distances and positions of the nearest rows of all processes."""
        import torch

        if self._ended or any(self._gather(torch.tensor([0]))):
            self._ended = True
            raise RunError("another process of this training run has ended: see what it printed")
        k = min(k, len(self._row_ids))
        gathered = self._gather(torch.from_numpy(np.ascontiguousarray(queries)))
        cost, distance, positions = self._search(np.concatenate([each.numpy() for each in gathered]), k)
        mine = slice(self._process * len(queries), (self._process + 1) * len(queries))
        found = [
            np.concatenate([each[mine].numpy() for each in self._gather(torch.from_numpy(part))], 1)
            for part in (cost, distance, positions)
        ]
        order = np.lexsort((found[2], found[0]))[:, :k]
        distance, positions = (np.take_along_axis(part, order, 1) for part in found[1:])
        return distance, positions

    def close(self) -> None:
        """Tell the other processes that this one searches no more, unless one of them came first.

        Afterwards all can begin anew.
        """
        import torch

        if not self._ended:
            self._gather(torch.tensor([1]), limit=CLOSE_LIMIT)
        self._ended = False

    def _search(
        self, queries: Float32[np.ndarray, "M S"], k: int
    ) -> tuple[Float32[np.ndarray, "M K"], Float32[np.ndarray, "M K"], Int[np.ndarray, "M K"]]:
        """Return costs, squared distances and positions of the nearest of this process's rows; infinite costs for none.

        Costs order the rows of all processes as `ExactSearch` does; distances do not suffer from cancellation.
        """
        cost = np.full((len(queries), k), np.inf, np.float32)
        distance, positions = np.zeros_like(cost), np.zeros(cost.shape, np.int64)
        own = min(k, self._blocks.count)
        for start in range(0, len(queries) if own else 0, MAX_QUERIES):
            rows = slice(start, start + MAX_QUERIES)
            least, nearest = (part.cpu().numpy() for part in self._blocks.nearest(queries[rows], own))
            cost[rows, :own], distance[rows, :own] = least, distances_of(self._blocks, queries[rows], nearest)
            positions[rows, :own] = nearest * self._num_processes + self._process
        return cost, distance, positions

    def _take(self, positions: Int[np.ndarray, "B K"], column: str) -> Float16[np.ndarray, "B K D"]:
        rows = self._table.take(self._blocks.train_positions[positions.ravel()], column)
        return np.asarray(rows.reshape(*positions.shape, -1))

    def _gather(self, mine: "torch.Tensor", limit: timedelta | None = None) -> "list[torch.Tensor]":
        """Return the tensors of all processes; with a limit, this process's own if the others do not come."""
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(mine) for _ in range(self._num_processes)]
        work: Any = dist.all_gather(parts, mine, group=self._group, async_op=True)
        try:
            work.wait() if limit is None else work.wait(limit)
        except RuntimeError:
            if limit is None:
                raise
        return parts
