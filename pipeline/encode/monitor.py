"""Monitor an encode run through its checkpoints: show progress, and stop it once too many samples are rejected."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from index.background import repeat
from index.errors import OutOfReachError
from index.reach import log_wait
from index.terminal import Progress
from pipeline.encode.checkpoints import STOP, SampleCounts, Watch
from pipeline.encode.job import EncodeJob

POLL_SECONDS = 0.5
PAUSE = 10
"""Listing a folder of many files takes long: no more than a tenth of the time is spent on looking."""
MIN_REJECTS_TO_STOP = 1000
"""A run is never stopped early for fewer rejects."""


@contextlib.contextmanager
def monitor(job: EncodeJob, samples: int | None, log: Path | None, *, all_samples: int | None = None) -> Iterator[None]:
    """Show progress while the block runs, and stop the run once --max-reject-rate cannot be met any more.

    `samples` is the number of samples to read; None estimates it from the finished shards and never stops the run.
    `all_samples` is that of all parts of the run, if the job is one of them.
    """
    shards, watch = len(job.config.shards), Watch(job.config.shards)
    # It looks again soon: a look that waited for the store would keep Ctrl-C waiting.
    checkpoints = replace(job.checkpoints, storage=replace(job.runtime.storage, patience=0.0))
    watch.look(job.checkpoints)
    with Progress("encode", total=samples, unit="images", log=log, done=watch.samples) as bar:

        def show() -> None:
            watch.look(checkpoints)
            for text in watch.waits:
                log_wait(text)
            done, counts = watch.samples, watch.counts
            if samples is None and counts.shards:
                bar.expect(max(done, round(counts.samples / counts.shards * shards)))
            elif samples is not None and (done > samples or counts.shards == shards):
                bar.expect(done)
            _advance(bar, done, counts, shards, watch.waits)
            if samples is not None:
                _stop_if_hopeless(job, all_samples or samples, counts)

        def look() -> None:
            with contextlib.suppress(OutOfReachError):
                show()

        try:
            with repeat(POLL_SECONDS, _seldom(look)):
                yield
        except Exception:
            look()
            raise
        look()


def _seldom(look: Callable[[], None]) -> Callable[[], None]:
    """Return a call that is skipped until `PAUSE` times as long as the last one took has passed."""
    earliest = 0.0

    def call() -> None:
        nonlocal earliest
        began = time.monotonic()
        if began >= earliest:
            look()
            ended = time.monotonic()
            earliest = ended + PAUSE * (ended - began)

    return call


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
