"""Which samples of a run are copies of earlier ones, found before anything is decoded.

    shards -> hash samples -> group by hash -> all but the first -> group by shard

Every sample that the cheap filters let through is hashed where it is read; 16 bytes of hash and its place are all
that is shuffled. The first of equal samples is the one with the smallest (shard, number), so the answer does not
depend on workers, batches or resuming. Hashes of a shard are kept with the run's checkpoints: a stopped run reads no shard
twice for them.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import apache_beam as beam

from pipeline.encode.checkpoints import name_of
from pipeline.encode.job import EncodeJob
from pipeline.encode.shard import wanted_caption
from pipeline.filters import Filtered
from pipeline.rejects import Rejected
from pipeline.sources.read import read_samples
from pipeline.sources.sample import Unreadable

Place = tuple[str, int]


class FindDuplicates(beam.PTransform):  # type: ignore[misc]
    """PCollection of shard names -> PCollection of (shard, the numbers of its samples that are copies)."""

    def __init__(self, job: EncodeJob) -> None:
        super().__init__()
        self.job = job

    def expand(self, shards: Any) -> Any:
        """The graph."""
        copies = (
            shards
            | "Spread" >> beam.Reshuffle()
            | "Hash samples" >> beam.ParDo(_HashSamples(self.job))
            | "Group by hash" >> beam.GroupByKey()
            | "All but the first" >> beam.FlatMap(_all_but_first)
        )
        every = shards | "Every shard" >> beam.Map(lambda shard: (shard, -1))
        return (
            (every, copies)
            | "With every shard" >> beam.Flatten()
            | "Group by shard" >> beam.GroupByKey()
            | "Numbers" >> beam.MapTuple(lambda shard, numbers: (shard, sorted(n for n in numbers if n >= 0)))
        )


class _HashSamples(beam.DoFn):  # type: ignore[misc]
    """Shard -> (hash, (shard, number)) for each of its samples that could be a row."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job

    def process(self, shard: str) -> Iterator[tuple[str, Place]]:
        job, name = self.job, name_of(shard, "hashes")
        hashes = job.checkpoints.read(name)
        if hashes is None:
            hashes = list(self._hashes(shard))
            job.checkpoints.write(name, hashes)
        for number, content in hashes:
            yield content, (shard, number)

    def _hashes(self, shard: str) -> Iterator[tuple[int, str]]:
        config, run = self.job.config, self.job.run
        samples = islice(read_samples(shard, run.reading(config)), self.job.takes.get(shard))
        for number, sample in enumerate(samples):
            if isinstance(sample, Unreadable) or not sample.image:
                continue
            try:
                caption = wanted_caption(sample, config.filters)
            except (Rejected, Filtered):
                continue
            digest = hashlib.sha256(sample.image)
            if config.filters.dedup == "pair":
                digest.update(b"\0" + caption.encode())
            yield number, digest.hexdigest()[:32]


def _all_but_first(group: tuple[str, Iterable[Place]]) -> Iterator[Place]:
    yield from sorted(group[1])[1:]
