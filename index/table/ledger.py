"""The ledger of a table, DB/NAME_shards.lance: one row for each shard that an encode run has read.

It tells `pipeline encode --append` which shards need not be read again. A shard is known by its identity, that is, by
what it holds. Rows of the ledger count only if the table names their run, so that a ledger that was left behind by a
deleted table, or that is newer than a restored one, hides no shard. Which rows a table has is decided by row ids in any
case: a ledger that lacks rows costs time, not data.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from index.table.table import Table, is_table, open_newest, rejects_uri

BATCH_ROWS = 8192

LEDGER = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("identity", pa.string()),  # of its content; empty if unknown
        pa.field("options", pa.string()),  # digest of the options that decide which of its samples become rows
        pa.field("run_id", pa.string()),
        pa.field("samples", pa.int64()),  # read: the sum of the next four
        pa.field("rows", pa.int64()),
        pa.field("rejected", pa.int64()),
        pa.field("filtered", pa.int64()),
        pa.field("already_present", pa.int64()),  # the table had them before the run
        pa.field("complete", pa.bool_()),  # read to its end: not cut short by --limit, not damaged
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """What became of one shard in one run: a row of the ledger."""

    shard: str
    identity: str = ""
    options: str = ""
    run_id: str = ""
    samples: int = 0
    rows: int = 0
    rejected: int = 0
    filtered: int = 0
    already_present: int = 0
    complete: bool = False


class Entries:
    """Entries in the order in which they were added, as columns of the ledger: objects take twice the memory."""

    def __init__(self, entries: Iterable[LedgerEntry] = ()) -> None:
        self._batches, self._added = list[pa.RecordBatch](), list[LedgerEntry]()
        for entry in entries:
            self.add(entry)

    def add(self, entry: LedgerEntry) -> None:
        """Add an entry at the end."""
        self._added.append(entry)
        if len(self._added) == BATCH_ROWS:
            self._batches, self._added = self.batches(), []

    def batches(self) -> list[pa.RecordBatch]:
        """Return all entries as rows of the ledger."""
        columns = {name: [getattr(entry, name) for entry in self._added] for name in LEDGER.names}
        return [*self._batches, *([pa.RecordBatch.from_pydict(columns, schema=LEDGER)] if self._added else [])]

    def __iter__(self) -> Iterator[LedgerEntry]:
        """Yield the entries one after the other."""
        for batch in self._batches:
            yield from (LedgerEntry(**row) for row in batch.to_pylist())
        yield from self._added


def ledger_uri(uri: str) -> str:
    """Return the URI of a table's ledger: DB/NAME_shards.lance."""
    return uri.removesuffix(".lance") + "_shards.lance"


def read_ledger(table: Table) -> list[LedgerEntry]:
    """Return the entries of the runs that the table names, oldest first; none if it has no ledger."""
    dataset = open_newest(ledger_uri(table.uri), table.storage)
    if dataset is None:
        return []
    batches = dataset.to_batches(columns=LEDGER.names, batch_size=BATCH_ROWS)
    rows = (row for batch in batches for row in batch.to_pylist())
    # Most entries share these texts, which are otherwise held once for each.
    entries = (LedgerEntry(**row | {name: sys.intern(row[name]) for name in ("options", "run_id")}) for row in rows)
    return [entry for entry in entries if entry.run_id in table.meta.run_ids]


def unread_shards(entries: Sequence[LedgerEntry]) -> list[str]:
    """Return the shards of which no run has read anything, because they were out of reach."""
    latest = {entry.shard: entry for entry in entries}
    return [entry.shard for entry in latest.values() if not (entry.complete or entry.samples)]


def rebuild_ledger(table: Table) -> list[LedgerEntry]:
    """Return entries for the shards of which a table holds rows or rejects, counted from these.

    Their identities are unknown and they may have been cut short: they are read again by the next append.
    """
    rejects = open_newest(rejects_uri(table.uri), table.storage)
    rows, rejected = Counter[str](), Counter[str]()
    for counts, batches in (
        (rows, table.scan(["shard"])),
        (rejected, [] if rejects is None else rejects.to_batches(columns=["shard"])),
    ):
        for batch in batches:
            for count in batch["shard"].value_counts().to_pylist():
                counts[count["values"]] += count["counts"]
    run_id = next(iter(table.meta.run_ids), "")
    return [
        LedgerEntry(
            shard=shard,
            run_id=run_id,
            samples=rows[shard] + rejected[shard],
            rows=rows[shard],
            rejected=rejected[shard],
        )
        for shard in sorted(rows | rejected)
    ]


def add_entries(table: Table, entries: Entries, present: Sequence[LedgerEntry]) -> None:
    """Add the entries of a run in one commit to those that are `present`; nothing is done if these are of that run.

    The ledger of another table that had the same name is replaced.
    """
    import lance

    rows = pa.Table.from_batches(entries.batches(), schema=LEDGER)
    runs = set(rows["run_id"].unique().to_pylist())
    if not len(rows) or runs <= {entry.run_id for entry in present}:
        return
    uri, storage = ledger_uri(table.uri), table.storage
    mode = "append" if present else "overwrite" if is_table(uri, storage) else "create"
    lance.write_dataset(rows, uri, mode=mode, storage_options=storage.lance)


def ledger_summary(table: Table) -> dict[str, Any]:
    """Return how many shards a table was encoded from, and which were not read to their end; None without a ledger."""
    latest = {entry.shard: entry for entry in read_ledger(table)}
    incomplete = [entry.shard for entry in latest.values() if not entry.complete]
    return {"shards": len(latest) or None, "incomplete_shards": incomplete if latest else None}
