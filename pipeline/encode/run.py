"""Run an encode job from its lock to its report.

Rerunning the same command resumes where it was stopped, shard by shard; on a finished table it does nothing.
"""

import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam

from index.table.codec import to_json_dict
from index.table.lock import hold_lock
from index.table.storage import Storage
from index.table.table import Table, log_of, reports_of, runs_folder, table_uri
from pipeline.beam.runner import run_beam
from pipeline.beam.workers import Place, check_runtime
from pipeline.config import EncodeConfig, Part, RuntimeConfig
from pipeline.encode.checkpoints import SampleCounts
from pipeline.encode.graph import EncodeToFragments, WriteShards
from pipeline.encode.job import SHOWN_SHARDS, EncodeJob
from pipeline.encode.measured import MeasuredEncoders, free_encoders, measure, to_json
from pipeline.encode.monitor import monitor
from pipeline.encode.parts import agree_on_plan, check_divisible, check_parts, hold_part, remove_parts
from pipeline.encode.plan import check_source, check_target, expected_samples, plan_run
from pipeline.encode.publish import publish_run, read_outcome, record_run, remove_unused_files
from pipeline.encode.resume import RemainingWork, State, begin, find_plans, remaining_work
from pipeline.encoders.devices import default_dtype, threads_kept, worker_device
from pipeline.images import pillow_kept
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

    With `append`, add the samples that the table does not have. With a `part`, encode its shards and publish nothing.
    A dry run checks sources, encoders, device, target and free space, encodes a few samples, and writes nothing. The
    report counts the files of the `sources` that are passed over.

    Raises a CoalescerError if something that the user can fix is wrong, before the work starts wherever possible, and
    TableError if the engine has ended and the table does not hold all rows, or if parts of the run are not finished:
    what is encoded is kept.
    """
    uri, place = table_uri(table), check_runtime(runtime)
    bytes_free = check_target(uri, runtime.storage)
    if runtime.part is None:
        check_parts(uri, runtime)
    else:
        check_divisible(config, runtime.part)
    job = EncodeJob.create(config, runtime, uri, _measure(config, runtime, uri, place, dry_run=dry_run))
    if place != "process" and not dry_run:
        free_encoders()
    if dry_run:
        return _dry_run(job, sources, place, bytes_free)
    if runtime.part is not None:
        return _encode_part(job, runtime.part, sources)
    with hold_lock(runs_folder(uri), runtime.storage):
        check_parts(uri, runtime)  # one may have started meanwhile; the next will see the lock
        work = remaining_work(job, sources)
        if work.state == State.COMPLETE:
            return _nothing_to_do(work)
        if work.state == State.PUBLISHED:
            return EncodeResult(*_finish(work, None), already_complete=True)
        if work.job.base is None and not work.job.num_parts:
            check_source(work.job.config.shards, job.read_options)
        work.passed_over = passed_over(sources, job.read_options)
        begin(work)
        start = time.monotonic()
        _run_graph(work.job)
        return EncodeResult(*_finish(work, time.monotonic() - start))


def _measure(
    config: EncodeConfig, runtime: RuntimeConfig, uri: str, place: Place, *, dry_run: bool
) -> MeasuredEncoders:
    """Return what is known of the encoders, loaded only if no plan and no report of the table tells it."""
    device, dtype = _trial_precision(config, runtime, place)
    if place != "process" and not dry_run:  # models that are freed at once
        device, dtype = "cpu", "float32"
    return measure(config, device, dtype, _measured_before(uri, runtime.storage))


def _measured_before(uri: str, storage: Storage) -> Iterator[Any]:
    for plan in find_plans(uri, storage):
        yield plan.get("encoders")
    yield (storage.read_json(f"{reports_of(uri)}/encode.json") or {}).get("encoders")


def _trial_precision(config: EncodeConfig, runtime: RuntimeConfig, place: Place) -> tuple[str, str]:
    """Return the device and data type with which this process encodes, if it does."""
    device = "cpu" if place == "elsewhere" else worker_device(runtime.device, runtime.first_worker)
    return device, default_dtype(device) if config.dtype == "auto" else config.dtype


def _dry_run(job: EncodeJob, sources: Sequence[str], place: Place, bytes_free: int | None) -> EncodeResult:
    work = remaining_work(job, sources)
    if work.state in (State.COMPLETE, State.PUBLISHED):
        return EncodeResult(None, {"already_complete": True}, already_complete=True)
    if work.job.base is None:
        check_source(work.job.config.shards, job.read_options)
    job, part = work.job, job.runtime.part
    job = job if part is None else job.of_part(part)
    device, dtype = _trial_precision(job.config, job.runtime, place)
    trial = replace(
        job, config=replace(job.config, dtype=dtype), runtime=replace(job.runtime, device=device), num_parts=None
    )
    with pillow_kept(), threads_kept():
        report = plan_run(trial, bytes_free) if job.config.shards else {"table": job.uri, "shards": 0}
    return EncodeResult(None, report | {"passed_over": passed_over(sources, job.read_options)})


def _encode_part(job: EncodeJob, part: Part, sources: Sequence[str]) -> EncodeResult:
    """Encode the shards of a part, which other parts leave alone, and publish nothing."""
    storage = job.runtime.storage
    with hold_part(job.uri, part, storage):
        work = remaining_work(job, sources)
        if work.state == State.TO_ENCODE and work.is_new and work.job.base is None:
            check_source(work.job.config.shards, job.read_options)
        while work.state == State.TO_ENCODE and work.is_new:
            if agree_on_plan(job.uri, work.plan, storage)["run_id"] == work.job.run_id:
                break
            work = remaining_work(job, sources)
        if work.state != State.TO_ENCODE:
            return EncodeResult(None, {"part": str(part), "table": job.uri}, already_complete=True)
        shards = len(work.job.config.shards)
        work.job = own = work.job.of_part(part)
        work.passed_over = passed_over(sources, job.read_options)
        start = time.monotonic()
        own.checkpoints.forget_attempt(own.config.shards)
        if own.config.shards:  # there may be more parts than shards
            samples = expected_samples(own)
            of_all = samples and round(samples * shards / len(own.config.shards))
            name = f"encode-part-{part.number}-of-{part.count}"
            _run(own, name, "Write shards", WriteShards(own), samples, of_all)
        outcome = read_outcome(own)
        own.check_read(outcome.counts)
        report = _report(work, outcome.counts, time.monotonic() - start)
        return EncodeResult(None, {"part": str(part), "table": job.uri} | report)


def _nothing_to_do(work: RemainingWork) -> EncodeResult:
    """Return the last report of the table, or that an append has found nothing new."""
    job = work.job
    table = job.open_table()
    if not job.config.append:
        report = table.report("encode") or {}
        report["warnings"] = [*report.get("warnings", ()), *work.warnings]
        return EncodeResult(table, report, already_complete=True)
    return EncodeResult(table, _report(work, SampleCounts(), None), already_complete=True)


def _run_graph(job: EncodeJob) -> None:
    # What parts could not read, and were told to leave out, is their outcome.
    job.checkpoints.forget_attempt(() if job.num_parts else None)
    _run(job, "encode", "Encode to fragments", EncodeToFragments(job), expected_samples(job))


def _run(
    job: EncodeJob, log: str, step: str, transform: Any, samples: int | None, all_samples: int | None = None
) -> None:
    with pillow_kept(), threads_kept():  # workers may be threads of this process
        run_beam(
            lambda pipeline: pipeline | "Shards" >> beam.Create(list(job.config.shards)) | step >> transform,
            job.runtime,
            job.uri,
            monitor=monitor(job, samples, log_of(job.uri, log), all_samples=all_samples),
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
    kept = {"table": job.uri, "settings": work.settings, "encoders": to_json(job.encoders)}
    table.write_report("encode", report | kept)
    remove_parts(job.uri, job.runtime.storage)
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
        f"{counts.truncated_captions:,} of {counts.rows:,} captions have more than the "
        f"{work.job.encoders.max_tokens} tokens that the text encoder reads, and were truncated: use shorter captions, "
        "or another --text-encoder",
    ]


def _report(work: RemainingWork, counts: SampleCounts, seconds: float | None) -> dict[str, Any]:
    job = work.job
    publishes_parts = job.num_parts is not None and job.runtime.part is None
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
        "images_per_second": None if publishes_parts or not seconds else round(counts.rows / seconds, 1),
        "seconds_by_step": {name: round(value, 2) for name, value in counts.seconds.items()},
        "image_encoder": to_json_dict(job.image_ref),
        "text_encoder": to_json_dict(job.text_ref),
        "latent_shape": list(job.latent_shape),
        "text_dim": job.text_dim,
        "warnings": _warnings(work, counts),
        "run_id": job.run_id,
        "num_workers": job.runtime.num_workers,
        "hub_commits": commits_of(job.config.shards),
        "num_parts": job.num_parts,
        "device": ", ".join(sorted(counts.devices)) or job.runtime.device,
        "dtype": (job.config.dtype == "auto" and job.chosen_dtype()) or job.config.dtype,
        "beam_options": list(job.runtime.beam_options),
        "versions": {name: importlib.metadata.version(name) for name in REPORTED_PACKAGES},
    }
