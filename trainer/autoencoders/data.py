"""Pictures and captions of a source in memory, split as `pipeline encode` splits them, for training autoencoders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from index.errors import SourceError
from index.table.schema import HELDOUT, TRAIN, row_id, split_of
from index.terminal import Progress
from pipeline.images import decode_image, quiet_pillow
from pipeline.rejects import Rejected
from pipeline.sources.listing import list_shards
from pipeline.sources.read import read_samples
from pipeline.sources.sample import Sample, decode_caption

MAX_BYTES = 4 * 2**30


@dataclass(frozen=True, eq=False, slots=True)
class Split:
    """Training and held-out pictures; of a small source none may be held out."""

    train: UInt8[np.ndarray, "N H W 3"]
    heldout: UInt8[np.ndarray, "M H W 3"]


def load_pictures(
    sources: Sequence[str], size: int, *, val_fraction: float, limit: int, log: Path | None = None
) -> Split:
    """The first `limit` pictures that can be decoded, or as many as fit into `MAX_BYTES`.

    A row held out here is held out in a table of the same share.
    """
    shards = list_shards(sources)
    quiet_pillow()
    limit = min(limit, MAX_BYTES // (3 * size * size))
    parts: dict[str, list[UInt8[np.ndarray, "H W 3"]]] = {TRAIN: [], HELDOUT: []}
    with Progress("read pictures", total=None, unit="pictures", log=log) as bar:
        for sample in _samples(shards):
            try:
                pixels = decode_image(sample.image, size).pixels
            except Rejected:
                continue
            parts[split_of(row_id(sample.key, sample.image or b""), val_fraction)].append(pixels)
            bar.advance()
            if bar.done == limit:
                break
    if not parts[TRAIN]:
        raise SourceError(f"no pictures to train on in {', '.join(sources)}")
    nothing = np.empty((0, size, size, 3), np.uint8)
    return Split(np.stack(parts[TRAIN]), np.stack(parts[HELDOUT]) if parts[HELDOUT] else nothing)


def load_captions(
    sources: Sequence[str], *, val_fraction: float, limit: int, log: Path | None = None
) -> tuple[list[str], list[str]]:
    """Distinct training and held-out captions of the first `limit` samples, split by the caption itself."""
    shards = list_shards(sources)
    seen: dict[str, str] = {}
    with Progress("read captions", total=None, unit="captions", log=log) as bar:
        for sample in _samples(shards):
            try:
                caption = decode_caption(sample.caption)
            except Rejected:
                continue
            seen.setdefault(caption, split_of(row_id(caption, b""), val_fraction))
            bar.advance()
            if bar.done == limit:
                break
    train = [caption for caption, split in seen.items() if split != HELDOUT]
    if not train:
        raise SourceError(f"no captions to train on in {', '.join(sources)}")
    return train, [caption for caption, split in seen.items() if split == HELDOUT]


def _samples(shards: Sequence[str]) -> Iterator[Sample]:
    for shard in shards:
        for sample in read_samples(shard):
            if isinstance(sample, Sample):
                yield sample
