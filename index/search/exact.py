"""Exact search over the training rows' vectors in blocks: held where they fit into memory, else read each time.

Held rows are sorted by their descriptions, so that a block whose descriptions are all farther from a query's than
the neighbor it has already is passed over: with ten classes nine tenths of the work.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float32, Int

from index.search.kmeans import ROWS_PER_PARTITION, lloyd, owners
from index.table.schema import TRAIN
from index.table.table import Table, column_array

if TYPE_CHECKING:
    import torch

LEAST_ROWS = 1024
MOST_QUERIES = 4096
"""Of a batch, when memory is counted."""
ROWS_AT_ONCE = {"cpu": 2048}
"""Rows of a block by kind of device: scores of 1,024 queries with so many stay in a CPU's cache (twice as fast)."""


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Some training rows."""

    place: 'Int[torch.Tensor, "n"]'
    """Where they stand among the training rows, in the table's order."""
    vectors: 'Float[torch.Tensor, "n S"]'
    squares: 'Float[torch.Tensor, "n"]'
    """Squared lengths."""

    @classmethod
    def of(cls, place: "torch.Tensor", vectors: "torch.Tensor") -> "Block":
        """A block of these rows."""
        return cls(place, vectors, vectors.square().sum(1))


class VectorBlocks:
    """The training rows, for any number of passes over them, within about `memory` bytes; with `every` = k each k-th.

    Without `balance` that coordinate is zero, so that potentials are fitted to bare distances whatever the table holds.
    """

    def __init__(
        self, table: Table, *, memory: int | None = None, device: str = "cpu", every: int = 1, balance: bool = True
    ) -> None:
        """Count the rows, and read them if they fit; without `memory` they are held in any case."""
        import torch

        self._table, self._every, self._balance = table, every, balance
        self.device = torch.device(device)
        self._offsets = table.positions(TRAIN)[::every]
        self.count = len(self._offsets)
        width = table.meta.geometry.vector_dim
        memory = 2**62 if memory is None else memory
        # float32 of the block in use, float16 and float32 of the one being read, and the scores of a batch of queries.
        self._rows = max(LEAST_ROWS, min(65_536, memory // (16 * width + 8 * MOST_QUERIES)))
        # Twice: sorting them copies them.
        self.held = 8 * (width + 2) * self.count + 16 * width * self._rows <= memory
        if self.held:
            self._hold()

    def __iter__(self) -> Iterator[Block]:
        """All blocks."""
        return iter(self._blocks) if self.held else self._read()

    def take(self, places: Int[np.ndarray, "B"]) -> Float32[np.ndarray, "B S"]:
        """The vectors at some places, order and repeats kept."""
        if not self.held:
            return self._prepared(self._table.take(self._offsets[places], "vector"))
        import torch

        return np.asarray(self._vectors[self._sorted[torch.from_numpy(places).to(self.device)]].cpu())

    def nearest(
        self, queries: Float32[np.ndarray, "B S"], k: int = 1, g: 'Float[torch.Tensor, "N"] | None' = None
    ) -> 'tuple[Float[torch.Tensor, "B K"], Int[torch.Tensor, "B K"]]':
        """The k smallest |q - v_i|^2 - g_i of each query, smallest first, and the places of their rows; no g is 0."""
        import torch

        q = torch.from_numpy(queries).to(self.device)
        k = min(k, self.count)
        cost = torch.full((len(q), k), torch.inf, device=self.device)
        place = torch.zeros((len(q), k), dtype=torch.int64, device=self.device)

        def visit(block: Block, asking: torch.Tensor) -> None:
            """Let some queries see a block."""
            if not len(asking):
                return
            asked = q[asking]
            offset = block.squares if g is None else block.squares - g[block.place]
            found = torch.addmm(offset, asked, block.vectors.T, alpha=-2)
            # min is much faster than topk.
            least = found.min(1, keepdim=True) if k == 1 else found.topk(min(k, found.shape[1]), largest=False)
            costs = torch.cat([cost[asking], least.values + asked.square().sum(1, keepdim=True)], 1)
            order = costs.sort(dim=1, stable=True).indices[:, :k]
            cost[asking] = costs.gather(1, order)
            place[asking] = torch.cat([place[asking], block.place[least.indices]], 1).gather(1, order)

        everyone = torch.arange(len(q), device=self.device)
        if not self.held:
            for block in self._read():
                visit(block, everyone)
            return cost, place
        at_least = self._at_least(q, g)
        first = at_least.argmin(1)
        for number, block in enumerate(self._blocks):
            visit(block, everyone[first == number])
        for number, block in enumerate(self._blocks):
            visit(block, everyone[(first != number) & (at_least[:, number] < cost[:, -1])])
        return cost, place

    def _at_least(self, q: "torch.Tensor", g: "torch.Tensor | None") -> "torch.Tensor":
        """What each query (B) finds at least in each held block, whose descriptions are no nearer than this (B P)."""
        import torch

        apart = torch.cdist(q[:, : self._centers.shape[1]], self._centers) - self._radii
        # Less a thousandth, lest rounding hide a row.
        least = 0.999 * apart.clamp(min=0).square()
        return least if g is None else least - torch.stack([g[block.place].max() for block in self._blocks])

    def _hold(self) -> None:
        """Read all rows, and sort them by groups of like descriptions."""
        import torch

        self._vectors = torch.cat([block.vectors for block in self._read()])
        texts = self._vectors[:, : self._table.meta.geometry.text_dim]
        most = ROWS_AT_ONCE.get(self.device.type, self._rows)
        groups, rng = -(-self.count // most), np.random.default_rng(0)
        sample = torch.from_numpy(rng.permutation(self.count)[: groups * ROWS_PER_PARTITION]).to(self.device)
        owner = owners(texts, lloyd(texts[sample], groups, rng))
        place = owner.argsort(stable=True)
        self._vectors, self._sorted = self._vectors[place], place.argsort()
        ends = torch.bincount(owner, minlength=groups).cumsum(0).tolist()
        cuts = sorted({cut for start, end in zip([0, *ends], ends, strict=False) for cut in range(start, end, most)})
        slices = [slice(start, end) for start, end in zip(cuts, [*cuts[1:], self.count], strict=True)]
        self._blocks = [Block.of(place[rows], self._vectors[rows]) for rows in slices]
        texts = self._vectors[:, : texts.shape[1]]
        self._centers = torch.stack([texts[rows].mean(0) for rows in slices])
        self._radii = torch.stack(
            [(texts[rows] - center).norm(dim=1).max() for rows, center in zip(slices, self._centers, strict=True)]
        )

    def _prepared(self, stored: Float[np.ndarray, "n S"]) -> Float32[np.ndarray, "n S"]:
        rows = stored.astype(np.float32)
        if not self._balance:
            self._table.meta.geometry.balance_of(rows)[:] = 0
        return rows

    def _read(self) -> Iterator[Block]:
        """All rows in the table's order."""
        import torch

        seen, start = 0, 0
        batches = self._table.scan(["vector"], TRAIN, batch_size=self._rows, batch_readahead=1)
        for batch in batches:
            rows = self._prepared(column_array(batch["vector"])[(-seen) % self._every :: self._every])
            seen += len(batch)
            place = torch.arange(start, start + len(rows), device=self.device)
            start += len(rows)
            if len(rows):
                yield Block.of(place, torch.from_numpy(rows).to(self.device))
        assert start == self.count, (start, self.count)
