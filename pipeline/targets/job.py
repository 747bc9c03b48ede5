"""DrawSteps: retrieve the pairs of ranges of training steps on Beam, one range per worker at a time.

What crosses the engine are numbers of steps. A worker searches the table itself, writes the row ids of its range as a
fragment that no commit refers to yet, and leaves a checkpoint that names it. So a draw that was stopped goes on with
the ranges that have no checkpoint, on any engine, and a worker that repeats a range changes nothing.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from index.search.ann import open_search
from index.search.neighbors import NeighborSearch
from index.search.pairs import QUERIES_PER_SEARCH, PairConfig, StepQueries
from index.table.storage import Storage
from index.table.table import open_table
from index.table.targets import TARGETS_SCHEMA, draw_folder
from pipeline.beam.gather import Spread
from pipeline.beam.write_lance import write_fragments
from pipeline.encoders.devices import worker_device, worker_number

CHECKPOINT = ".json"
_opening = threading.Lock()


@dataclass(frozen=True)
class StepRange:
    """The steps `first` to `stop - 1`."""

    first: int
    stop: int

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint that this range leaves."""
        return f"{self.first}-{self.stop}{CHECKPOINT}"


@dataclass(frozen=True)
class DrawJob:
    """Everything that a worker needs for a range of steps."""

    table: str
    version: int
    uri: str
    """Of the targets."""
    pairs: PairConfig
    exact: bool
    memory: int
    """Bytes of vectors that each process may hold."""
    device: str
    storage: Storage

    def checkpoint_of(self, steps: StepRange) -> str:
        """Return the file that names the fragment of a range, once it is written."""
        return f"{draw_folder(self.uri)}/{steps.checkpoint}"

    def draw(self, steps: StepRange) -> None:
        """Retrieve the pairs of a range, unless that was done, and leave its checkpoint."""
        if self.storage.read_json(self.checkpoint_of(steps)) is not None:
            return
        with _opening:
            search, queries = _open_search(self)
        fragments = write_fragments(self.uri, TARGETS_SCHEMA, self._batches(search, queries, steps), self.storage)
        written = sum(fragment["physical_rows"] for fragment in fragments)
        assert written == (steps.stop - steps.first) * self.pairs.batch_size, (written, steps)
        self.storage.write_json(self.checkpoint_of(steps), fragments)

    def _batches(self, search: NeighborSearch, queries: StepQueries, steps: StepRange) -> Iterator[pa.RecordBatch]:
        size = self.pairs.batch_size
        steps_per_search = max(1, QUERIES_PER_SEARCH // size)
        for first in range(steps.first, steps.stop, steps_per_search):
            searched = range(first, min(first + steps_per_search, steps.stop))
            step = np.repeat(np.array(searched, np.int64), size)
            slot = np.tile(np.arange(size, dtype=np.int32), len(searched))
            yield pa.record_batch([step, slot, queries.row_ids(search, searched)], schema=TARGETS_SCHEMA)


@lru_cache(maxsize=1)
def _open_search(job: DrawJob) -> tuple[NeighborSearch, StepQueries]:
    """Open the table and its search, once per process for any number of threads."""
    table = open_table(job.table, version=job.version, storage=job.storage)
    exact = job.exact or table.meta.uses_exact_search
    device = worker_device(job.device, worker_number()) if exact else "cpu"
    return open_search(table, exact=exact, device=device, memory=job.memory), StepQueries(table, job.pairs)


class DrawSteps(beam.PTransform):  # type: ignore[misc]
    """PCollection of (range's number, (first step, step after the last)) -> the same, each once it has a checkpoint."""

    def __init__(self, job: DrawJob) -> None:
        super().__init__()
        self.job = job

    def expand(self, ranges: Any) -> Any:
        """Build the graph."""
        return ranges | "Spread" >> Spread() | "Draw" >> beam.ParDo(_Draw(self.job))


class _Draw(beam.DoFn):  # type: ignore[misc]
    def __init__(self, job: DrawJob) -> None:
        self.job = job

    def process(self, element: tuple[int, tuple[int, int]]) -> Iterator[tuple[int, tuple[int, int]]]:
        self.job.draw(StepRange(*element[1]))
        yield element
