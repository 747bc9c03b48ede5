"""What an encode run is asked for: `EncodeConfig` says what the table holds, `RuntimeConfig` how the work is done."""

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from index.errors import OptionError
from index.space.geometry import KINDS, check_desc_scale
from index.table.storage import Storage
from pipeline.filters import Filters
from pipeline.sources.sample import ReadOptions

DTYPES = ("float32", "bfloat16", "float16")
DESC_SCALE, GEOMETRY = 4.0, "sphere"


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
    image_key: str | None = None
    """Column or tar ending of the picture; None: the usual names."""
    caption_key: str | None = None
    """Column, tar ending or sidecar key of the caption; None: the usual names."""
    filters: Filters = field(default_factory=Filters)
    dtype: str = "float32"
    """What the encoders compute in; the table holds float16 in any case."""
    desc_scale: float | None = None
    """Weight of the description in the search, 4 unless given; `pipeline build-index` can change it later."""
    allow_small_desc_scale: bool = False
    geometry: str | None = None
    """sphere unless given."""
    val_fraction: float = 0.05
    """Share of rows kept from training, for measuring."""
    keep_images: bool = False
    """Store the original bytes with each row."""
    limit: int | None = None
    """Samples to read in all; None reads everything."""
    max_reject_rate: float = 0.5
    """A larger share of rejects stops the run before the table is published."""
    append: bool = False
    """Add the shards that an existing table does not have; its geometry stays."""

    def __post_init__(self) -> None:
        """Refuse what cannot be encoded before anything is read."""
        if self.desc_scale is not None:
            check_desc_scale(self.desc_scale, allow_small=self.allow_small_desc_scale)
        if self.geometry is not None and self.geometry not in KINDS:
            raise OptionError(f"--geometry {self.geometry!r} is unknown: choose one of {', '.join(KINDS)}")
        if self.dtype not in DTYPES:
            raise OptionError(f"--dtype {self.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
        for name in ("val_fraction", "max_reject_rate"):
            if not 0 <= getattr(self, name) <= 1:
                flag = name.replace("_", "-")
                raise OptionError(f"--{flag} {getattr(self, name):g} is not a share: give a number from 0 to 1")
        if self.image_size < 8:
            raise OptionError(f"--image-size {self.image_size} is too small: give the side in pixels, for instance 64")
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"--limit {self.limit} reads nothing: give a number of samples above 0")

    @property
    def settings(self) -> dict[str, Any]:
        """All of it by option name, JSON-ready."""
        content: dict[str, Any] = asdict(self)
        filters: dict[str, Any] = content.pop("filters")
        return {**content, "shards": list(self.shards), **filters}


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """How the work is done; none of it changes the table."""

    num_workers: int = 1
    """Processes of the local runner, one torch thread each."""
    batch_size: int = 64
    device: str = "auto"
    storage: Storage = field(default_factory=Storage)
    beam_options: tuple[str, ...] = ()
    """Beam's own options; they override the local runner that `workers` sets up."""

    @property
    def decode_threads(self) -> int:
        """Threads that decode pictures while the encoders work, in each process."""
        return max(1, (os.cpu_count() or 1) // self.num_workers)

    def reading(self, config: EncodeConfig) -> ReadOptions:
        """How samples are read."""
        return ReadOptions(config.image_key, config.caption_key, self.storage)
