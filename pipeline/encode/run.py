"""Run an encode job from its lock to its report.

Rerunning the same command resumes where it was stopped, shard by shard; on a finished table it does nothing.
"""

import contextlib
import importlib.metadata
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import apache_beam as beam

from index.errors import TableError
from index.table.codec import to_json_dict
from index.table.lock import hold_lock
from index.table.table import Table, is_table, log_of, shards_of, table_uri
from pipeline.beam.engine import check_engine
from pipeline.beam.runner import run_beam
from pipeline.config import EncodeConfig, RuntimeConfig
from pipeline.encode.checkpoints import PLAN, STOP, SampleCounts
from pipeline.encode.graph import EncodeToTable
from pipeline.encode.job import EncodeJob, run_identity
from pipeline.encode.monitor import monitor
from pipeline.encode.plan import check_source, check_target, expected_samples, plan_run, samples_within_limit

REPORTED_PACKAGES = ("apache-beam", "torch", "diffusers", "transformers", "pylance", "pyarrow")
SHOWN_CHARACTERS = 40
"""Of an option's value in an error message."""


@dataclass(frozen=True, eq=False, slots=True)
class EncodeResult:
    """The table that a run wrote, and its report."""

    table: Table | None
    """None after a dry run."""
    report: dict[str, Any]
    """Of the run, or of the plan after a dry run."""
    already_complete: bool = False
    """Whether the table held all rows before, so that nothing was encoded."""


def encode_dataset(config: EncodeConfig, runtime: RuntimeConfig, table: str, *, dry_run: bool = False) -> EncodeResult:
    """Encode all shards and publish the table; resumes an unfinished run of the same config.

    A dry run checks sources, encoders, device, target and free space, encodes a few samples, and writes nothing.

    Raises a CoalescerError if something that the user can fix is wrong, before the work starts wherever possible.
    """
    uri = table_uri(table)
    check_engine(runtime)
    bytes_free = check_target(uri, runtime.storage)
    job = EncodeJob.create(config, runtime, uri)
    settings = job.settings
    with contextlib.nullcontext() if dry_run else hold_lock(job.checkpoints.folder, runtime.storage):
        job, already_complete = _remaining_job(job)
        if not already_complete:
            if not dry_run:
                job.checkpoints.write(PLAN, {"settings": run_identity(settings), "shards": job.config.shards})
            check_source(job.config.shards, job.read_options)
            if config.limit is not None:
                job.samples_per_shard = samples_within_limit(job.config.shards, config.limit, job.read_options)
        if dry_run:
            report = {"already_complete": True} if already_complete else plan_run(job, bytes_free)
            return EncodeResult(None, report, already_complete)
        start = time.monotonic()
        if not already_complete:
            _run_graph(job)
        return _finish(job, settings, None if already_complete else time.monotonic() - start)


def _remaining_job(job: EncodeJob) -> tuple[EncodeJob, bool]:
    """Return the job with the shards that are left to encode, and whether the table already holds all of them.

    Raises TableError if the table or an unfinished run has other options.
    """
    planned = _planned_shards(job)
    if not is_table(job.uri, job.runtime.storage):
        return job, False
    table = job.open_table()
    if job.run_id in table.meta.run_ids:
        return job, True
    if not job.config.append:
        report = table.report("encode")
        other = f" and was encoded with other options ({_changes(report['settings'], job.settings)})" if report else ""
        raise TableError(f"{job.uri} exists{other}: name another --table, add --append, or delete it")
    _check_appendable(job, table)
    if planned is None:
        present = shards_of(table)
        planned = [shard for shard in job.config.shards if shard not in present]
    job = replace(job, config=replace(job.config, shards=tuple(planned)), base=table.meta)
    return job, not planned


def _planned_shards(job: EncodeJob) -> list[str] | None:
    """Return the shards of an unfinished run, None if there is none. Raises TableError if its options differ."""
    plan = job.checkpoints.read(PLAN)
    if plan is None:
        return None
    if changes := _changes(plan["settings"], run_identity(job.settings)):
        raise TableError(
            f"{job.checkpoints.folder} holds an unfinished run with other options ({changes}): "
            "rerun with the original options to resume, or delete the folder to start over"
        )
    shards: list[str] = plan["shards"]
    return shards


def _check_appendable(job: EncodeJob, table: Table) -> None:
    """Raise TableError if rows of this job would differ in kind from those of the table."""
    meta, config = table.meta, job.config
    geometry = meta.geometry
    stored = {
        "image-encoder": meta.image_encoder.digest,
        "text-encoder": meta.text_encoder.digest,
        "image-size": meta.image_size,
        "val-fraction": meta.val_fraction,
        "keep-images": "image" in table.dataset().schema.names,
        "desc-scale": geometry.desc_scale,
        "geometry": geometry.name,
    }
    given = {
        "image-encoder": job.image_ref.digest,
        "text-encoder": job.text_ref.digest,
        "image-size": config.image_size,
        "val-fraction": config.val_fraction,
        "keep-images": config.keep_images,
        "desc-scale": config.desc_scale or geometry.desc_scale,
        "geometry": config.geometry or geometry.name,
    }
    if changes := _changes(stored, given, prefix="--"):
        raise TableError(
            f"{table.uri} was encoded with other options ({changes}): "
            "append with the same options, or leave out --append and name another --table"
        )


def _changes(stored: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> str:
    """Return the options that differ with both values, for a message; empty if none does."""
    given = json.loads(json.dumps(given))
    return "; ".join(
        f"{prefix}{name}: {_shown(stored.get(name))}, now {_shown(value)}"
        for name, value in given.items()
        if stored.get(name) != value
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} from {value[0]} to {value[-1]}" if value else "none"
    return "not set" if value is None else str(value)[:SHOWN_CHARACTERS]


def _run_graph(job: EncodeJob) -> None:
    job.checkpoints.storage.remove(job.checkpoints.uri(STOP))
    run_beam(
        lambda pipeline: (
            pipeline | "Shards" >> beam.Create(list(job.config.shards)) | "Encode to table" >> EncodeToTable(job)
        ),
        job.runtime,
        job.uri,
        monitor=monitor(job, expected_samples(job), log_of(job.uri, "encode")),
        memory_advice="fewer --num-workers or a smaller --batch-size",
    )


def _finish(job: EncodeJob, settings: dict[str, Any], seconds: float | None) -> EncodeResult:
    """Write the report and delete the checkpoints. `seconds` is None if nothing was encoded."""
    table = job.open_table()
    # A run that was stopped between its commit and its report still has its checkpoints.
    counts = SampleCounts()
    for shard in job.config.shards:
        if (checkpoint := job.checkpoints.load(shard)) is not None:
            counts.add(checkpoint)
    if counts.shards:
        table.write_report("encode", _report(job, counts, seconds) | {"table": job.uri, "settings": settings})
        if len(table.meta.run_ids) == 1 and table.version == 1:
            # Shards that were being encoded when a run was killed have left files that no commit refers to.
            table.dataset().cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
    job.runtime.storage.remove(job.checkpoints.folder)
    return EncodeResult(table, table.report("encode") or {}, seconds is None)


def _report(job: EncodeJob, counts: SampleCounts, seconds: float | None) -> dict[str, Any]:
    return {
        "rows": counts.rows,
        "rejected": counts.rejects.total(),
        "rejects_by_reason": dict(counts.rejects),
        "filtered": counts.filtered.total(),
        "filtered_by_reason": dict(counts.filtered),
        "success_rate": round(1 - counts.reject_rate, 4),
        "shards": counts.shards,
        "seconds": seconds and round(seconds, 2),
        "images_per_second": seconds and round(counts.rows / seconds, 1),
        "seconds_by_step": {name: round(value, 2) for name, value in counts.seconds.items()},
        "image_encoder": to_json_dict(job.image_ref),
        "text_encoder": to_json_dict(job.text_ref),
        "latent_shape": list(job.latent_shape),
        "text_dim": job.text_dim,
        "run_id": job.run_id,
        "num_workers": job.runtime.num_workers,
        "device": job.runtime.device,
        "beam_options": list(job.runtime.beam_options),
        "versions": {name: importlib.metadata.version(name) for name in REPORTED_PACKAGES},
    }
