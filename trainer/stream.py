"""NeighborStream: minibatches of nearest-neighbor targets, straight from the table.

Step s of a stream depends on (seed, s) alone: which descriptions are asked, with which random points, is drawn from
counters, so resuming needs two integers, and any number of processes shares out the slots of the same stream. A bounded
number of searches runs ahead in background threads; the time that training waits for them is measured.

Where searching costs more than training each draw (R with its pair) can serve several steps, with other uniforms each time.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int
from torch import Tensor

from index.errors import OptionError
from index.search.ann import NeighborSearch
from index.space.queries import draw_jitter, draw_points, draw_rows, draw_uniforms
from index.table.schema import TRAIN
from index.table.table import Table

COUPLINGS = ("nearest", "independent")
CONDITIONS = ("retrieved", "query")
DICE = 8
QUERIES_PER_SEARCH = 1024
"""One search answers several steps: asking 1,024 at once costs about half of asking four times 256."""
SEARCHES_AHEAD = 2
GROUP = 16
"""Draws between two uses of the same one."""

Describe = Callable[[Sequence[str]], Float32[np.ndarray, "B K T"]]
"""Captions to pooled embeddings and token states."""


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """What one training step is given; latents are in coordinates."""

    r: Float[Tensor, "B L"]
    """Random points R."""
    query: Float[Tensor, "B T"]
    """The descriptions DE that were asked for."""
    text: Float[Tensor, "B K T"]
    """The descriptions that the network is told: pooled embedding, then token states where it reads them."""
    y: Float[Tensor, "B L"]
    """The close pairs' latents."""
    uniforms: Float[Tensor, "B 8"]
    """Numbers uniform in [0, 1) for whatever else an objective decides by chance; the last is the stream's own."""

    def normal(self, column: int) -> Float[Tensor, "B"]:
        """One column of the uniforms as standard normal numbers, by the inverse of their distribution function."""
        normal: Tensor = torch.special.ndtri(self.uniforms[:, column].clamp(2**-25, 1 - 2**-24))
        return normal

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
        neighbors: NeighborSearch,
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
        condition: str = "retrieved",
        jitter: float = 0.0,
        describe: Describe | None = None,
    ) -> None:
        """Draw descriptions from the training rows of `table`, from step `start` on.

        Of the `batch_size` slots of a step each of several processes gets an equal run; each draw serves `reuse` steps.
        With `k` above 1 the pair is drawn from the k nearest, by exp(-squared distance / temperature). What is asked
        for is moved by a random vector, `jitter` times as long as it; the network is told it, or the close pair's
        description, by `describe` with its token states.
        """
        if coupling not in COUPLINGS:
            raise OptionError(f"--coupling {coupling!r} is unknown: choose one of {', '.join(COUPLINGS)}")
        self._table, self._neighbors, self._coupling = table, neighbors, coupling
        if condition not in CONDITIONS:
            raise OptionError(f"--condition {condition!r} is unknown: choose one of {', '.join(CONDITIONS)}")
        if batch_size % processes:
            raise OptionError(f"--batch-size {batch_size} cannot be shared by {processes} processes: give a multiple")
        self._offsets = table.positions(TRAIN)
        self._batch_size, self._seed, self._start = batch_size, seed, start
        self._share, self._reuse = batch_size // processes, reuse
        self._k, self._temperature = k, temperature
        self._condition, self._jitter, self._describe = condition, jitter, describe
        self._slots = slice(process * self._share, (process + 1) * self._share)
        self.waited = 0.0
        """Seconds that the consumer has waited for a batch, so far."""

    def batches(self, first: int, count: int) -> list[Batch]:
        """`count` draws from `first` on, found by one search; each is what it would be alone."""
        drawn = [self._draw(step) for step in range(first, first + count)]
        rows, r, noise, uniforms = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        asked = self._offsets[rows]
        query = self._table.take(asked, "text").astype(np.float32)
        query = query + noise * np.linalg.norm(query, axis=1, keepdims=True)
        if self._coupling == "nearest":
            row, text, latent = self._nearest(query, r, uniforms[:, -1])
        else:
            row, text, latent = None, query, self._table.take(asked, "latent")
        if self._condition == "query":
            row, text = None, query
        if self._describe is None:
            told = text[:, None]
        else:
            take = self._table.take if row is None else self._table.take_row_ids
            captions = take(asked if row is None else row, "caption")
            # One step at a time, because the last bits of an embedding depend on what else is in its batch.
            told = np.concatenate([self._describe(part.tolist()) for part in np.split(captions, count)])
        whole = (r, query, told, self._table.meta.geometry.to_coordinates(latent), uniforms)
        parts = [torch.split(torch.from_numpy(array), self._share) for array in whole]
        return [Batch(*arrays) for arrays in zip(*parts, strict=True)]

    def _draw(self, step: int) -> tuple[Any, ...]:
        """Row numbers, points, noise of descriptions and uniforms of our slots of one step."""
        geometry, count, at = self._table.meta.geometry, self._batch_size, {"seed": self._seed, "step": step}
        noise: Float32[np.ndarray, "B _"] = np.zeros((count, 1), np.float32)
        if self._jitter:
            noise = np.float32(self._jitter) * draw_jitter(count, geometry.text_dim, **at)
        whole = draw_rows(len(self._offsets), count, **at), draw_points(geometry, count, **at), noise
        return *(array[self._slots] for array in whole), self._dice(step)

    def _nearest(
        self,
        query: Float32[np.ndarray, "B T"],
        r: Float32[np.ndarray, "B L"],
        die: Float32[np.ndarray, "B"],
    ) -> tuple[Int[np.ndarray, "B"], Float32[np.ndarray, "B T"], Float16[np.ndarray, "B L"]]:
        """Row ids, descriptions and latents of the close pairs."""
        pairs = self._neighbors.nearest(self._table.meta.geometry.queries(query, r), self._k)
        chosen = np.arange(len(r)), draw_one(pairs.distance / self._temperature, die)
        return pairs.row[chosen], pairs.text[chosen].astype(np.float32), pairs.latent[chosen]

    def _dice(self, step: int) -> Float32[np.ndarray, "B D"]:
        return draw_uniforms(self._batch_size, DICE, seed=self._seed, step=step)[self._slots]

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
                uniforms = torch.from_numpy(self._dice(step))
                yield step, replace(held[(step - first) % GROUP], uniforms=uniforms)

    def _found(self, first: int) -> Iterator[Batch]:
        """Draws from `first` on, searched ahead in the background."""
        together = max(1, QUERIES_PER_SEARCH // self._share)
        # While a group is used again the next one is searched, whole.
        ahead = SEARCHES_AHEAD if self._reuse == 1 else max(SEARCHES_AHEAD, -(-GROUP // together))
        pending: deque[Future[list[Batch]]] = deque()
        with ThreadPoolExecutor(SEARCHES_AHEAD, thread_name_prefix="search") as pool:
            try:
                for asked in itertools.count(first, together):
                    pending.append(pool.submit(self.batches, asked, together))
                    if len(pending) <= ahead:
                        continue
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
