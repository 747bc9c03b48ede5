"""What is left of an encode run to do: its plan, if it is unfinished, next to the table and the table's ledger.

The plan of a run is written before its first checkpoint. It names the run, which has a part of its name that no other
run has, so that what a run of the same settings has left behind is never taken for its own.
"""

import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from index.errors import TableError
from index.table.ledger import LedgerEntry, read_ledger, rebuild_ledger, unread_shards
from index.table.storage import Storage
from index.table.table import Table, is_table, runs_folder
from pipeline.encode.checkpoints import PLAN, Checkpoints
from pipeline.encode.job import EncodeJob, run_identity
from pipeline.encode.ledger import changed_shards, shard_identities, shards_to_read, source_of
from pipeline.encode.measured import to_json
from pipeline.encode.options import changed_options, check_appendable
from pipeline.encode.parts import read_plans
from pipeline.encode.plan import samples_within_limit
from pipeline.encode.present import can_hash_images
from pipeline.sources.hub import SCHEME, commits_of, without_commit

RUN_FOLDER = re.compile("[0-9a-f]{16}-[0-9a-f]{8}")


class State(Enum):
    """How far a run is."""

    TO_ENCODE = "to encode"
    PUBLISHED = "published"
    """The table has the rows; report and ledger may be missing."""
    COMPLETE = "complete"
    """There is nothing to do."""


@dataclass(slots=True)
class RemainingWork:
    """A job with the shards that are left, and what the table's ledger says of the others."""

    job: EncodeJob
    state: State
    settings: dict[str, Any]
    """Of the run as it was planned."""
    recorded: list[LedgerEntry] = field(default_factory=list)
    """Entries for a table that has no ledger yet."""
    plan: dict[str, Any] = field(default_factory=dict)
    """What is written before the work starts, so that it can be resumed."""
    is_new: bool = True
    """Whether it has just been planned."""
    shards_already_present: int = 0
    passed_over: dict[str, int] = field(default_factory=dict)
    """Files of the sources that are not read, by extension."""
    warnings: list[str] = field(default_factory=list)


def remaining_work(job: EncodeJob, sources: Sequence[str] = ()) -> RemainingWork:
    """Find an unfinished run, or plan a new one. `sources` are the names that the shards were listed from, if known.

    Raises TableError if the table or an unfinished run has other options.
    """
    table = job.open_table() if is_table(job.uri, job.runtime.storage) else None
    plan = _find_plan(job, table)
    if plan is not None:
        return _resumed(job, plan, table, _on_hub(sources))
    if table is None:
        work = _planned(job, None)
    elif not job.config.append:
        return _complete(job, table)
    else:
        work = _planned(_appending(job, table), table)
    work.plan["hub_sources"] = _on_hub(sources)
    return work


def begin(work: RemainingWork) -> None:
    """Write the plan of a run, and delete what others have left, which cannot be resumed."""
    storage, root = work.job.runtime.storage, runs_folder(work.job.uri)
    for name in storage.names(root):
        if RUN_FOLDER.fullmatch(name) and name != work.job.run_id:
            storage.remove(f"{root}/{name}")
    if work.plan:
        work.job.checkpoints.write(PLAN, work.plan)


def _planned(job: EncodeJob, table: Table | None) -> RemainingWork:
    """Return the work of a new run, with the shards that the table's ledger does not have."""
    config, settings, digest = job.config, job.settings, job.settings_digest
    work = RemainingWork(job, State.TO_ENCODE, settings)
    if table is not None:
        identities = shard_identities(config.shards, job.read_options)
        entries = read_ledger(table)
        shards = shards_to_read(config.shards, identities, entries, job.sample_options)
        work.recorded = [] if entries else rebuild_ledger(table)
        work.shards_already_present = len(config.shards) - len(shards)
        named = {without_commit(entry.shard) for entry in entries}
        changed = changed_shards(config.shards, identities, entries)
        changed = [shard for shard in changed if shard.startswith(SCHEME) and without_commit(shard) in named]
        if changed:
            work.warnings.append(
                f"{len(changed):,} files of the hub have changed since they were encoded, such as {changed[0]}: "
                "samples that are new are added, and rows that the file no longer holds stay in the table"
            )
        if not shards:
            return replace(work, state=State.COMPLETE)
        job = replace(job, config=replace(config, shards=tuple(shards)))
    if config.limit is not None:
        samples = samples_within_limit(job.config.shards, config.limit, job.read_options)
        job.samples_per_shard = {shard: count for shard, count in samples.items() if count}
        if job.samples_per_shard:  # an empty source is refused later
            job = replace(job, config=replace(job.config, shards=tuple(job.samples_per_shard)))
    part = job.runtime.part
    job = replace(job, num_parts=None if part is None else part.count)
    work.job = job = job.named(f"{digest}-{uuid.uuid4().hex[:8]}")
    work.plan = {
        "run_id": job.run_id,
        "settings": run_identity(settings),
        "shards": list(job.config.shards),
        "samples_per_shard": job.samples_per_shard,
        "base_run_ids": None if table is None else list(table.meta.run_ids),
        "encoders": to_json(job.encoders),
        "num_parts": job.num_parts,
    }
    return work


def _on_hub(sources: Sequence[str]) -> list[str]:
    return [source for source in sources if source.startswith(SCHEME)]


def _resumed(job: EncodeJob, plan: dict[str, Any], table: Table | None, hub_sources: list[str]) -> RemainingWork:
    """Return the work of an unfinished run, with the shards of its plan. Raises TableError if its options differ.

    A dataset of the hub may hold anything by now: the run goes on at its own commit if the same sources are named.
    """
    given = run_identity(job.settings)
    stored = plan["settings"]
    if stored["dtype"] == "auto" and given["dtype"] == job.named(plan["run_id"]).chosen_dtype():
        given["dtype"] = "auto"
    is_same_on_hub = bool(hub_sources) and hub_sources == plan.get("hub_sources")
    stays = [shard for shard in stored["shards"] if not (is_same_on_hub and shard.startswith(SCHEME))]
    has_grown = _has_grown(stays, given["shards"])
    if changes := changed_options(stored, given | ({"shards": stored["shards"]} if has_grown else {})):
        raise TableError(
            f"{runs_folder(job.uri)} holds an unfinished run with other options ({changes}): "
            "rerun with the original options to resume, or delete the folder to start over"
        )
    _check_part(job, plan)
    listed = job.config.shards
    published = table is not None and plan["run_id"] in table.meta.run_ids
    if table is not None and not published:
        if plan["base_run_ids"] is None:
            return _complete(job, table)
        job = _appending(job, table)
    job = job.named(plan["run_id"])
    job = replace(
        job,
        config=replace(job.config, shards=tuple(plan["shards"])),
        samples_per_shard=plan["samples_per_shard"],
        num_parts=plan.get("num_parts"),
    )
    work = RemainingWork(
        job, State.PUBLISHED if published else State.TO_ENCODE, job.settings | {"shards": stored["shards"]}
    )
    work.plan = plan if job.num_parts else {}  # of parts it is beside the run's folder
    work.is_new = False
    newest, own = commits_of(listed), commits_of(plan["shards"])
    moved = [f"{name} at commit {commit}" for name, commit in own.items() if newest.get(name) != commit]
    if moved or stored["shards"] != given["shards"]:
        work.warnings.append(
            f"resumed an unfinished run with the {len(stored['shards']):,} shards of its start"
            f"{''.join(f', {each}' for each in moved)}; the source has changed since: run again with --append to add "
            "what is new"
        )
    if table is not None and not published:
        work.recorded = [] if read_ledger(table) else rebuild_ledger(table)
    return work


def _complete(job: EncodeJob, table: Table) -> RemainingWork:
    """Return that the table is finished, or the shards that it was published without.

    Raises TableError if it is one of another run.
    """
    if not job.settings_digests & {run_id.partition("-")[0] for run_id in table.meta.run_ids}:
        report = table.report("encode")
        changes = changed_options(report["settings"], job.settings) if report else ""
        other = f" and was encoded with other options ({changes})" if report else ""
        raise TableError(f"{job.uri} exists{other}: name another --table, add --append, or delete it")
    unread = set(unread_shards(read_ledger(table))) & set(job.config.shards)
    if unread and job.config.limit is None:
        shards = tuple(shard for shard in job.config.shards if shard in unread)
        rest = _appending(replace(job, config=replace(job.config, shards=shards)), table)
        work = _planned(rest, table)
        work.shards_already_present = len(job.config.shards) - len(shards)
        return work
    work = RemainingWork(job, State.COMPLETE, job.settings)
    identities = shard_identities(job.config.shards, job.read_options)
    entries = read_ledger(table)
    changed = changed_shards(job.config.shards, identities, entries)
    if entries and changed and job.config.limit is None:
        work.warnings.append(
            f"{len(changed):,} of {len(identities):,} shards have changed since they were encoded, such as "
            f"{changed[0]}: run again with --append to add what is new"
        )
    return work


def _appending(job: EncodeJob, table: Table) -> EncodeJob:
    """Return the job for adding to a table. Raises TableError if its options do not fit."""
    check_appendable(job, table)
    names = table.dataset().schema.names
    return replace(job, base=table.meta, has_image_hash="image_hash" in names, can_hash_images=can_hash_images(table))


def find_plans(uri: str, storage: Storage) -> Iterator[dict[str, Any]]:
    """Yield the plans of a table's unfinished runs, those in parts first."""
    root = runs_folder(uri)
    names = storage.names(root)
    if PLAN in names:
        raise TableError(
            f"{root} holds an unfinished run of an earlier version of the software: delete the folder to start over"
        )
    yield from read_plans(uri, storage)
    for name in filter(RUN_FOLDER.fullmatch, names):
        plan = Checkpoints(f"{root}/{name}", storage).read(PLAN)
        if isinstance(plan, dict) and plan.get("run_id") == name:
            yield plan


def _find_plan(job: EncodeJob, table: Table | None) -> dict[str, Any] | None:
    """Return the plan of the table's unfinished run, None if there is none that can still be finished."""
    plans = find_plans(job.uri, job.runtime.storage)
    return next((plan for plan in plans if not _is_outdated(job, plan, table)), None)


def _check_part(job: EncodeJob, plan: dict[str, Any]) -> None:
    """Raise TableError if an unfinished run has other parts than the one that was typed."""
    part, count = job.runtime.part, plan.get("num_parts")
    if part is None or part.count == count:
        return
    if count is None:
        raise TableError(
            f"{runs_folder(job.uri)} holds an unfinished run without parts: rerun without --part to resume it, or "
            "delete the folder to start over"
        )
    raise TableError(
        f"--part {part}: this run has {count} parts, not {part.count}: use --part I/{count}, or delete "
        f"{runs_folder(job.uri)} to start over"
    )


def _is_outdated(job: EncodeJob, plan: dict[str, Any], table: Table | None) -> bool:
    """Return whether the table that an unfinished append was to be added to has been deleted or replaced since."""
    base: list[str] | None = plan["base_run_ids"]
    run_ids = [] if table is None else list(table.meta.run_ids)
    if plan["run_id"] in run_ids:
        return False
    if base is None:
        return job.config.append and table is not None
    return run_ids != base


def _has_grown(stored: Sequence[str], given: Sequence[str]) -> bool:
    """Return whether all sources of the stored shards are still given, and have no fewer samples."""
    stops = dict[str, int]()
    for shard in given:
        source, stop = source_of(shard)
        stops[source] = max(stop, stops.get(source, 0))
    return all(stops.get(source, -1) >= stop for source, stop in map(source_of, stored))
