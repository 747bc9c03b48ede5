"""The options of an encode run: `EncodeConfig` decides what the table holds, `RuntimeConfig` how the work is done."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from index.errors import OptionError
from index.ranges import COUNT, FRACTION, PIXELS, POSITIVE, PROCESSES, TOTAL, check_ranges
from index.space.geometry import GEOMETRIES, check_desc_scale
from index.table.storage import Storage
from pipeline.filters import Filters
from pipeline.sources.sample import MAX_SAMPLE_BYTES, ReadOptions

DTYPES = ("float32", "bfloat16", "float16", "auto")
DESC_SCALE, GEOMETRY = 4.0, "sphere"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeConfig:
    """Everything that the rows of a table depend on. Saved in the report; another one is refused for the same table."""

    shards: tuple[str, ...]
    image_encoder: str
    """Folder or hub id of a diffusers autoencoder."""
    text_encoder: str
    """Folder or hub id of a transformers or sentence-transformers text model."""
    text_pooling: str | None = None
    """How its vector is made, one of `pipeline.encoders.families.POOLINGS`; None: as the model's family does."""
    text_prompt: str | None = None
    """Text that is put before each caption; None: the model's own default."""
    image_size: Annotated[int, PIXELS]
    """Side of the square image that is encoded, in pixels."""
    image_key: str | None = None
    """Column or tar extension of the image; None tries the usual names."""
    caption_key: str | None = None
    """Column, tar extension or sidecar field of the caption; None tries the usual names."""
    captions: str = "first"
    """Of an image with several captions: first, or all as one sample each."""
    max_sample_mb: Annotated[float, POSITIVE] = MAX_SAMPLE_BYTES / 2**20
    """Larger samples, in MiB of their files, are rejected without being read or decompressed."""
    filters: Filters = field(default_factory=Filters)
    dtype: str = "float32"
    """Of the encoders' computation; auto: as the workers' device likes it. The table stores float16 in any case."""
    desc_scale: float | None = None
    """Weight of the text embedding in the search vector; None: 4, or the table's own with `append`."""
    allow_small_desc_scale: bool = False
    """Accept a `desc_scale` of 1 or less."""
    geometry: str | None = None
    """sphere, standard or raw; None: sphere, or the table's own with `append`."""
    val_fraction: Annotated[float, FRACTION] = 0.05
    """Fraction of rows held out from training."""
    keep_images: bool = False
    """Store the original image bytes with each row."""
    limit: Annotated[int | None, TOTAL] = None
    """Number of samples to read in total; None reads all."""
    max_reject_rate: Annotated[float, FRACTION] = 0.5
    """A larger fraction of rejected samples stops the run before the table is published."""
    append: bool = False
    """Add the shards that an existing table does not hold; its geometry stays."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "EncodeConfig":
        """Build a config without shards from options by name; those of `Filters` become its `filters`."""
        names = {each.name for each in fields(Filters)}
        filters = Filters(**{name: value for name, value in options.items() if name in names})
        return cls(shards=(), filters=filters, **{k: value for k, value in options.items() if k not in names})

    def __post_init__(self) -> None:
        """Check every option's value; raises OptionError before anything is read."""
        if self.desc_scale is not None:
            check_desc_scale(self.desc_scale, allow_small=self.allow_small_desc_scale)
        if self.geometry is not None and self.geometry not in GEOMETRIES:
            raise OptionError(f"--geometry {self.geometry!r} is unknown: use one of {', '.join(GEOMETRIES)}")
        if self.dtype not in DTYPES:
            raise OptionError(f"--dtype {self.dtype!r} is unknown: use one of {', '.join(DTYPES)}")
        check_ranges(self)
        ReadOptions(captions=self.captions, max_sample_bytes=int(self.max_sample_mb * 2**20))
        if self.captions == "all" and self.filters.dedup == "image":
            raise OptionError("--dedup image keeps one caption of each image, against --captions all: use --dedup pair")

    @property
    def settings(self) -> dict[str, Any]:
        """All options by name, JSON-ready."""
        content: dict[str, Any] = asdict(self)
        filters: dict[str, Any] = content.pop("filters")
        return {**content, "shards": list(self.shards), **filters}


@dataclass(frozen=True, slots=True)
class Part:
    """One of several commands that share the shards of a run."""

    number: int
    """From 1."""
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Parse I/N. Raises OptionError if it is not of this form, or if I is not from 1 to N."""
        found = re.fullmatch(r"0*(\d{1,7})/0*(\d{1,7})", text)
        part = cls(int(found[1]), int(found[2])) if found else None
        if part is None or not 1 <= part.number <= part.count:
            raise OptionError(f"--part {text!r} is not I/N with I from 1 to N: type for instance --part 1/8")
        return part

    def __str__(self) -> str:
        """Return I/N."""
        return f"{self.number}/{self.count}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """How the work is done; the table does not depend on it."""

    num_workers: Annotated[int, PROCESSES] = 1
    """Processes of Beam's local runner, one torch thread each."""
    batch_size: Annotated[int, COUNT] = 64
    """Images or captions encoded at a time."""
    device: str = "auto"
    """Torch device of the encoders, chosen in the workers; auto prefers a GPU."""
    storage: Storage = field(default_factory=Storage)
    """How to reach object stores."""
    allow_missing_shards: bool = False
    """Publish without shards that cannot be read; the next run fetches them."""
    beam_options: tuple[str, ...] = ()
    """Beam's own options as `--name=value`; they override those that `num_workers` implies."""

    part: Part | None = None
    """Which shards of the run this command encodes, without publishing them; None: all."""

    def __post_init__(self) -> None:
        """Raise OptionError if a number is out of range."""
        check_ranges(self)

    @property
    def first_worker(self) -> int:
        """Number of this command's first worker, as if all parts had started on one machine."""
        return 0 if self.part is None else (self.part.number - 1) * self.num_workers

    @property
    def decode_threads(self) -> int:
        """Threads of each process that decode images while the encoders run."""
        return max(1, (os.cpu_count() or 1) // self.num_workers)

    def read_options(self, config: EncodeConfig) -> ReadOptions:
        """Return the options with which readers open the shards of `config`."""
        max_bytes = int(config.max_sample_mb * 2**20)
        return ReadOptions(config.image_key, config.caption_key, self.storage, config.captions, max_bytes)
