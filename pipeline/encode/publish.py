"""Publish what an encode run has written, and read it back: a run is done once the table holds its rows.

The engine is not asked: the fragments and the counts come from the files of the run. Rejects are committed before the
rows, so that a visible table has its rejects, and the ledger after them, so that it names no rows that are not there.
Each commit is recognized by the run's id, so a run that was stopped between two of them finishes when it is rerun.
"""

import uuid
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from index.background import look_up
from index.errors import TableError
from index.table.commit import RECENT_COMMITS, append_rows, commit_fragments, publish, update_meta
from index.table.ledger import Entries, LedgerEntry, add_entries, read_ledger, rebuild_ledger
from index.table.lock import Lock
from index.table.schema import REJECTS, TableMeta
from index.table.storage import unwritable
from index.table.table import Table, is_table, rejects_uri
from pipeline.beam.write_lance import fragment_from_dict
from pipeline.encode.checkpoints import META, SampleCounts, ShardCheckpoint, not_finished
from pipeline.encode.graph import ShardFragments
from pipeline.encode.job import EncodeJob

RECORDS_AT_ONCE = 128
"""Records of vectors that are held at a time: parsed, one takes several kilobytes."""


@dataclass(slots=True)
class RunOutcome:
    """What the checkpoints of a finished run promise."""

    counts: SampleCounts = field(default_factory=SampleCounts)
    entries: Entries = field(default_factory=Entries)
    """Of the ledger, one per shard."""
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Data files without search vectors, by shard; shards without rows have none."""
    reject_fragments: list[dict[str, Any]] = field(default_factory=list)
    uncounted_shards: list[str] = field(default_factory=list)
    """Of a published run: shards whose checkpoints are gone."""


def read_outcome(job: EncodeJob, *, is_published: bool = False) -> RunOutcome:
    """Add up the checkpoints of a run; raises TableError if a shard has none and the run is not published yet."""
    outcome, counted = RunOutcome(), set[str]()
    # Of a hundred thousand shards, so that names are not held twice.
    shards = {shard: shard for shard in job.config.shards}
    options = job.sample_options  # it looks through the names of all shards
    for checkpoint in job.checkpoints.load_all(job.config.shards, moments=False):
        checkpoint.check()
        shard = shards[checkpoint.shard]
        counted.add(shard)
        outcome.counts.add(checkpoint)
        outcome.entries.add(_entry(checkpoint, job.run_id, options))
        outcome.reject_fragments += checkpoint.reject_fragments
        if checkpoint.fragments:
            outcome.files[shard] = tuple(file["path"] for each in checkpoint.fragments for file in each["files"])
    if outcome.counts.shards != len(shards) and not is_published:
        raise not_finished(job.uri, outcome.counts.shards, len(shards))
    outcome.uncounted_shards = [shard for shard in shards if shard not in counted]
    return outcome


def publish_run(job: EncodeJob, outcome: RunOutcome, recorded: list[LedgerEntry], lock: Lock) -> Table:
    """Commit the rejects, rows and ledger of a run, check that they are there, and return the table.

    `recorded` are entries for a table that has no ledger yet. Raises TableError if the engine has lost a part, if the
    table was given another geometry while the run was encoding, or if the lock of the table was lost.
    """
    meta, fragments = _read_fragments(job, outcome)
    rejects = [fragment_from_dict(content) for content in outcome.reject_fragments]
    storage, run_id, append = job.runtime.storage, job.run_id, job.base is not None
    if append and not (fragments or rejects or _tells_more(job, outcome.entries)):
        return job.open_table()
    try:
        lock.check()
        _commit_rejects(job, rejects)
        lock.check()
        if not append:
            publish(job.uri, job.schema, meta, fragments, run_id, storage)
        else:
            table = _check_unchanged(job)
            # Another command may have changed the rest of the metadata meanwhile.
            meta = replace(table.meta, moments=meta.moments, run_ids=(*table.meta.run_ids, run_id))
            if fragments:
                append_rows(table, meta, fragments, run_id)
            else:
                update_meta(table, meta)
        del fragments, rejects  # of many shards they are large, and so is what comes
        return record_run(job, outcome, recorded)
    except OSError as error:
        raise unwritable(job.uri, error) from error


def record_run(job: EncodeJob, outcome: RunOutcome, recorded: list[LedgerEntry]) -> Table:
    """Read a published run back, write its ledger, and return the table.

    Raises TableError if the newest version does not hold the run, or not as many rows as its checkpoints promise.
    """
    if not is_table(job.uri, job.runtime.storage):
        raise not_finished(job.uri, outcome.counts.shards, len(job.config.shards))
    table = job.open_table()
    if job.run_id not in table.meta.run_ids:
        raise not_finished(job.uri, outcome.counts.shards, len(job.config.shards))
    rows = rows_of_run(table, job.run_id)  # a run without rows has no commit of rows
    counted, is_whole = outcome.counts.rows, not outcome.uncounted_shards
    if rows is not None and (rows < counted or (is_whole and rows != counted)):
        raise TableError(
            f"{job.uri} holds {rows:,} rows of this run and {outcome.counts.rows:,} were encoded: restore version "
            f"{table.version - 1} of the table, or delete it, and rerun the same command"
        )
    uncounted = _entries_from_rows(job, table, outcome.uncounted_shards)
    present = read_ledger(table)
    entries = outcome.entries
    if uncounted or (recorded and not present):
        entries = Entries([*([] if present else recorded), *outcome.entries, *uncounted])
    add_entries(table, entries, present)
    return table


def rows_of_run(table: Table, run_id: str) -> int | None:
    """Return how many rows the commit of a run added; None if it is not recent, or the version before was removed."""
    import lance

    for age, transaction in enumerate(table.dataset().get_transactions(RECENT_COMMITS)):
        if transaction and (transaction.transaction_properties or {}).get("run_id") == run_id:
            version = table.version - age
            is_new = version == 1 or isinstance(transaction.operation, lance.LanceOperation.Overwrite)
            try:
                before = 0 if is_new else table.at(version - 1).dataset().count_rows()
                return int(table.at(version).dataset().count_rows() - before)
            except ValueError:
                return None
    return None


def remove_unused_files(table: Table) -> None:
    """Delete what killed workers have left in a table that one run has just created."""
    if table.version == 1:
        table.dataset().cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)


def _read_fragments(job: EncodeJob, outcome: RunOutcome) -> tuple[TableMeta, list[Any]]:
    """Return the metadata and the fragments with search vectors; raises TableError if they are not all there."""
    unfinished = not_finished(job.uri, outcome.counts.shards, len(job.config.shards))
    planned = job.checkpoints.read(META)
    if planned is None:
        raise unfinished
    records, digest, shards = ShardFragments(job), planned["layout"], sorted(outcome.files)
    found = look_up(lambda shard: records.read_record(shard, digest) or [], shards, at_once=RECORDS_AT_ONCE)
    files, fragments, rows = set(job.runtime.storage.names(f"{job.uri}/data")), list[Any](), 0
    for shard, contents in zip(shards, found, strict=True):
        written = {file["path"] for content in contents for file in content["files"]}
        if not set(outcome.files[shard]) <= written <= files:
            raise unfinished
        rows += sum(content["physical_rows"] for content in contents)
        fragments += map(fragment_from_dict, contents)
    if rows != outcome.counts.rows:
        raise unfinished
    outcome.files.clear()
    return TableMeta.from_json(planned["meta"]), fragments


def _commit_rejects(job: EncodeJob, rejects: list[Any]) -> None:
    """Add the rejects of an append once, or replace all rejects by those of a new table, which may be empty."""
    uri, storage, append = rejects_uri(job.uri), job.runtime.storage, job.base is not None
    if append and not rejects and is_table(uri, storage):
        return
    # Rejects that a deleted table of the same name has left may be of this run, and are replaced as well.
    run_id = job.run_id if append else f"{job.run_id}-{uuid.uuid4().hex[:8]}"
    commit_fragments(uri, REJECTS, rejects, run_id=run_id, mode="append" if append else "overwrite", storage=storage)


def _check_unchanged(job: EncodeJob) -> Table:
    """Return the newest version of the table. Raises TableError if its vectors are no longer those of the run."""
    table, base = job.open_table(), job.base
    assert base is not None
    # A balance that has come or gone matters, too: new rows got the neutral one of the base.
    is_same = table.meta.geometry.same_as(base.geometry) and table.meta.balanced == base.balanced
    if not is_same or table.meta.run_ids != base.run_ids:
        raise TableError(f"{job.uri} changed while it was appended to: rerun the same command to finish")
    return table


def _tells_more(job: EncodeJob, entries: Entries) -> bool:
    """Return whether the ledger does not say already what a run without rows and rejects has found."""

    def finding(entry: LedgerEntry) -> tuple[str, str, str, bool]:
        return entry.shard, entry.identity, entry.options, entry.complete

    return not {finding(entry) for entry in entries} <= {finding(entry) for entry in read_ledger(job.open_table())}


def _entries_from_rows(job: EncodeJob, table: Table, shards: list[str]) -> list[LedgerEntry]:
    """Return entries for shards without checkpoints, which are not complete, so that an append reads them again."""
    entries = {entry.shard: entry for entry in rebuild_ledger(table)} if shards else {}
    found = (entries.get(shard, LedgerEntry(shard=shard)) for shard in shards)
    return [replace(entry, run_id=job.run_id) for entry in found]


def _entry(checkpoint: ShardCheckpoint, run_id: str, options: str) -> LedgerEntry:
    return LedgerEntry(
        shard=checkpoint.shard,
        identity=checkpoint.identity,
        options=options,
        run_id=run_id,
        samples=checkpoint.samples,
        rows=checkpoint.rows,
        rejected=checkpoint.rejected,
        filtered=checkpoint.filtered,
        already_present=checkpoint.already_present,
        complete=checkpoint.complete,
    )
