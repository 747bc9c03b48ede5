"""The job that is sent to every worker: which encoders, which columns, and what a table's metadata is made of."""

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa

from index.errors import SourceError
from index.space.geometry import Geometry
from index.space.moments import Moments
from index.table.schema import EncoderRef, TableMeta, encoded_schema
from index.table.table import Table, open_table
from pipeline.config import DESC_SCALE, GEOMETRY, EncodeConfig, RuntimeConfig
from pipeline.encode.checkpoints import Checkpoints, EncodedShard
from pipeline.encode.shard import EncodeShard
from pipeline.encoders import DiffusersAutoencoder, TransformersTextEncoder, resolve_device

_loading = threading.Lock()


def open_encoders(
    image_encoder: str, text_encoder: str, device: str, dtype: str
) -> tuple[DiffusersAutoencoder, TransformersTextEncoder]:
    """Both encoders, loaded once per process, whatever number of threads asks for them."""
    with _loading:
        return _open_encoders(image_encoder, text_encoder, resolve_device(device), dtype)


@lru_cache(maxsize=1)
def _open_encoders(
    image_encoder: str, text_encoder: str, device: str, dtype: str
) -> tuple[DiffusersAutoencoder, TransformersTextEncoder]:
    return DiffusersAutoencoder(image_encoder, device, dtype), TransformersTextEncoder(text_encoder, device, dtype)


@dataclass(slots=True)
class EncodeJob:
    """Pickled to every worker, so it holds config and loads its encoders there."""

    config: EncodeConfig
    run: RuntimeConfig
    uri: str
    """The table."""
    checkpoints: Checkpoints
    run_id: str
    image_ref: EncoderRef
    text_ref: EncoderRef
    latent_shape: tuple[int, int, int]
    text_dim: int
    takes: dict[str, int] = field(default_factory=dict)
    """Samples to read of each shard, where a limit was set."""
    base: TableMeta | None = None
    """The table that rows are appended to."""

    @property
    def schema(self) -> pa.Schema:
        """The columns of a row without its search vector."""
        return encoded_schema(self.text_dim, int(np.prod(self.latent_shape)), keep_images=self.config.keep_images)

    def open(self, shard: str, *, take: int | None = None, duplicates: frozenset[int] = frozenset()) -> EncodeShard:
        """Begin one shard."""
        import torch

        # Processes are the way to use more cores, and what a latent's last bits are must not depend on their number.
        torch.set_num_threads(1)
        config, run = self.config, self.run
        encoders = open_encoders(config.image_encoder, config.text_encoder, run.device, config.dtype)
        take = self.takes.get(shard) if take is None else take
        return EncodeShard(shard, config, run, self.schema, *encoders, take=take, duplicates=duplicates)

    def table(self) -> Table:
        """The table as it is now."""
        return open_table(self.uri, storage=self.run.storage)

    def meta(self, parts: Iterable[EncodedShard]) -> TableMeta:
        """The table's metadata from all parts, one after the other; SourceError where too much was rejected."""
        tally, moments = Counts(), None if self.base is None else self.base.moments
        for part in parts:
            tally.add(part)
            if part.summary["moments"]:
                more = Moments.from_dict(part.summary["moments"])
                moments = more if moments is None else moments + more
        if not tally.rows or tally.reject_rate > self.config.max_reject_rate:
            raise SourceError(f"{tally}: nothing was published; mend the source, or raise --max-reject-rate")
        if moments is None:
            raise SourceError(f"all {tally.rows:,} rows are held out: add samples or lower --val-fraction")
        if self.base is not None:
            return replace(self.base, moments=moments, run_ids=(*self.base.run_ids, self.run_id))
        return TableMeta(
            image_encoder=self.image_ref,
            text_encoder=self.text_ref,
            image_size=self.config.image_size,
            crop="center",
            latent_shape=self.latent_shape,
            text_dim=self.text_dim,
            val_fraction=self.config.val_fraction,
            moments=moments,
            geometry=Geometry.fit(
                moments,
                kind=self.config.geometry or GEOMETRY,
                desc_scale=self.config.desc_scale or DESC_SCALE,
                allow_small_desc_scale=self.config.allow_small_desc_scale,
            ),
            run_ids=(self.run_id,),
        )


@dataclass(slots=True)
class Counts:
    """What became of the samples of some shards."""

    shards: int = 0
    rows: int = 0
    rejected: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, part: EncodedShard) -> None:
        """Count one shard."""
        self.shards += 1
        self.rows += part.rows
        self.rejected += part.rejected
        self.rejects.update(part.summary["rejects"])
        self.filtered.update(part.summary["filtered"])
        for step, seconds in part.summary["seconds"].items():
            self.seconds[step] = self.seconds.get(step, 0.0) + seconds

    @property
    def reject_rate(self) -> float:
        """Share of the samples that were wanted and could not be encoded."""
        return self.rejected / max(1, self.rows + self.rejected)

    def __str__(self) -> str:
        """In words."""
        read = self.rows + self.rejected + self.filtered.total()
        told = [f"{self.rejected:,} of {read:,} samples were rejected{_listed(self.rejects)}"]
        if self.filtered:
            told.append(f"{self.filtered.total():,} filtered{_listed(self.filtered)}")
        return ", ".join(told)


def _listed(counts: Counter[str]) -> str:
    return f" ({', '.join(f'{name} {count:,}' for name, count in sorted(counts.items()))})" if counts else ""
