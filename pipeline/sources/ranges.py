"""Shards of a folder that is too large for one: ranges of about a thousand samples, named `FOLDER#START-STOP`."""

from dataclasses import dataclass

from index.errors import SourceError

SIZE = 1000


@dataclass(frozen=True, slots=True)
class SampleRange:
    """A range of a folder's samples."""

    folder: str
    start: int
    stop: int

    @classmethod
    def parse(cls, shard: str) -> "SampleRange":
        """From a shard's name; the folder may hold a # too."""
        folder, _, numbers = shard.rpartition("#")
        start, _, stop = numbers.partition("-")
        if not (folder and start.isdecimal() and stop.isdecimal()):
            raise SourceError(f"{shard!r} is not a shard: give .tar or .parquet files, or FOLDER#START-STOP")
        return cls(folder, int(start), int(stop))

    @property
    def size(self) -> int:
        """How many samples it names."""
        return self.stop - self.start

    def check(self, total: int) -> None:
        """Say it where the folder became smaller than this piece supposes."""
        if self.stop > total:
            raise ValueError(f"samples {self.start:,} to {self.stop:,} of {total:,}: {self.folder} was changed")


def cut(folder: str, total: int) -> list[str]:
    """A folder's samples as shards of about a thousand."""
    return [f"{folder}#{start}-{min(start + SIZE, total)}" for start in range(0, total, SIZE)]
