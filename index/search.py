"""Nearest pairs, a batch of queries at a time: approximate through LanceDB, or exact on the device.

Both search the training rows only and return the pairs themselves, because a trainer needs their latents, not their
names. Distances are squared L2 between query and stored vector.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float16, Float32, Int

from index.schema import TRAIN
from index.table import Table, column_array


@dataclass(frozen=True, eq=False, slots=True)
class Pairs:
    """The K nearest pairs of each of B queries, nearest first."""

    row: Int[np.ndarray, "B K"]
    """Lance row ids."""
    distance: Float32[np.ndarray, "B K"]
    text: Float16[np.ndarray, "B K T"]
    latent: Float16[np.ndarray, "B K L"]


@runtime_checkable
class Neighbours(Protocol):
    """Whatever finds the nearest training pairs of queries."""

    def nearest(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> Pairs:
        """The k nearest pairs of each query."""
        ...


class LanceNeighbours:
    """Approximate search in the table's LanceDB index, the whole batch in one shared scan."""

    def __init__(self, table: Table, nprobes: int | None = None) -> None:
        """Search `table` with its stored nprobes unless told otherwise."""
        self._table = table.lancedb()
        index = table.meta.index
        self._nprobes = nprobes or (index.nprobes if index else None)

    def _query(self, queries: Float32[np.ndarray, "B S"], k: int):  # type: ignore[no-untyped-def]
        query = self._table.search(queries).where(f"split = '{TRAIN}'").limit(k).with_row_id(True)
        if self._nprobes is not None:
            query = query.nprobes(self._nprobes)
        return query.select(["text", "latent", "_distance"])

    def nearest(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> Pairs:
        """The k nearest pairs of each query; where fewer were reached, the last one is repeated."""
        # A single query would be answered by another plan, which prunes differently and now and then finds another row.
        found = self._query(queries if len(queries) > 1 else queries.repeat(2, axis=0), k).to_arrow()
        # A filtered search may return fewer than k rows for a query: regroup by query instead of reshaping.
        owner = found["query_index"].to_numpy()
        first = np.searchsorted(owner, np.arange(len(queries)))
        count = np.searchsorted(owner, np.arange(len(queries)), side="right") - first
        assert count.min() >= 1, "a query found nothing"
        place = first[:, None] + np.minimum(np.arange(k), count[:, None] - 1)
        text, latent = (column_array(found[name]) for name in ("text", "latent"))
        return Pairs(
            row=found["_rowid"].to_numpy().astype(np.int64)[place],
            distance=found["_distance"].to_numpy()[place],
            text=text[place],
            latent=latent[place],
        )

    def plan(self, queries: Float32[np.ndarray, "B S"]) -> str:
        """How LanceDB answers such a batch; `ANNIvfBatch` is the shared scan."""
        return str(self._query(queries, 1).explain_plan())


class ExactNeighbours:
    """Exact search with the training vectors held on the device: the oracle, and the right choice for small tables."""

    def __init__(self, table: Table, device: str = "cpu", block: int = 65_536) -> None:
        """Load the training rows of `table`; `block` bounds the rows compared at a time."""
        import torch

        rows = table.dataset().to_table(
            columns=["text", "latent", "vector"], filter=f"split = '{TRAIN}'", with_row_id=True
        )
        self.row: Int[np.ndarray, N] = rows["_rowid"].to_numpy().astype(np.int64)
        self._order = np.argsort(self.row)
        self.text, self.latent = column_array(rows["text"]), column_array(rows["latent"])
        # In float32: on CPUs a float16 product is slower, and squared norms need the range.
        self.vectors = torch.from_numpy(column_array(rows["vector"]).astype(np.float32)).to(device)
        self._half_squares = self.vectors.square().sum(1) / 2
        self._block = block

    def place_of(self, row: Int[np.ndarray, "*B"]) -> Int[np.ndarray, "*B"]:
        """Positions among the training rows of Lance row ids."""
        return self._order[np.searchsorted(self.row, row, sorter=self._order)]

    def distances(
        self, queries: Float32[np.ndarray, "B S"], place: Int[np.ndarray, "B K"]
    ) -> Float32[np.ndarray, "B K"]:
        """Exact squared distances of queries to the training rows at some positions."""
        import torch

        vectors = self.vectors[torch.from_numpy(place).to(self.vectors.device)].cpu().numpy()
        return np.asarray(np.square(vectors - queries[:, None, :]).sum(-1))

    def nearest_places(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> Int[np.ndarray, "B K"]:
        """Positions among the training rows of the k nearest, nearest first."""
        import torch

        q = torch.from_numpy(queries).to(self.vectors.device)
        best, place = [], []
        for start in range(0, len(self.row), self._block):
            stop = start + self._block
            score = q @ self.vectors[start:stop].T - self._half_squares[start:stop]
            top = score.topk(min(k, score.shape[1]), dim=1)
            best.append(top.values)
            place.append(top.indices + start)
        order = torch.cat(best, 1).topk(min(k, len(self.row)), dim=1).indices
        return np.asarray(torch.cat(place, 1).gather(1, order).cpu())

    def nearest(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> Pairs:
        """The k nearest pairs of each query."""
        place = self.nearest_places(queries, k)
        return Pairs(
            row=self.row[place],
            distance=self.distances(queries, place),
            text=self.text[place],
            latent=self.latent[place],
        )


def open_neighbours(table: Table, *, exact: bool = False, device: str = "cpu") -> Neighbours:
    """The search that `table` was indexed for, or the exact one."""
    if exact or table.meta.searched_exactly:
        return ExactNeighbours(table, device)
    return LanceNeighbours(table)
