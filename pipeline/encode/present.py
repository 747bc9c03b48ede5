"""Which samples an appended-to table has already: row ids, image hashes and rejects, 16 bytes each in every worker.

Each is read from the table once per process and kept as a sorted array, so memory is 16 bytes per row. Ids are compared
in full: a sample is skipped only if the table has its key, image and caption. Where a key is only a position, which
changes as the source grows, image and caption are compared instead.
"""

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from index.errors import TableError
from index.table.schema import HASH_BYTES, content_hash
from index.table.storage import Storage
from index.table.table import Table, open_newest, open_table, rejects_uri
from pipeline.encode.ledger import source_of

_reading = threading.Lock()


class HashSet:
    """A set of 16-byte hashes in 16 bytes each."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        """Take concatenated hashes in any order."""
        arrays = [np.frombuffer(part, ">u8").reshape(-1, 2).astype(np.uint64) for part in parts]
        hashes = np.concatenate([np.empty((0, 2), np.uint64), *arrays])
        order = np.argsort(hashes[:, 0])
        self._first, self._second = hashes[order, 0], hashes[order, 1]

    def __len__(self) -> int:
        """Return the number of hashes, with repeats."""
        return len(self._first)

    def __contains__(self, digest: bytes) -> bool:
        """Return whether a hash is in the set."""
        first, second = (np.uint64(int.from_bytes(half, "big")) for half in (digest[:8], digest[8:HASH_BYTES]))
        start = np.searchsorted(self._first, first, "left")
        stop = np.searchsorted(self._first, first, "right")
        return bool((self._second[start:stop] == second).any())


@dataclass(frozen=True, slots=True)
class PresentRows:
    """What a table holds, as of the start of an append in this process."""

    uri: str
    run_id: str
    """Of the append; another one reads the table again."""
    storage: Storage

    def has_id(self, row_id: str) -> bool:
        """Return whether the table has a row of this id."""
        return bytes.fromhex(row_id) in self._hashes(_ids)

    def has_image(self, image_hash: bytes) -> bool:
        """Return whether the table has a row with this image."""
        return image_hash in self._hashes(_images)

    def has_pair(self, image_hash: bytes, caption: str) -> bool:
        """Return whether the table has a row with this image and this caption."""
        return pair_hash(image_hash, caption) in self._hashes(_pairs)

    def has_reject(self, reject: dict[str, str]) -> bool:
        """Return whether the rejects table has this sample of the same source with the same reason."""
        return reject_hash(reject) in self._hashes(_rejects)

    def _hashes(self, read: Callable[[Table], Iterator[bytes]]) -> HashSet:
        with _reading:  # decoding threads ask at the same time
            return _read(read, self.uri, self.run_id, self.storage)


def pair_hash(image_hash: bytes, caption: str) -> bytes:
    """Return the hash of an image-caption pair without its key."""
    return content_hash(image_hash + caption.encode("utf-8", "surrogatepass"))


def reject_hash(reject: dict[str, str]) -> bytes:
    """Return the hash of a reject: where its sample comes from, and the reason.

    A sample is found again in another range of its folder or file of its dataset; the rest of a damaged shard is not.
    The detail may have addresses of memory in it.
    """
    source = source_of(reject["shard"])[0] if reject["key"] else reject["shard"]
    return content_hash("\0".join((source, reject["key"], reject["reason"])).encode("utf-8", "surrogatepass"))


def can_hash_images(table: Table) -> bool:
    """Return whether a table's images can be compared: those of version 1 only if it keeps the image bytes."""
    return bool({"image_hash", "image"} & set(table.dataset().schema.names))


@lru_cache(maxsize=4)
def _read(read: Callable[[Table], Iterator[bytes]], uri: str, run_id: str, storage: Storage) -> HashSet:
    return HashSet(read(open_table(uri, storage=storage)))


def _ids(table: Table) -> Iterator[bytes]:
    for batch in table.scan(["id"]):
        ids = batch["id"].drop_null().to_pylist()
        try:
            part = bytes.fromhex("".join(ids))
        except ValueError:
            part = b""
        # Rows that others have added may have ids of any form, which no sample of ours can have.
        if len(part) != HASH_BYTES * len(ids):
            part = b"".join(bytes.fromhex(each) for each in ids if re.fullmatch("[0-9a-f]{32}", each))
        yield part


def _images(table: Table) -> Iterator[bytes]:
    for hashes, _ in _hashed_images(table, []):
        yield b"".join(hashes)


def _pairs(table: Table) -> Iterator[bytes]:
    for hashes, batch in _hashed_images(table, ["caption"]):
        captions = batch["caption"].to_pylist()
        yield b"".join(pair_hash(each, caption or "") for each, caption in zip(hashes, captions, strict=True))


def _rejects(table: Table) -> Iterator[bytes]:
    dataset = open_newest(rejects_uri(table.uri), table.storage)
    for batch in [] if dataset is None else dataset.to_batches():
        yield b"".join(reject_hash(row) for row in batch.to_pylist())


def _hashed_images(table: Table, columns: list[str]) -> Iterator[tuple[list[bytes], pa.RecordBatch]]:
    """Yield the image hashes of each batch of rows, with the batch."""
    names = table.dataset().schema.names
    if not can_hash_images(table):
        raise TableError(f"{table.uri} has neither the column `image_hash` nor `image`")
    name, batch_size = ("image_hash", 65_536) if "image_hash" in names else ("image", 256)
    for batch in table.scan([name, *columns], batch_size=batch_size):
        values = batch[name].to_pylist()
        yield (
            [
                bytes(HASH_BYTES) if each is None else each if name == "image_hash" else content_hash(each)
                for each in values
            ],
            batch,
        )
