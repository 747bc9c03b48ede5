"""NeighborStream: batches of training targets, retrieved from the table by vector search.

The batch of step s depends on (seed, s) alone: its queries are drawn from counters. So resuming needs two integers, and
any number of processes can divide the slots of the same batches. A bounded number of searches runs ahead in background
threads, and the time that training waits for them is measured.

Where a search costs more than a training step, each retrieved pair can serve several steps (reuse), each time with
other uniforms. On a CPU the reuse is planned from counts alone, so the same seed gives the same result on every
machine; on an accelerator, whose speed is unknown, it is measured when training starts and stored with the run.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int
from torch import Tensor

from index.errors import OptionError
from index.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SEED, check_ranges
from index.search.neighbors import LockstepSearch, NeighborSearch
from index.space.queries import draw_jitter, draw_points, draw_rows, draw_uniforms
from index.table.schema import TRAIN
from index.table.table import Table

COUPLINGS = ("nearest", "independent")
CONDITIONS = ("retrieved", "query")
NUM_UNIFORMS = 8
QUERIES_PER_SEARCH = 1024
"""One search serves several steps: 1,024 queries at once cost about half as much as four times 256."""
SEARCHES_AHEAD = 2
REUSE_GROUP = 16
"""Pairs are reused in groups of this many steps: 0 to 15, then 0 to 15 again."""
MAX_REUSE = 16
# The cost of a search, as the number of floating-point operations of training that take as long on the same core;
# fitted to tests/bench/search_speed.py on tables of 10,000 to a million rows, and doubled, because both compete for
# caches.
FLOPS_PER_QUERY, FLOPS_PER_SCANNED_ENTRY = 13e6, 14

EncodeTokens = Callable[[Sequence[str]], Float32[np.ndarray, "B K T"]]
"""Captions to pooled text embeddings followed by token embeddings."""


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """The input of one training step; latents are in coordinates."""

    r: Float[Tensor, "B L"]
    """Noise R."""
    text: Float[Tensor, "B K T"]
    """Conditioning: the pooled text embedding, then token embeddings if the network attends to any."""
    y: Float[Tensor, "B L"]
    """Latents of the retrieved pairs."""
    uniforms: Float[Tensor, "B 8"]
    """Numbers uniform in [0, 1) for the random choices of an objective; the last is reserved for the stream."""

    def normal(self, column: int) -> Float[Tensor, "B"]:
        """Return one column of the uniforms as standard normal numbers, by the inverse of the normal CDF."""
        normal: Tensor = torch.special.ndtri(self.uniforms[:, column].clamp(2**-25, 1 - 2**-24))
        return normal

    def to(self, device: str | torch.device) -> "Batch":
        """Return the batch on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in self.__slots__})

    def split(self, parts: int) -> "list[Batch]":
        """Split the batch into `parts` parts of equal size."""
        chunks = [getattr(self, name).chunk(parts) for name in self.__slots__]
        return [Batch(*tensors) for tensors in zip(*chunks, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """What the batches of a stream depend on, next to the table; see FitConfig for the fields."""

    batch_size: Annotated[int, COUNT]
    seed: Annotated[int, SEED] = 0
    coupling: str = "nearest"
    num_neighbors: Annotated[int, COUNT] = 1
    temperature: Annotated[float, POSITIVE] = 1.0
    condition: str = "retrieved"
    jitter: Annotated[float, NOT_NEGATIVE] = 0.0
    reuse: Annotated[int, COUNT] = 1

    def __post_init__(self) -> None:
        """Raise OptionError if a value is unknown or out of range."""
        for name, choices in {"coupling": COUPLINGS, "condition": CONDITIONS}.items():
            if getattr(self, name) not in choices:
                raise OptionError(f"--{name} {getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}")
        check_ranges(self)


@dataclass(frozen=True, eq=False, slots=True)
class Queries:
    """A sample of the query distribution, one query per slot."""

    position: Int[np.ndarray, "B"]
    """Positions in the table of the rows whose captions are queried."""
    text: Float32[np.ndarray, "B T"]
    """Text embeddings DE, with jitter if there is any."""
    r: Float32[np.ndarray, "B L"]
    """Noise R."""
    uniforms: Float32[np.ndarray, "B 8"]


class Pairs(NamedTuple):
    """The pair of each query: text embedding, latent, and row id (None: the query's own row)."""

    text: Float32[np.ndarray, "B T"]
    latent: Float16[np.ndarray, "B L"]
    row_id: Int[np.ndarray, "B"] | None


class NeighborStream:
    """Iterate over (step, batch) from a given step on, without end."""

    def __init__(
        self,
        table: Table,
        search: NeighborSearch,
        config: StreamConfig,
        *,
        start: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        encode_tokens: EncodeTokens | None = None,
    ) -> None:
        """Draw queries from the training rows of `table`, and retrieve their pairs by `search`.

        Each of several processes gets an equal range of the slots of a batch. `encode_tokens` adds token embeddings to
        the conditioning. Raises OptionError if the batch size is not a multiple of the number of processes.
        """
        if config.batch_size % num_processes:
            raise OptionError(
                f"--batch-size {config.batch_size} cannot be divided among {num_processes} processes: use a multiple "
                f"of {num_processes}"
            )
        self._table, self._search, self._config, self._start = table, search, config, start
        self._positions = table.positions(TRAIN)
        self._count = config.batch_size // num_processes
        self._slots = slice(process_index * self._count, (process_index + 1) * self._count)
        self._encode_tokens = encode_tokens
        self.waiting_seconds = 0.0
        """Seconds that the consumer has waited for batches so far."""

    def queries(self, first: int, count: int) -> Queries:
        """Return the queries of this process's slots in the steps `first` to `first + count - 1`."""
        steps = range(first, first + count)
        rows, r = (np.concatenate(parts) for parts in zip(*map(self._draw, steps), strict=True))
        position = self._positions[rows]
        text = self._table.take(position, "text").astype(np.float32)
        text = text + np.concatenate([*map(self._jitter, steps)]) * np.linalg.norm(text, axis=1, keepdims=True)
        return Queries(position, text, r, np.concatenate([*map(self._uniforms, steps)]))

    def batches(self, first: int, count: int) -> list[Batch]:
        """Return the batches of `count` steps from one search; each equals the batch of a search of its own."""
        queries = self.queries(first, count)
        pairs = self._pairs(queries)
        y = self._table.meta.geometry.to_coordinates(pairs.latent)
        arrays = (queries.r, self._conditioning(queries, pairs, count), y, queries.uniforms)
        parts = [torch.split(torch.from_numpy(array), self._count) for array in arrays]
        return [Batch(*tensors) for tensors in zip(*parts, strict=True)]

    def _draw(self, step: int) -> tuple[Int[np.ndarray, "B"], Float32[np.ndarray, "B L"]]:
        size, seed = self._config.batch_size, self._config.seed
        rows = draw_rows(len(self._positions), size, seed=seed, step=step)
        r = draw_points(self._table.meta.geometry, size, seed=seed, step=step)
        return rows[self._slots], r[self._slots]

    def _jitter(self, step: int) -> Float32[np.ndarray, "B _"]:
        config = self._config
        if not config.jitter:
            return np.zeros((self._count, 1), np.float32)
        noise = draw_jitter(config.batch_size, self._table.meta.geometry.text_dim, seed=config.seed, step=step)
        return np.float32(config.jitter) * noise[self._slots]

    def _uniforms(self, step: int) -> Float32[np.ndarray, "B 8"]:
        return draw_uniforms(self._config.batch_size, NUM_UNIFORMS, seed=self._config.seed, step=step)[self._slots]

    def _pairs(self, queries: Queries) -> Pairs:
        if self._config.coupling == "independent":
            return Pairs(queries.text, self._table.take(queries.position, "latent"), None)
        vectors = self._table.meta.geometry.queries(queries.text, queries.r)
        nearest = self._search.nearest(vectors, self._config.num_neighbors)
        neighbor = sample_neighbor(nearest.distance / self._config.temperature, queries.uniforms[:, -1])
        chosen = np.arange(len(neighbor)), neighbor
        return Pairs(nearest.text[chosen].astype(np.float32), nearest.latent[chosen], nearest.row_id[chosen])

    def _conditioning(self, queries: Queries, pairs: Pairs, count: int) -> Float32[np.ndarray, "B K T"]:
        if self._config.condition == "query":
            pairs = pairs._replace(text=queries.text, row_id=None)
        if self._encode_tokens is None:
            return pairs.text[:, None]
        if pairs.row_id is None:
            captions = self._table.take(queries.position, "caption")
        else:
            captions = self._table.take_row_ids(pairs.row_id, "caption")
        # One step at a time, because the last bits of an embedding depend on what else is in its batch.
        return np.concatenate([self._encode_tokens(part.tolist()) for part in np.split(captions, count)])

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """Yield steps in order; with reuse, the pairs of a group once, then all of them again."""
        if self._config.reuse == 1:
            yield from enumerate(self._retrieved(self._start), self._start)
            return
        steps_per_group = REUSE_GROUP * self._config.reuse
        group = self._start // steps_per_group
        retrieved = self._retrieved(group * REUSE_GROUP)
        for first in itertools.count(group * steps_per_group, steps_per_group):
            held = list(itertools.islice(retrieved, REUSE_GROUP))
            for step in range(max(first, self._start), first + steps_per_group):
                uniforms = torch.from_numpy(self._uniforms(step))
                yield step, replace(held[(step - first) % REUSE_GROUP], uniforms=uniforms)

    def _retrieved(self, first: int) -> Iterator[Batch]:
        """Yield the batches from `first` on, each retrieved once, by searches ahead in the background."""
        steps_per_search = max(1, QUERIES_PER_SEARCH // self._count)
        # While a group is reused the whole next one is searched.
        depth = SEARCHES_AHEAD if self._config.reuse == 1 else max(SEARCHES_AHEAD, -(-REUSE_GROUP // steps_per_search))
        pending: deque[Future[list[Batch]]] = deque()
        lockstep = self._search if isinstance(self._search, LockstepSearch) else None
        threads = SEARCHES_AHEAD if lockstep is None else 1
        with (
            nullcontext() if lockstep is None else closing(lockstep),
            ThreadPoolExecutor(threads, thread_name_prefix="search") as pool,
        ):
            try:
                for step in itertools.count(first, steps_per_search):
                    pending.append(pool.submit(self.batches, step, steps_per_search))
                    if len(pending) <= depth:
                        continue
                    began = time.perf_counter()
                    batches = pending.popleft().result()
                    self.waiting_seconds += time.perf_counter() - began
                    yield from batches
            finally:
                for future in pending:
                    future.cancel()


def sample_neighbor(energy: Float[np.ndarray, "B K"], uniform: Float32[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
    """Sample one of K neighbors per row, with probability proportional to exp(-energy), from uniform numbers."""
    weight = np.exp(energy.min(1, keepdims=True) - energy.astype(np.float64))
    reached = weight.cumsum(1) > uniform[:, None] * weight.sum(1, keepdims=True)
    return np.asarray(reached.argmax(1))


def plan_reuse(table: Table, flops: int, *, exact: bool) -> int:
    """Return the reuse on a CPU for a network whose forward pass takes `flops` operations per image."""
    index, rows, dim = table.meta.index, len(table.positions(TRAIN)), table.meta.geometry.vector_dim
    training = 3 * flops
    if exact or index is None or index.num_partitions is None:
        searching = 2.0 * rows * dim
    else:
        scanned = rows * (index.nprobes or 1) / index.num_partitions
        searching = FLOPS_PER_QUERY + FLOPS_PER_SCANNED_ENTRY * scanned * dim
    return _clip_reuse(searching / training)


def measure_reuse(
    stream: Iterable[tuple[int, Batch]],
    train: Callable[[Batch], None],
    *,
    steps: int = 16,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Return the reuse with which `stream` keeps up with `train`, from the seconds that steps of each take alone."""
    batches = iter(stream)
    _, batch = next(batches)
    began = clock()
    for _ in range(steps):
        next(batches)
    searching = clock() - began
    train(batch)
    began = clock()
    for _ in range(steps):
        train(batch)
    training = clock() - began
    return _clip_reuse(1.1 * searching / training)


def _clip_reuse(ratio: float) -> int:
    return int(np.clip(np.ceil(ratio), 1, MAX_REUSE))
