"""Monitor an encode run through its checkpoints: show progress, and stop it once too many samples are rejected."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from index.background import repeat
from index.errors import OutOfReachError
from index.reach import log_wait
from index.terminal import Progress
from pipeline.encode.checkpoints import STOP, SampleCounts, ShardCheckpoint
from pipeline.encode.job import EncodeJob

POLL_SECONDS = 0.5
MIN_REJECTS_TO_STOP = 1000
"""A run is never stopped early for fewer rejects."""


@contextlib.contextmanager
def monitor(job: EncodeJob, samples: int | None, log: Path | None, *, all_samples: int | None = None) -> Iterator[None]:
    """Show progress while the block runs, and stop the run once --max-reject-rate cannot be met any more.

    `samples` is the number of samples to read; None estimates it from the finished shards and never stops the run.
    `all_samples` is that of all parts of the run, if the job is one of them.
    """
    shards, finished = job.config.shards, dict[str, ShardCheckpoint]()
    # It looks again soon: a look that waited for the store would keep Ctrl-C waiting.
    storage = replace(job.runtime.storage, patience=0.0)
    checkpoints = replace(job.checkpoints, storage=storage)
    with Progress("encode", total=samples, unit="images", log=log, done=job.checkpoints.poll(shards, finished)) as bar:

        def show() -> None:
            waits = checkpoints.waits()
            for text in waits:
                log_wait(text)
            done = checkpoints.poll(shards, finished)
            counts = SampleCounts()
            for checkpoint in finished.values():
                counts.add(checkpoint)
            if samples is None and finished:
                bar.expect(max(done, round(counts.samples / len(finished) * len(shards))))
            elif samples is not None and (done > samples or len(finished) == len(shards)):
                bar.expect(done)
            _advance(bar, done, counts, len(shards), waits)
            if samples is not None:
                _stop_if_hopeless(job, all_samples or samples, counts)

        def look() -> None:
            with contextlib.suppress(OutOfReachError):
                show()

        try:
            with repeat(POLL_SECONDS, look):
                yield
        except Exception:
            look()
            raise
        look()


def _advance(bar: Progress, done: int, counts: SampleCounts, shards: int, waits: list[str]) -> None:
    bar.metrics = {name: value for name, value in bar.metrics.items() if name != "waiting_for"}
    rejected, filtered = counts.rejects.total(), counts.filtered.total()
    bar.advance(
        done - bar.done,
        shards=f"{counts.shards}/{shards}",
        success_rate=round(1 - rejected / max(1, counts.samples), 4),
        rejected=rejected,
        **({"waiting_for": waits[0].partition(" is out of reach ")[0]} if waits else {}),
        **({"unread_shards": len(counts.unread)} if counts.unread else {}),
        **({"filtered": filtered} if filtered else {}),
        **({"truncated_captions": counts.truncated_captions} if counts.truncated_captions else {}),
    )


def _stop_if_hopeless(job: EncodeJob, samples: int, counts: SampleCounts) -> None:
    """Keep further shards from starting if more is rejected than the whole run may reject."""
    rejected, rate = counts.rejects.total(), job.config.max_reject_rate
    if rejected > max(rate * samples, MIN_REJECTS_TO_STOP):
        job.checkpoints.write(
            STOP,
            f"{rejected:,} of {samples:,} samples are already rejected after {counts.shards:,} of "
            f"{len(job.config.shards):,} shards, above --max-reject-rate {rate:g}: nothing was published; "
            "fix the source or raise --max-reject-rate",
        )
