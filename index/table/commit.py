"""Change a table: rows, search vectors and metadata, each change in one commit.

The search vectors of a fragment are in a data file of their own. Encoding writes the other columns first, shard by
shard; a geometry can be fitted only when all of them are known, and then `add_vectors` writes the vectors. `publish`
commits rows, vectors and metadata together, and so does `append_rows`: readers see the table before or after, never a
part of it. A new geometry rewrites the vector files alone; rows that were deleted stay deleted.

Each commit carries the version that it was computed from. What came in between makes it a TableError, unless it
changes nothing that the commit rests on: rows that LanceDB deletes while metadata is written, for instance.
"""

import contextlib
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Float32

from index.errors import TableError
from index.space.geometry import Geometry
from index.table.schema import METADATA_KEY, TRAIN, TableMeta, table_schema, vector_field
from index.table.storage import Storage
from index.table.table import INDEXED, Table, column_array, list_array, open_newest

if TYPE_CHECKING:
    import lance
    from lance.schema import LanceSchema

RECENT_COMMITS = 100
DROPPED = -2
"""Lance's field id, in a data file, of a column that a later data file replaces."""
MODES = ("create", "overwrite", "append")
BATCH_ROWS = 4096

Rows = tuple[Float16[np.ndarray, "B T"], Float16[np.ndarray, "B L"]]
"""Text embeddings and latents."""


def add_vectors(
    uri: str,
    fragment: "lance.FragmentMetadata",
    encoded: pa.Schema,
    geometry: Geometry,
    balance: float = 0.0,
    storage: Storage | None = None,
) -> "lance.FragmentMetadata":
    """Write the search vectors of a fragment that no commit refers to yet; return the fragment with that file.

    `balance` is the balance coordinate of all rows. Nothing is committed.
    """
    from lance.file import LanceFileReader

    content: dict[str, Any] = fragment.to_json()
    rows_file = next(file for file in content["files"] if encoded.get_field_index("latent") in file["fields"])
    reader = LanceFileReader(
        f"{uri}/data/{rows_file['path']}",
        storage_options=None if storage is None else storage.lance,
        columns=["text", "latent"],
    )
    batches = (_text_and_latent(batch) for batch in reader.read_all(batch_size=BATCH_ROWS).to_batches())
    vectors = (geometry.vectors(*rows, np.full(len(rows[0]), balance, np.float32)) for rows in batches)
    return _with_vectors(uri, content, len(encoded), geometry.vector_dim, vectors, storage)


def _with_vectors(
    uri: str,
    content: dict[str, Any],
    vector_id: int,
    dim: int,
    vectors: Iterator[Float32[np.ndarray, "B S"]],
    storage: Storage | None,
) -> "lance.FragmentMetadata":
    """Write a data file of vectors, one for each physical row, and return the fragment with it in place of its own."""
    import lance
    from lance.file import LanceFileWriter

    schema, name, done = pa.schema([vector_field(dim)]), f"{uuid.uuid4().hex}.lance", 0
    options = None if storage is None else storage.lance
    with LanceFileWriter(f"{uri}/data/{name}", schema, storage_options=options) as writer:
        for batch in vectors:
            writer.write_batch(pa.record_batch([list_array(batch)], schema=schema))
            done += len(batch)
    assert done == content["physical_rows"], (done, content["physical_rows"])
    rows_file = content["files"][0]
    other_files = [
        {**file, "fields": [DROPPED if field == vector_id else field for field in file["fields"]]}
        for file in content["files"]
        if file["fields"] != [vector_id]
    ]
    vector_file = {**rows_file, "path": name, "fields": [vector_id], "column_indices": [0], "file_size_bytes": None}
    return lance.FragmentMetadata.from_json(json.dumps({**content, "files": [*other_files, vector_file]}))


def commit_fragments(
    uri: str,
    schema: pa.Schema,
    fragments: Sequence["lance.FragmentMetadata"],
    *,
    run_id: str,
    mode: str = "create",
    read_version: int | None = None,
    storage: Storage | None = None,
) -> int:
    """Make fragments the table at `uri`, or append them to it, in one commit; return its version.

    `read_version` is the version that they were computed from, by default the newest; 0 stands for no table. Mode
    `create` never replaces a table, `overwrite` replaces that version alone, and `append` creates a table if there is
    none. Lance would accept the same fragments twice, so nothing is done if a recent commit has this `run_id`.

    Raises TableError if a table exists (create), or if the table changed meanwhile.
    """
    import lance

    assert mode in MODES, mode
    storage = storage or Storage()
    current = open_newest(uri, storage)
    if current is not None and committed_by(current, run_id):
        return int(current.version)
    if mode == "create":
        if current is not None:
            raise TableError(f"{uri} exists (version {current.version}): name another table, or overwrite or append")
        read_version = 0
    elif read_version is None:
        read_version = 0 if current is None else int(current.version)
    if current is None and read_version:
        raise changed(uri, read_version, storage)
    operation: lance.LanceOperation.BaseOperation = lance.LanceOperation.Overwrite(schema, list(fragments))
    if mode == "append" and current is not None:
        if read_version == 0:
            raise changed(uri, read_version, storage)
        operation = lance.LanceOperation.Append(list(fragments))
    return int(_commit(uri, operation, read_version, storage, run_id).version)


def committed_by(dataset: "lance.LanceDataset", run_id: str) -> bool:
    """Return whether a recent commit of a table has this `run_id`."""
    recent = dataset.get_transactions(RECENT_COMMITS)
    return any(each and (each.transaction_properties or {}).get("run_id") == run_id for each in recent)


def _commit(
    uri: str,
    operation: "lance.LanceOperation.BaseOperation",
    read_version: int,
    storage: Storage,
    run_id: str | None = None,
) -> "lance.LanceDataset":
    """Commit what was computed from `read_version`; raises TableError if another commit contradicts it."""
    import lance

    transaction = lance.Transaction(
        read_version=read_version,
        operation=operation,
        transaction_properties={} if run_id is None else {"run_id": run_id},
    )
    with refused_on_conflict(uri, read_version, storage):
        # Without retries, because Lance would retry an Overwrite over whatever came in between.
        return lance.LanceDataset.commit(uri, transaction, storage_options=storage.lance, max_retries=0)


@contextlib.contextmanager
def refused_on_conflict(uri: str, read_version: int, storage: Storage) -> Iterator[None]:
    """Turn Lance's error for a commit that others preempted into a TableError with both versions."""
    from lance.commit import CommitConflictError

    try:
        yield
    except CommitConflictError as error:
        raise changed(uri, read_version, storage) from error
    except OSError as error:
        # Not all of Lance's interface has a class for it; read_version 0 is looked for if there is a table.
        text = str(error)
        if "ncompatible transaction" in text or "preempted by" in text or (read_version == 0 and "not found" in text):
            raise changed(uri, read_version, storage) from error
        raise


def changed(uri: str, read_version: int, storage: Storage) -> TableError:
    """Return the error for a commit that was computed from a version which is not the newest any more."""
    newest = open_newest(uri, storage)
    versions = f"{read_version or 'none'} -> {'none' if newest is None else newest.version}"
    return TableError(f"{uri} changed meanwhile (version {versions}): rerun the same command")


def publish(
    uri: str,
    encoded: pa.Schema,
    meta: TableMeta,
    fragments: Sequence["lance.FragmentMetadata"],
    run_id: str,
    storage: Storage,
    *,
    mode: str = "create",
) -> Table:
    """Make fragments with vectors the table, in one commit; readers that have an older version open keep it."""
    schema = table_schema(encoded, meta)
    version = commit_fragments(uri, schema, fragments, run_id=run_id, mode=mode, storage=storage)
    return Table(uri, version, meta, storage)


def append_rows(table: Table, meta: TableMeta, fragments: Sequence["lance.FragmentMetadata"], run_id: str) -> Table:
    """Append fragments and store `meta`, which differs by their moments and `run_id`, in one commit; indexes stay.

    Raises TableError if `meta` was not computed from the metadata of `table`, as after another append or build-index,
    or if the table changed meanwhile. Rows that a recent commit with this `run_id` appended are not appended again.
    """
    import lance

    dataset = table.dataset()
    if run_id in table.meta.run_ids:
        return table
    if replace(meta, moments=table.meta.moments, run_ids=table.meta.run_ids).to_json() != table.meta.to_json() or (
        meta.run_ids[: len(table.meta.run_ids)] != table.meta.run_ids
    ):
        raise TableError(
            f"{table.uri} changed while rows were encoded for it (now version {table.version}): rerun the same command"
        )
    if committed_by(dataset, run_id):
        return update_meta(table, meta)
    if not _has_own_columns(table):
        operation: lance.LanceOperation.BaseOperation = lance.LanceOperation.Append(list(fragments))
        dataset = _commit(table.uri, operation, table.version, table.storage, run_id)
        return update_meta(table.at(dataset), meta)
    # Append cannot change metadata. In a Merge, new fragments get ids that no fragment had before, so no index covers
    # them, and any other commit is a conflict.
    fragments = [*(each.metadata for each in dataset.get_fragments()), *fragments]
    operation = lance.LanceOperation.Merge(fragments, _lance_schema(table, meta))
    return table.at(_commit(table.uri, operation, table.version, table.storage, run_id), meta)


def _lance_schema(table: Table, meta: TableMeta) -> "LanceSchema":
    """Return the table's schema with new metadata, for a commit; other metadata stays."""
    from lance.schema import LanceSchema

    schema = table.dataset().schema
    schema = schema.set(schema.get_field_index("vector"), vector_field(meta.geometry.vector_dim))
    return LanceSchema.from_pyarrow(schema.with_metadata((schema.metadata or {}) | {METADATA_KEY: meta.to_json()}))


def neutral_balance(table: Table) -> float:
    """Return the root mean square balance coordinate of training rows, for rows to append; 0 without potentials."""
    first = table.dataset().head(65_536, columns=["vector"], filter=f"split = '{TRAIN}'")["vector"]
    coordinate = table.meta.geometry.balance_of(column_array(first)).astype(np.float32)
    return float(np.sqrt(np.square(coordinate).mean())) if len(coordinate) else 0.0


def rewrite_vectors(
    table: Table, geometry: Geometry, balance: Float32[np.ndarray, "N"] | None = None
) -> Iterator[int | Table]:
    """Replace the vectors of all rows by those of another geometry: yield the rows done so far, then the new table.

    `balance` is the balance coordinate of each row, in table order. No row moves, so other indexes stay; the vector
    index covers no row any more. Raises TableError if the table changed meanwhile.
    """
    import lance

    encoded, dataset = encoded_columns(table), table.dataset()
    count = dataset.count_rows()
    coordinate = np.zeros(count, np.float32) if balance is None else balance
    if len(coordinate) != count:
        raise TableError(f"{table.uri} changed meanwhile ({len(coordinate)} rows -> {count}): rerun the same command")
    fragments, done = [], 0
    for fragment in dataset.get_fragments():
        rows = fragment.count_rows()
        vectors = _vectors_of(fragment, geometry, coordinate[done : done + rows])
        content = fragment.metadata.to_json()
        fragments.append(_with_vectors(table.uri, content, len(encoded), geometry.vector_dim, vectors, table.storage))
        done += rows
        yield done
    meta = table.meta.with_geometry(geometry)
    operation = lance.LanceOperation.Merge(fragments, _lance_schema(table, meta))
    yield table.at(_commit(table.uri, operation, table.version, table.storage), meta)


def _vectors_of(
    fragment: "lance.LanceFragment", geometry: Geometry, balance: Float32[np.ndarray, "N"]
) -> Iterator[Float32[np.ndarray, "B S"]]:
    """Iterate over the vectors of a committed fragment, in its physical order; those of deleted rows are zero."""
    physical, done = 0, 0
    batches = fragment.to_batches(columns=["text", "latent"], with_row_address=True, batch_size=BATCH_ROWS)
    for batch in batches:
        # The lower half of an address is the row within its fragment.
        rows = (batch["_rowaddr"].to_numpy() & 0xFFFFFFFF).astype(np.int64)
        if not len(rows):
            continue
        yield from _zeros(int(rows[0]) - physical, geometry.vector_dim)
        vectors = np.zeros((rows[-1] + 1 - rows[0], geometry.vector_dim), np.float32)
        vectors[rows - rows[0]] = geometry.vectors(*_text_and_latent(batch), balance[done : done + len(rows)])
        yield vectors
        physical, done = int(rows[-1]) + 1, done + len(rows)
    yield from _zeros(fragment.metadata.physical_rows - physical, geometry.vector_dim)


def _zeros(count: int, dim: int) -> Iterator[Float32[np.ndarray, "B S"]]:
    for start in range(0, count, BATCH_ROWS):
        yield np.zeros((min(BATCH_ROWS, count - start), dim), np.float32)


def _text_and_latent(batch: pa.RecordBatch) -> Rows:
    return column_array(batch["text"]), column_array(batch["latent"])


def encoded_columns(table: Table) -> pa.Schema:
    """Return the columns that encoding wrote.

    Raises TableError if the user added or dropped columns: `add_vectors` finds columns by their field ids.
    """
    if not _has_own_columns(table):
        raise TableError(
            f"columns of {table.uri} were added or dropped, so its vectors cannot be rewritten: "
            "encode the table again with `pipeline encode`"
        )
    schema = table.dataset().schema
    return schema.remove(len(schema) - 1).remove_metadata()


def _has_own_columns(table: Table) -> bool:
    """Return whether the table has the columns that encoding wrote and no others, with the field ids 0, 1, 2 ..."""
    dataset = table.dataset()
    names = [(field.id(), field.name()) for field in dataset.lance_schema.fields()]
    return names == list(enumerate(dataset.schema.names)) and dataset.schema.names[-1] == "vector"


def update_meta(table: Table, meta: TableMeta) -> Table:
    """Store new metadata that was computed from this version; rows and indexes stay.

    Raises TableError if other metadata was stored meanwhile.
    """
    import lance

    update = lance.LanceOperation.UpdateMap({METADATA_KEY.decode(): meta.to_json()})
    operation = lance.LanceOperation.UpdateConfig(schema_metadata_updates=update)
    return table.at(_commit(table.uri, operation, table.version, table.storage), meta)


def tag_indexed(table: Table) -> None:
    """Tag this version as one with a complete index: clean-up keeps it, and `open_table(indexed=True)` finds it."""
    tags, name = table.dataset().tags, f"{INDEXED}{table.version}"
    if name not in tags.list():
        tags.create(name, table.version)
