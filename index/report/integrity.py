"""Search vectors that no index can serve well: not finite, zero, or equal to another one; and equal captions.

Equal rows are counted by their hashes. If more distinct ones come than memory has room for, only those whose hash
begins with a zero bit are kept, then with two, and what is counted among them is scaled up (P. Gibbons, Distinct
sampling for highly-accurate answers to distinct values queries, VLDB 2001). Equal rows have equal hashes, so no pair of
duplicates is torn apart.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float16, UInt64

from index.search.memory import held_bytes, rows_at_once
from index.table.schema import TRAIN
from index.table.table import Table, column_array

BATCH_ROWS = 4096
MIN_HASHES = 2**16
"""Distinct rows that are always counted exactly."""
HASH_BYTES = 32
"""What a distinct hash takes: itself, and copies while sorting."""


@dataclass(frozen=True, kw_only=True)
class VectorIntegrity:
    """Counts of unusable training vectors, and of distinct captions."""

    nonfinite_vectors: int
    """Vectors with a NaN or an infinity."""
    zero_vectors: int
    duplicate_vectors: int
    """Vectors equal to an earlier one."""
    hashed_rows: int
    """Training rows among which duplicates were counted: all, or, if memory has no room for as many hashes, an even
    sample of the distinct vectors, whose count is scaled up."""
    distinct_texts: int
    """Distinct text embeddings: as many as training rows if every caption is unique."""


def check_vectors(table: Table, memory: int | None = None) -> VectorIntegrity:
    """Count the unusable training vectors of a table in one pass over them, within `memory` bytes (None: no limit)."""
    geometry, nonfinite, zero = table.meta.geometry, 0, 0
    room, at_once = 2**62, BATCH_ROWS
    if memory is not None:
        room = max(MIN_HASHES, held_bytes(memory) // (2 * HASH_BYTES))
        at_once = min(BATCH_ROWS, rows_at_once(memory, 16 * geometry.vector_dim))
    distinct, distinct_texts = DistinctRows(room), DistinctRows(room)
    for vectors in table.column_batches("vector", TRAIN, at_once):
        nonfinite += int((~np.isfinite(vectors).all(1)).sum())
        zero += int((vectors == 0).all(1).sum())
        distinct.add(row_hashes(vectors))
        distinct_texts.add(row_hashes(vectors[:, : geometry.text_width]))
    return VectorIntegrity(
        nonfinite_vectors=nonfinite,
        zero_vectors=zero,
        duplicate_vectors=distinct.duplicates,
        hashed_rows=distinct.rows,
        distinct_texts=distinct_texts.count,
    )


class DistinctRows:
    """Count the distinct hashes of rows, and the rows that have a hash of others, in bounded memory."""

    def __init__(self, room: int) -> None:
        """Keep at most `room` distinct hashes."""
        self._room, self._bits = room, 0
        self._hashes, self._added = np.empty(0, np.uint64), list[UInt64[np.ndarray, "n"]]()
        self._waiting = 0
        self._rows_by_zeros = np.zeros(65, np.int64)

    def add(self, hashes: UInt64[np.ndarray, "N"]) -> None:
        """Count the hashes of some rows."""
        # frexp gives the number of bits that a hash takes; float64 rounds up only hashes that begin with 53 ones.
        zeros = 64 - np.frexp(hashes.astype(np.float64))[1].clip(0, 64)
        self._rows_by_zeros += np.bincount(zeros, minlength=65)
        self._added.append(hashes[zeros >= self._bits])
        self._waiting += len(self._added[-1])
        if self._waiting > max(len(self._hashes), MIN_HASHES // 2):
            self._merge()

    def _merge(self) -> None:
        """Add what is waiting to the distinct hashes, and keep a smaller part of them if they are too many."""
        self._hashes = np.unique(np.concatenate([self._hashes, *self._added]))
        self._added, self._waiting = [], 0
        while len(self._hashes) > self._room:
            self._bits += 1
            # They are sorted, and those that begin with zeros come first.
            self._hashes = self._hashes[: np.searchsorted(self._hashes, np.uint64(2 ** (64 - self._bits)))].copy()

    @property
    def rows(self) -> int:
        """The number of rows whose hashes are kept."""
        self._merge()
        return int(self._rows_by_zeros[self._bits :].sum())

    @property
    def count(self) -> int:
        """The number of distinct rows, estimated if `rows` is less than all."""
        self._merge()
        return len(self._hashes) << self._bits

    @property
    def duplicates(self) -> int:
        """The number of rows that are equal to an earlier one, estimated if `rows` is less than all."""
        return (self.rows - len(self._hashes)) << self._bits


def explain_nonfinite(table: Table) -> str:
    """Say which part of the search vectors is not finite, and what to do about it.

    What is stored as float16 may overflow: the latents and text embeddings of an encoder, or their scaled parts of the
    vector.
    """
    geometry, counts = table.meta.geometry, dict.fromkeys(("latent", "text", "text part", "image part"), 0)
    end = geometry.text_width + geometry.image_width
    for batch in table.scan(["text", "latent", "vector"], TRAIN, batch_size=BATCH_ROWS):
        text, latent, vectors = (column_array(batch[name]) for name in ("text", "latent", "vector"))
        parts = (latent, text, vectors[:, : geometry.text_width], vectors[:, geometry.text_width : end])
        for name, part in zip(counts, parts, strict=True):
            counts[name] += int((~np.isfinite(part).all(1)).sum())
    if counts["latent"] or counts["text"]:
        name, encoder = ("latents", "image") if counts["latent"] else ("text embeddings", "text")
        count = counts["latent"] or counts["text"]
        return (
            f"{count} {name} are not finite, as the {encoder} encoder gave them: encode the table again with "
            "--dtype float32, or delete these rows"
        )
    if counts["text part"]:
        longest = float(np.finfo(np.float16).max) / geometry.kappa
        small = "" if longest > 1 else " with --allow-small-desc-scale"
        return (
            f"the text part overflows float16 at --desc-scale {geometry.desc_scale:g}, because the captions are almost "
            f"equal (kappa {geometry.kappa:g}): use --desc-scale {longest:.2g} or less{small}"
        )
    if counts["image part"]:
        return (
            f"the image part overflows float16 in --geometry {geometry.name}, because some latent dimensions hardly "
            f"vary (smallest standard deviation {geometry.std.min():.2g}, median {np.median(geometry.std):.2g}): "
            "use --geometry sphere, which bounds it"
        )
    return "the balance coordinate overflows float16: use --no-balance, then --balance again"


def row_hashes(rows: Float16[np.ndarray, "N D"]) -> UInt64[np.ndarray, "N"]:
    """Return a 64-bit hash of each row: the sum over its words of splitmix64, keyed by where each word stands."""
    # Adding zero turns -0 into +0, so that equal rows have equal bytes; four numbers make a word.
    words = np.zeros((len(rows), -(-rows.shape[1] // 4) * 4), rows.dtype)
    np.add(rows, rows.dtype.type(0), out=words[:, : rows.shape[1]])
    mixed = words.view(np.uint64)
    mixed += np.random.default_rng(0).integers(2**64, size=mixed.shape[1], dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    # Sums of splitmix64 of one word in two places differ, because the keys do.
    total: UInt64[np.ndarray, N] = mixed.sum(1, dtype=np.uint64)
    return total
