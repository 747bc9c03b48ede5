"""EncodeToFragments: the Beam graph that turns shard names into fragments, which no commit refers to yet.

    shards -> [find duplicates] -> write shards -> wait for all -> plan layout -> lay out vectors

Reading, decoding, encoding and writing of a shard happen in one DoFn, so what crosses Beam is the shard's name: no
image, latent or vector is ever shuffled, and nothing is gathered in one element. A shard that has a checkpoint is
skipped, and so is one whose vectors are written. What the graph has done is read from the files of the run, never from
the engine; publish.py commits it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam

from index.errors import OutOfReachError, SourceError
from index.table.storage import Storage
from index.table.vectors import add_vectors, neutral_balance
from pipeline.beam.gather import Barrier
from pipeline.beam.layout import Fragment, Fragments, Layout, LayOutVectors
from pipeline.beam.write_lance import fragment_from_dict
from pipeline.encode.checkpoints import LAYOUT, META, PLAN, STOP, VECTORS, ShardCheckpoint, file_name, not_finished
from pipeline.encode.dedup import FindDuplicates
from pipeline.encode.job import EncodeJob
from pipeline.encode.parts import not_encoded_by_its_part
from pipeline.encode.shard import finished_shard, write_shard


class EncodeToFragments(beam.PTransform):  # type: ignore[misc]
    """PCollection of shard names -> PCollection of the shards that have rows, once their fragments are written."""

    def __init__(self, job: EncodeJob) -> None:
        super().__init__()
        # Every step carries the job, without the names of all shards, which travel as elements.
        self.job = replace(job, config=replace(job.config, shards=()))

    def expand(self, shards: Any) -> Any:
        """Build the graph."""
        job = self.job
        return (
            shards
            | "Write shards" >> WriteShards(job)
            | "Wait for all" >> Barrier()
            | "Plan layout" >> beam.ParDo(_PlanLayout(job))
            | "Lay out vectors" >> LayOutVectors(ShardFragments(job))
        )


class WriteShards(beam.PTransform):  # type: ignore[misc]
    """PCollection of shard names -> the same, each once it has a checkpoint."""

    def __init__(self, job: EncodeJob) -> None:
        super().__init__()
        self.job = replace(job, config=replace(job.config, shards=()))

    def expand(self, shards: Any) -> Any:
        """Build the graph."""
        if self.job.config.filters.dedup:
            shards = shards | "Find duplicates" >> FindDuplicates(self.job)
        else:
            shards = shards | "No duplicates" >> beam.Map(lambda shard: (shard, [])) | "Spread" >> beam.Reshuffle()
        return shards | "Write" >> beam.ParDo(_WriteShard(self.job))


@dataclass(frozen=True)
class ShardFragments(Fragments):
    """The fragments of encoded shards, by the shards' names, which are in their checkpoints."""

    job: EncodeJob

    @property
    def uri(self) -> str:
        """URI of the table."""
        return self.job.uri

    @property
    def layout_uri(self) -> str:
        """File of the run's layout."""
        return self.job.checkpoints.uri(LAYOUT)

    @property
    def storage(self) -> Storage:
        """How to reach an object store."""
        return self.job.runtime.storage

    def load(self, name: str) -> list[Fragment]:
        """Return the fragments of a shard. Raises TableError if its checkpoint is gone."""
        checkpoint = self.job.checkpoints.load(name)
        if checkpoint is None:
            raise not_finished(self.job.uri, 0, 1)
        return checkpoint.fragments

    def add_vectors(self, name: str, fragment: Fragment, layout: Layout) -> Fragment:
        """Write the vectors of a fragment that no commit refers to yet."""
        job, source = self.job, fragment_from_dict(fragment)
        written = add_vectors(job.uri, source, job.schema, layout.geometry, layout.balance, job.runtime.storage)
        return dict(written.to_json())

    def record_uri(self, name: str) -> str:
        """Return a file next to the shard's checkpoint."""
        return self.job.checkpoints.uri(file_name(name, VECTORS))


class _WriteShard(beam.DoFn):  # type: ignore[misc]
    """(shard, positions of its duplicates) -> shard, once it has a checkpoint."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job

    def process(self, element: tuple[str, Iterable[int]]) -> Iterator[str]:
        shard, duplicates = element
        checkpoints = self.job.checkpoints
        if finished_shard(self.job, shard) is None and checkpoints.load_unread(shard) is None:
            if reason := checkpoints.read(STOP):
                raise SourceError(reason)
            if self.job.num_parts and self.job.runtime.part is None:
                raise not_encoded_by_its_part(self.job.uri, shard, checkpoints.read(PLAN))
            try:
                checkpoint = write_shard(self.job, shard, frozenset(duplicates))
            except OutOfReachError as error:
                # The other shards are still read, so that the run ends with a list of all that could not be.
                checkpoints.save_unread(shard, str(error))
                checkpoint = ShardCheckpoint(shard, unread=str(error))
            for name in ("rows", "rejected", "filtered"):
                beam.metrics.Metrics.counter("encode", name).inc(getattr(checkpoint, name))
        yield shard


class _PlanLayout(beam.DoFn):  # type: ignore[misc]
    """Number of shards -> those with rows one by one, once the layout that their vectors need is written."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job

    def process(self, number: int) -> Iterator[str]:
        job, checkpoints = self.job, self.job.checkpoints
        planned = checkpoints.read(PLAN)["shards"]
        if number != len(planned):  # some engines drop elements without an error
            raise not_finished(job.uri, number, len(planned))
        finished, shards = 0, list[str]()

        # Always in the same order: sums of floats depend on it.
        def outcomes() -> Iterator[ShardCheckpoint]:
            nonlocal finished
            for checkpoint in checkpoints.load_all(sorted(planned)):
                finished += 1
                if checkpoint.fragments:
                    shards.append(checkpoint.shard)
                yield checkpoint

        meta = job.table_meta(outcomes())
        if finished != len(planned):
            raise not_finished(job.uri, finished, len(planned))
        balance = neutral_balance(job.open_table()) if job.base is not None else 0.0
        layout = Layout(meta.geometry, balance)
        layout.write(checkpoints.uri(LAYOUT), job.runtime.storage)
        checkpoints.write(META, {"meta": meta.to_json(), "layout": layout.digest})
        yield from shards
