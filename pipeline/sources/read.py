"""Count, identify and read the samples of one shard, with the reader of its format.

Samples come in the order of their source and are not decoded: a damaged image or caption is rejected later, by
images.py and sample.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Protocol, TypeVar, runtime_checkable

from index.errors import CoalescerError, OutOfReachError
from index.reach import Patience, describe
from index.table.storage import is_local
from pipeline.rejects import RejectReason
from pipeline.sources import folder, hub, parquet, saved, streamed, tar
from pipeline.sources.ranges import SampleRange
from pipeline.sources.sample import ReadOptions, Sample, Unreadable, path_of

T = TypeVar("T")


@runtime_checkable
class Reader(Protocol):
    """What the module of each format offers: tar, parquet, folder, saved and streamed."""

    def count_samples(self, shard: str, options: ReadOptions) -> int | None:
        """Return the number of samples if it is known without reading them, else None."""

    def read_samples(self, shard: str, options: ReadOptions) -> Iterator[Sample | Unreadable]:
        """Yield the samples in their order; any exception ends the shard."""

    def identity(self, shard: str, options: ReadOptions) -> str:
        """Return a text that differs if the content of the shard does, without reading it."""


def count_samples(shard: str, options: ReadOptions | None = None) -> int | None:
    """Return the number of samples of a shard if it is known without reading them, else None."""
    try:
        return _expected(shard, options or ReadOptions())
    except OutOfReachError:
        return None


def shard_identity(shard: str, options: ReadOptions | None = None) -> str:
    """Return a text that tells a shard's content, whichever path it is seen under, without reading it.

    It is made of hashes that the hub or store gives, or of file names, sizes and times of change. Raises SourceError if
    the shard stays out of reach.
    """
    options = options or ReadOptions()
    return _patiently(shard, options, lambda: _reader_of(shard, options).identity(shard, options))


def read_samples(shard: str, options: ReadOptions | None = None) -> Iterator[Sample | Unreadable]:
    """Yield the samples of a shard in its order, and a last Unreadable with an empty key if some cannot be read.

    A store that is out of reach is waited for; raises SourceError if it does not come back, so that no sample is ever
    rejected for it.
    """
    options = options or ReadOptions()
    keys: set[str] = set()
    read, name = 0, public_name(shard)
    try:
        for sample in _read_on(shard, options):
            read += sample.caption_number == 0
            if isinstance(sample, Unreadable):
                yield replace(sample, key=_printable(sample.key), shard=name)
            elif problem := _unsafe(sample.key):
                yield Unreadable(_printable(sample.key), name, RejectReason.UNSAFE_NAME, problem)
            elif sample.key in keys:
                yield Unreadable(
                    sample.key, name, RejectReason.DUPLICATE_KEY, "an earlier sample of the shard has this key"
                )
            else:
                keys.add(sample.key)
                yield sample if name == shard else replace(sample, shard=name)
        expected = _expected(shard, options)
        fault = "the shard ends early" if expected is not None and expected > read else None
    except CoalescerError:
        raise
    except Exception as error:  # tarfile, pyarrow, datasets and file systems raise exceptions of any class
        fault, expected = describe(error), _expected(shard, options)
    if fault is not None:
        missed = None if expected is None else max(1, expected - read)
        known = "how many samples are missed is unknown" if missed is None else f"{missed:,} samples are missed"
        yield Unreadable("", name, RejectReason.UNREADABLE_SHARD, f"{fault}; {known}", missed)


def public_name(shard: str) -> str:
    """Return a shard's name as it is stored and shown: without the signature of a presigned URL."""
    return path_of(shard)


def _read_on(shard: str, options: ReadOptions) -> Iterator[Sample | Unreadable]:
    """Yield what the reader yields; where the store is out of reach, wait, open it again, and go on from there."""
    patience = _patience(shard, options)
    done = 0
    while True:
        try:
            for sample in islice(_reader_of(shard, options).read_samples(shard, options), done, None):
                done += 1
                patience.reset()
                yield sample
            return
        except Exception as error:
            patience.wait(error)


def _expected(shard: str, options: ReadOptions) -> int | None:
    """Return the number of samples if it is known; raises OutOfReachError if what tells it stays out of reach."""
    try:
        return _patiently(shard, options, lambda: _reader_of(shard, options).count_samples(shard, options))
    except CoalescerError:
        raise
    except Exception:  # a shard that cannot be read is reported by read_samples
        return None


def _patiently(shard: str, options: ReadOptions, call: Callable[[], T]) -> T:
    """Return the result of a call, which is repeated while the shard is out of reach."""
    patience = _patience(shard, options)
    while True:
        try:
            result = call()
        except Exception as error:
            patience.wait(error)
        else:
            patience.reset()
            return result


def _patience(shard: str, options: ReadOptions) -> Patience:
    is_file = is_local(shard) and not shard.startswith(hub.SCHEME)
    return Patience(public_name(shard), is_local=is_file, limit=options.storage.patience, on_wait=options.on_wait)


def _reader_of(shard: str, options: ReadOptions) -> Reader:
    path = path_of(shard)
    if hub.is_dataset(shard):
        return streamed
    if path.endswith(parquet.EXTENSIONS):
        return parquet
    if path.endswith(tar.EXTENSIONS):
        return tar
    return saved if saved.is_saved_dataset(SampleRange.parse(shard).folder, options.storage) else folder


def _printable(key: str) -> str:
    return repr(key)[1:-1] if _unsafe(key) else key


def _unsafe(key: str) -> str | None:
    """Return why a key is unsafe to use as a path (absolute, `..`, control characters), or None."""
    if any(ord(letter) < 32 or 127 <= ord(letter) < 160 or 0xD800 <= ord(letter) < 0xE000 for letter in key):
        return "the key contains control characters or is not UTF-8"
    parts = key.replace("\\", "/").split("/")
    if parts[0] == "" or (len(parts[0]) == 2 and parts[0][1] == ":"):
        return "the key is an absolute path"
    return "the key contains .." if ".." in parts else None
