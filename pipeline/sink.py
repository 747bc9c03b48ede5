"""WriteLance: shard names in, one committed Lance table out, on any Beam runner.

    shards -> write fragments -> gather -> search vectors -> gather -> commit

Bulk data never crosses Beam: an element is a shard's name, and what its rows are is the business of a `ShardJob`
that runs beside the writer. A finished shard leaves a mark, written aside and renamed; running again skips it.
Rows, search vectors, metadata and rejects become visible in one commit at the end, so a reader sees the table as it
was before or whole. What fails for a reason that the user can put right is left as an outcome file for the driver,
because an exception would come back from a worker as text.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import apache_beam as beam
import pyarrow as pa

from index.console import write_json
from index.errors import CoalescerError
from index.schema import REJECTS, TableMeta
from index.table import add_vectors, publish


@dataclass(slots=True)
class ShardPart:
    """What one shard has become: fragments that no commit refers to yet, and a summary."""

    shard: str
    rows: int = 0
    rejected: int = 0
    fragments: list[dict[str, Any]] = field(default_factory=list)
    reject_fragments: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class ShardRun(Protocol):
    """One shard on its way through a job: iterate `batches` to its end, then read the rest."""

    rejects: list[dict[str, str]]

    @property
    def summary(self) -> dict[str, Any]:
        """What the job wants to know of the shard when it settles the metadata; JSON-ready."""
        ...

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The shard's rows, without their search vectors."""
        ...


@runtime_checkable
class ShardJob(Protocol):
    """What turns shards into rows, and summaries into the table's metadata. It is pickled, so it holds config only."""

    @property
    def schema(self) -> pa.Schema:
        """The columns of a row without its search vector."""
        ...

    def open(self, shard: str) -> ShardRun:
        """Begin one shard."""
        ...

    def meta(self, parts: list[ShardPart]) -> TableMeta:
        """The table's metadata once all shards are written; a CoalescerError stops the commit."""
        ...


def rejects_uri(uri: str) -> str:
    """The rejects table beside a table: DB/NAME_rejects.lance."""
    return uri.removesuffix(".lance") + "_rejects.lance"


def mark_of(marks: str, shard: str) -> Path:
    """The file that says a shard is finished."""
    return Path(marks) / f"{hashlib.sha256(shard.encode()).hexdigest()[:24]}.json"


def finished_part(marks: str, shard: str) -> ShardPart | None:
    """What a shard has become, if it is finished."""
    mark = mark_of(marks, shard)
    return ShardPart(**json.loads(mark.read_text())) if mark.exists() else None


def rows_begun(marks: str, shard: str) -> int:
    """How many rows a shard that is being written has come to, as far as is known from outside."""
    try:
        return int(mark_of(marks, shard).with_suffix(".rows").read_text() or 0)
    except FileNotFoundError:
        return 0


class WriteLance(beam.PTransform):  # type: ignore[misc]
    """PCollection of shard names -> PCollection with the one version number that was committed.

    Args:
        uri: absolute path of the table, DB/NAME.lance; it is replaced by the commit, not before.
        job: what makes rows of shards.
        marks: folder for the marks of finished shards; use one per configuration, delete it after the commit.
        run_id: written into the commit's message.
    """

    def __init__(self, uri: str, job: ShardJob, marks: str, run_id: str) -> None:
        super().__init__()
        self.uri, self.job, self.marks, self.run_id = uri, job, marks, run_id

    def expand(self, shards: Any) -> Any:
        """The graph."""
        return (
            shards
            | "Spread shards" >> beam.Reshuffle()
            | "Write fragments" >> beam.ParDo(_WriteFragments(self.uri, self.job, self.marks))
            | "Gather parts" >> beam.combiners.ToList()
            | "Settle metadata" >> beam.ParDo(_SettleMetadata(self.job, self.marks))
            | "Spread fragments" >> beam.Reshuffle()
            | "Add vectors" >> beam.ParDo(_AddVectors(self.uri, self.job.schema))
            | "Gather fragments" >> beam.combiners.ToList()
            | "Commit" >> beam.ParDo(_Commit(self.uri, self.job.schema, self.marks, self.run_id))
        )


class _WriteFragments(beam.DoFn):  # type: ignore[misc]
    def __init__(self, uri: str, job: ShardJob, marks: str) -> None:
        self.uri, self.job, self.marks = uri, job, marks

    def process(self, shard: str) -> Iterator[ShardPart]:
        finished = finished_part(self.marks, shard)
        if finished is not None:
            yield finished
            return
        mark, part, run = mark_of(self.marks, shard), ShardPart(shard), self.job.open(shard)
        mark.parent.mkdir(parents=True, exist_ok=True)
        begun = mark.with_suffix(".rows")

        # Lance pulls this generator on a thread of its own, where Beam's counters would be lost: count here.
        def counted() -> Iterator[pa.RecordBatch]:
            for batch in run.batches():
                part.rows += len(batch)
                begun.write_text(str(part.rows))
                yield batch

        part.fragments = _write(self.uri, self.job.schema, counted())
        part.rejected = len(run.rejects)
        rejects = pa.RecordBatch.from_pylist(run.rejects, schema=REJECTS)
        part.reject_fragments = _write(rejects_uri(self.uri), REJECTS, iter([rejects]))
        part.summary = run.summary
        write_json(mark, asdict(part))
        begun.unlink(missing_ok=True)
        counter = beam.metrics.Metrics.counter
        counter("encode", "rows").inc(part.rows)
        counter("encode", "rejects").inc(part.rejected)
        yield part


def _write(uri: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> list[dict[str, Any]]:
    import lance

    first = next((batch for batch in batches if len(batch)), None)
    if first is None:
        return []

    def all_batches() -> Iterator[pa.RecordBatch]:
        yield first
        yield from batches

    reader = pa.RecordBatchReader.from_batches(schema, all_batches())
    written = lance.fragment.write_fragments(reader, uri, schema=schema, mode="create")
    return [fragment.to_json() for fragment in written]


class _SettleMetadata(beam.DoFn):  # type: ignore[misc]
    """All parts in; out come the fragments one by one, each with the metadata that its vectors need."""

    def __init__(self, job: ShardJob, marks: str) -> None:
        self.job, self.marks = job, marks

    def process(self, parts: list[ShardPart]) -> Iterator[tuple[int, dict[str, Any], list[dict[str, Any]], str]]:
        parts = sorted(parts, key=lambda part: part.shard)
        try:
            meta = self.job.meta(parts).to_json()
        except CoalescerError as error:
            write_json(Path(self.marks) / "outcome.json", {"error": type(error).__name__, "text": str(error)})
            return
        rejects = [fragment for part in parts for fragment in part.reject_fragments]
        fragments = [fragment for part in parts for fragment in part.fragments]
        for number, fragment in enumerate(fragments):
            yield number, fragment, rejects if number == 0 else [], meta


class _AddVectors(beam.DoFn):  # type: ignore[misc]
    def __init__(self, uri: str, schema: pa.Schema) -> None:
        self.uri, self.schema = uri, schema

    def process(self, element: Any) -> Iterator[Any]:
        import lance

        number, content, rejects, meta = element
        fragment = lance.FragmentMetadata.from_json(json.dumps(content))
        geometry = TableMeta.from_json(meta).geometry
        yield number, add_vectors(self.uri, fragment, self.schema, geometry).to_json(), rejects, meta


class _Commit(beam.DoFn):  # type: ignore[misc]
    def __init__(self, uri: str, schema: pa.Schema, marks: str, run_id: str) -> None:
        self.uri, self.schema, self.marks, self.run_id = uri, schema, marks, run_id

    def process(self, elements: list[Any]) -> Iterator[int]:
        import lance

        if not elements:  # the metadata could not be settled; the outcome file says why
            return
        elements = sorted(elements, key=lambda element: element[0])
        rejects = [_fragment(content) for element in elements for content in element[2]]
        lance.LanceDataset.commit(rejects_uri(self.uri), lance.LanceOperation.Overwrite(REJECTS, rejects))
        fragments = [_fragment(element[1]) for element in elements]
        meta = TableMeta.from_json(elements[0][3])
        table = publish(self.uri, self.schema, meta, fragments, self.run_id)
        write_json(Path(self.marks) / "outcome.json", {"version": table.version})
        yield table.version


def _fragment(content: dict[str, Any]) -> Any:
    import lance

    return lance.FragmentMetadata.from_json(json.dumps(content))
