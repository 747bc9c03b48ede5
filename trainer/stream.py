"""NeighborStream: minibatches of nearest-neighbour targets, straight from the table.

Step s of a stream depends on (seed, s) alone: which descriptions are asked, with which random points, is drawn from
counters, so resuming needs two integers, and any number of processes shares out the slots of the same stream. A bounded
number of searches runs ahead in background threads; the time that training waits for them is measured.

Where searching costs more than training each draw (R with its pair) can serve several steps, with other dice each time.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from index.errors import OptionError
from index.queries import draw_dice, draw_points, draw_rows
from index.schema import TRAIN
from index.search import Neighbours
from index.table import Table

COUPLINGS = ("nearest", "independent")
DICE = 4
QUERIES_PER_SEARCH = 1024
"""One search answers several steps: asking 1,024 at once costs about half of asking four times 256."""
SEARCHES_AHEAD = 2
GROUP = 16
"""Draws between two uses of the same one."""
MOST_REUSE = 16


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

    def to(self, device: str | torch.device) -> "Batch":
        """The same batch on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in self.__slots__})

    def split(self, parts: int) -> "list[Batch]":
        """The batch in equal parts."""
        cut = [getattr(self, name).chunk(parts) for name in self.__slots__]
        return [Batch(*arrays) for arrays in zip(*cut, strict=True)]


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
        process: int = 0,
        processes: int = 1,
        reuse: int = 1,
        k: int = 1,
        temperature: float = 1.0,
    ) -> None:
        """Draw descriptions from the training rows of `table`, from step `start` on.

        Of the `batch_size` slots of a step each of several processes gets an equal run; each draw serves `reuse` steps.
        With `k` above 1 the pair is drawn from the k nearest, by exp(-squared distance / temperature).
        """
        if coupling not in COUPLINGS:
            raise OptionError(f"--coupling {coupling!r} is unknown: choose one of {', '.join(COUPLINGS)}")
        self._table, self._neighbours, self._coupling = table, neighbours, coupling
        if batch_size % processes:
            raise OptionError(f"--batch-size {batch_size} cannot be shared by {processes} processes: give a multiple")
        self._offsets = table.offsets(TRAIN)
        self._batch_size, self._seed, self._start = batch_size, seed, start
        self._share, self._reuse = batch_size // processes, reuse
        self._k, self._temperature = k, temperature
        self._slots = slice(process * self._share, (process + 1) * self._share)
        self.waited = 0.0
        """Seconds that the consumer has waited for a batch, so far."""

    def batches(self, first: int, count: int) -> list[Batch]:
        """`count` draws from `first` on, found by one search; each is what it would be alone."""
        drawn = [self._draw(step) for step in range(first, first + count)]
        offsets = np.concatenate([self._offsets[rows] for rows, _, _ in drawn])
        r, dice = np.concatenate([r for _, r, _ in drawn]), np.concatenate([dice for _, _, dice in drawn])
        query = self._table.take(offsets, "text").astype(np.float32)
        geometry = self._table.meta.geometry
        if self._coupling == "nearest":
            pairs = self._neighbours.nearest(geometry.queries(query, r), self._k)
            chosen = np.arange(len(r)), draw_one(pairs.distance / self._temperature, dice[:, -1])
            text, latent = pairs.text[chosen].astype(np.float32), pairs.latent[chosen]
        else:
            text, latent = query, self._table.take(offsets, "latent")
        whole = (r, query, text, geometry.to_coordinates(latent), dice)
        parts = [torch.split(torch.from_numpy(array), self._share) for array in whole]
        return [Batch(*arrays) for arrays in zip(*parts, strict=True)]

    def _draw(self, step: int) -> tuple[Int[np.ndarray, "B"], Float32[np.ndarray, "B L"], Float32[np.ndarray, "B D"]]:
        """Row numbers, points and dice of our slots of one step."""
        count, seed = self._batch_size, self._seed
        return (
            draw_rows(len(self._offsets), count, seed=seed, step=step)[self._slots],
            draw_points(self._table.meta.geometry, count, seed=seed, step=step)[self._slots],
            self._dice(step),
        )

    def _dice(self, step: int) -> Float32[np.ndarray, "B D"]:
        return draw_dice(self._batch_size, DICE, seed=self._seed, step=step)[self._slots]

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """Yield steps in order: every draw of a group once, then all of them again."""
        if self._reuse == 1:
            yield from enumerate(self._found(self._start), self._start)
            return
        group = self._start // (GROUP * self._reuse)
        found = self._found(group * GROUP)
        for first in itertools.count(group * GROUP * self._reuse, GROUP * self._reuse):
            held = list(itertools.islice(found, GROUP))
            for step in range(max(first, self._start), first + GROUP * self._reuse):
                dice = torch.from_numpy(self._dice(step))
                yield step, replace(held[(step - first) % GROUP], dice=dice)

    def _found(self, first: int) -> Iterator[Batch]:
        """Draws from `first` on, searched ahead in the background."""
        together = max(1, QUERIES_PER_SEARCH // self._share)
        # While a group is used again the next one is searched, whole.
        ahead = SEARCHES_AHEAD if self._reuse == 1 else max(SEARCHES_AHEAD, -(-GROUP // together))
        pending: deque[Future[list[Batch]]] = deque()
        asked = first
        with ThreadPoolExecutor(SEARCHES_AHEAD, thread_name_prefix="search") as pool:
            try:
                while True:
                    while len(pending) < ahead:
                        pending.append(pool.submit(self.batches, asked, together))
                        asked += together
                    began = time.perf_counter()
                    found = pending.popleft().result()
                    self.waited += time.perf_counter() - began
                    yield from found
            finally:
                for future in pending:
                    future.cancel()


def draw_one(energy: Float[np.ndarray, "B K"], die: Float32[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
    """For each row one of K by exp(-energy), decided by a number uniform in [0, 1)."""
    weight = np.exp(energy.min(1, keepdims=True) - energy.astype(np.float64))
    reached = weight.cumsum(1) > die[:, None] * weight.sum(1, keepdims=True)
    return np.asarray(reached.argmax(1))


def choose_reuse(stream: NeighborStream, train: Callable[[Batch], None], *, steps: int = 16) -> int:
    """How many steps each draw must serve for training not to wait, by a few searches and steps of each alone."""
    draws = iter(stream)
    first = next(draws)[1]
    began = time.perf_counter()
    for _ in range(steps):
        next(draws)
    searched = time.perf_counter() - began
    train(first)
    began = time.perf_counter()
    for _ in range(steps):
        train(first)
    trained = time.perf_counter() - began
    return int(np.clip(np.ceil(1.1 * searched / trained), 1, MOST_REUSE))
