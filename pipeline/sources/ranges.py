"""Ranges of a folder's samples, for sources without shard files: each range is one shard, `FOLDER#START-STOP`."""

from dataclasses import dataclass

from index.errors import SourceError

SAMPLES_PER_RANGE = 1000


@dataclass(frozen=True, slots=True)
class SampleRange:
    """The samples from position `start` up to, not including, `stop` of a folder."""

    folder: str
    start: int
    stop: int

    @classmethod
    def parse(cls, shard: str) -> "SampleRange":
        """Parse a shard's name, in which the folder may contain `#`; raises SourceError if it is not a range."""
        folder, _, positions = shard.rpartition("#")
        start, _, stop = positions.partition("-")
        if not (folder and start.isdecimal() and stop.isdecimal()):
            raise SourceError(f"{shard!r} is not a shard: use .tar or .parquet files, or FOLDER#START-STOP")
        return cls(folder, int(start), int(stop))

    @property
    def num_samples(self) -> int:
        """Return the number of samples in the range."""
        return self.stop - self.start

    def check(self, total: int) -> None:
        """Raise ValueError if the folder, of `total` samples now, has fewer than this range expects."""
        if self.stop > total:
            raise ValueError(
                f"{self.folder} has {total:,} samples and this shard needs {self.stop:,}: the source was changed "
                "after it was listed"
            )


def split_into_ranges(folder: str, total: int) -> list[str]:
    """Return the shards of a folder of `total` samples."""
    starts = range(0, total, SAMPLES_PER_RANGE)
    return [f"{folder}#{start}-{min(start + SAMPLES_PER_RANGE, total)}" for start in starts]
