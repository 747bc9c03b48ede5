"""Where image-caption pairs come from: list shards, count and read their samples.

A shard is one unit of work, named by a string that means the same on every machine that reaches the data:

    path/00000.tar  .tar.gz  .tgz   WebDataset / img2dataset                                    tar.py
    path/00000.parquet              rows with image bytes                                       parquet.py
    FOLDER#0-1000                   pictures with captions beside them or in metadata.csv       folder.py
    FOLDER/train#0-1000             a dataset that Hugging Face's `save_to_disk` wrote          saved.py
    hf:NAME?split=train&shard=0/3   a dataset of the Hugging Face hub, streamed                 hub.py

All but the last may stand at any fsspec URI. Samples come in their source's order, undecoded: what is wrong with a
picture or a caption is said by whoever decodes it.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from index.errors import CoalescerError, SourceError, one_line
from pipeline.images import RejectReason
from pipeline.sources import folder, hub, listing, parquet, saved, tar
from pipeline.sources.ranges import SampleRange
from pipeline.sources.sample import ReadOptions, Sample, Unreadable

__all__ = ["ReadOptions", "Sample", "Unreadable", "count_samples", "list_shards", "read_samples"]

STORES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "s3fs")
"""Packages whose own exceptions mean that a store cannot be reached or refuses."""
USUAL = ReadOptions()


@runtime_checkable
class Reader(Protocol):
    """What every file in `readers` offers."""

    def count_samples(self, shard: str, reading: ReadOptions) -> int | None:
        """How many samples, without reading them."""

    def read_samples(self, shard: str, reading: ReadOptions) -> Iterator[Sample | Unreadable]:
        """The samples in their order."""


def list_shards(sources: Sequence[str], reading: ReadOptions = USUAL) -> list[str]:
    """The shards behind folders, files, globs, brace patterns and hub names; SourceError where there is none."""
    found: dict[str, None] = {}
    for source in sources:
        is_hub = source.startswith(hub.SCHEME)
        try:
            shards = hub.list_shards(source, reading) if is_hub else listing.list_shards(source, reading)
        except Exception as error:
            if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in STORES:
                raise
            raise SourceError(f"{source!r} cannot be listed: {one_line(error, typed=True)}") from error
        if not shards:
            raise SourceError(
                f"no shards at {source!r}: give .tar or .parquet files, a folder of them or of pictures, a pattern "
                "such as 'data/{00000..00009}.tar', or hf:NAME"
            )
        found |= dict.fromkeys(shards)
    return list(found)


def count_samples(shard: str, reading: ReadOptions = USUAL) -> int | None:
    """How many samples a shard has, without reading them; None where only reading tells."""
    try:
        return _reader(shard, reading).count_samples(shard, reading)
    except CoalescerError:
        raise
    except Exception:  # whatever is wrong with the shard, reading it will say so
        return None


def read_samples(shard: str, reading: ReadOptions = USUAL) -> Iterator[Sample | Unreadable]:
    """The samples of one shard, in its order; where it cannot be read on, a last `Unreadable` without a key."""
    seen: set[str] = set()
    try:
        for sample in _reader(shard, reading).read_samples(shard, reading):
            if isinstance(sample, Unreadable):
                yield sample
            elif fault := _fault(sample.key):
                yield Unreadable(repr(sample.key)[1:-1], shard, RejectReason.UNSAFE_NAME, fault)
            elif sample.key in seen:
                yield Unreadable(
                    sample.key, shard, RejectReason.DUPLICATE_KEY, "an earlier sample of the shard has this key"
                )
            else:
                seen.add(sample.key)
                yield sample
    except CoalescerError:
        raise
    except Exception as error:  # whatever tarfile, pyarrow or a file system raise, the shard ends here
        yield Unreadable("", shard, RejectReason.BROKEN_SHARD, one_line(error, typed=True))


def _reader(shard: str, reading: ReadOptions) -> Reader:
    if shard.startswith(hub.SCHEME):
        return hub
    if shard.endswith(listing.EXTENSIONS):
        return parquet if shard.endswith(parquet.EXTENSIONS) else tar
    return saved if saved.is_saved(SampleRange.parse(shard).folder, reading.storage) else folder


def _fault(key: str) -> str | None:
    """Why a name could lead astray whoever makes a path of it; None where it cannot."""
    if any(ord(letter) < 32 or 127 <= ord(letter) < 160 or 0xD800 <= ord(letter) < 0xE000 for letter in key):
        return "it holds control characters or is not UTF-8"
    parts = key.replace("\\", "/").split("/")
    if parts[0] == "" or (len(parts[0]) == 2 and parts[0][1] == ":"):
        return "it is absolute"
    return "it leads up a folder" if ".." in parts else None
