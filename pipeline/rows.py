"""One shard's samples become rows: the config of an encode run, and the job that is sent to every worker.

Every sample either becomes a row or stands in the rejects table with a reason.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, UInt8

from index.errors import OptionError, SourceError
from index.geometry import KINDS, Geometry, check_desc_scale
from index.moments import Moments
from index.schema import TRAIN, EncoderRef, TableMeta, encoded_schema, row_id, split_of
from index.table import list_array
from pipeline.encoders import DiffusersAutoencoder, TransformersTextEncoder, pick_device
from pipeline.images import Reason, Rejected, decode_caption, decode_image
from pipeline.sink import ShardPart
from pipeline.sources import Broken, Sample, read_samples


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeConfig:
    """What a table's content depends on. Saved in the report; a changed one is refused for an existing table."""

    shards: tuple[str, ...]
    image_encoder: str
    """Folder or hub id of a diffusers autoencoder."""
    text_encoder: str
    """Folder or hub id of a transformers text model."""
    image_size: int
    """Side of the square that is encoded, in pixels."""
    desc_scale: float = 4.0
    """Weight of the description in the search; `pipeline build-index` can change it later."""
    allow_small_desc_scale: bool = False
    geometry: str = "sphere"
    heldout_share: float = 0.05
    """Share of rows kept from training, for measuring."""
    keep_images: bool = False
    """Store the original bytes with each row."""
    limit: int | None = None
    """Samples to read in all; None reads everything."""
    max_reject_share: float = 0.5
    """A larger share of rejects stops the run before the table is published."""

    def __post_init__(self) -> None:
        """Refuse what cannot be encoded before anything is read."""
        check_desc_scale(self.desc_scale, allow_small=self.allow_small_desc_scale)
        if self.geometry not in KINDS:
            raise OptionError(f"--geometry {self.geometry!r} is unknown: choose one of {', '.join(KINDS)}")
        for name in ("heldout_share", "max_reject_share"):
            if not 0 <= getattr(self, name) <= 1:
                flag = name.replace("_", "-")
                raise OptionError(f"--{flag} {getattr(self, name):g} is not a share: give a number from 0 to 1")
        if self.image_size < 8:
            raise OptionError(f"--image-size {self.image_size} is too small: give the side in pixels, for instance 64")
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"--limit {self.limit} reads nothing: give a number of samples above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How the work is done; none of it changes the table."""

    workers: int = 1
    """Processes of the local runner, one torch thread each."""
    batch_size: int = 64
    device: str = "auto"
    beam_options: tuple[str, ...] = ()
    """Beam's own options; they override the local runner that `workers` sets up."""


@lru_cache(maxsize=1)
def open_encoders(
    image_encoder: str, text_encoder: str, device: str
) -> tuple[DiffusersAutoencoder, TransformersTextEncoder]:
    """Both encoders, loaded once per process."""
    device = pick_device(device)
    return DiffusersAutoencoder(image_encoder, device), TransformersTextEncoder(text_encoder, device)


@dataclass(slots=True)
class EncodeJob:
    """Makes rows of shards. Pickled to every worker, so it holds config and loads its encoders there."""

    config: EncodeConfig
    run: RunConfig
    image_ref: EncoderRef
    text_ref: EncoderRef
    latent_shape: tuple[int, int, int]
    text_width: int
    run_id: str
    takes: dict[str, int] = field(default_factory=dict)
    """Samples to read of each shard, where a limit was set."""

    @property
    def schema(self) -> pa.Schema:
        """The columns of a row without its search vector."""
        return encoded_schema(self.text_width, int(np.prod(self.latent_shape)), keep_images=self.config.keep_images)

    def open(self, shard: str) -> "EncodeShard":
        """Begin one shard."""
        import torch

        if self.run.workers > 1:
            torch.set_num_threads(1)
        encoders = open_encoders(self.config.image_encoder, self.config.text_encoder, self.run.device)
        return EncodeShard(self, shard, *encoders)

    def meta(self, parts: list[ShardPart]) -> TableMeta:
        """The table's metadata; SourceError where too much was rejected."""
        rows, rejected = sum(part.rows for part in parts), sum(part.rejected for part in parts)
        reasons = dict(sum((Counter(part.summary["reasons"]) for part in parts), Counter()))
        if rows == 0 or rejected > self.config.max_reject_share * (rows + rejected):
            raise SourceError(
                f"{rejected:,} of {rows + rejected:,} samples were rejected ({_listed(reasons)}): "
                "nothing was published; mend the source, or raise --max-reject-share"
            )
        parts = [part for part in parts if part.summary["moments"]]
        if not parts:
            raise SourceError(f"all {rows:,} rows are held out: add samples or lower --heldout-share")
        moments = Moments.from_dict(parts[0].summary["moments"])
        for part in parts[1:]:
            moments += Moments.from_dict(part.summary["moments"])
        geometry = Geometry.fit(
            moments,
            kind=self.config.geometry,
            desc_scale=self.config.desc_scale,
            allow_small_desc_scale=self.config.allow_small_desc_scale,
        )
        return TableMeta(
            image_encoder=self.image_ref,
            text_encoder=self.text_ref,
            image_size=self.config.image_size,
            crop="centre",
            latent_shape=self.latent_shape,
            text_width=self.text_width,
            heldout_share=self.config.heldout_share,
            moments=moments,
            geometry=geometry,
            run_ids=(self.run_id,),
        )


@dataclass(slots=True)
class _Ready:
    """A sample that was decoded and waits for its batch."""

    sample: Sample
    caption: str
    pixels: UInt8[np.ndarray, "H W 3"]
    width: int
    height: int


class EncodeShard:
    """One shard on its way: read, decode, encode, row by row into record batches."""

    def __init__(self, job: EncodeJob, shard: str, image: DiffusersAutoencoder, text: TransformersTextEncoder) -> None:
        """Count from zero; nothing is read before `batches`."""
        self.job, self.shard, self._image, self._text = job, shard, image, text
        self.rejects: list[dict[str, str]] = []
        self.seconds = dict.fromkeys(("read", "decode", "encode", "write"), 0.0)
        self._moments: Moments | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """Statistics of the training rows, rejects by reason, seconds by step; JSON-ready."""
        return {
            "moments": self._moments.to_dict() if self._moments else None,
            "reasons": dict(Counter(reject["reason"] for reject in self.rejects)),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The shard's rows."""
        ready: list[_Ready] = []
        for sample in self._samples():
            began = time.perf_counter()
            try:
                caption = decode_caption(sample.caption)
                picture = decode_image(sample.image, self.job.config.image_size)
                ready.append(_Ready(sample, caption, picture.pixels, picture.width, picture.height))
            except Rejected as rejected:
                self._reject(sample.key, rejected)
            self.seconds["decode"] += time.perf_counter() - began
            if len(ready) == self.job.run.batch_size:
                yield self._encode(ready)
                ready = []
        if ready:
            yield self._encode(ready)

    def _samples(self) -> Iterator[Sample]:
        take = self.job.takes.get(self.shard)
        began = time.perf_counter()
        for number, sample in enumerate(read_samples(self.shard)):
            self.seconds["read"] += time.perf_counter() - began
            if number == take:
                return
            if isinstance(sample, Broken):
                self._reject("", Rejected(Reason.BROKEN_SHARD, sample.detail))
            else:
                yield sample
            began = time.perf_counter()

    def _encode(self, ready: list[_Ready]) -> pa.RecordBatch:
        began = time.perf_counter()
        latent = self._image.encode(np.stack([r.pixels for r in ready])).reshape(len(ready), -1)
        text = self._text.encode([r.caption for r in ready])
        self.seconds["encode"] += time.perf_counter() - began
        began = time.perf_counter()
        good = self._sound(ready, latent, Reason.BAD_LATENT) & self._sound(ready, text, Reason.BAD_EMBEDDING)
        rows, latent, text = [r for r, g in zip(ready, good, strict=True) if g], latent[good], text[good]
        batch = self._batch(rows, text, latent)
        self.seconds["write"] += time.perf_counter() - began
        return batch

    def _sound(self, ready: list[_Ready], rows: Float32[np.ndarray, "B D"], reason: Reason) -> Bool[np.ndarray, "B"]:
        """Which rows are finite in float16 and not zero; the others are rejected."""
        with np.errstate(over="ignore"):
            half = rows.astype(np.float16)
        good = np.asarray(np.isfinite(half).all(1) & half.any(1))
        for r, row in zip(np.array(ready, dtype=object)[~good], half[~good], strict=True):
            self._reject(r.sample.key, Rejected(reason, "all zero" if not row.any() else "not finite in float16"))
        return good

    def _batch(
        self, ready: list[_Ready], text: Float32[np.ndarray, "B T"], latent: Float32[np.ndarray, "B L"]
    ) -> pa.RecordBatch:
        config, schema = self.job.config, self.job.schema
        ids = [row_id(r.sample.key, r.sample.image or b"") for r in ready]
        splits = [split_of(row, config.heldout_share) for row in ids]
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
            "meta": [r.sample.meta for r in ready],
            "image": [r.sample.image for r in ready],
            "text": list_array(text),
            "latent": list_array(latent),
        }
        return pa.RecordBatch.from_pydict({name: columns[name] for name in schema.names}, schema=schema)

    def _reject(self, key: str, rejected: Rejected) -> None:
        self.rejects.append(
            {"key": key, "shard": self.shard, "reason": str(rejected.reason), "detail": rejected.detail[:500]}
        )


def _listed(reasons: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(reasons.items()))
