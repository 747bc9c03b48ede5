"""NeighborStream: batches of training targets, retrieved from the table by vector search.

The batch of step s depends on (seed, s) alone: its queries are drawn from counters. So resuming needs two integers, and
any number of processes can divide the slots of the same batches. A bounded number of searches runs ahead in background
threads, and the time that training waits for them is measured. Targets that `pipeline draw-targets` has drawn ahead
take the place of the searches: then rows are read, those of many steps at once, and the table needs no index.

Where a search costs more than a training step, each retrieved pair can serve several steps (reuse), each time with
other uniforms. Without --reuse a rule of counts alone decides how many, so the same seed gives the same result on every
machine; an accelerator may train faster than that, and then says so.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from index.errors import OptionError
from index.ranges import COUNT, check_choices
from index.search.neighbors import LockstepSearch, NeighborSearch
from index.search.pairs import QUERIES_PER_SEARCH, Captions, PairConfig, Pairs, StepQueries
from index.table.rows import RowReader, take_columns
from index.table.schema import TRAIN
from index.table.table import Table
from index.table.targets import Targets

COUPLINGS = ("nearest", "independent")
CONDITIONS = ("retrieved", "query")
SEARCHES_AHEAD = 2
WINDOW_BYTES, BYTES_PER_ENTRY = 2**27, 12
"""Memory of the batches that one read of targets makes, of which four exist at a time; of an entry of a text embedding
or latent they hold it as float16 and float32, and R."""
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

    on_host: Float[Tensor, "B 8"] | None = None
    """The uniforms on the CPU if the batch is elsewhere: a choice that decides shapes is made there, as reading it from
    the device would wait for all that was computed before."""

    @property
    def host_uniforms(self) -> Float[Tensor, "B 8"]:
        """Return the uniforms on the CPU."""
        return self.uniforms if self.on_host is None else self.on_host

    def normal(self, column: int) -> Float[Tensor, "B"]:
        """Return one column of the uniforms as standard normal numbers, by the inverse of the normal CDF.

        It is computed on the CPU: Apple GPUs have no such function.
        """
        normal: Tensor = torch.special.ndtri(self.host_uniforms[:, column].clamp(2**-25, 1 - 2**-24))
        return send(normal, self.uniforms.device)

    def to(self, device: str | torch.device) -> "Batch":
        """Return the batch on a device; copies from pinned memory do not wait for it."""
        moved = {name: send(getattr(self, name), device) for name in TENSORS}
        return replace(self, **moved, on_host=None if torch.device(device).type == "cpu" else self.host_uniforms)

    def split(self, parts: int) -> "list[Batch]":
        """Split the batch into `parts` parts of equal size."""
        names = TENSORS if self.on_host is None else (*TENSORS, "on_host")
        chunks = [getattr(self, name).chunk(parts) for name in names]
        return [Batch(**dict(zip(names, tensors, strict=True))) for tensors in zip(*chunks, strict=True)]


TENSORS = ("r", "text", "y", "uniforms")
"""Fields of a batch that training computes with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig(PairConfig):
    """What the batches of a stream depend on, next to the table; see FitConfig for the fields."""

    coupling: str = "nearest"
    condition: str = "retrieved"
    reuse: Annotated[int, COUNT] = 1

    def __post_init__(self) -> None:
        """Raise OptionError if a value is unknown or out of range."""
        check_choices(self, coupling=COUPLINGS, condition=CONDITIONS)
        PairConfig.__post_init__(self)


class NeighborStream:
    """Iterate over (step, batch) from a given step on: without end, or as far as targets were drawn ahead."""

    def __init__(
        self,
        table: Table,
        source: NeighborSearch | Targets | None,
        config: StreamConfig,
        *,
        start: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        encode_tokens: EncodeTokens | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Draw queries from the training rows of `table`; their pairs are searched, or read from targets drawn ahead.

        Independent coupling needs neither. Each of several processes gets an equal range of the slots of a batch.
        `encode_tokens` adds token embeddings to the conditioning; `pin_memory` is for batches that a GPU copies without
        waiting. Raises OptionError if the batch size is not a multiple of the number of processes.
        """
        if config.batch_size % num_processes:
            raise OptionError(
                f"--batch-size {config.batch_size} cannot be divided among {num_processes} processes: use a multiple "
                f"of {num_processes}"
            )
        self._table, self._source, self._config, self._start = table, source, config, start
        self._count = config.batch_size // num_processes
        self._slots = slice(process_index * self._count, (process_index + 1) * self._count)
        self.queries = StepQueries(table, config, self._slots)
        """Those of this process's slots."""
        self._asks_captions = not isinstance(source, Targets) or config.condition == "query"
        if self._asks_captions:
            self.queries.positions  # noqa: B018  read here, not by several threads
        self._rows = RowReader.of(table)
        self._encode_tokens, self._pin_memory = encode_tokens, pin_memory
        self.waiting_seconds = 0.0
        """Seconds that the consumer has waited for batches so far."""

    def batches(self, first: int, count: int) -> list[Batch]:
        """Return the batches of `count` steps from one search or read; each equals the batch of one of its own."""
        steps = range(first, first + count)
        r, uniforms = self.queries.noise(steps), self.queries.uniforms(steps)
        captions = self.queries.captions(steps) if self._asks_captions else None
        pairs = self._pairs(steps, captions, r, uniforms)
        y = self._table.meta.geometry.to_coordinates(pairs.latent)
        arrays = (r, self._conditioning(captions, pairs, count), y, uniforms)
        whole = [torch.from_numpy(array) for array in arrays]
        if self._pin_memory:
            whole = [each.pin_memory() for each in whole]
        return [Batch(*tensors) for tensors in zip(*(torch.split(each, self._count) for each in whole), strict=True)]

    def _pairs(
        self,
        steps: range,
        captions: Captions | None,
        r: Float32[np.ndarray, "B L"],
        uniforms: Float32[np.ndarray, "B 8"],
    ) -> Pairs:
        if isinstance(self._source, Targets):
            row_id = self._source.read(steps.start, len(steps))[:, self._slots].ravel()
            text, latent = self._rows.take(row_id, ["text", "latent"])
            return Pairs(text.astype(np.float32), latent, row_id)
        assert captions is not None
        if self._config.coupling == "independent":
            (latent,) = take_columns(self._table, captions.position, ["latent"])
            return Pairs(captions.text, latent, None)
        assert self._source is not None
        return self.queries.retrieve(self._source, captions, r, uniforms)

    def _conditioning(self, captions: Captions | None, pairs: Pairs, count: int) -> Float32[np.ndarray, "B K T"]:
        if self._config.condition == "query":
            assert captions is not None
            pairs = pairs._replace(text=captions.text, row_id=None)
        if self._encode_tokens is None:
            return pairs.text[:, None]
        if pairs.row_id is None:
            assert captions is not None
            (texts,) = take_columns(self._table, captions.position, ["caption"])
        else:
            (texts,) = self._rows.take(pairs.row_id, ["caption"])
        # One step at a time, because the last bits of an embedding depend on what else is in its batch.
        return np.concatenate([self._encode_tokens(part.tolist()) for part in np.split(texts, count)])

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """Yield steps in order; with reuse, the pairs of a group once, then all of them again."""
        if self._config.reuse == 1:
            yield from enumerate(self._retrieved(self._start), self._start)
            return
        steps_per_group = REUSE_GROUP * self._config.reuse
        group = self._start // steps_per_group
        retrieved = self._retrieved(group * REUSE_GROUP)
        for first in itertools.count(group * steps_per_group, steps_per_group):
            held = list(islice(retrieved, REUSE_GROUP))
            for step in range(max(first, self._start), first + steps_per_group):
                if (step - first) % REUSE_GROUP >= len(held):
                    return  # targets drawn ahead end here
                uniforms = torch.from_numpy(self.queries.uniforms([step]))
                yield step, replace(held[(step - first) % REUSE_GROUP], uniforms=uniforms)

    def _retrieved(self, first: int) -> Iterator[Batch]:
        """Yield the batches from `first` on, each retrieved once, by searches or reads ahead in the background."""
        ahead, pending = self._windows(first), deque[Future[list[Batch]]]()
        # While a group is reused the whole next one is searched.
        group = 1 if self._config.reuse == 1 else -(-REUSE_GROUP // self._steps_per_search)
        lockstep = self._source if isinstance(self._source, LockstepSearch) else None
        threads = SEARCHES_AHEAD if lockstep is None else 1
        with (
            nullcontext() if lockstep is None else closing(lockstep),
            ThreadPoolExecutor(threads, thread_name_prefix="search") as pool,
        ):
            try:
                pending.extend(pool.submit(self.batches, *each) for each in islice(ahead, max(SEARCHES_AHEAD, group)))
                while pending:
                    pending.extend(pool.submit(self.batches, *each) for each in islice(ahead, 1))
                    began = time.perf_counter()
                    batches = pending.popleft().result()
                    self.waiting_seconds += time.perf_counter() - began
                    yield from batches
            finally:
                for future in pending:
                    future.cancel()

    def _windows(self, first: int) -> Iterator[tuple[int, int]]:
        """Iterate over the first step and the number of steps of each search or read."""
        if not isinstance(self._source, Targets):
            yield from ((step, self._steps_per_search) for step in itertools.count(first, self._steps_per_search))
            return
        geometry = self._table.meta.geometry
        most = max(1, WINDOW_BYTES // (BYTES_PER_ENTRY * (geometry.latent_dim + geometry.text_dim) * self._count))
        # The first read is small, so that training begins soon.
        step, count = first, min(self._steps_per_search, most)
        while step < self._source.steps:
            yield step, min(count, self._source.steps - step)
            step, count = step + count, min(4 * count, most)

    @property
    def _steps_per_search(self) -> int:
        return max(1, QUERIES_PER_SEARCH // self._count)


def send(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Copy a tensor to a device, without waiting for it where that is safe: Apple GPUs may read the memory too late."""
    return tensor.to(device, non_blocking=torch.device(device).type not in ("cpu", "mps"))


def sent_ahead(batches: Iterator[tuple[int, Batch]], device: torch.device) -> Iterator[tuple[int, Batch]]:
    """Yield batches on a device, each sent there before the one that precedes it is trained on.

    CUDA copies on a stream of its own, so that the copy of a batch runs beside the training on the one before.
    """
    if device.type == "cpu":
        yield from batches
        return
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    sent: tuple[int, Batch] | None = None
    for step, batch in batches:
        with torch.cuda.stream(copies) if copies else nullcontext():
            following = step, batch.to(device)
        if sent is not None:
            yield sent
        if copies:
            training = torch.cuda.current_stream(device)
            training.wait_stream(copies)
            for name in TENSORS:
                getattr(following[1], name).record_stream(training)
        sent = following
    if sent is not None:
        yield sent


def searched_steps(steps: int, reuse: int) -> int:
    """Return how many steps are searched for to train a number of steps, of which each serves `reuse`."""
    groups, rest = divmod(steps, REUSE_GROUP * reuse)
    return groups * REUSE_GROUP + min(rest, REUSE_GROUP)


def plan_reuse(table: Table, flops: int, *, exact: bool) -> int:
    """Return the reuse with which searches keep up with training on a CPU, from counts alone.

    So it is the same on every device and machine, and at every moment. `flops` are the network's operations per image.
    """
    index, rows, dim = table.meta.index, table.count(TRAIN), table.meta.geometry.vector_dim
    training = 3 * flops
    if exact or index is None or index.num_partitions is None:
        searching = 2.0 * rows * dim
    else:
        scanned = rows * (index.nprobes or 1) / index.num_partitions
        searching = FLOPS_PER_QUERY + FLOPS_PER_SCANNED_ENTRY * scanned * dim
    return int(np.clip(np.ceil(searching / training), 1, MAX_REUSE))
