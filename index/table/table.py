"""A Lance table on disk: open it, write vectors beside its rows, publish it in one commit.

A table's fragments keep their search vectors in a data file of their own. Encoding writes the other columns first,
shard by shard; only when all are there are the statistics known that a geometry needs, and then `add_vectors` writes
the vectors. `publish` makes rows, vectors and metadata visible together, so a reader sees the table before or after,
never a part. A changed geometry goes the same way and rewrites the vector files alone. Appended rows come with vectors
of the table's own geometry, and the index goes on serving the others.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Float32, Int

from index.errors import TableError, one_line
from index.space.geometry import Geometry
from index.table.schema import METADATA_KEY, REJECTS, TRAIN, TableMeta, check_table, table_schema, vector_field
from index.table.storage import Storage, is_local

if TYPE_CHECKING:
    import lance
    import lancedb
    from lancedb import AsyncTable


LANCE_STORES = ("s3://", "gs://", "az://")
RECENT_COMMITS = 100
INDEXED = "index-v"
"""Tags of versions with a complete index, before their number."""


@dataclass(frozen=True, slots=True)
class Table:
    """One version of a table: where it is, and what its metadata says."""

    uri: str
    version: int
    meta: TableMeta
    storage: Storage = field(default_factory=Storage)

    def dataset(self) -> "lance.LanceDataset":
        """This version, through Lance."""
        import lance

        return lance.dataset(self.uri, version=self.version, storage_options=self.storage.lance)

    def lancedb(self) -> "lancedb.table.Table":
        """This version, through LanceDB."""
        import lancedb

        folder, name = self._place()
        table = lancedb.connect(folder, storage_options=self.storage.lance).open_table(name)
        table.checkout(self.version)
        return table

    async def lancedb_async(self) -> "AsyncTable":
        """This version, through LanceDB's asynchronous interface."""
        import lancedb

        folder, name = self._place()
        connection = await lancedb.connect_async(folder, storage_options=self.storage.lance)
        table = await connection.open_table(name)
        await table.checkout(self.version)
        return table

    def _place(self) -> tuple[str, str]:
        """The folder and the name by which LanceDB knows the table."""
        folder, _, name = self.uri.rpartition("/")
        return folder, name.removesuffix(".lance")

    def positions(self, split: str) -> Int[np.ndarray, "N"]:
        """Positions of the rows of one split, in the table's order."""
        batches = self.dataset().to_batches(columns=["split"], batch_size=65_536)
        here = [pc.equal(batch["split"], split).to_numpy(zero_copy_only=False) for batch in batches]
        return np.flatnonzero(np.concatenate([np.empty(0, bool), *here]))

    def take(self, offsets: Int[np.ndarray, "B"], column: str) -> Any:
        """One column at some positions, order and repeats kept; vectors come as a float array B x width."""
        return column_array(self.dataset().take(offsets.tolist(), columns=[column])[column])

    def take_row_ids(self, rows: Int[np.ndarray, "B"], column: str) -> Any:
        """One column of the rows with some Lance row ids, order and repeats kept."""
        wanted = ", ".join(str(row) for row in np.unique(rows))
        found = self.dataset().to_table(columns=[column], filter=f"_rowid IN ({wanted})", with_row_id=True)
        ids = found["_rowid"].to_numpy().astype(np.int64)
        order = np.argsort(ids)
        return column_array(found[column])[order[np.searchsorted(ids, rows, sorter=order)]]

    def column(self, name: str, split: str | None = TRAIN) -> Any:
        """A whole column of one split (or of all rows), in the table's order."""
        where = None if split is None else f"split = '{split}'"
        return column_array(self.dataset().to_table(columns=[name], filter=where)[name])

    def report(self, name: str) -> Any:
        """A report beside the table, DB/NAME.reports/`name`.json; None where there is none."""
        return self.storage.read_json(f"{reports_of(self.uri)}/{name}.json")

    def write_report(self, name: str, content: Any) -> None:
        """Write DB/NAME.reports/`name`.json."""
        self.storage.write_json(f"{reports_of(self.uri)}/{name}.json", content)

    def write_page(self, name: str, page: str) -> str:
        """Write DB/NAME.reports/`name`.html and return where it is."""
        uri = f"{reports_of(self.uri)}/{name}.html"
        self.storage.write_text(uri, page)
        return uri

    def log(self, name: str) -> Path | None:
        """The file that progress is appended to; see `log_of`."""
        return log_of(self.uri, name)


def table_uri(given: str | Path) -> str:
    """The URI of DB/NAME.lance, with paths made absolute (LanceDB takes `db...` for its cloud); else TableError."""
    text = str(given)
    if is_local(text) and text.partition("/")[0].endswith(":"):
        raise TableError(f"{text!r} has lost a slash: give a URI as text, not as a pathlib.Path")
    if not is_local(text) and not text.startswith(LANCE_STORES):
        raise TableError(f"{text!r} is nothing that Lance writes to: give a path, or {', '.join(LANCE_STORES)}...")
    if not text.endswith(".lance") or text.rpartition("/")[2] == ".lance":
        raise TableError(
            f"{text!r} is not a table: give a path of the form DB/NAME.lance, for instance data/pairs.lance"
        )
    return str(Path(text).absolute()) if is_local(text) else text


def rejects_uri(uri: str) -> str:
    """The rejects table beside a table: DB/NAME_rejects.lance."""
    return uri.removesuffix(".lance") + "_rejects.lance"


def is_table(uri: str, storage: Storage) -> bool:
    """Whether a table was published there; an encode run that was stopped leaves data without a version."""
    try:
        return bool(storage.names(f"{uri}/_versions"))
    except Exception as error:  # every object store has errors of its own
        raise TableError(
            f"{uri} cannot be reached ({one_line(error)}): check the address, the rights and --storage-option"
        ) from error


def reports_of(uri: str) -> str:
    """The folder of a table's reports: DB/NAME.reports."""
    return uri.removesuffix(".lance") + ".reports"


def log_of(uri: str, name: str) -> Path | None:
    """The file that progress is appended to, DB/NAME.reports/`name`.jsonl; object stores append to no file."""
    return Path(reports_of(uri)) / f"{name}.jsonl" if is_local(uri) else None


def open_table(
    given: str | Path, *, version: int | None = None, indexed: bool = False, storage: Storage | None = None
) -> Table:
    """Open and check a table, at its newest version unless told; TableError says what is wrong and what to type.

    With `indexed`, where the newest version has no index because another one is being built, the last that has one.
    """
    import lance

    uri, storage = table_uri(given), Storage.of() if storage is None else storage
    if not is_table(uri, storage):
        raise TableError(f"no table at {given}: make it with `pipeline encode SOURCE --table {given} ...`")
    try:
        dataset = lance.dataset(uri, version=version, storage_options=storage.lance)
    except (ValueError, OSError) as error:
        raise TableError(f"{given} cannot be opened as a Lance table: {one_line(error)}") from error
    table = Table(uri, dataset.version, check_table(dataset.schema), storage)
    if not indexed or table.meta.index is not None:
        return table
    tagged = [int(tag.removeprefix(INDEXED)) for tag in dataset.tags.list() if tag.startswith(INDEXED)]
    if version is not None or not tagged:
        raise TableError(f"{given} has no index: type `pipeline build-index {given}`")
    return open_table(uri, version=max(tagged), storage=storage)


def tag_indexed(table: Table) -> None:
    """Keep this version from clean-up: trainers pin it, and it serves until another index is complete."""
    tags, name = table.dataset().tags, f"{INDEXED}{table.version}"
    if name not in tags.list():
        tags.create(name, table.version)


def column_array(column: pa.ChunkedArray | pa.Array) -> Any:
    """An Arrow column as numpy; a fixed_size_list column as rows x width."""
    if isinstance(column, pa.Array):
        column = pa.chunked_array([column])
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy()
    width = column.type.list_size
    flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(flat or [np.empty(0, np.float16)]).reshape(-1, width)


def list_array(rows: Float[np.ndarray, "B D"]) -> pa.FixedSizeListArray:
    """Rows as a fixed_size_list<float16> column."""
    flat = pa.array(np.ascontiguousarray(rows, dtype=np.float16).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])


def add_vectors(
    uri: str,
    fragment: "lance.FragmentMetadata",
    encoded: pa.Schema,
    geometry: Geometry,
    balance: Float32[np.ndarray, "N"] | float = 0.0,
    storage: Storage | None = None,
) -> "lance.FragmentMetadata":
    """Write the search vectors of one fragment to a data file of their own and return the fragment that has them."""
    import lance
    from lance.file import LanceFileReader, LanceFileWriter

    options = None if storage is None else storage.lance
    content: dict[str, Any] = fragment.to_json()
    place = len(encoded)
    rows_file = next(f for f in content["files"] if encoded.get_field_index("latent") in f["fields"])
    reader = LanceFileReader(f"{uri}/data/{rows_file['path']}", storage_options=options, columns=["text", "latent"])
    schema = pa.schema([vector_field(geometry.vector_dim)])
    name = f"{uuid.uuid4().hex}.lance"
    each = np.broadcast_to(np.asarray(balance, np.float32), content["physical_rows"])
    done = 0
    with LanceFileWriter(f"{uri}/data/{name}", schema, storage_options=options) as writer:
        for batch in reader.read_all(batch_size=4096).to_batches():
            text, latent = (column_array(batch[c]) for c in ("text", "latent"))
            vectors = geometry.vectors(text, latent, each[done : done + len(text)])
            writer.write_batch(pa.record_batch([list_array(vectors)], schema=schema))
            done += len(text)
    assert done == content["physical_rows"], (done, content["physical_rows"])
    kept = [
        # -2 is Lance's mark for a column that a later file replaces.
        {**f, "fields": [-2 if field == place else field for field in f["fields"]]}
        for f in content["files"]
        if f["fields"] != [place]
    ]
    added = {**rows_file, "path": name, "fields": [place], "column_indices": [0], "file_size_bytes": None}
    return lance.FragmentMetadata.from_json(json.dumps({**content, "files": [*kept, added]}))


def commit_fragments(
    uri: str,
    schema: pa.Schema,
    fragments: Sequence["lance.FragmentMetadata"],
    *,
    run_id: str,
    append: bool = False,
    storage: Storage | None = None,
) -> int:
    """Make fragments the table at `uri`, or add them to it, in one commit; returns its version.

    Lance would take the same fragments twice. Where one of the last commits carries this `run_id` nothing is done.
    """
    import lance

    storage = storage or Storage()
    there = lance.dataset(uri, storage_options=storage.lance) if is_table(uri, storage) else None
    operation = lance.LanceOperation.Overwrite(schema, list(fragments))
    if there is not None:
        if any(t and t.transaction_properties.get("run_id") == run_id for t in there.get_transactions(RECENT_COMMITS)):
            return int(there.version)
        if append:
            operation = lance.LanceOperation.Append(list(fragments))
    transaction = lance.Transaction(
        read_version=0 if there is None else there.version,
        operation=operation,
        transaction_properties={"run_id": run_id},
    )
    return int(lance.LanceDataset.commit(uri, transaction, storage_options=storage.lance).version)


def publish(
    uri: str,
    encoded: pa.Schema,
    meta: TableMeta,
    fragments: Sequence["lance.FragmentMetadata"],
    run_id: str,
    storage: Storage,
) -> Table:
    """Make these fragments the table, in one commit; whoever has an older version open keeps it."""
    version = commit_fragments(uri, table_schema(encoded, meta), fragments, run_id=run_id, storage=storage)
    return Table(uri, version, meta, storage)


def append_rows(table: Table, meta: TableMeta, fragments: Sequence["lance.FragmentMetadata"], run_id: str) -> Table:
    """Add fragments and then `meta`; indexes stay, and so does what a reader between the two commits relies on."""
    schema = table.dataset().schema
    version = commit_fragments(table.uri, schema, fragments, run_id=run_id, append=True, storage=table.storage)
    return update_meta(Table(table.uri, version, table.meta, table.storage), meta)


def neutral_balance(table: Table) -> float:
    """The balance coordinate of an average training row, for rows that come later; 0 where none was fitted."""
    dataset = table.dataset()
    some = dataset.head(65_536, columns=["vector"], filter=f"split = '{TRAIN}'")["vector"]
    coordinate = table.meta.geometry.balance_of(column_array(some)).astype(np.float32)
    return float(np.sqrt(np.square(coordinate).mean())) if len(coordinate) else 0.0


def shards_of(table: Table) -> set[str]:
    """The shards that a table holds rows or rejects of."""
    import lance

    rejects = lance.dataset(rejects_uri(table.uri), storage_options=table.storage.lance)
    assert rejects.schema.names == REJECTS.names, rejects.schema
    found: set[str] = set()
    for dataset in (table.dataset(), rejects):
        for batch in dataset.to_batches(columns=["shard"]):
            found.update(batch["shard"].unique().to_pylist())
    return found


def rewrite_vectors(
    table: Table, geometry: Geometry, balance: Float32[np.ndarray, "N"] | None = None
) -> Iterator[int | Table]:
    """Lay the table out in another geometry: yields the rows done so far, and at last the new version."""
    encoded = encoded_columns(table)
    fragments, done = [], 0
    for fragment in table.dataset().get_fragments():
        rows = fragment.metadata.physical_rows
        part = 0.0 if balance is None else balance[done : done + rows]
        fragments.append(add_vectors(table.uri, fragment.metadata, encoded, geometry, part, table.storage))
        done += rows
        yield done
    meta = table.meta.with_geometry(geometry)
    yield publish(table.uri, encoded, meta, fragments, f"vectors-{uuid.uuid4().hex}", table.storage)


def encoded_columns(table: Table) -> pa.Schema:
    """The columns that encoding wrote; TableError where others stand among them: fields would not be found again."""
    dataset = table.dataset()
    names = [(field.id(), field.name()) for field in dataset.lance_schema.fields()]
    if names != list(enumerate(dataset.schema.names)) or dataset.schema.names[-1] != "vector":
        raise TableError(
            f"{table.uri} has had columns added or dropped: its vectors cannot be written, encode it again"
        )
    return dataset.schema.remove(len(dataset.schema) - 1).remove_metadata()


def update_meta(table: Table, meta: TableMeta) -> Table:
    """Store new metadata; rows and indexes stay."""
    dataset = table.dataset()
    dataset.update_schema_metadata({METADATA_KEY.decode(): meta.to_json()}, replace=True)
    return Table(table.uri, dataset.version, meta, table.storage)
