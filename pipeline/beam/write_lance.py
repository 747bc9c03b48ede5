"""WriteLance: record batches in, one committed Lance table out, on any Beam runner.

    batches -> write fragments -> gather -> commit

Workers write their rows to files that no reader sees; only the files' descriptions travel on, and one commit at the
end makes all of them the table. A failed or repeated bundle leaves files that no commit refers to; a repeated commit
is noticed by its run id. Beam has sinks for many stores, and none for Lance.
"""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa

from index.errors import TableError, one_line
from index.table.commit import commit_fragments
from index.table.storage import Storage
from index.table.table import is_table, table_uri

MODES = ("create", "overwrite", "append")


class WriteLance(beam.PTransform):  # type: ignore[misc]
    """PCollection of `pyarrow.RecordBatch` -> PCollection with the one version number that was committed.

    Rows keep their order within a bundle; bundles come in any order.

    Args:
        uri: DB/NAME.lance, an absolute path or an object store that Lance knows.
        schema: of every batch.
        mode: create (TableError where a table is), overwrite (readers keep the old version), or append.
        run_id: where a recent commit carries it already, nothing is committed again; None: a new one each time the
            pipeline is built.
        bytes_per_file: a bundle's rows are written out when they have come to so many bytes.
        storage: how to reach an object store.
    """

    def __init__(
        self,
        uri: str,
        schema: pa.Schema,
        *,
        mode: str = "create",
        run_id: str | None = None,
        bytes_per_file: int = 256 * 2**20,
        storage: Storage | None = None,
    ) -> None:
        super().__init__()
        storage = storage or Storage()
        if mode not in MODES:
            raise TableError(f"mode {mode!r} is unknown: choose one of {', '.join(MODES)}")
        if mode == "create" and is_table(table_uri(uri), storage):
            raise TableError(f"{uri} exists: choose mode overwrite or append")
        self.uri, self.schema, self.storage = table_uri(uri), schema, storage
        self.append, self.run_id, self.bytes_per_file = mode == "append", run_id or uuid.uuid4().hex, bytes_per_file

    def expand(self, batches: Any) -> Any:
        """The graph."""
        return (
            batches
            | "Write fragments" >> beam.ParDo(_WriteFragments(self.uri, self.schema, self.bytes_per_file, self.storage))
            | "Gather" >> beam.combiners.ToList()
            | "Commit" >> beam.Map(self._commit)
        )

    def _commit(self, fragments: list[str]) -> int:
        found = [fragment_of(json.loads(text)) for text in sorted(fragments)]
        return commit_fragments(
            self.uri, self.schema, found, run_id=self.run_id, append=self.append, storage=self.storage
        )


class _WriteFragments(beam.DoFn):  # type: ignore[misc]
    """Buffers a bundle's batches, writes them out when they have grown large, and at the bundle's end."""

    def __init__(self, uri: str, schema: pa.Schema, bytes_per_file: int, storage: Storage) -> None:
        self.uri, self.schema, self.bytes_per_file, self.storage = uri, schema, bytes_per_file, storage

    def start_bundle(self) -> None:
        self.waiting: list[pa.RecordBatch] = []
        self.bytes = 0

    def process(self, batch: pa.RecordBatch) -> Iterator[str]:
        self.waiting.append(batch)
        self.bytes += batch.nbytes
        if self.bytes >= self.bytes_per_file:
            yield from self._write()

    def finish_bundle(self) -> Iterator[Any]:
        for text in self._write():
            yield beam.utils.windowed_value.WindowedValue(
                text, beam.window.GlobalWindow().max_timestamp(), [beam.window.GlobalWindow()]
            )

    def _write(self) -> list[str]:
        written = write_fragments(self.uri, self.schema, iter(self.waiting), self.storage)
        self.waiting, self.bytes = [], 0
        return [json.dumps(fragment) for fragment in written]


def write_fragments(
    uri: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch], storage: Storage
) -> list[dict[str, Any]]:
    """Write rows to files that no commit refers to yet; their descriptions, or none where there are no rows.

    What `batches` raises is raised as it is, though Lance pulls it on a thread of its own; what Lance raises of the
    target, such as a full disk, is a TableError.
    """
    import lance

    first = next((batch for batch in batches if len(batch)), None)
    if first is None:
        return []
    failed: list[BaseException] = []

    def pulled() -> Iterator[pa.RecordBatch]:
        try:
            yield first
            yield from batches
        except BaseException as error:
            failed.append(error)
            raise

    reader = pa.RecordBatchReader.from_batches(schema, pulled())
    try:
        # `overwrite` writes files alone; `create` would refuse where a table is that they will be added to.
        written = lance.fragment.write_fragments(
            reader, uri, schema=schema, mode="overwrite", storage_options=storage.lance
        )
    except Exception as error:
        if failed:
            raise failed[0] from None
        raise unwritable(uri, error) from error
    return [fragment.to_json() for fragment in written]


def fragment_of(content: dict[str, Any]) -> Any:
    """The inverse of a fragment's `to_json`."""
    import lance

    return lance.FragmentMetadata.from_json(json.dumps(content))


def unwritable(uri: str, error: Exception) -> TableError:
    """What to say where a target cannot be written."""
    return TableError(
        f"{uri} cannot be written ({one_line(error)}): make room there or name another --table; "
        "the same command goes on where it stopped"
    )
