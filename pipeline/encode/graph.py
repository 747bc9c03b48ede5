"""EncodeToTable: the Beam graph that turns shard names into a published table.

    shards -> [find duplicates] -> write shards -> gather -> plan layout -> lay out vectors -> gather -> commit

Reading, decoding, encoding and writing of a shard happen in one DoFn, so what crosses Beam is the shard's name and
later the names of its files: no image, latent or vector is ever shuffled. A shard that has a checkpoint is skipped.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import apache_beam as beam

from index.errors import SourceError
from index.table.commit import append_rows, commit_fragments, neutral_balance, publish
from index.table.schema import REJECTS
from index.table.storage import unwritable
from index.table.table import rejects_uri
from pipeline.beam.gather import Gather
from pipeline.beam.layout import Layout, LayOutVectors, PlacedFragment
from pipeline.beam.write_lance import fragment_from_dict
from pipeline.encode.checkpoints import LAYOUT, REJECT_FRAGMENTS, STOP, ShardCheckpoint
from pipeline.encode.dedup import FindDuplicates
from pipeline.encode.job import EncodeJob
from pipeline.encode.shard import write_shard


class EncodeToTable(beam.PTransform):  # type: ignore[misc]
    """PCollection of shard names -> PCollection with the one version number that was published."""

    def __init__(self, job: EncodeJob) -> None:
        super().__init__()
        # Every step carries the job, without the names of all shards, which travel as elements.
        self.job = replace(job, config=replace(job.config, shards=()))

    def expand(self, shards: Any) -> Any:
        """Build the graph."""
        job = self.job
        if job.config.filters.dedup:
            shards = shards | "Find duplicates" >> FindDuplicates(job)
        else:
            shards = shards | "No duplicates" >> beam.Map(lambda shard: (shard, [])) | "Spread" >> beam.Reshuffle()
        layout_uri = job.checkpoints.uri(LAYOUT)
        return (
            shards
            | "Write shards" >> beam.ParDo(_WriteShard(job))
            | "Gather shards" >> Gather()
            | "Plan layout" >> beam.ParDo(_PlanLayout(job))
            | "Lay out vectors" >> LayOutVectors(job.uri, job.schema, layout_uri, job.runtime.storage)
            | "Gather fragments" >> Gather()
            | "Commit" >> beam.ParDo(_Commit(job))
        )


class _WriteShard(beam.DoFn):  # type: ignore[misc]
    """(shard, positions of its duplicates) -> shard, once it has a checkpoint."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job

    def process(self, element: tuple[str, Iterable[int]]) -> Iterator[str]:
        shard, duplicates = element
        checkpoints = self.job.checkpoints
        if checkpoints.load(shard) is None:
            if reason := checkpoints.read(STOP):
                raise SourceError(reason)
            checkpoint = write_shard(self.job, shard, frozenset(duplicates))
            for name in ("rows", "rejected", "filtered"):
                beam.metrics.Metrics.counter("encode", name).inc(getattr(checkpoint, name))
        yield shard


class _PlanLayout(beam.DoFn):  # type: ignore[misc]
    """All shards -> their fragments one by one, once the layout that their vectors need is written."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job

    def process(self, shards: list[str]) -> Iterator[PlacedFragment]:
        job = self.job
        fragments: list[dict[str, Any]] = []
        reject_fragments: list[dict[str, Any]] = []

        # One by one, and always in the same order: sums of floats depend on it.
        def checkpoints() -> Iterator[ShardCheckpoint]:
            for shard in sorted(shards):
                checkpoint = job.checkpoints.load(shard)
                assert checkpoint is not None, shard
                fragments.extend(checkpoint.fragments)
                reject_fragments.extend(checkpoint.reject_fragments)
                yield checkpoint

        meta = job.table_meta(checkpoints())
        balance = neutral_balance(job.open_table()) if job.base is not None else 0.0
        Layout(meta, balance).write(job.checkpoints.uri(LAYOUT), job.runtime.storage)
        job.checkpoints.write(REJECT_FRAGMENTS, reject_fragments)
        for position, fragment in enumerate(fragments):
            yield position, json.dumps(fragment)


class _Commit(beam.DoFn):  # type: ignore[misc]
    """All fragments -> the table's version.

    The rejects table is committed before the main table, so that a visible table always has its rejects.
    """

    def __init__(self, job: EncodeJob) -> None:
        self.job = job

    def process(self, elements: list[PlacedFragment]) -> Iterator[int]:
        job, storage = self.job, self.job.runtime.storage
        meta, append = Layout.read(job.checkpoints.uri(LAYOUT), storage).meta, job.base is not None
        fragments = [fragment_from_dict(json.loads(text)) for _, text in sorted(elements)]
        rejects = [fragment_from_dict(content) for content in job.checkpoints.read(REJECT_FRAGMENTS)]
        try:
            commit_fragments(rejects_uri(job.uri), REJECTS, rejects, run_id=job.run_id, append=append, storage=storage)
            if append:
                table = append_rows(job.open_table(), meta, fragments, job.run_id)
            else:
                table = publish(job.uri, job.schema, meta, fragments, job.run_id, storage)
        except OSError as error:
            raise unwritable(job.uri, error) from error
        yield table.version
