"""What can fail is tried before the work starts: the source, the encoders, the device, the target, the space.

A few real samples go the whole way, except that nothing is written; so the plan knows what a row weighs and how many
rows to expect.
"""

import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from index.errors import SourceError, TableError
from index.table.storage import Storage, is_local
from pipeline.encode.job import EncodeJob
from pipeline.sources.read import count_samples, read_samples
from pipeline.sources.sample import ReadOptions, Unreadable

TRIED_SAMPLES = 8
COUNTED_SHARDS = 256


def check_target(uri: str, storage: Storage) -> int | None:
    """The free bytes beside `uri`, None where there is no end of them; TableError where nothing can be written."""
    if not is_local(uri):
        files, path = storage.files(uri + ".probe")
        try:
            files.pipe_file(path, b"")
            files.rm_file(path)
        except Exception as error:  # every object store has errors of its own
            raise TableError(f"{uri} cannot be written: {error}: check bucket, rights and --storage-option") from error
        return None
    folder = next(parent for parent in Path(uri).parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TableError(f"{uri} cannot be written: {folder}: {error.strerror}: name another --table") from error
    return shutil.disk_usage(folder).free


def check_source(shards: tuple[str, ...], reading: ReadOptions) -> None:
    """SourceError where no shard holds a sample, be it a broken one."""
    trouble = "nothing in it"
    for shard in shards:
        for sample in read_samples(shard, reading):
            if sample.key:
                return
            trouble = sample.detail if isinstance(sample, Unreadable) else trouble
    raise SourceError(f"no samples in {len(shards)} shards; {shard}: {trouble[:300]}")


def first_samples(shards: tuple[str, ...], limit: int, reading: ReadOptions) -> dict[str, int]:
    """How many samples to read of each shard, so that all together are the first `limit`."""
    takes = dict.fromkeys(shards, 0)
    for shard in shards:
        for _ in read_samples(shard, reading):
            if limit == 0:
                return takes
            takes[shard] += 1
            limit -= 1
    return takes


def expected_samples(job: EncodeJob) -> int | None:
    """How many samples there are, as far as shards tell without being read; of many shards some stand for all."""
    shards = job.config.shards
    if job.takes:
        return sum(job.takes.values())
    some = shards[:: -(-len(shards) // COUNTED_SHARDS)]
    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(lambda shard: count_samples(shard, job.run.reading(job.config)), some))
    known = [count for count in counts if count is not None]
    return round(sum(known) / len(known) * len(shards)) if known else None


def plan(job: EncodeJob, free: int | None) -> dict[str, Any]:
    """What a run would do, from the first samples; TableError where there is no room for it."""
    began = time.perf_counter()
    trial = job.open(next(iter(job.config.shards)), take=TRIED_SAMPLES)
    batches = list(trial.batches())
    seconds = time.perf_counter() - began
    rows = sum(len(batch) for batch in batches)
    # The search vector is as wide as text and latent together.
    row = sum(batch.nbytes for batch in batches) / rows + 2 * (job.text_dim + _size(job)) if rows else None
    samples = expected_samples(job)
    needed = round(row * samples) if row and samples else None
    if free is not None and needed is not None and needed > free:
        raise TableError(
            f"{job.uri} needs about {needed / 2**30:.1f} GiB for {samples:,} samples and {free / 2**30:.1f} GiB are "
            "free: make room there, name another --table, or --limit the run"
        )
    summary = trial.summary
    return {
        "table": job.uri,
        "shards": len(job.config.shards),
        "samples": samples,
        "tried_rows": rows,
        "tried_rejects": summary["rejects"],
        "tried_filtered": summary["filtered"],
        "tried_seconds": round(seconds, 3),
        "latent_shape": list(job.latent_shape),
        "text_dim": job.text_dim,
        "bytes_per_row": row and round(row),
        "bytes_needed": needed,
        "bytes_free": free,
        "device": job.run.device,
        "dtype": job.config.dtype,
        "workers": job.run.num_workers,
        "decode_threads": job.run.decode_threads,
        "cores": os.cpu_count(),
        "beam": " ".join(job.run.beam_options),
    }


def _size(job: EncodeJob) -> int:
    channels, height, width = job.latent_shape
    return channels * height * width
