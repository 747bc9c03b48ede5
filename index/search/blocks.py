"""Exact k-nearest-neighbor search over the training vectors, a block of rows at a time and within a memory budget.

Vectors that fit into the budget stay in memory as they are stored, in float16, sorted so that rows with similar text
embeddings share a block. A block whose text parts all lie farther from a query than its k-th neighbor so far is
skipped: with ten classes that saves nine tenths of the work. Vectors that do not fit are read from disk in table order
on every pass. Either way a block is compared in float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float32, Int

from index.search.kmeans import ROWS_PER_PARTITION, k_means, nearest_centroid
from index.search.memory import available_bytes, held_bytes, rows_at_once
from index.table.schema import TRAIN
from index.table.table import Table

if TYPE_CHECKING:
    import torch

MAX_QUERIES = 4096
"""Largest batch of queries that the memory budget accounts for."""
CACHE_BLOCK_ROWS = {"cpu": 2048}
"""Rows of a block in memory, by device type: the scores of 1,024 queries against so many rows stay in a CPU's cache,
which doubles the speed. Other devices use the block size of reading."""
POSITION_BYTES = 36
"""Per row: sorted positions, ranks, squared norms; clusters while sorting."""
SORTED_AT_ONCE = 8
"""Parts of the dimensions that are sorted one after the other, so that a copy takes an eighth of the vectors."""


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Some training rows."""

    positions: 'Int[torch.Tensor, "n"]'
    """Positions among the training rows, in table order."""
    vectors: 'Float32[torch.Tensor, "n S"]'
    squares: 'Float32[torch.Tensor, "n"]'
    """Squared norms of the vectors."""


@dataclass(frozen=True, eq=False, slots=True)
class SortedBlocks:
    """Vectors in memory in P blocks of rows with similar text parts, and a ball around the text parts of each block."""

    vectors: 'Float[torch.Tensor, "N S"]'
    """In the order of the blocks, as they are stored."""
    squares: 'Float32[torch.Tensor, "N"]'
    order: 'Int[torch.Tensor, "N"]'
    """The position of each vector."""
    rank: 'Int[torch.Tensor, "N"]'
    """The inverse of `order`: for each position in table order, its index in `vectors`."""
    ends: list[int]
    """Where in `vectors` each block ends."""
    centers: 'Float32[torch.Tensor, "P T"]'
    radii: 'Float32[torch.Tensor, "P"]'

    @classmethod
    def of(cls, vectors: "torch.Tensor", groups: "Sequence[torch.Tensor]", text_dim: int) -> "SortedBlocks":
        """Sort vectors (N S) in place into one block per group of positions.

        Text parts are the first `text_dim` entries.
        """
        import torch

        order, sizes = torch.cat(list(groups)), [len(group) for group in groups]
        for columns in torch.split(vectors, -(-vectors.shape[1] // SORTED_AT_ONCE), dim=1):
            columns.copy_(columns[order])
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        squares, centers, radii = [], [], []
        for part in torch.split(vectors, sizes):
            rows = part.float()
            text = rows[:, :text_dim]
            center = text.mean(0)
            squares.append(rows.square().sum(1))
            centers.append(center)
            radii.append((text - center).norm(dim=1).max())
        ends = np.cumsum(sizes).tolist()
        return cls(vectors, torch.cat(squares), order, rank, ends, torch.stack(centers), torch.stack(radii))

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.ends)

    def __getitem__(self, number: int) -> Block:
        """Return a block, in float32."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        rows = slice(self.ends[number - 1] if number else 0, self.ends[number])
        return Block(self.order[rows], self.vectors[rows].float(), self.squares[rows])

    def take(self, positions: 'Int[torch.Tensor, "B"]') -> 'Float32[torch.Tensor, "B S"]':
        """Return the vectors at some positions."""
        return self.vectors[self.rank[positions]].float()

    def lower_bounds(self, q: "torch.Tensor", g: "torch.Tensor | None" = None) -> "torch.Tensor":
        """Return, for queries (B S), a lower bound of |q - v_i|^2 - g_i over the rows of each block (B P).

        The bound is the squared distance of the query's text part to the ball around the block's, less the largest
        potential in the block.
        """
        import torch

        gap = torch.cdist(q[:, : self.centers.shape[1]], self.centers) - self.radii
        # A thousandth less, so that rounding never hides a row.
        bound = 0.999 * gap.clamp(min=0).square()
        if g is None:
            return bound
        return bound - torch.stack([part.max() for part in g[self.order].tensor_split(self.ends[:-1])])


class VectorBlocks:
    """The training vectors of a table, for any number of passes over them."""

    def __init__(
        self,
        table: Table,
        *,
        memory: int | None = None,
        device: str = "cpu",
        stride: int = 1,
        first: int = 0,
        balance: bool = True,
        block_rows: int | None = None,
    ) -> None:
        """Count the rows and read them to `device` if they fit into `memory` bytes (None: no limit) and on the device.

        With `stride` k only every k-th row from `first` on is used. Without `balance` the balance coordinate is set to
        zero, so that potentials are fitted to plain distances even if the table stores some. `block_rows` overrides the
        number of rows per block.
        """
        import torch

        self._table, self._stride, self._first, self._balance = table, stride, first, balance
        self.device = torch.device(device)
        self.train_positions = table.positions(TRAIN)
        """Positions of all training rows in the table."""
        self.table_positions = self.train_positions[first::stride]
        """Positions in the table of the rows used."""
        self.count = len(self.table_positions)
        geometry = table.meta.geometry
        memory = 2**62 if memory is None else memory
        # float16 and float32 of the rows being read and in use; the scores of a batch, and a copy of the best.
        self._read_rows = block_rows or rows_at_once(memory, 16 * geometry.vector_dim + 8 * MAX_QUERIES)
        block_rows = block_rows or CACHE_BLOCK_ROWS.get(self.device.type, self._read_rows)
        self.num_bytes = vector_bytes(table, self.count, block_rows)
        """What holding the vectors in memory takes."""
        fits = self.num_bytes <= held_bytes(memory)
        if fits and self.device.type != "cpu":
            fits = self.num_bytes <= held_bytes(available_bytes(device))
        self.sorted: SortedBlocks | None = self._sort(block_rows) if fits else None

    @property
    def in_memory(self) -> bool:
        """Whether the vectors are held in memory."""
        return self.sorted is not None

    def __iter__(self) -> Iterator[Block]:
        """Yield all blocks."""
        return self._read() if self.sorted is None else iter(self.sorted)

    def take(self, positions: Int[np.ndarray, "B"]) -> Float32[np.ndarray, "B S"]:
        """Return the vectors at some positions; order and repeats are kept."""
        if self.sorted is None:
            return self._prepare(self._table.take(self.table_positions[positions], "vector")).astype(np.float32)
        import torch

        return np.asarray(self.sorted.take(torch.from_numpy(positions).to(self.device)).cpu())

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
        for number in sorted(set(closest.tolist())):
            best.update(self.sorted[number], (closest == number).nonzero()[:, 0])
        for number in range(len(self.sorted)):
            promising = ((closest != number) & (bounds[:, number] < best.cost[:, -1])).nonzero()[:, 0]
            if len(promising):
                best.update(self.sorted[number], promising)
        return best.cost, best.positions

    def _sort(self, block_rows: int) -> SortedBlocks:
        """Read all rows and group them by k-means on their text parts, in blocks of at most `block_rows`."""
        import torch

        vectors, text_dim = self._read_all(), self._table.meta.geometry.text_width
        texts = vectors[:, :text_dim]
        clusters, rng = -(-self.count // block_rows), np.random.default_rng(0)
        sample = torch.from_numpy(rng.permutation(self.count)[: clusters * ROWS_PER_PARTITION]).to(self.device)
        cluster = nearest_centroid(texts, k_means(texts[sample], clusters, rng))
        members = torch.split(cluster.argsort(stable=True), torch.bincount(cluster, minlength=clusters).tolist())
        groups = [group for rows in members for group in torch.split(rows, block_rows) if len(group)]
        return SortedBlocks.of(vectors, groups, text_dim)

    def _read_all(self) -> 'Float[torch.Tensor, "N S"]':
        """Read all rows, each once, into one tensor."""
        import torch

        vectors = torch.empty(0)
        for start, rows in self._stored():
            if not start:
                vectors = torch.empty((self.count, rows.shape[1]), dtype=rows.dtype, device=self.device)
            vectors[start : start + len(rows)] = rows
        return vectors

    def _prepare(self, stored: Float[np.ndarray, "n S"]) -> Float[np.ndarray, "n S"]:
        """Remove the balance from stored vectors, if they are to be compared without it."""
        if not self._balance:
            self._table.meta.geometry.balance_of(stored)[:] = 0
        return stored

    def _stored(self) -> 'Iterator[tuple[int, Float[torch.Tensor, "n S"]]]':
        """Read all stored rows, in table order; yield the position of the first of each batch, and the batch."""
        import torch

        seen, start = 0, 0
        for vectors in self._table.column_batches("vector", TRAIN, self._read_rows):
            rows = self._prepare(vectors[(self._first - seen) % self._stride :: self._stride])
            seen += len(vectors)
            if len(rows):
                yield start, torch.from_numpy(rows)
            start += len(rows)
        assert start == self.count, (start, self.count)

    def _read(self) -> Iterator[Block]:
        """Read all rows from disk, in table order."""
        import torch

        for start, rows in self._stored():
            vectors = rows.to(self.device).float()
            positions = torch.arange(start, start + len(rows), device=self.device)
            yield Block(positions, vectors, vectors.square().sum(1))


def vector_bytes(table: Table, rows: int, block_rows: int = CACHE_BLOCK_ROWS["cpu"]) -> int:
    """Return what `VectorBlocks` takes to hold a number of rows of a table in blocks of `block_rows`, and sort them."""
    geometry = table.meta.geometry
    entry: int = table.dataset().schema.field("vector").type.value_type.bit_width // 8
    sampled = -(-rows // block_rows) * ROWS_PER_PARTITION
    per_row = entry * geometry.vector_dim * (SORTED_AT_ONCE + 1) // SORTED_AT_ONCE + POSITION_BYTES
    return per_row * rows + entry * geometry.text_width * min(rows, sampled)


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
