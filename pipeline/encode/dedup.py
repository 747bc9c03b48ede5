"""FindDuplicates: which samples of a run are copies of earlier ones, found before anything is decoded.

    shards -> hash samples -> group by hash -> drop the first of each group -> group by shard

Every sample that the caption and metadata filters keep is hashed in the worker that reads its shard; only the hash and
the (shard, position) are shuffled. The first of equal samples is the one with the smallest (shard, position), so the
result depends neither on the number of workers nor on batches or resuming. A shard's hashes are kept with the run's
checkpoints: a resumed run does not read the shard again for them.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import apache_beam as beam

from index.errors import OutOfReachError
from pipeline.encode.checkpoints import file_name
from pipeline.encode.job import EncodeJob
from pipeline.encode.ledger import content_identity
from pipeline.encode.shard import valid_caption
from pipeline.filters import Filtered
from pipeline.rejects import Rejected
from pipeline.sources.read import read_samples
from pipeline.sources.sample import Unreadable

ShardPosition = tuple[str, int]
"""A shard, and the position of a sample in it."""


class FindDuplicates(beam.PTransform):  # type: ignore[misc]
    """PCollection of shard names -> PCollection of (shard, positions of its samples that are duplicates)."""

    def __init__(self, job: EncodeJob) -> None:
        super().__init__()
        self.job = job

    def expand(self, shards: Any) -> Any:
        """Build the graph."""
        duplicates = (
            shards
            | "Spread" >> beam.Reshuffle()
            | "Hash samples" >> beam.ParDo(_HashSamples(self.job))
            | "Group by hash" >> beam.GroupByKey()
            | "Drop the first" >> beam.FlatMap(_all_but_first)
        )
        no_duplicates = shards | "Every shard" >> beam.Map(lambda shard: (shard, -1))
        return (
            (no_duplicates, duplicates)
            | "With every shard" >> beam.Flatten()
            | "Group by shard" >> beam.GroupByKey()
            | "Positions" >> beam.MapTuple(lambda shard, positions: (shard, sorted(p for p in positions if p >= 0)))
        )


class _HashSamples(beam.DoFn):  # type: ignore[misc]
    """Shard -> (hash, (shard, position)) of each sample that could become a row."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job

    def process(self, shard: str) -> Iterator[tuple[str, ShardPosition]]:
        checkpoints, name = self.job.checkpoints, file_name(shard, "hashes")
        identity, stored = content_identity(shard, self.job.read_options), checkpoints.read(name)
        if stored is None or identity not in ("", stored["identity"]):
            try:
                stored = {"identity": identity, "hashes": list(self._hashes(shard))}
            except OutOfReachError as error:
                checkpoints.save_unread(shard, str(error))  # so that it is not encoded without its hashes
                return
            checkpoints.write(name, stored)
        for position, digest in stored["hashes"]:
            yield digest, (shard, position)

    def _hashes(self, shard: str) -> Iterator[tuple[int, str]]:
        filters = self.job.config.filters
        samples = islice(read_samples(shard, self.job.reading(shard)), self.job.samples_per_shard.get(shard))
        for position, sample in enumerate(samples):
            if isinstance(sample, Unreadable) or not sample.image:
                continue
            try:
                caption = valid_caption(sample, filters)
            except (Rejected, Filtered):
                continue
            digest = hashlib.sha256(sample.image)
            if filters.dedup == "pair":
                digest.update(b"\0" + caption.encode())
            yield position, digest.hexdigest()[:32]


def _all_but_first(group: tuple[str, Iterable[ShardPosition]]) -> Iterator[ShardPosition]:
    yield from sorted(group[1])[1:]
