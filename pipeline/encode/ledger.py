"""What of a source a table does not have yet: the identity of shards, compared with those of the table's ledger.

A shard is skipped if the ledger says that the same content was read to its end under the same options. Its folder may
be another one. Every other shard is read, and its samples are compared with the table's rows (present.py).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from index.background import look_up
from index.errors import CoalescerError, OutOfReachError
from index.table.ledger import LedgerEntry
from pipeline.sources.hub import SCHEME, DatasetURI, is_dataset, without_commit
from pipeline.sources.ranges import SampleRange
from pipeline.sources.read import shard_identity
from pipeline.sources.sample import ReadOptions

LOOKUP_SECONDS = 5.0
RANGE = re.compile(r"#\d+-\d+$")


def content_identity(shard: str, options: ReadOptions) -> str:
    """Return what tells a shard's content from other content, without reading it; empty if it is out of reach.

    A store that is away is waited for only a moment: it is when the shard is read.
    """
    patience = options.storage.patience
    storage = replace(options.storage, patience=LOOKUP_SECONDS if patience is None else min(LOOKUP_SECONDS, patience))
    try:
        return identity_to_read(shard, replace(options, storage=storage, on_wait=None))
    except OutOfReachError:
        return ""


def identity_to_read(shard: str, options: ReadOptions) -> str:
    """Return the same of a shard that is read next; raises OutOfReachError if it stays out of reach."""
    try:
        return shard_identity(shard, options)
    except OutOfReachError:
        raise
    except (CoalescerError, ValueError, OSError):  # reading the shard reports them
        return ""


def shard_identities(shards: Sequence[str], options: ReadOptions) -> list[str]:
    """Return the identities of shards as of now."""
    return list(look_up(lambda shard: content_identity(shard, options), shards))


def shards_to_read(
    shards: Sequence[str], identities: Sequence[str], entries: Iterable[LedgerEntry], options: str
) -> list[str]:
    """Return the shards that no run of the ledger has read to their end under these options."""
    known = {_content(each.shard, each.identity) for each in entries if each.complete and each.options == options}
    return [
        shard
        for shard, identity in zip(shards, identities, strict=True)
        if not identity or _content(shard, identity) not in known
    ]


def changed_shards(shards: Sequence[str], identities: Sequence[str], entries: Iterable[LedgerEntry]) -> list[str]:
    """Return the shards that the ledger does not have with the content that they have now."""
    known = {(without_commit(entry.shard), entry.identity) for entry in entries}
    pairs = zip(shards, identities, strict=True)
    return [shard for shard, identity in pairs if identity and (without_commit(shard), identity) not in known]


def source_of(shard: str) -> tuple[str, int]:
    """Return what a shard is a part of, a file, folder or dataset, and the position at which the part ends."""
    shard = without_commit(shard)
    if is_dataset(shard):
        return str(replace(DatasetURI.parse(shard), shard=None)), 0
    if RANGE.search(shard):
        sample_range = SampleRange.parse(shard)
        return sample_range.folder, sample_range.stop
    return shard, 0


def _content(shard: str, identity: str) -> tuple[str, str]:
    # Files of one size and time are common, for instance after `tar -x`, so that the name of the file counts too.
    return "" if shard.startswith(SCHEME) else shard.rstrip("/").rsplit("/", 1)[-1], identity
