"""Exact k-nearest-neighbor search over the training vectors, a block of rows at a time and within a memory budget.

Vectors that fit into the budget stay in memory, sorted so that rows with similar text embeddings share a block. A
block whose text parts all lie farther from a query than its k-th neighbor so far is skipped: with ten classes that
saves nine tenths of the work. Vectors that do not fit are read from disk in table order on every pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float32, Int

from index.search.kmeans import ROWS_PER_PARTITION, k_means, nearest_centroid
from index.table.schema import TRAIN
from index.table.table import Table, column_array

if TYPE_CHECKING:
    import torch

MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 1024, 65_536
MAX_QUERIES = 4096
"""Largest batch of queries that the memory budget accounts for."""
CACHE_BLOCK_ROWS = {"cpu": 2048}
"""Rows of a block in memory, by device type: the scores of 1,024 queries against so many rows stay in a CPU's cache,
which doubles the speed. Other devices use the block size of reading."""


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Some training rows."""

    positions: 'Int[torch.Tensor, "n"]'
    """Positions among the training rows, in table order."""
    vectors: 'Float[torch.Tensor, "n S"]'
    squares: 'Float[torch.Tensor, "n"]'
    """Squared norms of the vectors."""

    @classmethod
    def of(cls, positions: "torch.Tensor", vectors: "torch.Tensor") -> "Block":
        """Make a block of some rows."""
        return cls(positions, vectors, vectors.square().sum(1))


@dataclass(frozen=True, eq=False, slots=True)
class SortedBlocks:
    """Vectors in memory in P blocks of rows with similar text parts, and a ball around the text parts of each block."""

    vectors: 'Float[torch.Tensor, "N S"]'
    """In the order of the blocks."""
    rank: 'Int[torch.Tensor, "N"]'
    """For each position in table order, its index in `vectors`."""
    blocks: list[Block]
    centers: 'Float[torch.Tensor, "P T"]'
    radii: 'Float[torch.Tensor, "P"]'

    @classmethod
    def of(cls, vectors: "torch.Tensor", groups: "Sequence[torch.Tensor]", text_dim: int) -> "SortedBlocks":
        """Sort vectors (N S) into one block per group of positions; text parts are the first `text_dim` entries."""
        import torch

        order = torch.cat(list(groups))
        vectors = vectors[order]
        parts = torch.split(vectors, [len(group) for group in groups])
        texts = [part[:, :text_dim] for part in parts]
        centers = torch.stack([text.mean(0) for text in texts])
        radii = torch.stack([(text - center).norm(dim=1).max() for text, center in zip(texts, centers, strict=True)])
        blocks = [Block.of(group, part) for group, part in zip(groups, parts, strict=True)]
        return cls(vectors, order.argsort(), blocks, centers, radii)

    def lower_bounds(self, q: "torch.Tensor", g: "torch.Tensor | None" = None) -> "torch.Tensor":
        """Return, for queries (B S), a lower bound of |q - v_i|^2 - g_i over the rows of each block (B P).

        The bound is the squared distance of the query's text part to the ball around the block's, less the largest
        potential in the block.
        """
        import torch

        gap = torch.cdist(q[:, : self.centers.shape[1]], self.centers) - self.radii
        # A thousandth less, so that rounding never hides a row.
        bound = 0.999 * gap.clamp(min=0).square()
        return bound if g is None else bound - torch.stack([g[block.positions].max() for block in self.blocks])


class VectorBlocks:
    """The training vectors of a table, for any number of passes over them."""

    def __init__(
        self,
        table: Table,
        *,
        memory: int | None = None,
        device: str = "cpu",
        stride: int = 1,
        balance: bool = True,
        block_rows: int | None = None,
    ) -> None:
        """Count the rows and read them to `device` if they fit into about `memory` bytes (None: no limit).

        With `stride` k only every k-th row is used. Without `balance` the balance coordinate is set to zero, so that
        potentials are fitted to plain distances even if the table stores some. `block_rows` overrides the number of
        rows per block.
        """
        import torch

        self._table, self._stride, self._balance = table, stride, balance
        self.device = torch.device(device)
        self._table_positions = table.positions(TRAIN)[::stride]
        self.count = len(self._table_positions)
        dim = table.meta.geometry.vector_dim
        memory = 2**62 if memory is None else memory
        # Per row float32 of the block in use, float16 and float32 of the one being read; then the scores of a batch.
        affordable = memory // (16 * dim + 8 * MAX_QUERIES)
        self._read_rows = block_rows or max(MIN_BLOCK_ROWS, min(MAX_BLOCK_ROWS, affordable))
        # Twice the vectors, because sorting copies them.
        self.num_bytes = 8 * (dim + 2) * self.count + 16 * dim * self._read_rows
        """What holding the vectors in memory takes."""
        fits = self.num_bytes <= memory
        block_rows = block_rows or CACHE_BLOCK_ROWS.get(self.device.type, self._read_rows)
        self.sorted: SortedBlocks | None = self._sort(block_rows) if fits else None

    @property
    def in_memory(self) -> bool:
        """Whether the vectors are held in memory."""
        return self.sorted is not None

    def __iter__(self) -> Iterator[Block]:
        """Yield all blocks."""
        return self._read() if self.sorted is None else iter(self.sorted.blocks)

    def take(self, positions: Int[np.ndarray, "B"]) -> Float32[np.ndarray, "B S"]:
        """Return the vectors at some positions; order and repeats are kept."""
        if self.sorted is None:
            return self._prepare(self._table.take(self._table_positions[positions], "vector"))
        import torch

        rank = self.sorted.rank[torch.from_numpy(positions).to(self.device)]
        return np.asarray(self.sorted.vectors[rank].cpu())

    def nearest(
        self, queries: Float32[np.ndarray, "B S"], k: int = 1, g: 'Float[torch.Tensor, "N"] | None' = None
    ) -> 'tuple[Float[torch.Tensor, "B K"], Int[torch.Tensor, "B K"]]':
        """Return the `k` smallest |q - v_i|^2 - g_i of each query, smallest first, and the positions of those rows.

        Without `g` all potentials are 0.
        """
        import torch

        q = torch.from_numpy(queries).to(self.device)
        best = _Best(q, min(k, self.count), g)
        if self.sorted is None:
            for block in self._read():
                best.update(block, torch.arange(len(q), device=self.device))
            return best.cost, best.positions
        bounds = self.sorted.lower_bounds(q, g)
        closest = bounds.argmin(1)
        for number, block in enumerate(self.sorted.blocks):
            best.update(block, (closest == number).nonzero()[:, 0])
        for number, block in enumerate(self.sorted.blocks):
            promising = (closest != number) & (bounds[:, number] < best.cost[:, -1])
            best.update(block, promising.nonzero()[:, 0])
        return best.cost, best.positions

    def _sort(self, block_rows: int) -> SortedBlocks:
        """Read all rows and group them by k-means on their text parts, in blocks of at most `block_rows`."""
        import torch

        vectors, text_dim = torch.cat([block.vectors for block in self._read()]), self._table.meta.geometry.text_width
        texts = vectors[:, :text_dim]
        clusters, rng = -(-self.count // block_rows), np.random.default_rng(0)
        sample = torch.from_numpy(rng.permutation(self.count)[: clusters * ROWS_PER_PARTITION]).to(self.device)
        cluster = nearest_centroid(texts, k_means(texts[sample], clusters, rng))
        members = torch.split(cluster.argsort(stable=True), torch.bincount(cluster, minlength=clusters).tolist())
        groups = [group for rows in members for group in torch.split(rows, block_rows) if len(group)]
        return SortedBlocks.of(vectors, groups, text_dim)

    def _prepare(self, stored: Float[np.ndarray, "n S"]) -> Float32[np.ndarray, "n S"]:
        vectors = stored.astype(np.float32)
        if not self._balance:
            self._table.meta.geometry.balance_of(vectors)[:] = 0
        return vectors

    def _read(self) -> Iterator[Block]:
        """Read all rows from disk, in table order."""
        import torch

        seen, start = 0, 0
        batches = self._table.scan(["vector"], TRAIN, batch_size=self._read_rows, batch_readahead=1)
        for batch in batches:
            vectors = self._prepare(column_array(batch["vector"])[(-seen) % self._stride :: self._stride])
            seen += len(batch)
            positions = torch.arange(start, start + len(vectors), device=self.device)
            start += len(vectors)
            if len(vectors):
                yield Block.of(positions, torch.from_numpy(vectors).to(self.device))
        assert start == self.count, (start, self.count)


class _Best:
    """The k best rows so far of each query of a batch."""

    def __init__(self, q: "torch.Tensor", k: int, g: "torch.Tensor | None") -> None:
        import torch

        self._q, self._k, self._g = q, k, g
        self.cost = torch.full((len(q), k), torch.inf, device=q.device)
        self.positions = torch.zeros((len(q), k), dtype=torch.int64, device=q.device)

    def update(self, block: Block, which: "torch.Tensor") -> None:
        """Compare the queries at the indices `which` with a block of rows."""
        import torch

        if not len(which):
            return
        q = self._q[which]
        offset = block.squares if self._g is None else block.squares - self._g[block.positions]
        scores = torch.addmm(offset, q, block.vectors.T, alpha=-2)
        # min is much faster than topk.
        least, rows = (
            scores.min(1, keepdim=True) if self._k == 1 else scores.topk(min(self._k, scores.shape[1]), largest=False)
        )
        cost = torch.cat([self.cost[which], least + q.square().sum(1, keepdim=True)], 1)
        positions = torch.cat([self.positions[which], block.positions[rows]], 1)
        order = cost.sort(dim=1, stable=True).indices[:, : self._k]
        self.cost[which], self.positions[which] = cost.gather(1, order), positions.gather(1, order)
