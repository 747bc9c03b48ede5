"""The search vectors of rows: computed, written to data files of their own, and committed.

Encoding writes the other columns first, shard by shard; a geometry can be fitted only when all of them are known, and
then `add_vectors` writes the vectors of fragments that no commit refers to yet. A new geometry rewrites the vector
files alone, fragment by fragment (`replace_vectors`), here or on other machines, in one commit (`commit_vectors`); rows
that were deleted stay deleted. `in_geometry` computes vectors without writing them.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Float32, Int

from index.errors import TableError
from index.space.geometry import Geometry
from index.table.commit import has_own_columns, merge_fragments
from index.table.schema import TRAIN, vector_field
from index.table.storage import Storage
from index.table.table import Table, column_array, list_array

if TYPE_CHECKING:
    import lance

DROPPED = -2
"""Lance's field id, in a data file, of a column that a later data file replaces."""
BATCH_ROWS = 4096
BALANCE_ROWS = 65_536
"""Training rows whose balance coordinates are averaged for rows to append."""

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


def replace_vectors(
    table: Table,
    fragment: "lance.LanceFragment",
    geometry: Geometry,
    balance: Float32[np.ndarray, "n"] | None = None,
    start: int | None = None,
) -> "lance.FragmentMetadata":
    """Write the search vectors of a fragment of a table in another geometry; return the fragment with that file.

    `balance` is the balance coordinate of each row that is not deleted, in table order. `start` is the position of its
    first row, from which on rows that the table holds in memory are not read again. Nothing is committed. The table has
    the columns that encoding wrote, see `encoded_columns`.
    """
    rows = fragment.count_rows()
    coordinate = np.zeros(rows, np.float32) if balance is None else balance
    if len(coordinate) != rows:
        raise TableError(f"{table.uri} changed meanwhile ({len(coordinate)} rows -> {rows}): rerun the same command")
    content = fragment.metadata.to_json()
    vector_id = max(field for file in content["files"] for field in file["fields"])  # it is the last column
    if start is not None and table.holds("text") and table.holds("latent") and not fragment.metadata.num_deletions:
        vectors = _vectors_in_memory(table, start, geometry, coordinate)
    else:
        vectors = _vectors_of(fragment, geometry, coordinate)
    return _with_vectors(table.uri, content, vector_id, geometry.vector_dim, vectors, table.storage)


def commit_vectors(
    table: Table, geometry: Geometry, fragments: Sequence["lance.FragmentMetadata"], *, balanced: bool
) -> Table:
    """Commit all fragments of a table with the vectors of another geometry. No row moves, so other indexes stay.

    The vector index covers no row any more. Raises TableError if the table changed meanwhile.
    """
    committed = merge_fragments(table, table.meta.with_geometry(geometry, balanced=balanced), fragments)
    table.storage.remove(vectors_folder(table.uri))
    return committed


def vectors_folder(uri: str) -> str:
    """Return the folder of vectors that are left to commit: DB/NAME.vectors, with a folder for a version and layout."""
    return uri.removesuffix(".lance") + ".vectors"


def rewrite_vectors(
    table: Table, geometry: Geometry, balance: Float32[np.ndarray, "N"] | None = None
) -> Iterator[int | Table]:
    """Replace the vectors of all rows by those of another geometry: yield the rows done so far, then the new table.

    `balance` is the balance coordinate of each row, in table order. Raises TableError if the table changed meanwhile.
    """
    encoded_columns(table)
    starts = fragment_starts(table)
    if balance is not None and len(balance) != starts[-1]:
        raise TableError(f"{table.uri} changed meanwhile ({len(balance)} rows -> {starts[-1]}): rerun the same command")
    written = []
    for fragment, (start, end) in zip(table.dataset().get_fragments(), pairwise(starts.tolist()), strict=True):
        own = None if balance is None else balance[start:end]
        written.append(replace_vectors(table, fragment, geometry, own, start))
        yield end
    yield commit_vectors(table, geometry, written, balanced=balance is not None and bool(balance.any()))


def fragment_starts(table: Table) -> Int[np.ndarray, "_"]:
    """Return the position in table order of the first row of each fragment, and the number of rows at the end."""
    return np.cumsum([0, *(fragment.count_rows() for fragment in table.dataset().get_fragments())])


def is_balanced(table: Table) -> bool:
    """Return whether a balance coordinate is stored; tables of earlier versions do not say it, and are read once."""
    if table.meta.balanced is not None:
        return table.meta.balanced
    return any(coordinate.any() for coordinate in _balance_coordinates(table))


def balance_coordinate(table: Table) -> Float32[np.ndarray, "N"]:
    """Return the balance coordinate of every row, in table order."""
    if table.meta.balanced is False:
        return np.zeros(table.dataset().count_rows(), np.float32)
    return np.concatenate([np.empty(0, np.float32), *_balance_coordinates(table)])


def _balance_coordinates(table: Table) -> Iterator[Float32[np.ndarray, "B"]]:
    for batch in table.scan(["vector"], batch_size=BATCH_ROWS, batch_readahead=1):
        yield table.meta.geometry.balance_of(column_array(batch["vector"])).astype(np.float32)


def neutral_balance(table: Table) -> float:
    """Return the root mean square balance coordinate of training rows, for rows to append; 0 without potentials."""
    if table.meta.balanced is False:
        return 0.0
    batches = table.dataset().to_batches(
        columns=["vector"], filter=f"split = '{TRAIN}'", limit=BALANCE_ROWS, batch_size=BATCH_ROWS, batch_readahead=1
    )
    parts = [table.meta.geometry.balance_of(column_array(batch["vector"])).astype(np.float32) for batch in batches]
    coordinate = np.concatenate([np.empty(0, np.float32), *parts])
    return float(np.sqrt(np.square(coordinate).mean())) if len(coordinate) else 0.0


def encoded_columns(table: Table) -> pa.Schema:
    """Return the columns that encoding wrote.

    Raises TableError if the user added or dropped columns: `add_vectors` finds columns by their field ids.
    """
    if not has_own_columns(table):
        raise TableError(
            f"columns of {table.uri} were added or dropped, so its vectors cannot be rewritten: "
            "encode the table again with `pipeline encode`"
        )
    schema = table.dataset().schema
    return schema.remove(len(schema) - 1).remove_metadata()


def in_geometry(table: Table, geometry: Geometry) -> Table:
    """Return a table as it will be once its vectors are rewritten in a geometry, without balance.

    Its vectors are computed from the rows whenever they are read: the same as those that would be stored.
    """
    computed = _InGeometry(table.uri, table.version, table.meta.with_geometry(geometry), table.storage)
    computed.__dict__["_shared"] = table.shared()
    return computed


class _InGeometry(Table):
    """A table whose column `vector` is computed from `text` and `latent`."""

    def _digest(self, column: str) -> str:
        return f"computed by {id(self)}" if column == "vector" else super()._digest(column)

    def scan(
        self,
        columns: Sequence[str],
        split: str | None = None,
        *,
        batch_size: int = 65_536,
        batch_readahead: int = 2,
    ) -> Iterator[pa.RecordBatch]:
        if "vector" not in columns:
            yield from super().scan(columns, split, batch_size=batch_size, batch_readahead=batch_readahead)
            return
        stored = dict.fromkeys(name for name in (*columns, "text", "latent") if name != "vector")
        for batch in super().scan([*stored], split, batch_size=batch_size, batch_readahead=batch_readahead):
            vectors = self._vectors(*_text_and_latent(batch))
            yield pa.record_batch([vectors if name == "vector" else batch[name] for name in columns], names=[*columns])

    def column(self, name: str, split: str | None = TRAIN) -> Any:
        if name != "vector":
            return super().column(name, split)
        return column_array(self._vectors(super().column("text", split), super().column("latent", split)))

    def take(self, positions: Int[np.ndarray, "B"], column: str) -> Any:
        if column != "vector":
            return super().take(positions, column)
        return column_array(self._vectors(super().take(positions, "text"), super().take(positions, "latent")))

    def _vectors(self, text: Float16[np.ndarray, "B T"], latent: Float16[np.ndarray, "B L"]) -> pa.FixedSizeListArray:
        """Compute what would be stored, some rows at a time: float32 takes twice the memory."""
        starts = range(0, max(len(text), 1), BATCH_ROWS)
        parts = (self.meta.geometry.vectors(text[i : i + BATCH_ROWS], latent[i : i + BATCH_ROWS]) for i in starts)
        return pa.concat_arrays([list_array(part) for part in parts])


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
    vector_file = {**rows_file, "path": name, "fields": [vector_id], "column_indices": [0]}
    # A file whose size is known is opened without asking the store for it.
    vector_file["file_size_bytes"] = writer.size_bytes
    return lance.FragmentMetadata.from_json(json.dumps({**content, "files": [*other_files, vector_file]}))


def _vectors_of(
    fragment: "lance.LanceFragment", geometry: Geometry, balance: Float32[np.ndarray, "n"]
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


def _vectors_in_memory(
    table: Table, start: int, geometry: Geometry, balance: Float32[np.ndarray, "n"]
) -> Iterator[Float32[np.ndarray, "B S"]]:
    """Iterate over the vectors of some rows from a position on, as many at a time as are read of a file."""
    for first in range(0, len(balance), BATCH_ROWS):
        own = balance[first : first + BATCH_ROWS]
        rows = np.arange(start + first, start + first + len(own))
        yield geometry.vectors(table.take(rows, "text"), table.take(rows, "latent"), own)


def _zeros(count: int, dim: int) -> Iterator[Float32[np.ndarray, "B S"]]:
    for start in range(0, count, BATCH_ROWS):
        yield np.zeros((min(BATCH_ROWS, count - start), dim), np.float32)


def _text_and_latent(batch: pa.RecordBatch) -> Rows:
    return column_array(batch["text"]), column_array(batch["latent"])
