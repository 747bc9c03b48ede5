"""Images and captions of a source in memory, split as `pipeline encode` splits them, for training autoencoders."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from index.errors import SourceError
from index.table.schema import HELDOUT, TRAIN, content_hash, split_of
from index.table.storage import Storage
from index.terminal import Progress
from pipeline.images import decode_image, quiet_pillow
from pipeline.rejects import Rejected
from pipeline.sources.listing import list_shards
from pipeline.sources.read import read_samples
from pipeline.sources.sample import ReadOptions, Sample, decode_caption

MAX_BYTES = 4 * 2**30
"""Memory for decoded images."""


class Images(NamedTuple):
    """Training and held-out images; a small source may have no held-out ones."""

    train: UInt8[np.ndarray, "N H W 3"]
    heldout: UInt8[np.ndarray, "M H W 3"]


class Captions(NamedTuple):
    """Distinct training and held-out captions; a small source may have no held-out ones."""

    train: list[str]
    heldout: list[str]


def load_images(
    sources: Sequence[str],
    image_size: int,
    *,
    val_fraction: float,
    limit: int,
    storage: Storage | None = None,
    log: Path | None = None,
) -> Images:
    """Decode the first `limit` valid images of the sources, or as many as fit into `MAX_BYTES`.

    An image is held out if and only if a table encoded with the same `val_fraction` holds it out. Raises SourceError if
    there are no training images.
    """
    quiet_pillow()
    limit = min(limit, MAX_BYTES // (3 * image_size * image_size))
    splits: dict[str, list[UInt8[np.ndarray, "H W 3"]]] = {TRAIN: [], HELDOUT: []}
    options = ReadOptions(storage=storage or Storage.of())
    shards = list_shards(sources, options)
    with Progress("read images", total=None, unit="images", log=log) as bar:
        for sample in _samples(shards, options):
            try:
                pixels = decode_image(sample.image, image_size).pixels
            except Rejected:
                continue
            splits[split_of(content_hash(sample.image or b""), val_fraction)].append(pixels)
            bar.advance()
            if bar.done == limit:
                break
    if not splits[TRAIN]:
        raise SourceError(f"no training images in {', '.join(sources)}: use shards that hold images")
    empty = np.empty((0, image_size, image_size, 3), np.uint8)
    return Images(np.stack(splits[TRAIN]), np.stack(splits[HELDOUT]) if splits[HELDOUT] else empty)


def load_captions(
    sources: Sequence[str],
    *,
    val_fraction: float,
    limit: int,
    storage: Storage | None = None,
    log: Path | None = None,
) -> Captions:
    """Read the distinct captions of the first `limit` valid samples; equal captions are in the same split.

    Raises SourceError if there are no training captions.
    """
    splits: dict[str, str] = {}
    options = ReadOptions(storage=storage or Storage.of())
    shards = list_shards(sources, options)
    with Progress("read captions", total=None, unit="captions", log=log) as bar:
        for sample in _samples(shards, options):
            try:
                caption = decode_caption(sample.caption)
            except Rejected:
                continue
            splits.setdefault(caption, split_of(content_hash(caption.encode()), val_fraction))
            bar.advance()
            if bar.done == limit:
                break
    train = [caption for caption, split in splits.items() if split != HELDOUT]
    if not train:
        raise SourceError(f"no training captions in {', '.join(sources)}: use shards that hold captions")
    return Captions(train, [caption for caption, split in splits.items() if split == HELDOUT])


def _samples(shards: Sequence[str], options: ReadOptions) -> Iterator[Sample]:
    for shard in shards:
        for sample in read_samples(shard, options):
            if isinstance(sample, Sample):
                yield sample
