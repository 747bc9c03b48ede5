"""The training rows' search vectors in blocks: held where they fit into the given memory, else read each time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float32, Int

from index.schema import TRAIN
from index.table import Table, column_array

if TYPE_CHECKING:
    import torch

LEAST_ROWS = 1024


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Some consecutive training rows."""

    start: int
    """Place of the first among the blocks' rows."""
    vectors: 'Float[torch.Tensor, "n S"]'
    squares: 'Float[torch.Tensor, "n"]'
    """Squared lengths."""

    @property
    def rows(self) -> slice:
        """Their places."""
        return slice(self.start, self.start + len(self.vectors))


class VectorBlocks:
    """Iterate all blocks, as often as wanted, within about `memory` bytes; with `every` = k only each k-th row.

    Without `balance` that coordinate is zero, so that potentials are fitted to bare distances whatever the table holds.
    """

    def __init__(
        self, table: Table, *, memory: int | None = None, device: str = "cpu", every: int = 1, balance: bool = True
    ) -> None:
        """Count the rows, and read them if they fit; without `memory` they are held in any case."""
        self._table, self._device, self._every, self._balance = table, device, every, balance
        self._offsets = table.offsets(TRAIN)[::every]
        self.count = len(self._offsets)
        width = table.meta.geometry.width
        memory = 2**62 if memory is None else memory
        # float32 of the block in use, float16 and float32 of the one being read, and the scores of a batch of queries.
        self._rows = max(LEAST_ROWS, min(65_536, memory // (16 * width + 8 * 1024)))
        self.held = 4 * (width + 1) * self.count + 16 * width * self._rows <= memory
        self._blocks = list(self._read()) if self.held else []

    def __iter__(self) -> Iterator[Block]:
        """The blocks in the table's order."""
        return iter(self._blocks) if self.held else self._read()

    def take(self, places: Int[np.ndarray, "B"]) -> Float32[np.ndarray, "B S"]:
        """The vectors at some places, order and repeats kept."""
        if not self.held:
            return self._prepared(self._table.take(self._offsets[places], "vector"))
        import torch

        rows = torch.from_numpy(places).to(self._device)
        out = torch.empty((len(places), self._table.meta.geometry.width), device=self._device)
        for block in self._blocks:
            here = (rows >= block.start) & (rows < block.rows.stop)
            out[here] = block.vectors[rows[here] - block.start]
        return np.asarray(out.cpu())

    def _prepared(self, stored: Float[np.ndarray, "n S"]) -> Float32[np.ndarray, "n S"]:
        rows = stored.astype(np.float32)
        if not self._balance:
            self._table.meta.geometry.balance_of(rows)[:] = 0
        return rows

    def _read(self) -> Iterator[Block]:
        import torch

        seen, start = 0, 0
        batches = self._table.dataset().to_batches(
            columns=["vector"], filter=f"split = '{TRAIN}'", batch_size=self._rows, batch_readahead=1
        )
        for batch in batches:
            rows = column_array(batch["vector"])[(-seen) % self._every :: self._every]
            seen += len(batch)
            vectors = torch.from_numpy(self._prepared(rows)).to(self._device)
            yield Block(start, vectors, vectors.square().sum(1))
            start += len(rows)
        assert start == self.count, (start, self.count)
