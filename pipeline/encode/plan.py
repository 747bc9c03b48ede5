"""Plan an encode run: list its shards, and check source, target and free space before the work starts.

A dry run takes a few real samples through the encoders without writing anything, so that it can tell how large a row
is and how many rows to expect.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from index.background import look_up
from index.errors import OutOfReachError, SourceError, TableError
from index.table.storage import Storage, is_local, unwritable
from pipeline.config import EncodeConfig, RuntimeConfig
from pipeline.encode.job import EncodeJob
from pipeline.encode.shard import ShardEncoder
from pipeline.sources.listing import list_shards
from pipeline.sources.read import count_samples, read_samples
from pipeline.sources.sample import ReadOptions, Unreadable

TRIAL_SAMPLES = 8
COUNTED_SHARDS = 256
"""Shards whose samples are counted; more are estimated from as many of them, evenly spaced."""
FLOAT16_BYTES = 2


def plan_encode(sources: Sequence[str], options: Mapping[str, Any], runtime: RuntimeConfig) -> EncodeConfig:
    """Check the options of a run, given by name, list the shards of its sources, and return its config.

    Raises OptionError if an option's value is not allowed, SourceError if a source has no shards.
    """
    config = EncodeConfig.from_options(options)
    return replace(config, shards=tuple(list_shards(sources, runtime.read_options(config))))


def check_target(uri: str, storage: Storage) -> int | None:
    """Return the free bytes of the disk of `uri`, None on an object store. Raises TableError if it is not writable."""
    if not is_local(uri):
        files, path = storage.files(uri + ".probe")
        try:
            files.pipe_file(path, b"")
            files.rm_file(path)
        except Exception as error:  # every object store has its own exceptions
            raise unwritable(uri, error) from error
        return None
    folder = next(parent for parent in Path(uri).parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(uri, error) from error
    return shutil.disk_usage(folder).free


def check_source(shards: Sequence[str], options: ReadOptions) -> None:
    """Raise SourceError if no shard holds a sample, readable or not.

    A shard that is out of reach may hold one: the workers wait for it.
    """
    fault = "it is empty"
    options = replace(options, storage=replace(options.storage, patience=0.0))
    for shard in shards:
        try:
            for sample in read_samples(shard, options):
                if sample.key:
                    return
                fault = sample.detail if isinstance(sample, Unreadable) else fault
        except OutOfReachError:
            return
    raise SourceError(f"no samples in {len(shards)} shards; {shard}: {fault[:300]}")


def samples_within_limit(shards: Sequence[str], limit: int, options: ReadOptions) -> dict[str, int]:
    """Return how many samples to read of each shard, so that all together are the first `limit` samples."""
    counts = dict.fromkeys(shards, 0)
    for shard in shards:
        for _ in read_samples(shard, options):
            if limit == 0:
                return counts
            counts[shard] += 1
            limit -= 1
    return counts


def expected_samples(job: EncodeJob) -> int | None:
    """Return the number of samples to read, estimated from the shards' metadata; None if no shard tells it."""
    shards = job.config.shards
    if job.samples_per_shard:
        return sum(job.samples_per_shard.values())
    counted = shards[:: -(-len(shards) // COUNTED_SHARDS)]
    counts = look_up(lambda shard: count_samples(shard, job.read_options), counted)
    known = [count for count in counts if count is not None]
    return round(sum(known) / len(known) * len(shards)) if known else None


def plan_run(job: EncodeJob, bytes_free: int | None) -> dict[str, Any]:
    """Return what a run would do, measured on its first samples. Raises TableError if it would not fit on the disk."""
    start = time.perf_counter()
    trial = ShardEncoder(job, next(iter(job.config.shards)), max_samples=TRIAL_SAMPLES)
    bytes_encoded = sum(batch.nbytes for batch in trial.batches())
    seconds = time.perf_counter() - start
    # A search vector is about as long as text embedding and latent together.
    vector_bytes = FLOAT16_BYTES * (job.text_dim + job.latent_dim)
    bytes_per_row = bytes_encoded / trial.rows + vector_bytes if trial.rows else None
    samples = expected_samples(job)
    bytes_needed = round(bytes_per_row * samples) if bytes_per_row and samples else None
    if bytes_free is not None and bytes_needed is not None and bytes_needed > bytes_free:
        raise TableError(
            f"{job.uri} needs about {bytes_needed / 2**30:.1f} GiB for {samples:,} samples and "
            f"{bytes_free / 2**30:.1f} GiB are free: make room, name another --table, or set --limit"
        )
    return {
        "table": job.uri,
        "shards": len(job.config.shards),
        "samples": samples,
        "trial_rows": trial.rows,
        "trial_rejects_by_reason": trial.rejects_by_reason,
        "trial_filtered_by_reason": trial.filtered_by_reason,
        "trial_seconds": round(seconds, 3),
        "latent_shape": list(job.latent_shape),
        "text_dim": job.text_dim,
        "bytes_per_row": bytes_per_row and round(bytes_per_row),
        "bytes_needed": bytes_needed,
        "bytes_free": bytes_free,
        "device": job.runtime.device,
        "dtype": job.config.dtype,
        "num_workers": job.runtime.num_workers,
        "decode_threads": job.runtime.decode_threads,
        "cpu_cores": os.cpu_count(),
        "beam_options": " ".join(job.runtime.beam_options),
    }
