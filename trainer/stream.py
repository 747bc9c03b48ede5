"""NeighborStream: minibatches of nearest-neighbour targets, straight from the table.

Step s of a stream depends on (seed, s) alone: which descriptions are asked, with which random points, is drawn from
counters, so resuming needs two integers and any number of processes sees the same stream. Searches run ahead in
background threads, a bounded number of steps; the time that training waits for them is measured.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from index.errors import OptionError
from index.queries import draw_dice, draw_points, draw_rows
from index.schema import TRAIN
from index.search import Neighbours
from index.table import Table

COUPLINGS = ("nearest", "independent")
DICE = 4


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """What one training step is given; latents are in coordinates."""

    r: Float[Tensor, "B L"]
    """Random points R."""
    query: Float[Tensor, "B T"]
    """The descriptions DE that were asked for."""
    text: Float[Tensor, "B T"]
    """The close pairs' descriptions."""
    y: Float[Tensor, "B L"]
    """The close pairs' latents."""
    dice: Float[Tensor, "B 4"]
    """Numbers uniform in [0, 1) for whatever else an objective decides by chance."""

    def to(self, device: str) -> "Batch":
        """The same batch on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in self.__slots__})


class NeighborStream:
    """Iterate (step, batch) from `start` on, without end."""

    def __init__(
        self,
        table: Table,
        neighbours: Neighbours,
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        coupling: str = "nearest",
        ahead: int = 8,
        threads: int = 2,
    ) -> None:
        """Draw descriptions from the training rows of `table`; keep at most `ahead` steps searched in advance."""
        if coupling not in COUPLINGS:
            raise OptionError(f"--coupling {coupling!r} is unknown: choose one of {', '.join(COUPLINGS)}")
        self._table, self._neighbours, self._coupling = table, neighbours, coupling
        self._offsets = table.offsets(TRAIN)
        self._dataset = table.dataset()
        self._batch_size, self._seed, self._start = batch_size, seed, start
        self._ahead, self._threads = ahead, threads
        self.waited = 0.0
        """Seconds that the consumer has waited for a batch, so far."""

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        geometry, count = self._table.meta.geometry, self._batch_size
        rows = draw_rows(len(self._offsets), count, seed=self._seed, step=step)
        r = draw_points(geometry, count, seed=self._seed, step=step)
        offsets = self._offsets[rows]
        query = self._table.take(offsets, "text").astype(np.float32)
        if self._coupling == "nearest":
            pairs = self._neighbours.nearest(geometry.queries(query, r))
            text, latent = pairs.text[:, 0].astype(np.float32), pairs.latent[:, 0]
        else:
            text, latent = query, self._table.take(offsets, "latent")
        return Batch(
            r=torch.from_numpy(r),
            query=torch.from_numpy(query),
            text=torch.from_numpy(text),
            y=torch.from_numpy(geometry.to_coordinates(latent)),
            dice=torch.from_numpy(draw_dice(count, DICE, seed=self._seed, step=step)),
        )

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """Search ahead in the background and yield steps in order."""
        pending: deque[Future[Batch]] = deque()
        step = self._start
        with ThreadPoolExecutor(self._threads, thread_name_prefix="search") as pool:
            try:
                while True:
                    while len(pending) < self._ahead:
                        pending.append(pool.submit(self.batch, step + len(pending)))
                    began = time.perf_counter()
                    batch = pending.popleft().result()
                    self.waited += time.perf_counter() - began
                    yield step, batch
                    step += 1
            finally:
                for future in pending:
                    future.cancel()
