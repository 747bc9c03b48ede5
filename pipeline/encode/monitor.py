"""An encode run seen from outside: progress by the checkpoints that shards leave, and an end where nothing good can come."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from index.background import repeat
from index.terminal import Progress
from pipeline.encode.checkpoints import EncodedShard
from pipeline.encode.graph import STOPPED
from pipeline.encode.job import EncodeJob

LOOK_SECONDS = 0.5
STOPPING_REJECTS = 1000
"""So many rejects at least, before a run is stopped on the way."""


@contextlib.contextmanager
def watching(job: EncodeJob, samples: int | None, log: Path | None) -> Iterator[None]:
    """Show progress, and stop a run that rejects more than is allowed whatever is still to come.

    `samples` is what there is to do; where it is not known, the finished shards' mean stands in for the others.
    """
    shards, finished = job.config.shards, dict[str, EncodedShard]()
    with Progress("encode", total=samples, unit="images", log=log, done=job.checkpoints.look(shards, finished)) as bar:

        def show() -> None:
            done = job.checkpoints.look(shards, finished)
            ended = sum(part.samples for part in finished.values())
            rejects = sum(part.rejected for part in finished.values())
            if samples is None and finished:
                bar.expect(max(done, round(ended / len(finished) * len(shards))))
            elif samples is not None and (done > samples or len(finished) == len(shards)):
                bar.expect(done)
            success = round(1 - rejects / max(1, ended), 4)
            filtered = sum(part.filtered for part in finished.values())
            bar.advance(
                done - bar.done,
                shards=f"{len(finished)}/{len(shards)}",
                success=success,
                rejects=rejects,
                **({"filtered": filtered} if filtered else {}),
            )
            allowed = job.config.max_reject_rate * (samples or 0)
            if samples is not None and rejects > max(allowed, STOPPING_REJECTS):
                job.checkpoints.write(
                    STOPPED,
                    f"{rejects:,} of {samples:,} samples are rejected already, after {len(finished):,} of "
                    f"{len(shards):,} shards: nothing was published; mend the source, or raise --max-reject-rate",
                )

        try:
            with repeat(LOOK_SECONDS, show):
                yield
        finally:
            show()
