"""The job that every worker of a run receives: configuration, encoders to load, columns, and the table's metadata."""

import hashlib
import json
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa

from index.errors import EncoderError, OptionError, OutOfReachError, SourceError
from index.space.geometry import Geometry
from index.space.moments import Moments
from index.table.codec import from_json_dict
from index.table.once import write_once
from index.table.schema import EncoderRef, TableMeta, encoded_schema
from index.table.storage import Storage
from index.table.table import Table, open_table, runs_folder
from pipeline.config import DESC_SCALE, DTYPES, GEOMETRY, EncodeConfig, Part, RuntimeConfig
from pipeline.encode.checkpoints import Checkpoints, SampleCounts, ShardCheckpoint
from pipeline.encode.measured import Encoders, MeasuredEncoders, cached_encoders
from pipeline.encoders.devices import default_dtype, worker_device, worker_number
from pipeline.encoders.stored import check_encoder
from pipeline.sources.hub import without_commit
from pipeline.sources.sample import ReadOptions

OTHER_OPTIONS = (
    *("shards", "limit", "append", "max_reject_rate", "image_encoder", "text_encoder", "dtype", "image_size"),
    *("text_pooling", "text_prompt"),
    *("desc_scale", "allow_small_desc_scale", "geometry", "val_fraction", "keep_images"),
)
"""Options that do not decide which samples of a shard become rows."""
NOT_IDENTITY = ("max_reject_rate", "image_encoder", "text_encoder")
PRECISION = "precision.json"
"""File of a run with the data type that its first worker has chosen, with --dtype auto."""
SHOWN_SHARDS = 20
"""Of those that could not be read, in an error message."""


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
    encoders: MeasuredEncoders
    samples_per_shard: dict[str, int] = field(default_factory=dict)
    """How many samples to read of each shard if `limit` is set; empty: all."""
    base: TableMeta | None = None
    """Metadata of the table that rows are appended to; None for a new table."""
    has_image_hash: bool = True
    """Whether the table has that column; those of version 1 do not."""
    can_hash_images: bool = True
    """Whether images can be compared with those of the table's rows."""
    num_parts: int | None = None
    """Of a run whose shards are encoded by that many commands; None: by this one."""

    @classmethod
    def create(cls, config: EncodeConfig, runtime: RuntimeConfig, uri: str, encoders: MeasuredEncoders) -> "EncodeJob":
        """Build a job without a run; `named` gives it its run id."""
        return cls(config, runtime, uri, Checkpoints(runs_folder(uri), runtime.storage), "", encoders)

    def named(self, run_id: str) -> "EncodeJob":
        """Return the job as the run with this id, whose checkpoints are in a folder of their own."""
        checkpoints = Checkpoints(f"{runs_folder(self.uri)}/{run_id}", self.runtime.storage)
        return replace(self, run_id=run_id, checkpoints=checkpoints)

    def of_part(self, part: Part) -> "EncodeJob":
        """Return the job with every N-th shard."""
        shards = self.config.shards[part.number - 1 :: part.count]
        samples = {shard: self.samples_per_shard[shard] for shard in shards if shard in self.samples_per_shard}
        return replace(self, config=replace(self.config, shards=shards), samples_per_shard=samples)

    @property
    def image_ref(self) -> EncoderRef:
        """The image encoder, with latents normalized as those of the table that rows are appended to."""
        ref = self.encoders.image_ref
        if self.base is None:
            return ref
        stored = self.base.image_encoder
        return replace(ref, latents_mean=stored.latents_mean, latents_std=stored.latents_std)

    @property
    def text_ref(self) -> EncoderRef:
        """The text encoder."""
        return self.encoders.text_ref

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        return self.encoders.latent_shape

    @property
    def text_dim(self) -> int:
        """T."""
        return self.encoders.text_dim

    @property
    def settings_digest(self) -> str:
        """Of the settings that tell one run from another, and of the weights."""
        return _digest(run_identity(self.settings))

    @property
    def settings_digests(self) -> set[str]:
        """Of all runs that this command may be typed again for: --dtype auto is any type that workers have chosen."""
        dtypes = DTYPES if self.config.dtype == "auto" else (self.config.dtype,)
        return {_digest(run_identity(self.settings | {"dtype": dtype})) for dtype in dtypes}

    @property
    def sample_options(self) -> str:
        """Digest of the options that decide which samples of a shard become rows, and with which captions."""
        return _digest({name: value for name, value in self.config.settings.items() if name not in OTHER_OPTIONS})

    @property
    def settings(self) -> dict[str, Any]:
        """All options by name, and what both encoders are known by, JSON-ready."""
        encoders: dict[str, Any] = {
            "image_encoder": self.image_ref.name,
            "text_encoder": self.text_ref.name,
            "image_digest": self.image_ref.digest,
            "text_digest": self.text_ref.digest,
            "tokenizer_digest": self.text_ref.tokenizer_digest,
            "text_pooling": self.text_ref.pooling,
            "text_prompt": self.text_ref.prompt,
        }
        statistics = [list(self.encoders.image_ref.latents_mean), list(self.encoders.image_ref.latents_std)]
        if any(statistics):
            encoders["latents"] = statistics
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
        """Load both encoders in a worker, on its own device, with one torch thread.

        Raises EncoderError if they are not the job's, OptionError if the device is not there, or if the run has begun
        in another data type than --dtype auto gives on it.
        """
        import torch

        # More cores are used by more processes, and the last bits of a latent must not depend on the thread count.
        torch.set_num_threads(1)
        image, text = (self.image_ref.name, self.image_ref.revision), (self.text_ref.name, self.text_ref.revision)
        try:
            device = worker_device(self.runtime.device, self.runtime.first_worker + worker_number())
            image_encoder, text_encoder = cached_encoders(image, text, self.config, device, self._dtype(device))
            check_encoder(self.image_ref, image_encoder.ref, "image")
            check_encoder(self.text_ref, text_encoder.ref, "text")
        except (EncoderError, OptionError) as error:
            raise type(error)(f"worker on {socket.gethostname()}: {error}") from error
        return image_encoder.normalizing_as(self.image_ref), text_encoder

    def chosen_dtype(self) -> str | None:
        """Return the data type that the first worker of the run has chosen; None if none has, or had to."""
        stored = self.checkpoints.read(PRECISION)
        return None if stored is None else str(stored["dtype"])

    def _dtype(self, device: str) -> str:
        """Return the data type to compute in; that of --dtype auto is the same for all workers of a run, or refused."""
        if self.config.dtype != "auto":
            return self.config.dtype
        own = {"dtype": default_dtype(device), "device": device, "host": socket.gethostname()}
        run = _precision(self.checkpoints.uri(PRECISION), json.dumps(own), self.runtime.storage)
        if run["dtype"] != own["dtype"]:
            raise OptionError(
                f"--dtype auto is {own['dtype']} on {device}, and this run has begun in {run['dtype']}, on "
                f"{run['device']} of {run['host']}: add --dtype {run['dtype']}, or use workers of one kind"
            )
        return str(own["dtype"])

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
        self.check_read(counts)
        self._check_counts(counts)
        if moments is None:
            raise SourceError(f"all {counts.rows:,} rows are held out: add samples or lower --val-fraction")
        if self.base is not None:
            return replace(self.base, moments=moments, run_ids=(*self.base.run_ids, self.run_id))
        return self._new_meta(moments)

    def check_read(self, counts: SampleCounts) -> None:
        """Raise OutOfReachError, with the list, if shards could not be read and are not to be left out."""
        is_worth_publishing = counts.rows > 0 or self.base is not None or self.runtime.part is not None
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


@lru_cache(maxsize=4)
def _precision(uri: str, own: str, storage: Storage) -> dict[str, str]:
    """Return which worker of a run was the first to load its encoders, and their data type."""
    content: dict[str, str] = write_once(uri, json.loads(own), storage)
    return content


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
