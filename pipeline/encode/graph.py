"""EncodeShards: the graph that turns shard names into a published table.

    shards -> [find duplicates] -> encode -> gather -> settle metadata -> search vectors -> gather -> publish

ReadOptions, decoding, encoding and writing of a shard happen in one DoFn, so what crosses Beam is the shard's name and,
later, the names of its files: no picture, latent or vector is ever shuffled. A finished shard leaves a mark and is
skipped when the run is started again.
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import apache_beam as beam
import pyarrow as pa

from index.errors import SourceError
from index.table.commit import add_vectors, append_rows, commit_fragments, neutral_balance, publish
from index.table.schema import REJECTS, TableMeta
from index.table.storage import is_local
from index.table.table import rejects_uri
from pipeline.beam.write_lance import fragment_of, unwritable, write_fragments
from pipeline.encode.checkpoints import EncodedShard
from pipeline.encode.dedup import FindDuplicates
from pipeline.encode.job import EncodeJob

SETTLED, STOPPED = "settled.json", "stopped.json"


class EncodeShards(beam.PTransform):  # type: ignore[misc]
    """PCollection of shard names -> PCollection with the one version number that was published."""

    def __init__(self, job: EncodeJob) -> None:
        super().__init__()
        # Every step carries the job: without the names of all shards, which travel as elements.
        self.job = replace(job, config=replace(job.config, shards=()))

    def expand(self, shards: Any) -> Any:
        """The graph."""
        if self.job.config.filters.dedup:
            numbered = shards | "Find duplicates" >> FindDuplicates(self.job)
        else:
            numbered = shards | "No duplicates" >> beam.Map(lambda shard: (shard, [])) | "Spread" >> beam.Reshuffle()
        return (
            numbered
            | "Encode" >> beam.ParDo(_Encode(self.job))
            | "Gather shards" >> beam.combiners.ToList()
            | "Settle metadata" >> beam.ParDo(_Settle(self.job))
            | "Spread fragments" >> beam.Reshuffle()
            | "Add vectors" >> beam.ParDo(_AddVectors(self.job))
            | "Gather fragments" >> beam.combiners.ToList()
            | "Publish" >> beam.ParDo(_Publish(self.job))
        )


class _Encode(beam.DoFn):  # type: ignore[misc]
    """(shard, numbers of its duplicates) -> shard, once its mark is there."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job

    def process(self, element: tuple[str, Iterable[int]]) -> Iterator[str]:
        job, (shard, duplicates) = self.job, element
        if job.checkpoints.finished(shard) is None:
            if stopped := job.checkpoints.read(STOPPED):
                raise SourceError(stopped)
            part = encode_shard(job, shard, frozenset(duplicates))
            counter = beam.metrics.Metrics.counter
            for name in ("rows", "rejected", "filtered"):
                counter("encode", name).inc(getattr(part, name))
        yield shard


def encode_shard(job: EncodeJob, shard: str, duplicates: frozenset[int] = frozenset()) -> EncodedShard:
    """Encode one shard to files that no commit refers to yet, and leave its mark."""
    part, run = EncodedShard(shard), job.open(shard, duplicates=duplicates)
    every = 0.5 if is_local(job.uri) else 5.0
    told, inside, began = 0.0, 0.0, time.perf_counter()

    # Lance pulls this generator on a thread of its own, where Beam's counters would be lost: count here.
    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal told, inside
        entered = time.perf_counter()
        for batch in run.batches():
            part.rows += len(batch)
            now = time.perf_counter()
            if now - told > every:
                job.checkpoints.begin(shard, part.rows + len(run.rejects) + run.filtered.total())
                told = now
            inside += time.perf_counter() - entered
            yield batch
            entered = time.perf_counter()
        inside += time.perf_counter() - entered

    part.fragments = write_fragments(job.uri, job.schema, counted(), job.run.storage)
    run.seconds["write"] = time.perf_counter() - began - inside
    part.rejected, part.filtered = len(run.rejects), run.filtered.total()
    rejects = pa.RecordBatch.from_pylist(run.rejects, schema=REJECTS)
    part.reject_fragments = write_fragments(rejects_uri(job.uri), REJECTS, iter([rejects]), job.run.storage)
    part.summary = run.summary
    job.checkpoints.finish(part)
    return part


class _Settle(beam.DoFn):  # type: ignore[misc]
    """All shards in; out come their fragments one by one, once the metadata that their vectors need is written."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job

    def process(self, shards: list[str]) -> Iterator[tuple[int, str]]:
        fragments: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []

        # Checkpoints are read one by one and always in the same order: sums of floats depend on it.
        def parts() -> Iterator[EncodedShard]:
            for shard in sorted(shards):
                part = self.job.checkpoints.finished(shard)
                assert part is not None, shard
                fragments.extend(part.fragments)
                rejects.extend(part.reject_fragments)
                yield part

        meta = self.job.meta(parts())
        balance = neutral_balance(self.job.table()) if self.job.base is not None else 0.0
        self.job.checkpoints.write(SETTLED, {"meta": meta.to_json(), "balance": balance, "rejects": rejects})
        for number, fragment in enumerate(fragments):
            yield number, json.dumps(fragment)


class _AddVectors(beam.DoFn):  # type: ignore[misc]
    """A fragment without search vectors in, the same with them out."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job

    def process(self, element: tuple[int, str]) -> Iterator[tuple[int, str]]:
        job, (number, text) = self.job, element
        settled = job.checkpoints.read(SETTLED)
        try:
            fragment = add_vectors(
                job.uri,
                fragment_of(json.loads(text)),
                job.schema,
                TableMeta.from_json(settled["meta"]).geometry,
                settled["balance"],
                job.run.storage,
            )
        except OSError as error:
            raise unwritable(job.uri, error) from error
        yield number, json.dumps(fragment.to_json())


class _Publish(beam.DoFn):  # type: ignore[misc]
    """All fragments in; the version of the table out. Rejects come first: who reads the table finds them there."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job

    def process(self, elements: list[tuple[int, str]]) -> Iterator[int]:
        job, storage = self.job, self.job.run.storage
        settled = job.checkpoints.read(SETTLED)
        meta, append = TableMeta.from_json(settled["meta"]), job.base is not None
        fragments = [fragment_of(json.loads(text)) for _, text in sorted(elements)]
        rejects = [fragment_of(content) for content in settled["rejects"]]
        try:
            commit_fragments(rejects_uri(job.uri), REJECTS, rejects, run_id=job.run_id, append=append, storage=storage)
            if append:
                table = append_rows(job.table(), meta, fragments, job.run_id)
            else:
                table = publish(job.uri, job.schema, meta, fragments, job.run_id, storage)
        except OSError as error:
            raise unwritable(job.uri, error) from error
        yield table.version
