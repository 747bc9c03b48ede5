"""WriteLance: write record batches to a Lance table in one commit, on any Beam runner.

    batches -> write fragments -> gather -> count and commit

Workers write rows to files that no reader sees; one commit at the end makes all of them visible. A failed or retried
bundle leaves files that no commit refers to; a retried commit is recognized by its run id. Beam has sinks for many
stores, but none for Lance.

A bundle's last rows can be written only when it finishes, and not every runner passes on what a bundle emits then
(Dask's does not). So what travels is one count per batch, and each bundle leaves its fragments in a small file beside
the table. The commit reads the files of those bundles that the runner let pass, and refuses if they hold other numbers
of rows.
"""

import json
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import apache_beam as beam
import pyarrow as pa

from index.background import look_up
from index.errors import TableError
from index.table.commit import MODES, commit_fragments, committed_by
from index.table.storage import Storage, unwritable
from index.table.table import open_newest, table_uri
from pipeline.beam.gather import Gather

if TYPE_CHECKING:
    import lance

BYTES_PER_FILE = 256 * 2**20
BundleRows = tuple[str, int]
"""A bundle's name, and the rows of one of its batches."""


class WriteLance(beam.PTransform):  # type: ignore[misc]
    """PCollection of `pyarrow.RecordBatch` -> PCollection with the one version number that was committed.

    Rows keep their order within a bundle; bundles come in any order. While it runs there is a folder DB/NAME.write; a
    run that failed leaves its part of it, which may be deleted.

    Args:
        uri: DB/NAME.lance, an absolute path or an object store that Lance supports.
        schema: of every batch.
        mode: create (TableError if the table exists), overwrite (open readers keep the old version), or append
            (TableError if the table has other columns).
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
        if mode not in MODES:
            raise TableError(f"mode {mode!r} is unknown: use one of {', '.join(MODES)}")
        self.uri, self.schema, self.storage, self.mode = table_uri(uri), schema, storage or Storage(), mode
        self.run_id, self.bytes_per_file = run_id or uuid.uuid4().hex, bytes_per_file
        self.folder = f"{self.uri.removesuffix('.lance')}.write/{uuid.uuid4().hex}"
        """Where bundles leave the metadata of their fragments."""
        self._check_target(open_newest(self.uri, self.storage))

    def expand(self, batches: Any) -> Any:
        """Build the graph."""
        return (
            batches
            | "Write fragments" >> beam.ParDo(_WriteFragments(self))
            | "Gather" >> Gather()
            | "Commit" >> beam.Map(self._commit)
        )

    def _check_target(self, current: "lance.LanceDataset | None") -> None:
        """Raise TableError if the mode does not allow for what is there."""
        if current is None or committed_by(current, self.run_id):
            return
        if self.mode == "create":
            raise TableError(f"{self.uri} exists: use mode overwrite or append")
        if self.mode == "append":
            _check_columns(self.uri, current, self.schema)

    def _commit(self, bundles: list[BundleRows]) -> int:
        # Again, because a table may have come, or have got other columns, since the graph was built.
        current = open_newest(self.uri, self.storage)
        self._check_target(current)
        if current is not None and committed_by(current, self.run_id):
            version = int(current.version)
        else:
            version = commit_fragments(
                self.uri,
                self.schema,
                self._fragments(bundles),
                run_id=self.run_id,
                mode=self.mode,
                read_version=0 if current is None else int(current.version),
                storage=self.storage,
            )
        self._remove_folder()
        return version

    def _fragments(self, bundles: list[BundleRows]) -> "list[lance.FragmentMetadata]":
        """Return the fragments of all bundles. Raises TableError if they do not hold the rows that entered."""
        entered = Counter[str]()
        for bundle, rows in bundles:
            entered[bundle] += rows
        names = sorted(bundle for bundle, rows in entered.items() if rows)
        parts = list(look_up(lambda name: self.storage.read_json(self.part(name)) or [], names))
        for name, fragments in zip(names, parts, strict=True):
            written = sum(fragment["physical_rows"] for fragment in fragments)
            if written != entered[name]:
                raise TableError(
                    f"{self.uri} is not written: {entered.total():,} rows entered, but of {entered[name]:,} in one "
                    f"bundle {written:,} are in its files: nothing was committed; run the pipeline again"
                )
        return [fragment_from_dict(fragment) for fragments in parts for fragment in fragments]

    def part(self, bundle: str) -> str:
        """Return the file in which a bundle leaves the metadata of its fragments."""
        return f"{self.folder}/{bundle}.json"

    def _remove_folder(self) -> None:
        self.storage.remove(self.folder)
        parent = self.folder.rpartition("/")[0]
        if not self.storage.names(parent):
            self.storage.remove(parent)


def _check_columns(uri: str, current: "lance.LanceDataset", schema: pa.Schema) -> None:
    """Raise TableError if rows of `schema` would not fit a table: other columns, types or order, or renumbered ones."""
    from lance.schema import LanceSchema

    stored = current.schema.remove_metadata()
    if stored != schema.remove_metadata():
        raise TableError(
            f"{uri} has other columns ({_difference(stored, schema)}): append rows with the table's columns"
        )
    # Files refer to columns by number, and those of a table that lost a column differ from those of new files.
    if _numbers(current.lance_schema.fields()) != _numbers(LanceSchema.from_pyarrow(schema).fields()):
        raise TableError(
            f"columns of {uri} were added or dropped, so fragments written elsewhere do not fit: "
            "use mode overwrite, or write another table"
        )


def _difference(stored: pa.Schema, given: pa.Schema) -> str:
    """Return the first column that differs, with both types."""
    for name in dict.fromkeys((*stored.names, *given.names)):
        there, here = (
            str(schema.field(name).type) if name in schema.names else "missing" for schema in (stored, given)
        )
        if there != here:
            return f"{name}: {there} there, {here} here"
    if stored.names != given.names:
        return f"{', '.join(stored.names)} there, {', '.join(given.names)} here"
    return "nullable there, not here, or the other way around"


def _numbers(fields: Any) -> list[tuple[int, str]]:
    return [pair for field in fields for pair in ((field.id(), field.name()), *_numbers(field.children()))]


class _WriteFragments(beam.DoFn):  # type: ignore[misc]
    """Batch -> (bundle, rows of the batch). Batches are buffered, and written once they are large enough.

    What the end of a bundle emits is lost on some runners, so the fragments are left in a file that the commit reads.
    """

    def __init__(self, target: WriteLance) -> None:
        self.target = target

    def start_bundle(self) -> None:
        self.bundle = uuid.uuid4().hex
        self.buffer: list[pa.RecordBatch] = []
        self.fragments: list[dict[str, Any]] = []
        self.bytes = 0

    def process(self, batch: pa.RecordBatch) -> Iterator[BundleRows]:
        self.buffer.append(batch)
        self.bytes += batch.nbytes
        if self.bytes >= self.target.bytes_per_file:
            self._flush()
        yield self.bundle, len(batch)

    def finish_bundle(self) -> None:
        self._flush()
        if self.fragments:
            self.target.storage.write_json(self.target.part(self.bundle), self.fragments)

    def _flush(self) -> None:
        target = self.target
        self.fragments += write_fragments(target.uri, target.schema, iter(self.buffer), target.storage)
        self.buffer, self.bytes = [], 0


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
