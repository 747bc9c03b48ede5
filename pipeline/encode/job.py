"""The job that every worker of a run receives: configuration, encoders to load, columns, and the table's metadata."""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa

from index.errors import EncoderError, OutOfReachError, SourceError
from index.space.geometry import Geometry
from index.space.moments import Moments
from index.table.codec import from_json_dict
from index.table.schema import EncoderRef, TableMeta, encoded_schema
from index.table.table import Table, open_table, runs_folder
from pipeline.config import DESC_SCALE, GEOMETRY, EncodeConfig, RuntimeConfig
from pipeline.encode.checkpoints import Checkpoints, SampleCounts, ShardCheckpoint
from pipeline.encoders.devices import resolve_device
from pipeline.encoders.files import find_encoder
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.stored import check_encoder
from pipeline.encoders.text import TransformersTextEncoder
from pipeline.sources.hub import without_commit
from pipeline.sources.sample import ReadOptions

Encoders = tuple[DiffusersAutoencoder, TransformersTextEncoder]

OTHER_OPTIONS = (
    *("shards", "limit", "append", "max_reject_rate", "image_encoder", "text_encoder", "dtype", "image_size"),
    *("text_pooling", "text_prompt"),
    *("desc_scale", "allow_small_desc_scale", "geometry", "val_fraction", "keep_images"),
)
"""Options that do not decide which samples of a shard become rows."""
NOT_IDENTITY = ("max_reject_rate", "image_encoder", "text_encoder")
SHOWN_SHARDS = 20
"""Of those that could not be read, in an error message."""
_loading = threading.Lock()


@lru_cache(maxsize=1)
def _load_encoders(
    image: tuple[str, str | None],
    text: tuple[str, str | None],
    device: str,
    dtype: str,
    pooling: str | None,
    prompt: str | None,
) -> Encoders:
    return (
        DiffusersAutoencoder(image[0], device, dtype, revision=image[1]),
        TransformersTextEncoder(text[0], device, dtype, revision=text[1], pooling=pooling, prompt=prompt),
    )


def cached_encoders(
    image: tuple[str, str | None], text: tuple[str, str | None], config: EncodeConfig, runtime: RuntimeConfig
) -> Encoders:
    """Return encoders by (name, revision), loaded once per process for any number of threads."""
    with _loading:
        device = resolve_device(runtime.device)
        return _load_encoders(image, text, device, config.dtype, config.text_pooling, config.text_prompt)


@dataclass(slots=True)
class EncodeJob:
    """Everything that a worker needs for a shard. It is pickled, so it holds names and loads the encoders there."""

    config: EncodeConfig
    runtime: RuntimeConfig
    uri: str
    """Of the table."""
    checkpoints: Checkpoints
    run_id: str
    """`settings_digest`, a dash, and a part that no other run has."""
    image_ref: EncoderRef
    text_ref: EncoderRef
    latent_shape: tuple[int, int, int]
    """C, H, W."""
    text_dim: int
    max_tokens: int
    """That the text encoder reads of a caption."""
    samples_per_shard: dict[str, int] = field(default_factory=dict)
    """How many samples to read of each shard if `limit` is set; empty: all."""
    base: TableMeta | None = None
    """Metadata of the table that rows are appended to; None for a new table."""
    has_image_hash: bool = True
    """Whether the table has that column; those of version 1 do not."""
    can_hash_images: bool = True
    """Whether images can be compared with those of the table's rows."""

    @classmethod
    def create(cls, config: EncodeConfig, runtime: RuntimeConfig, uri: str) -> "EncodeJob":
        """Load the encoders and measure their output shapes; `named` gives the job its run id."""
        image, text = find_encoder(config.image_encoder, "image"), find_encoder(config.text_encoder, "text")
        image_encoder, text_encoder = cached_encoders(image, text, config, runtime)
        return cls(
            config=config,
            runtime=runtime,
            uri=uri,
            checkpoints=Checkpoints(runs_folder(uri), runtime.storage),
            run_id="",
            image_ref=image_encoder.ref,
            text_ref=text_encoder.ref,
            latent_shape=image_encoder.latent_shape(config.image_size),
            text_dim=text_encoder.text_dim(),
            max_tokens=text_encoder.max_length,
        )

    def named(self, run_id: str) -> "EncodeJob":
        """Return the job as the run with this id, whose checkpoints are in a folder of their own."""
        checkpoints = Checkpoints(f"{runs_folder(self.uri)}/{run_id}", self.runtime.storage)
        return replace(self, run_id=run_id, checkpoints=checkpoints)

    @property
    def settings_digest(self) -> str:
        """Of the settings that tell one run from another, and of the weights."""
        return _digest(run_identity(self.settings))

    @property
    def sample_options(self) -> str:
        """Digest of the options that decide which samples of a shard become rows, and with which captions."""
        return _digest({name: value for name, value in self.config.settings.items() if name not in OTHER_OPTIONS})

    @property
    def settings(self) -> dict[str, Any]:
        """All options by name, and what both encoders are known by, JSON-ready."""
        encoders = {
            "image_encoder": self.image_ref.name,
            "text_encoder": self.text_ref.name,
            "image_digest": self.image_ref.digest,
            "text_digest": self.text_ref.digest,
            "tokenizer_digest": self.text_ref.tokenizer_digest,
            "text_pooling": self.text_ref.pooling,
            "text_prompt": self.text_ref.prompt,
        }
        return {**self.config.settings, **encoders}

    @property
    def read_options(self) -> ReadOptions:
        """The options with which readers open a shard."""
        return self.runtime.read_options(self.config)

    def reading(self, shard: str) -> ReadOptions:
        """Return the options for a worker that reads a shard, which tells this run's monitor what it waits for."""
        return replace(self.read_options, on_wait=partial(self.checkpoints.save_wait, shard))

    @property
    def schema(self) -> pa.Schema:
        """The columns of a row without its search vector."""
        return encoded_schema(
            self.text_dim, self.latent_dim, keep_images=self.config.keep_images, image_hash=self.has_image_hash
        )

    @property
    def latent_dim(self) -> int:
        """Dimensions of a flattened latent, C*H*W."""
        return int(np.prod(self.latent_shape))

    def load_encoders(self) -> Encoders:
        """Load both encoders in a worker, with one torch thread; raises EncoderError if they are not the job's."""
        import torch

        # More cores are used by more processes, and the last bits of a latent must not depend on the thread count.
        torch.set_num_threads(1)
        image, text = (self.image_ref.name, self.image_ref.revision), (self.text_ref.name, self.text_ref.revision)
        image_encoder, text_encoder = cached_encoders(image, text, self.config, self.runtime)
        try:
            check_encoder(self.image_ref, image_encoder.ref, "image")
            check_encoder(self.text_ref, text_encoder.ref, "text")
        except EncoderError as error:
            raise EncoderError(f"worker on {socket.gethostname()}: {error}") from error
        return image_encoder, text_encoder

    def open_table(self) -> Table:
        """Open the newest version of the table."""
        return open_table(self.uri, storage=self.runtime.storage)

    def table_meta(self, checkpoints: Iterable[ShardCheckpoint]) -> TableMeta:
        """Return the table's metadata from the checkpoints of all shards, consumed one by one.

        Raises SourceError if a new table would have no rows or no training rows, or if too many samples were rejected.
        """
        counts, moments = SampleCounts(), None if self.base is None else self.base.moments
        for checkpoint in checkpoints:
            counts.add(checkpoint)
            if checkpoint.moments is not None:
                shard_moments = from_json_dict(Moments, checkpoint.moments)
                moments = shard_moments if moments is None else moments + shard_moments
        self._check_read(counts)
        self._check_counts(counts)
        if moments is None:
            raise SourceError(f"all {counts.rows:,} rows are held out: add samples or lower --val-fraction")
        if self.base is not None:
            return replace(self.base, moments=moments, run_ids=(*self.base.run_ids, self.run_id))
        return self._new_meta(moments)

    def _check_read(self, counts: SampleCounts) -> None:
        is_worth_publishing = counts.rows > 0 or self.base is not None
        if not counts.unread or (self.runtime.allow_missing_shards and is_worth_publishing):
            return
        names = "; ".join(
            f"{name} ({unread_reason(text)})" for name, text in list(counts.unread.items())[:SHOWN_SHARDS]
        )
        more = f"; and {len(counts.unread) - SHOWN_SHARDS:,} more" if len(counts.unread) > SHOWN_SHARDS else ""
        raise OutOfReachError(
            f"not finished: these shards could not be read: {names}{more}: {counts.shards - len(counts.unread):,} of "
            f"{counts.shards:,} shards are kept and nothing is published; rerun the same command to resume, or add "
            "--allow-missing-shards to publish without them"
        )

    def _check_counts(self, counts: SampleCounts) -> None:
        # An append may find nothing new: a nightly one mostly does.
        if not counts.rows and self.base is None:
            raise SourceError(
                f"no sample became a row: {counts}: nothing was published; fix the source or relax the filters"
            )
        if counts.reject_rate > self.config.max_reject_rate:
            raise SourceError(
                f"{counts}, above --max-reject-rate {self.config.max_reject_rate:g}: nothing was published; "
                "fix the source or raise --max-reject-rate"
            )

    def _new_meta(self, moments: Moments) -> TableMeta:
        config = self.config
        return TableMeta(
            image_encoder=self.image_ref,
            text_encoder=self.text_ref,
            image_size=config.image_size,
            crop="center",
            latent_shape=self.latent_shape,
            text_dim=self.text_dim,
            val_fraction=config.val_fraction,
            moments=moments,
            geometry=Geometry.fit(
                moments,
                name=config.geometry or GEOMETRY,
                desc_scale=config.desc_scale or DESC_SCALE,
                allow_small_desc_scale=config.allow_small_desc_scale,
            ),
            balanced=False,
            run_ids=(self.run_id,),
        )


def unread_reason(text: str) -> str:
    """Return the store's answer from the error of a shard that could not be read."""
    found = re.search(r"(?:is out of|be) reach(?:ed)? \((.*)\): check", text)
    return found[1] if found else text


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def run_identity(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that tell one run from another.

    A run that stopped for too many rejects resumes under a higher limit, so `max_reject_rate` is not one of them.
    Encoders are known by what they hold, so it also resumes after they were moved. A dataset of the hub is the same
    whatever its newest commit: the run's own is in its plan.
    """
    identity = {name: value for name, value in settings.items() if name not in NOT_IDENTITY}
    return identity | {"shards": [without_commit(shard) for shard in settings["shards"]]}
