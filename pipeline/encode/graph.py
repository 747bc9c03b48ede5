"""EncodeToFragments: the Beam graph that turns shard names into fragments, which no commit refers to yet.

    shards -> [find duplicates] -> write shards -> gather -> plan layout -> lay out vectors -> gather -> save

Reading, decoding, encoding and writing of a shard happen in one DoFn, so what crosses Beam is the shard's name and
later the names of its files: no image, latent or vector is ever shuffled. A shard that has a checkpoint is skipped.
What the graph has done is read from the files of the run, never from the engine; publish.py commits it.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import apache_beam as beam

from index.errors import OutOfReachError, SourceError
from index.table.commit import neutral_balance
from pipeline.beam.gather import Gather
from pipeline.beam.layout import Layout, LayOutVectors, PlacedFragment
from pipeline.encode.checkpoints import FRAGMENTS, LAYOUT, PLAN, STOP, ShardCheckpoint, not_finished
from pipeline.encode.dedup import FindDuplicates
from pipeline.encode.job import EncodeJob
from pipeline.encode.parts import not_encoded_by_its_part
from pipeline.encode.shard import finished_shard, write_shard


class EncodeToFragments(beam.PTransform):  # type: ignore[misc]
    """PCollection of shard names -> PCollection with the number of fragments that were written."""

    def __init__(self, job: EncodeJob) -> None:
        super().__init__()
        # Every step carries the job, without the names of all shards, which travel as elements.
        self.job = replace(job, config=replace(job.config, shards=()))

    def expand(self, shards: Any) -> Any:
        """Build the graph."""
        job = self.job
        layout_uri = job.checkpoints.uri(LAYOUT)
        return (
            shards
            | "Write shards" >> WriteShards(job)
            | "Gather shards" >> Gather()
            | "Plan layout" >> beam.ParDo(_PlanLayout(job))
            | "Lay out vectors" >> LayOutVectors(job.uri, job.schema, layout_uri, job.runtime.storage)
            | "Gather fragments" >> Gather()
            | "Save fragments" >> beam.ParDo(_SaveFragments(job))
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
    """All shards -> their fragments one by one, once the layout that their vectors need is written."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job

    def process(self, shards: list[str]) -> Iterator[PlacedFragment]:
        job = self.job
        planned = job.checkpoints.read(PLAN)["shards"]
        if set(shards) != set(planned):  # some engines drop elements without an error
            raise not_finished(job.uri, len(set(shards)), len(planned))
        fragments: list[dict[str, Any]] = []

        # Always in the same order: sums of floats depend on it.
        def checkpoints() -> Iterator[ShardCheckpoint]:
            for checkpoint in job.checkpoints.load_all(sorted(planned)):
                fragments.extend(checkpoint.fragments)
                yield checkpoint

        meta = job.table_meta(checkpoints())
        balance = neutral_balance(job.open_table()) if job.base is not None else 0.0
        Layout(meta, balance).write(job.checkpoints.uri(LAYOUT), job.runtime.storage)
        for position, fragment in enumerate(fragments):
            yield position, json.dumps(fragment)


class _SaveFragments(beam.DoFn):  # type: ignore[misc]
    """All fragments with vectors -> their number, once they are written next to the checkpoints."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job

    def process(self, elements: list[PlacedFragment]) -> Iterator[int]:
        self.job.checkpoints.write(FRAGMENTS, [text for _, text in sorted(elements)])
        yield len(elements)
