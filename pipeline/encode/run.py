"""Run an encode job from its lock to its report.

Rerunning the same command resumes where it was stopped, shard by shard; on a finished table it does nothing.
"""

import contextlib
import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam

from index.table.codec import to_json_dict
from index.table.lock import hold_lock
from index.table.table import Table, log_of, runs_folder, table_uri
from pipeline.beam.engine import check_engine
from pipeline.beam.runner import run_beam
from pipeline.config import EncodeConfig, RuntimeConfig
from pipeline.encode.checkpoints import SampleCounts
from pipeline.encode.graph import EncodeToFragments
from pipeline.encode.job import SHOWN_SHARDS, EncodeJob
from pipeline.encode.monitor import monitor
from pipeline.encode.plan import check_source, check_target, expected_samples, plan_run
from pipeline.encode.publish import publish_run, read_outcome, record_run, remove_unused_files
from pipeline.encode.resume import RemainingWork, State, begin, remaining_work
from pipeline.sources.hub import commits_of
from pipeline.sources.listing import passed_over

REPORTED_PACKAGES = ("apache-beam", "torch", "diffusers", "transformers", "pylance", "pyarrow")


@dataclass(frozen=True, eq=False, slots=True)
class EncodeResult:
    """The table that a run wrote, and its report."""

    table: Table | None
    """None after a dry run."""
    report: dict[str, Any]
    """Of the run, or of the plan after a dry run."""
    already_complete: bool = False
    """Whether the table held all rows before, so that nothing was encoded."""


def encode_dataset(
    config: EncodeConfig,
    runtime: RuntimeConfig,
    table: str,
    *,
    dry_run: bool = False,
    sources: Sequence[str] = (),
) -> EncodeResult:
    """Encode all shards and publish the table; resumes an unfinished run of the same config.

    With `append`, add the samples that the table does not have. A dry run checks sources, encoders, device, target and
    free space, encodes a few samples, and writes nothing. The report counts the files of the `sources` that are passed
    over.

    Raises a CoalescerError if something that the user can fix is wrong, before the work starts wherever possible, and
    TableError if the engine has ended and the table does not hold all rows: what is encoded is kept.
    """
    uri = table_uri(table)
    check_engine(runtime)
    bytes_free = check_target(uri, runtime.storage)
    job = EncodeJob.create(config, runtime, uri)
    with contextlib.nullcontext() if dry_run else hold_lock(runs_folder(uri), runtime.storage):
        work = remaining_work(job, sources)
        if work.state == State.COMPLETE:
            return _nothing_to_do(work, dry_run=dry_run)
        if work.state == State.PUBLISHED:
            return EncodeResult(*_finish(work, None), already_complete=True)
        if work.job.base is None:
            check_source(work.job.config.shards, job.read_options)
        if dry_run:
            report = plan_run(work.job, bytes_free)
            return EncodeResult(None, report | {"passed_over": passed_over(sources, job.read_options)})
        work.passed_over = passed_over(sources, job.read_options)
        begin(work)
        start = time.monotonic()
        _run_graph(work.job)
        return EncodeResult(*_finish(work, time.monotonic() - start))


def _nothing_to_do(work: RemainingWork, *, dry_run: bool) -> EncodeResult:
    """Return the last report of the table, or that an append has found nothing new."""
    job = work.job
    if dry_run:
        return EncodeResult(None, {"already_complete": True}, already_complete=True)
    table = job.open_table()
    if not job.config.append:
        report = table.report("encode") or {}
        report["warnings"] = [*report.get("warnings", ()), *work.warnings]
        return EncodeResult(table, report, already_complete=True)
    return EncodeResult(table, _report(work, SampleCounts(), None), already_complete=True)


def _run_graph(job: EncodeJob) -> None:
    job.checkpoints.forget_attempt()
    run_beam(
        lambda pipeline: (
            pipeline
            | "Shards" >> beam.Create(list(job.config.shards))
            | "Encode to fragments" >> EncodeToFragments(job)
        ),
        job.runtime,
        job.uri,
        monitor=monitor(job, expected_samples(job), log_of(job.uri, "encode")),
        memory_advice="fewer --num-workers or a smaller --batch-size",
    )


def _finish(work: RemainingWork, seconds: float | None) -> tuple[Table, dict[str, Any]]:
    """Publish the run, read it back, write its report and delete its checkpoints.

    `seconds` is None if the run was stopped between its commit and its report, so that only the rest is done.
    """
    job = work.job
    outcome = read_outcome(job, is_published=seconds is None)
    with hold_lock(job.uri, job.runtime.storage, "encode") as lock:
        if seconds is None:
            table = record_run(job, outcome, work.recorded)
        else:
            table = publish_run(job, outcome, work.recorded, lock)
            if job.base is None:
                remove_unused_files(table)
    if outcome.uncounted_shards:
        work.warnings.append(
            f"checkpoints of {len(outcome.uncounted_shards):,} shards are gone, so this report does not count them: "
            "the table holds all rows of the run; run again with --append to read these shards again"
        )
    report = _report(work, outcome.counts, seconds)
    table.write_report("encode", report | {"table": job.uri, "settings": work.settings})
    job.checkpoints.remove()
    return table, table.report("encode")


def _warnings(work: RemainingWork, counts: SampleCounts) -> list[str]:
    warnings = list(work.warnings)
    if counts.unread:
        warnings.append(
            f"{len(counts.unread):,} shards could not be read and are not in the table: "
            f"{', '.join(list(counts.unread)[:SHOWN_SHARDS])}: rerun the same command, or --append, to fetch them"
        )
    if not counts.truncated_captions:
        return warnings
    return [
        *warnings,
        f"{counts.truncated_captions:,} of {counts.rows:,} captions have more than the {work.job.max_tokens} tokens "
        "that the text encoder reads, and were truncated: use shorter captions, or another --text-encoder",
    ]


def _report(work: RemainingWork, counts: SampleCounts, seconds: float | None) -> dict[str, Any]:
    job = work.job
    return {
        "samples": counts.samples,
        "rows": counts.rows,
        "rejected": counts.rejects.total(),
        "rejects_by_reason": dict(counts.rejects),
        "filtered": counts.filtered.total(),
        "filtered_by_reason": dict(counts.filtered),
        "already_present": counts.already_present,
        "uncounted_shards": counts.uncounted,
        "unused_captions": counts.unused_captions,
        "truncated_captions": counts.truncated_captions,
        "success_rate": round(1 - counts.reject_rate, 4),
        "passed_over": work.passed_over,
        "shards": counts.shards,
        "shards_already_present": work.shards_already_present,
        "unread_shards": list(counts.unread),
        "seconds": seconds and round(seconds, 2),
        "images_per_second": seconds and round(counts.rows / seconds, 1),
        "seconds_by_step": {name: round(value, 2) for name, value in counts.seconds.items()},
        "image_encoder": to_json_dict(job.image_ref),
        "text_encoder": to_json_dict(job.text_ref),
        "latent_shape": list(job.latent_shape),
        "text_dim": job.text_dim,
        "warnings": _warnings(work, counts),
        "run_id": job.run_id,
        "num_workers": job.runtime.num_workers,
        "hub_commits": commits_of(job.config.shards),
        "device": job.runtime.device,
        "beam_options": list(job.runtime.beam_options),
        "versions": {name: importlib.metadata.version(name) for name in REPORTED_PACKAGES},
    }
