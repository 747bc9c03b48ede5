"""Change a table: rows, search vectors and metadata, each change in one commit.

The search vectors of a fragment are in a data file of their own. Encoding writes the other columns first, shard by
shard; a geometry can be fitted only when all of them are known, and then `add_vectors` writes the vectors. `publish`
commits rows, vectors and metadata together, so readers see the table before or after, never a part of it. A new
geometry is published the same way and rewrites the vector files alone. Appended rows get vectors of the table's
present geometry, and the index still serves the earlier rows.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from index.errors import TableError
from index.space.geometry import Geometry
from index.table.schema import METADATA_KEY, TRAIN, TableMeta, table_schema, vector_field
from index.table.storage import Storage
from index.table.table import INDEXED, Table, column_array, is_table, list_array

if TYPE_CHECKING:
    import lance

RECENT_COMMITS = 100
DROPPED = -2
"""Lance's field id, in a data file, of a column that a later data file replaces."""


def add_vectors(
    uri: str,
    fragment: "lance.FragmentMetadata",
    encoded: pa.Schema,
    geometry: Geometry,
    balance: Float32[np.ndarray, "N"] | float = 0.0,
    storage: Storage | None = None,
) -> "lance.FragmentMetadata":
    """Write the search vectors of one fragment to a new data file and return the fragment with that file.

    `balance` is the balance coordinate of each row, or of all rows. Nothing is committed.
    """
    import lance
    from lance.file import LanceFileReader, LanceFileWriter

    options = None if storage is None else storage.lance
    content: dict[str, Any] = fragment.to_json()
    vector_id = len(encoded)
    rows_file = next(file for file in content["files"] if encoded.get_field_index("latent") in file["fields"])
    reader = LanceFileReader(f"{uri}/data/{rows_file['path']}", storage_options=options, columns=["text", "latent"])
    schema = pa.schema([vector_field(geometry.vector_dim)])
    name = f"{uuid.uuid4().hex}.lance"
    coordinate = np.broadcast_to(np.asarray(balance, np.float32), content["physical_rows"])
    done = 0
    with LanceFileWriter(f"{uri}/data/{name}", schema, storage_options=options) as writer:
        for batch in reader.read_all(batch_size=4096).to_batches():
            text, latent = (column_array(batch[column]) for column in ("text", "latent"))
            vectors = geometry.vectors(text, latent, coordinate[done : done + len(text)])
            writer.write_batch(pa.record_batch([list_array(vectors)], schema=schema))
            done += len(text)
    assert done == content["physical_rows"], (done, content["physical_rows"])
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
    append: bool = False,
    storage: Storage | None = None,
) -> int:
    """Make fragments the table at `uri`, or append them to it, in one commit; return its version.

    Lance would accept the same fragments twice, so nothing is done if a recent commit has this `run_id`.
    """
    import lance

    storage = storage or Storage()
    current = lance.dataset(uri, storage_options=storage.lance) if is_table(uri, storage) else None
    operation = lance.LanceOperation.Overwrite(schema, list(fragments))
    if current is not None:
        recent = current.get_transactions(RECENT_COMMITS)
        if any(each and each.transaction_properties.get("run_id") == run_id for each in recent):
            return int(current.version)
        if append:
            operation = lance.LanceOperation.Append(list(fragments))
    transaction = lance.Transaction(
        read_version=0 if current is None else current.version,
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
    """Make fragments with vectors the table, in one commit; readers that have an older version open keep it."""
    version = commit_fragments(uri, table_schema(encoded, meta), fragments, run_id=run_id, storage=storage)
    return Table(uri, version, meta, storage)


def append_rows(table: Table, meta: TableMeta, fragments: Sequence["lance.FragmentMetadata"], run_id: str) -> Table:
    """Append fragments, then store `meta`; indexes stay, and a reader between the two commits sees a sound table."""
    schema = table.dataset().schema
    version = commit_fragments(table.uri, schema, fragments, run_id=run_id, append=True, storage=table.storage)
    return update_meta(table.at(version), meta)


def neutral_balance(table: Table) -> float:
    """Return the root mean square balance coordinate of training rows, for rows to append; 0 without potentials."""
    first = table.dataset().head(65_536, columns=["vector"], filter=f"split = '{TRAIN}'")["vector"]
    coordinate = table.meta.geometry.balance_of(column_array(first)).astype(np.float32)
    return float(np.sqrt(np.square(coordinate).mean())) if len(coordinate) else 0.0


def rewrite_vectors(
    table: Table, geometry: Geometry, balance: Float32[np.ndarray, "N"] | None = None
) -> Iterator[int | Table]:
    """Replace the vectors of all rows by those of another geometry: yield the rows done so far, then the new table."""
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
    """Return the columns that encoding wrote.

    Raises TableError if the user added or dropped columns: `add_vectors` finds columns by their field ids.
    """
    dataset = table.dataset()
    names = [(field.id(), field.name()) for field in dataset.lance_schema.fields()]
    if names != list(enumerate(dataset.schema.names)) or dataset.schema.names[-1] != "vector":
        raise TableError(
            f"columns of {table.uri} were added or dropped, so its vectors cannot be rewritten: "
            "encode the table again with `pipeline encode`"
        )
    return dataset.schema.remove(len(dataset.schema) - 1).remove_metadata()


def update_meta(table: Table, meta: TableMeta) -> Table:
    """Store new metadata; rows and indexes stay."""
    dataset = table.dataset()
    dataset.update_schema_metadata({METADATA_KEY.decode(): meta.to_json()}, replace=True)
    return table.at(dataset, meta)


def tag_indexed(table: Table) -> None:
    """Tag this version as one with a complete index: clean-up keeps it, and `open_table(indexed=True)` finds it."""
    tags, name = table.dataset().tags, f"{INDEXED}{table.version}"
    if name not in tags.list():
        tags.create(name, table.version)
