"""Change a table: rows, search vectors and metadata, each change in one commit.

`publish` commits rows, vectors and metadata together, and so does `append_rows`: readers see the table before or after,
never a part of it. Vectors alone are written and committed in `index.table.vectors`.

Each commit carries the version that it was computed from. What came in between makes it a TableError, unless it
changes nothing that the commit rests on: rows that LanceDB deletes while metadata is written, for instance.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa

from index.errors import TableError
from index.table.schema import METADATA_KEY, TableMeta, table_schema, vector_field
from index.table.storage import Storage
from index.table.table import INDEXED, Table, open_newest

if TYPE_CHECKING:
    import lance
    from lance.schema import LanceSchema

RECENT_COMMITS = 100
MODES = ("create", "overwrite", "append")


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
    target: "str | Table",
    operation: "lance.LanceOperation.BaseOperation",
    read_version: int,
    storage: Storage,
    run_id: str | None = None,
) -> "lance.LanceDataset":
    """Commit what was computed from `read_version`; raises TableError if another commit contradicts it.

    The dataset of a table is not opened again.
    """
    import lance

    uri, base = (target, target) if isinstance(target, str) else (target.uri, target.dataset())

    transaction = lance.Transaction(
        read_version=read_version,
        operation=operation,
        transaction_properties={} if run_id is None else {"run_id": run_id},
    )
    with refused_on_conflict(uri, read_version, storage):
        # Without retries, because Lance would retry an Overwrite over whatever came in between.
        return lance.LanceDataset.commit(base, transaction, storage_options=storage.lance, max_retries=0)


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
    if not has_own_columns(table):
        operation: lance.LanceOperation.BaseOperation = lance.LanceOperation.Append(list(fragments))
        dataset = _commit(table, operation, table.version, table.storage, run_id)
        return update_meta(table.at(dataset), meta)
    # Append cannot change metadata. In a Merge, new fragments get ids that no fragment had before, so no index covers
    # them, and any other commit is a conflict.
    return merge_fragments(table, meta, [*(each.metadata for each in dataset.get_fragments()), *fragments], run_id)


def merge_fragments(
    table: Table, meta: TableMeta, fragments: Sequence["lance.FragmentMetadata"], run_id: str | None = None
) -> Table:
    """Replace the fragments and the metadata of a table in one commit.

    Raises TableError if the table changed meanwhile.
    """
    import lance

    operation = lance.LanceOperation.Merge(list(fragments), _lance_schema(table, meta))
    return table.at(_commit(table, operation, table.version, table.storage, run_id), meta)


def _lance_schema(table: Table, meta: TableMeta) -> "LanceSchema":
    """Return the table's schema with new metadata, for a commit; other metadata stays."""
    from lance.schema import LanceSchema

    schema = table.dataset().schema
    schema = schema.set(schema.get_field_index("vector"), vector_field(meta.geometry.vector_dim))
    return LanceSchema.from_pyarrow(schema.with_metadata((schema.metadata or {}) | {METADATA_KEY: meta.to_json()}))


def has_own_columns(table: Table) -> bool:
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
    return table.at(_commit(table, operation, table.version, table.storage), meta)


def tag_indexed(table: Table) -> None:
    """Tag this version as one with a complete index: clean-up keeps it, and `open_table(indexed=True)` finds it."""
    tags, name = table.dataset().tags, f"{INDEXED}{table.version}"
    if name not in tags.list():
        tags.create(name, table.version)
