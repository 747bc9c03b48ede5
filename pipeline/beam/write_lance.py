"""WriteLance: write record batches to a Lance table in one commit, on any Beam runner.

    batches -> write fragments -> gather -> commit

Workers write rows to files that no reader sees; only the files' metadata travels on, and one commit at the end makes
all of them visible. A failed or retried bundle leaves files that no commit refers to; a retried commit is recognized by
its run id. Beam has sinks for many stores, but none for Lance.
"""

import json
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import apache_beam as beam
import pyarrow as pa

from index.errors import TableError
from index.table.commit import commit_fragments
from index.table.storage import Storage, unwritable
from index.table.table import is_table, table_uri

if TYPE_CHECKING:
    import lance

MODES = ("create", "overwrite", "append")
BYTES_PER_FILE = 256 * 2**20


class WriteLance(beam.PTransform):  # type: ignore[misc]
    """PCollection of `pyarrow.RecordBatch` -> PCollection with the one version number that was committed.

    Rows keep their order within a bundle; bundles come in any order.

    Args:
        uri: DB/NAME.lance, an absolute path or an object store that Lance supports.
        schema: of every batch.
        mode: create (TableError if the table exists), overwrite (open readers keep the old version), or append.
        run_id: if one of the last commits carries it, nothing is committed again; None draws one per pipeline.
        bytes_per_file: a bundle's rows are written to a new file once they reach this size in memory.
        storage: how to reach an object store.
    """

    def __init__(
        self,
        uri: str,
        schema: pa.Schema,
        *,
        mode: str = "create",
        run_id: str | None = None,
        bytes_per_file: int = BYTES_PER_FILE,
        storage: Storage | None = None,
    ) -> None:
        super().__init__()
        storage = storage or Storage()
        if mode not in MODES:
            raise TableError(f"mode {mode!r} is unknown: use one of {', '.join(MODES)}")
        if mode == "create" and is_table(table_uri(uri), storage):
            raise TableError(f"{uri} exists: use mode overwrite or append")
        self.uri, self.schema, self.storage = table_uri(uri), schema, storage
        self.mode, self.run_id, self.bytes_per_file = mode, run_id or uuid.uuid4().hex, bytes_per_file

    def expand(self, batches: Any) -> Any:
        """Build the graph."""
        return (
            batches
            | "Write fragments" >> beam.ParDo(_WriteFragments(self.uri, self.schema, self.bytes_per_file, self.storage))
            | "Gather" >> beam.combiners.ToList()
            | "Commit" >> beam.Map(self._commit)
        )

    def _commit(self, fragments: list[str]) -> int:
        return commit_fragments(
            self.uri,
            self.schema,
            [fragment_from_dict(json.loads(text)) for text in sorted(fragments)],
            run_id=self.run_id,
            mode=self.mode,
            storage=self.storage,
        )


class _WriteFragments(beam.DoFn):  # type: ignore[misc]
    """Buffers a bundle's batches; writes them once they are large enough, and at the end of the bundle."""

    def __init__(self, uri: str, schema: pa.Schema, bytes_per_file: int, storage: Storage) -> None:
        self.uri, self.schema, self.bytes_per_file, self.storage = uri, schema, bytes_per_file, storage

    def start_bundle(self) -> None:
        self.buffer: list[pa.RecordBatch] = []
        self.bytes = 0

    def process(self, batch: pa.RecordBatch) -> Iterator[str]:
        self.buffer.append(batch)
        self.bytes += batch.nbytes
        if self.bytes >= self.bytes_per_file:
            yield from self._flush()

    def finish_bundle(self) -> Iterator[Any]:
        for fragment in self._flush():
            yield beam.utils.windowed_value.WindowedValue(
                fragment, beam.window.GlobalWindow().max_timestamp(), [beam.window.GlobalWindow()]
            )

    def _flush(self) -> list[str]:
        written = write_fragments(self.uri, self.schema, iter(self.buffer), self.storage)
        self.buffer, self.bytes = [], 0
        return [json.dumps(fragment) for fragment in written]


def write_fragments(
    uri: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch], storage: Storage
) -> list[dict[str, Any]]:
    """Write rows to files that no commit refers to yet, and return their metadata; none without rows.

    An exception of `batches` is raised unchanged, although Lance pulls them in its own thread. Raises TableError if
    Lance cannot write to the target, for instance because the disk is full.
    """
    import lance

    first = next((batch for batch in batches if len(batch)), None)
    if first is None:
        return []
    failures: list[BaseException] = []

    def guarded() -> Iterator[pa.RecordBatch]:
        try:
            yield first
            yield from batches
        except BaseException as error:
            failures.append(error)
            raise

    reader = pa.RecordBatchReader.from_batches(schema, guarded())
    try:
        # Mode `overwrite` writes files only; `create` would refuse a table that exists, which append adds them to.
        written = lance.fragment.write_fragments(
            reader, uri, schema=schema, mode="overwrite", storage_options=storage.lance
        )
    except Exception as error:
        if failures:
            raise failures[0] from None
        raise unwritable(uri, error) from error
    return [fragment.to_json() for fragment in written]


def fragment_from_dict(content: dict[str, Any]) -> "lance.FragmentMetadata":
    """Return a fragment's metadata from its JSON-ready form, which `write_fragments` returns."""
    import lance

    return lance.FragmentMetadata.from_json(json.dumps(content))
