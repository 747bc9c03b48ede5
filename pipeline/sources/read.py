"""Count and read the samples of one shard, with the reader of its format.

Samples come in the order of their source and are not decoded: a damaged image or caption is rejected later, by
images.py and sample.py.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from index.errors import CoalescerError, one_line
from pipeline.rejects import RejectReason
from pipeline.sources import folder, hub, parquet, saved, tar
from pipeline.sources.ranges import SampleRange
from pipeline.sources.sample import ReadOptions, Sample, Unreadable


@runtime_checkable
class Reader(Protocol):
    """What the module of each format offers: tar, parquet, folder, saved and hub."""

    def count_samples(self, shard: str, options: ReadOptions) -> int | None:
        """Return the number of samples if it is known without reading them, else None."""

    def read_samples(self, shard: str, options: ReadOptions) -> Iterator[Sample | Unreadable]:
        """Yield the samples in their order; any exception ends the shard."""


def count_samples(shard: str, options: ReadOptions | None = None) -> int | None:
    """Return the number of samples of a shard if it is known without reading them, else None."""
    options = options or ReadOptions()
    try:
        return _reader_of(shard, options).count_samples(shard, options)
    except CoalescerError:
        raise
    except Exception:  # a shard that cannot be read is reported by read_samples
        return None


def read_samples(shard: str, options: ReadOptions | None = None) -> Iterator[Sample | Unreadable]:
    """Yield the samples of a shard in its order, and a last Unreadable with an empty key if the shard is damaged."""
    options = options or ReadOptions()
    keys: set[str] = set()
    try:
        for sample in _reader_of(shard, options).read_samples(shard, options):
            if isinstance(sample, Unreadable):
                yield sample
            elif problem := _unsafe(sample.key):
                yield Unreadable(repr(sample.key)[1:-1], shard, RejectReason.UNSAFE_NAME, problem)
            elif sample.key in keys:
                yield Unreadable(
                    sample.key, shard, RejectReason.DUPLICATE_KEY, "an earlier sample of the shard has this key"
                )
            else:
                keys.add(sample.key)
                yield sample
    except CoalescerError:
        raise
    except Exception as error:  # tarfile, pyarrow, datasets and file systems raise exceptions of any class
        yield Unreadable("", shard, RejectReason.UNREADABLE_SHARD, one_line(error, typed=True))


def _reader_of(shard: str, options: ReadOptions) -> Reader:
    if shard.startswith(hub.SCHEME):
        return hub
    if shard.endswith(parquet.EXTENSIONS):
        return parquet
    if shard.endswith(tar.EXTENSIONS):
        return tar
    return saved if saved.is_saved_dataset(SampleRange.parse(shard).folder, options.storage) else folder


def _unsafe(key: str) -> str | None:
    """Return why a key is unsafe to use as a path (absolute, `..`, control characters), or None."""
    if any(ord(letter) < 32 or 127 <= ord(letter) < 160 or 0xD800 <= ord(letter) < 0xE000 for letter in key):
        return "the key contains control characters or is not UTF-8"
    parts = key.replace("\\", "/").split("/")
    if parts[0] == "" or (len(parts[0]) == 2 and parts[0][1] == ":"):
        return "the key is an absolute path"
    return "the key contains .." if ".." in parts else None
