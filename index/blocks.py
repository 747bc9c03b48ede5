"""The training rows' search vectors in blocks: held where they fit into the memory that is given, else read each time.

The balance coordinate is left out, so that potentials are fitted to bare distances whatever the table holds already.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

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
    """Iterate all blocks, as often as wanted, within about `memory` bytes; with `every` = k only each k-th row."""

    def __init__(self, table: Table, *, memory: int, device: str = "cpu", every: int = 1) -> None:
        """Count the rows, and read them if they fit."""
        self._table, self._device, self._every = table, device, every
        trained = table.dataset().count_rows(filter=f"split = '{TRAIN}'")
        self.count = -(-trained // every)
        width = table.meta.geometry.width
        # float32 of the block in use, float16 and float32 of the one being read, and the scores of a batch of queries.
        self._rows = max(LEAST_ROWS, min(65_536, memory // (16 * width + 8 * 1024)))
        self.held = 4 * (width + 1) * self.count + 16 * width * self._rows <= memory
        self._blocks = list(self._read()) if self.held else []

    def __iter__(self) -> Iterator[Block]:
        """The blocks in the table's order."""
        return iter(self._blocks) if self.held else self._read()

    def _read(self) -> Iterator[Block]:
        import torch

        geometry, seen, start = self._table.meta.geometry, 0, 0
        batches = self._table.dataset().to_batches(
            columns=["vector"], filter=f"split = '{TRAIN}'", batch_size=self._rows, batch_readahead=1
        )
        for batch in batches:
            rows = column_array(batch["vector"])[(-seen) % self._every :: self._every].astype(np.float32)
            seen += len(batch)
            geometry.balance_of(rows)[:] = 0
            vectors = torch.from_numpy(rows).to(self._device)
            yield Block(start, vectors, vectors.square().sum(1))
            start += len(rows)
        assert start == self.count, (start, self.count)
