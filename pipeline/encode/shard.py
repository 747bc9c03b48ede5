"""One shard's samples become rows: read and decode ahead in threads, encode in batches, keep what was wrong.

Every sample becomes a row, or is counted as filtered, or stands in the rejects table with a reason.
"""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, UInt8

from index.background import ahead
from index.space.moments import Moments
from index.table.schema import TRAIN, row_id, split_of
from index.table.table import list_array
from pipeline.config import EncodeConfig, RuntimeConfig
from pipeline.encoders import ImageEncoder, TextEncoder
from pipeline.filters import Filtered, FilterReason, Filters
from pipeline.images import decode_image, quiet_pillow
from pipeline.rejects import Rejected, RejectReason
from pipeline.sources.read import read_samples
from pipeline.sources.sample import Sample, Unreadable, decode_caption, decode_meta

BATCHES_AHEAD = 2


@dataclass(slots=True)
class _Ready:
    """A sample that was decoded and waits for its batch."""

    sample: Sample
    caption: str
    pixels: UInt8[np.ndarray, "H W 3"]
    width: int
    height: int


@dataclass(slots=True)
class _Decoded:
    """One batch, and what fell out on the way to it."""

    ready: list[_Ready]
    rejects: list[dict[str, str]] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)


class EncodeShard:
    """One shard on its way. Iterate `batches` to its end, then read the rest."""

    def __init__(
        self,
        shard: str,
        config: EncodeConfig,
        run: RuntimeConfig,
        schema: pa.Schema,
        image: ImageEncoder,
        text: TextEncoder,
        *,
        take: int | None = None,
        duplicates: frozenset[int] = frozenset(),
    ) -> None:
        """Read `take` samples (None: all) without those numbered in `duplicates`; nothing is read before `batches`."""
        self.shard, self.config, self.run, self.schema = shard, config, run, schema
        self._image, self._text, self._take, self._duplicates = image, text, take, duplicates
        self.rejects: list[dict[str, str]] = []
        self.filtered: Counter[str] = Counter()
        self.seconds = dict.fromkeys(("read", "decode", "wait", "encode"), 0.0)
        """ReadOptions and decoding run ahead of encoding; `wait` is what encoding waited for them."""
        self._moments: Moments | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """Statistics of the training rows, rejects and filtered by reason, seconds by step; JSON-ready."""
        return {
            "moments": self._moments.to_dict() if self._moments else None,
            "rejects": dict(Counter(reject["reason"] for reject in self.rejects)),
            "filtered": {str(reason): count for reason, count in self.filtered.items()},
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The shard's rows."""
        quiet_pillow()
        began = time.perf_counter()
        for decoded in ahead(self._decoded(), BATCHES_AHEAD):
            self.seconds["wait"] += time.perf_counter() - began
            self.rejects += decoded.rejects
            self.filtered += decoded.filtered
            if decoded.ready:
                yield self._encode(decoded.ready)
            began = time.perf_counter()

    def _decoded(self) -> Iterator[_Decoded]:
        """The shard in batches, decoded in threads, in its order."""
        size = self.run.batch_size
        samples = enumerate(islice(read_samples(self.shard, self.run.reading(self.config)), self._take))
        batch = _Decoded([])
        with ThreadPoolExecutor(self.run.decode_threads, thread_name_prefix="decode") as pool:
            while True:
                began = time.perf_counter()
                chunk = list(islice(samples, size))
                self.seconds["read"] += time.perf_counter() - began
                if not chunk:
                    break
                began = time.perf_counter()
                for (_, sample), outcome in zip(chunk, pool.map(self._decode, chunk), strict=True):
                    if isinstance(outcome, _Ready):
                        batch.ready.append(outcome)
                    elif isinstance(outcome, Filtered):
                        batch.filtered[outcome.reason] += 1
                    else:
                        batch.rejects.append(_reject(sample, outcome))
                self.seconds["decode"] += time.perf_counter() - began
                if len(batch.ready) >= size:
                    yield _Decoded(batch.ready[:size], batch.rejects, batch.filtered)
                    batch = _Decoded(batch.ready[size:])
        yield batch

    def _decode(self, numbered: tuple[int, Sample | Unreadable]) -> _Ready | Rejected | Filtered:
        number, sample = numbered
        if isinstance(sample, Unreadable):
            return Rejected(sample.reason, sample.detail)
        filters = self.config.filters
        try:
            caption = wanted_caption(sample, filters)
            if number in self._duplicates:
                return Filtered(FilterReason.DUPLICATE)
            picture = decode_image(sample.image, self.config.image_size, filters.check_size)
        except (Rejected, Filtered) as outcome:
            return outcome
        return _Ready(sample, caption, picture.pixels, picture.width, picture.height)

    def _encode(self, ready: list[_Ready]) -> pa.RecordBatch:
        began = time.perf_counter()
        latent = self._image.encode(np.stack([r.pixels for r in ready])).reshape(len(ready), -1)
        text = self._text.encode([r.caption for r in ready])
        good = self._sound(ready, latent, RejectReason.BAD_LATENT)
        ready, latent, text = [r for r, g in zip(ready, good, strict=True) if g], latent[good], text[good]
        good = self._sound(ready, text, RejectReason.BAD_EMBEDDING)
        ready, latent, text = [r for r, g in zip(ready, good, strict=True) if g], latent[good], text[good]
        batch = self._batch(ready, text, latent)
        self.seconds["encode"] += time.perf_counter() - began
        return batch

    def _sound(
        self, ready: list[_Ready], rows: Float32[np.ndarray, "B D"], reason: RejectReason
    ) -> Bool[np.ndarray, "B"]:
        """Which rows are finite in float16 and not zero; the others are rejected."""
        with np.errstate(over="ignore"):
            half = rows.astype(np.float16)
        good = np.asarray(np.isfinite(half).all(1) & half.any(1))
        for r, row in zip(np.array(ready, dtype=object)[~good], half[~good], strict=True):
            detail = "all zero" if not row.any() else "not finite in float16"
            self.rejects.append(_reject(r.sample, Rejected(reason, detail)))
        return good

    def _batch(
        self, ready: list[_Ready], text: Float32[np.ndarray, "B T"], latent: Float32[np.ndarray, "B L"]
    ) -> pa.RecordBatch:
        ids = [row_id(r.sample.key, r.sample.image or b"") for r in ready]
        splits = [split_of(row, self.config.val_fraction) for row in ids]
        # Statistics are those of the stored float16 values, so that they can be recomputed from the table.
        text, latent = text.astype(np.float16), latent.astype(np.float16)
        train = np.array(splits) == TRAIN
        if train.any():
            moments = Moments.of(text[train], latent[train])
            self._moments = moments if self._moments is None else self._moments + moments
        columns: dict[str, Any] = {
            "id": ids,
            "caption": [r.caption for r in ready],
            "key": [r.sample.key for r in ready],
            "shard": [r.sample.shard for r in ready],
            "split": splits,
            "width": [r.width for r in ready],
            "height": [r.height for r in ready],
            "meta": [r.sample.meta.decode() for r in ready],
            "image": [r.sample.image for r in ready],
            "text": list_array(text),
            "latent": list_array(latent),
        }
        return pa.RecordBatch.from_pydict({name: columns[name] for name in self.schema.names}, schema=self.schema)


def wanted_caption(sample: Sample, filters: Filters) -> str:
    """The caption of a sample whose text and metadata are sound and wanted; Rejected or Filtered otherwise."""
    caption = decode_caption(sample.caption)
    fields = decode_meta(sample.meta)
    filters.check_caption(caption)
    filters.check_meta(fields, caption)
    return caption


def _reject(sample: Sample | Unreadable, rejected: Rejected) -> dict[str, str]:
    return {
        "key": sample.key,
        "shard": sample.shard,
        "reason": str(rejected.reason),
        "detail": rejected.detail[:500],
    }
