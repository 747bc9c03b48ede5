"""A Lance table on disk: open it, write vectors beside its rows, publish it in one commit.

A table's fragments keep their search vectors in a data file of their own. Encoding writes the other columns first,
shard by shard; only when all are there are the statistics known that a geometry needs, and then `add_vectors` writes
the vectors. `publish` makes rows, vectors and metadata visible together, so a reader sees the table before or after,
never a part. A changed geometry goes the same way and rewrites the vector files alone.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32, Int

from index.errors import TableError
from index.geometry import Geometry
from index.schema import METADATA_KEY, TRAIN, TableMeta, check_table, table_schema, vector_field

if TYPE_CHECKING:
    import lance
    import lancedb


@dataclass(frozen=True, slots=True)
class Table:
    """One version of a table: where it is, and what its metadata says."""

    uri: str
    version: int
    meta: TableMeta

    def dataset(self) -> "lance.LanceDataset":
        """This version, through Lance."""
        import lance

        return lance.dataset(self.uri, version=self.version)

    def lancedb(self) -> "lancedb.table.Table":
        """This version, through LanceDB."""
        import lancedb

        path = Path(self.uri)
        table = lancedb.connect(str(path.parent)).open_table(path.stem)
        table.checkout(self.version)
        return table

    def offsets(self, split: str) -> Int[np.ndarray, "N"]:
        """Positions of the rows of one split, in the table's order."""
        splits = self.dataset().to_table(columns=["split"])["split"].to_numpy()
        return np.flatnonzero(splits == split)

    def take(self, offsets: Int[np.ndarray, "B"], column: str) -> Any:
        """One column at some positions, order and repeats kept; vectors come as a float array B x width."""
        return column_array(self.dataset().take(offsets.tolist(), columns=[column])[column])

    def column(self, name: str, split: str | None = TRAIN) -> Any:
        """A whole column of one split (or of all rows), in the table's order."""
        where = None if split is None else f"split = '{split}'"
        return column_array(self.dataset().to_table(columns=[name], filter=where)[name])

    @property
    def reports(self) -> Path:
        """The folder of this table's reports: DB/NAME.reports."""
        return reports_of(self.uri)


def table_uri(given: str | Path) -> str:
    """The absolute path of DB/NAME.lance (LanceDB takes a relative `db...` for its cloud); TableError otherwise."""
    path = Path(given)
    if path.parts and path.parts[0].endswith(":"):  # s3://bucket has become s3:/bucket
        raise TableError(f"{str(given)!r} is not on this machine: give a local path of the form DB/NAME.lance")
    if path.suffix != ".lance" or not path.stem:
        raise TableError(
            f"{str(given)!r} is not a table: give a path of the form DB/NAME.lance, for instance data/pairs.lance"
        )
    return str(path.absolute())


def is_table(uri: str) -> bool:
    """Whether a table was published there; an encode run that was stopped leaves data without a version."""
    return (Path(uri) / "_versions").is_dir()


def reports_of(uri: str) -> Path:
    """The folder of a table's reports: DB/NAME.reports."""
    return Path(uri).with_suffix(".reports")


def open_table(given: str | Path, *, version: int | None = None, indexed: bool = False) -> Table:
    """Open and check a table, at its newest version unless told; TableError says what is wrong and what to type."""
    import lance

    uri = table_uri(given)
    if not is_table(uri):
        raise TableError(f"no table at {given}: make it with `pipeline encode SOURCE --table {given} ...`")
    try:
        dataset = lance.dataset(uri, version=version)
    except (ValueError, OSError) as error:
        raise TableError(f"{given} cannot be opened as a Lance table: {first_line(error)}") from error
    table = Table(uri, dataset.version, check_table(dataset.schema))
    if indexed and table.meta.index is None:
        raise TableError(f"{given} has no index: type `pipeline build-index {given}`")
    return table


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def column_array(column: pa.ChunkedArray) -> Any:
    """An Arrow column as numpy; a fixed_size_list column as rows x width."""
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
    balance: Float32[np.ndarray, "N"] | None = None,
) -> "lance.FragmentMetadata":
    """Write the search vectors of one fragment to a data file of their own and return the fragment that has them."""
    import lance
    from lance.file import LanceFileReader, LanceFileWriter

    content: dict[str, Any] = fragment.to_json()
    place = len(encoded)
    rows_file = next(f for f in content["files"] if encoded.get_field_index("latent") in f["fields"])
    reader = LanceFileReader(f"{uri}/data/{rows_file['path']}", columns=["text", "latent"])
    schema = pa.schema([vector_field(geometry.width)])
    name = f"{uuid.uuid4().hex}.lance"
    done = 0
    with LanceFileWriter(f"{uri}/data/{name}", schema) as writer:
        for batch in reader.read_all(batch_size=4096).to_batches():
            text, latent = (column_array(pa.chunked_array([batch[c]])) for c in ("text", "latent"))
            part = None if balance is None else balance[done : done + len(text)]
            vectors = geometry.vectors(text, latent, part)
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


def publish(
    uri: str, encoded: pa.Schema, meta: TableMeta, fragments: Sequence["lance.FragmentMetadata"], message: str
) -> Table:
    """Make these fragments the table, in one commit; whoever has an older version open keeps it."""
    import lance

    operation = lance.LanceOperation.Overwrite(table_schema(encoded, meta), list(fragments))
    dataset = lance.LanceDataset.commit(uri, operation, commit_message=message)
    return Table(uri, dataset.version, meta)


def rewrite_vectors(
    table: Table, geometry: Geometry, balance: Float32[np.ndarray, "N"] | None = None
) -> Iterator[int | Table]:
    """Lay the table out in another geometry: yields the rows done so far, and at last the new version."""
    dataset = table.dataset()
    names = [(field.id(), field.name()) for field in dataset.lance_schema.fields()]
    if names != list(enumerate(dataset.schema.names)) or dataset.schema.names[-1] != "vector":
        raise TableError(
            f"{table.uri} has had columns added or dropped: its vectors cannot be rewritten, encode it again"
        )
    encoded = dataset.schema.remove(len(dataset.schema) - 1).remove_metadata()
    fragments, done = [], 0
    for fragment in dataset.get_fragments():
        rows = fragment.metadata.physical_rows
        part = None if balance is None else balance[done : done + rows]
        fragments.append(add_vectors(table.uri, fragment.metadata, encoded, geometry, part))
        done += rows
        yield done
    yield publish(table.uri, encoded, table.meta.with_geometry(geometry), fragments, "vectors")


def update_meta(table: Table, meta: TableMeta) -> Table:
    """Store new metadata; rows and indexes stay."""
    dataset = table.dataset()
    dataset.update_schema_metadata({METADATA_KEY.decode(): meta.to_json()}, replace=True)
    return Table(table.uri, dataset.version, meta)
