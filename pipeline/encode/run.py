"""Encode image-caption shards into a table: plan the run, put it on Beam, report it.

Running the same command again goes on where it was stopped, shard by shard; on a finished table it does nothing.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np

from index.errors import TableError
from index.table.lock import claim
from index.table.table import Table, is_table, log_of, open_table, shards_of, table_uri
from pipeline.beam.runner import run_beam
from pipeline.config import EncodeConfig, RuntimeConfig
from pipeline.encode.checkpoints import Checkpoints
from pipeline.encode.graph import STOPPED, EncodeShards
from pipeline.encode.job import Counts, EncodeJob, open_encoders
from pipeline.encode.monitor import watching
from pipeline.encode.plan import check_source, check_target, expected_samples, first_samples, plan
from pipeline.filters import Filters
from pipeline.sources.listing import list_shards
from pipeline.sources.sample import ReadOptions

BEGUN = "begun.json"


@dataclass(frozen=True, eq=False, slots=True)
class Encoded:
    """The table that came out, and the report of the run; `done_before` where there was nothing to do."""

    table: Table | None
    """None after a dry run."""
    report: dict[str, Any]
    done_before: bool = False


def plan_encode(sources: list[str], options: dict[str, Any], run: RuntimeConfig) -> EncodeConfig:
    """The config for some sources and options by name; the sources are listed now."""
    filters = Filters(**{name: options.pop(name) for name in Filters.__dataclass_fields__ if name in options})
    reading = ReadOptions(options.get("image_key"), options.get("caption_key"), run.storage)
    blank = EncodeConfig(shards=(), filters=filters, **options)  # refuses wrong options before anything is listed
    return replace(blank, shards=tuple(list_shards(sources, reading)))


def encode(config: EncodeConfig, run: RuntimeConfig, table: str, *, dry_run: bool = False) -> Encoded:
    """Encode all shards and publish the table; goes on where an earlier run of the same config stopped.

    A dry run checks sources, encoders, device, target and space, encodes a few samples, and writes nothing.
    """
    uri = table_uri(table)
    free = check_target(uri, run.storage)
    checkpoints = Checkpoints(uri.removesuffix(".lance") + ".encode", run.storage)
    image, text = open_encoders(config.image_encoder, config.text_encoder, run.device, config.dtype)
    settings = {**config.settings, "image_digest": image.ref.digest, "text_digest": text.ref.digest}
    # A run that stopped for too many rejects goes on when more are allowed, so that limit is no part of its identity.
    identity = {name: value for name, value in settings.items() if name != "max_reject_rate"}
    blank = np.zeros((1, config.image_size, config.image_size, 3), np.uint8)
    job = EncodeJob(
        config=config,
        run=run,
        uri=uri,
        checkpoints=checkpoints,
        run_id=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16],
        image_ref=image.ref,
        text_ref=text.ref,
        latent_shape=image.encode(blank).shape[1:],
        text_dim=text.encode(["a"]).shape[1],
    )
    with contextlib.nullcontext() if dry_run else claim(checkpoints.folder, run.storage):
        there = open_table(uri, storage=run.storage) if is_table(uri, run.storage) else None
        begun = _begun(checkpoints, identity)
        done_before = there is not None and job.run_id in there.meta.run_ids
        if there is not None and not done_before:
            if not config.append:
                raise TableError(
                    f"{uri} exists{_told(there, settings)}: name another --table, add --append, or delete it"
                )
            job = _appending(job, there, begun)
            done_before = not job.config.shards
        if not done_before:
            if not dry_run:
                checkpoints.write(BEGUN, {"settings": identity, "shards": job.config.shards})
            check_source(job.config.shards, run.reading(config))
            if config.limit is not None:
                job.takes = first_samples(job.config.shards, config.limit, run.reading(config))
        if dry_run:
            return Encoded(None, {"to_do": "nothing"} if done_before else plan(job, free))
        return _finish(job, settings, done_before)


def _finish(job: EncodeJob, settings: dict[str, Any], done_before: bool) -> Encoded:
    """Run what is left of it, report it, and clear up."""
    began = time.monotonic()
    if not done_before:
        _run(job)
    table = job.table()
    # A run that was stopped between its commit and its report still has its checkpoints.
    parts = Counts()
    for shard in job.config.shards:
        if (part := job.checkpoints.finished(shard)) is not None:
            parts.add(part)
    if parts.shards:
        seconds = None if done_before else time.monotonic() - began
        table.write_report("encode", _report(job, parts, seconds) | {"table": job.uri, "settings": settings})
        if len(table.meta.run_ids) == 1 and table.version == 1:
            # Shards that were in flight when a run was killed have left files that no commit refers to.
            table.dataset().cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
    job.run.storage.remove(job.checkpoints.folder)
    return Encoded(table, table.report("encode") or {}, done_before)


def _appending(job: EncodeJob, table: Table, begun: list[str] | None) -> EncodeJob:
    """The same job for the shards that the table does not have; TableError where its rows would not fit.

    A run that has begun goes on with its own shards, whether or not it came to adding their rows.
    """
    meta = table.meta
    geometry = meta.geometry
    config = job.config
    pairs = {
        "image-encoder": (meta.image_encoder.digest, job.image_ref.digest),
        "text-encoder": (meta.text_encoder.digest, job.text_ref.digest),
        "image-size": (meta.image_size, config.image_size),
        "heldout-share": (meta.val_fraction, config.val_fraction),
        "keep-images": ("image" in table.dataset().schema.names, config.keep_images),
        "desc-scale": (geometry.desc_scale, config.desc_scale or geometry.desc_scale),
        "geometry": (geometry.kind, config.geometry or geometry.kind),
    }
    changed = [f"--{name}" for name, (before, now) in pairs.items() if before != now]
    if changed:
        raise TableError(
            f"{table.uri} was encoded with another {', '.join(changed)}: append with the same, or leave it out"
        )
    if begun is None:
        present = shards_of(table)
        begun = [shard for shard in config.shards if shard not in present]
    return replace(job, config=replace(config, shards=tuple(begun)), base=meta)


def _begun(checkpoints: Checkpoints, identity: dict[str, Any]) -> list[str] | None:
    """The shards of an unfinished run of these settings, None where there is no run; TableError where it has others."""
    before = checkpoints.read(BEGUN)
    if before is None:
        return None
    if changed := _changes(before["settings"], identity):
        raise TableError(
            f"an unfinished run in {checkpoints.folder} has another {changed}: type its options to go on with it, "
            f"or delete that folder to start anew"
        )
    shards: list[str] = before["shards"]
    return shards


def _told(table: Table, settings: dict[str, Any]) -> str:
    """What a table was encoded with otherwise, as far as its report tells."""
    report = table.report("encode")
    return f" and was encoded with another {_changes(report['settings'], settings)}" if report else ""


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The names of what differs."""
    now = json.loads(json.dumps(now))
    return ", ".join(name for name in now if before.get(name) != now[name])


def _run(job: EncodeJob) -> None:
    """Put the job on Beam."""
    import apache_beam as beam

    job.checkpoints.storage.remove(f"{job.checkpoints.folder}/{STOPPED}")
    run_beam(
        lambda pipeline: (
            pipeline | "Shards" >> beam.Create(list(job.config.shards)) | "Encode shards" >> EncodeShards(job)
        ),
        job.run,
        job.uri,
        watching=watching(job, expected_samples(job), log_of(job.uri, "encode")),
        relief="fewer --num-workers or a smaller --batch-size, to go on",
    )


def _report(job: EncodeJob, done: Counts, seconds: float | None) -> dict[str, Any]:
    """What was done, and how fast where `seconds` were measured from the first shard to the commit."""
    return {
        "rows": done.rows,
        "rejects": done.rejected,
        "rejects_by_reason": dict(done.rejects),
        "filtered": done.filtered.total(),
        "filtered_by_reason": dict(done.filtered),
        "success_rate": round(1 - done.reject_rate, 4),
        "shards": done.shards,
        "seconds": seconds and round(seconds, 2),
        "images_per_second": seconds and round(done.rows / seconds, 1),
        "seconds_by_step": {name: round(value, 2) for name, value in done.seconds.items()},
        "image_encoder": asdict(job.image_ref),
        "text_encoder": asdict(job.text_ref),
        "latent_shape": list(job.latent_shape),
        "text_dim": job.text_dim,
        "run_id": job.run_id,
        "workers": job.run.num_workers,
        "device": job.run.device,
        "beam_options": list(job.run.beam_options),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("apache-beam", "torch", "diffusers", "transformers", "pylance", "pyarrow")
        },
    }
