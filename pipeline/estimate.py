"""Estimate what a table of any size takes: bytes by column, the index, and the hours of each stage. Arithmetic alone.

What is on disk follows from Lance's format and is checked against real tables in the tests. Hours are work divided by
rates; the default rates were measured on one core of an x86-64 machine, that of the encoders is cited.
docs/clusters.md says where each comes from, and shows the estimate for LAION.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import isqrt, prod
from typing import Annotated, Any

from index.build.build_index import NUM_RECALL_QUERIES
from index.build.select import MIN_INDEXED_ROWS, types_to_try
from index.errors import OptionError
from index.ranges import COUNT, FRACTION, NOT_NEGATIVE, PIXELS, POSITIVE, PROCESSES, TOTAL, check_ranges
from index.search.kmeans import ITERATIONS, ROWS_PER_PARTITION

FLOAT16 = 2
HASH, SIZES = 16, 3
"""Bytes of the image hash, and of width, height, split and shard together."""
ID_LENGTH, KEY_LENGTH = 32.0, 9.0
ID_RATIO, KEY_RATIO, TEXT_RATIO = 0.65, 0.78, 0.55
"""Stored bytes per character of row ids, of keys, and of captions and sidecars, where Lance compresses them ..."""
COMPRESSED_FROM, OFFSET_BYTES = 2**15, 4
"""... which it does in columns of so many bytes; smaller ones take the string and its offset."""
FRAGMENT_BYTES = 10_000
"""Headers and footers of the two data files of a fragment; there is one fragment per shard."""
INDEX_ROW = 8
"""Bytes of a row id in an index."""
RQ_FACTORS = 20
"""Bytes of the five factors of a row in IVF_RQ."""
RQ_BLOCK = 64
"""Dimensions that IVF_RQ pads all bits but the first to."""
TARGET_BYTES = 7
"""Bytes of a target drawn ahead."""
SEGMENT_TYPES = ("ivf_rq", "ivf_flat")
HOUR = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """How fast one worker is. Measured on one core unless something else is said."""

    images: Annotated[float, POSITIVE] = 215.0
    """Images and captions encoded per second on a GPU of the size of an RTX 4090, at 256 pixels; in proportion to the
    pixels at other sizes. Cited."""
    layout_mb: Annotated[float, POSITIVE] = 400.0
    """Millions of bytes of text embeddings, latents and search vectors, read and written, per second."""
    gflops: Annotated[float, POSITIVE] = 25.0
    """Of comparing vectors with each other: partitions and exact search."""
    quantized: Annotated[float, POSITIVE] = 4.7e6
    """Entries of vectors quantized per second to 8 bits; 2.3 times as many to 5 bits."""
    scanned: Annotated[float, POSITIVE] = 8.4e9
    """Entries of vectors compared per second in a search of the index."""

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "Rates":
        """Return the default rates, but for those written as NAME=VALUE. Raises OptionError if one is not valid."""
        names, values = [each.name for each in fields(cls)], {}
        for text in texts:
            name, _, value = text.partition("=")
            if name not in names:
                raise OptionError(f"--rate {text!r} is unknown: use NAME=VALUE with one of {', '.join(names)}")
            try:
                values[name] = float(value)
            except ValueError:
                raise OptionError(f"--rate {text!r} is not a number: type for instance {name}=100") from None
        rates = cls(**values)
        for name in values:
            POSITIVE.check(f"--rate {name}", getattr(rates, name))
        return rates


@dataclass(frozen=True, kw_only=True, slots=True)
class TableShape:
    """What the estimate depends on."""

    rows: Annotated[int, TOTAL]
    image_size: Annotated[int, PIXELS] = 256
    latent_shape: tuple[int, int, int] | None = None
    """C, H, W; None: 4 channels at an eighth of the image size, as Stable Diffusion has them."""
    text_dim: Annotated[int, COUNT] = 768
    search_dim: Annotated[int | None, COUNT] = None
    """Dimensions of the reduced search space; None: those of text embedding and latent."""
    val_fraction: Annotated[float, FRACTION] = 0.05
    rows_per_shard: Annotated[int, COUNT] = 10_000
    caption_length: Annotated[float, NOT_NEGATIVE] = 60.0
    """Mean number of characters."""
    sidecar_length: Annotated[float, NOT_NEGATIVE] = 500.0
    """Mean number of characters of a sample's JSON."""
    image_bytes: Annotated[float, NOT_NEGATIVE] = 0.0
    """Mean size of the original images, with --keep-images."""
    index_type: str = "auto"
    max_memory: Annotated[int, POSITIVE] = 4 * 2**30
    nprobes: Annotated[int, COUNT] = 24
    """Partitions that a query visits: what a million rows of 256 dimensions need for a recall@1 of 0.95."""
    targets: Annotated[int, TOTAL] = 1_000_000_000
    """Training length in images."""
    num_workers: Annotated[int, PROCESSES] = 1
    rates: Rates = field(default_factory=Rates)

    def __post_init__(self) -> None:
        """Raise OptionError for values out of range."""
        check_ranges(self)
        if self.index_type not in ("auto", "none", *SEGMENT_TYPES):
            raise OptionError(
                f"--index-type {self.index_type!r} cannot be planned: use one of auto, none, {', '.join(SEGMENT_TYPES)}"
            )

    @property
    def latent_dim(self) -> int:
        """L."""
        return prod(self.latent_shape or self.default_latent_shape)

    @property
    def default_latent_shape(self) -> tuple[int, int, int]:
        """C, H, W of Stable Diffusion's autoencoder."""
        return (4, self.image_size // 8, self.image_size // 8)

    @property
    def vector_dim(self) -> int:
        """S: of the search vector, with the balance coordinate, rounded up to a multiple of 8."""
        return -(-((self.search_dim or self.text_dim + self.latent_dim) + 1) // 8) * 8

    @property
    def train_rows(self) -> int:
        """Rows that are not held out."""
        return round(self.rows * (1 - self.val_fraction))

    @property
    def num_shards(self) -> int:
        """Shards, and fragments of the table."""
        return -(-self.rows // self.rows_per_shard)

    @property
    def num_partitions(self) -> int:
        """Partitions of the index, those that build-index makes."""
        return max(isqrt(self.train_rows), 1)

    def index(self) -> tuple[str, int | None]:
        """Return the index type that build-index tries first, and its bits."""
        if self.index_type == "none" or (self.index_type == "auto" and self.train_rows < MIN_INDEXED_ROWS):
            return "none", None
        return types_to_try(self.index_type, self.train_rows, self.vector_dim, self.max_memory)[0]


def column_bytes(shape: TableShape) -> dict[str, float]:
    """Return the bytes per row on disk of each column, and of what a fragment adds to them."""

    def stored(length: float, ratio: float) -> float:
        return ratio * length if length * shape.rows_per_shard >= COMPRESSED_FROM else length + OFFSET_BYTES

    columns = {
        "id, key": stored(ID_LENGTH, ID_RATIO) + stored(KEY_LENGTH, KEY_RATIO),
        "caption": stored(shape.caption_length, TEXT_RATIO),
        "sidecar": stored(shape.sidecar_length, TEXT_RATIO),
        "image hash, sizes, split": HASH + SIZES,
        "image": shape.image_bytes,
        "text": FLOAT16 * shape.text_dim,
        "latent": FLOAT16 * shape.latent_dim,
        "vector": FLOAT16 * shape.vector_dim,
        "file headers": FRAGMENT_BYTES / shape.rows_per_shard,
    }
    return {name: float(size) for name, size in columns.items() if size}


def index_bytes(shape: TableShape) -> int:
    """Return the size of the index on disk."""
    kind, bits = shape.index()
    dim = shape.vector_dim
    if kind == "none":
        return 0
    row = float(INDEX_ROW + FLOAT16 * dim)
    if bits is not None:
        row = INDEX_ROW + RQ_FACTORS + (dim + (bits - 1) * -(-dim // RQ_BLOCK) * RQ_BLOCK) / 8
    return round(row * shape.rows + FLOAT16 * dim * shape.num_partitions)


def worker_hours(shape: TableShape) -> dict[str, float]:
    """Return the hours that one worker would need for each stage."""
    rates, (kind, bits) = shape.rates, shape.index()
    dim, partitions = shape.vector_dim, shape.num_partitions
    moved = FLOAT16 * (shape.text_dim + shape.latent_dim + dim)
    seconds = {
        "encode": shape.rows / (rates.images * (256 / shape.image_size) ** 2),
        "lay out vectors": shape.rows * moved / (rates.layout_mb * 1e6),
        "exact recall of the report": 2 * NUM_RECALL_QUERIES * 2 * shape.train_rows * dim / (rates.gflops * 1e9),
    }
    per_query = float(shape.train_rows * dim)
    if kind != "none":
        sample = min(partitions * ROWS_PER_PARTITION, shape.train_rows)
        compared = 2 * (ITERATIONS * sample + shape.rows) * partitions * dim
        seconds["index: partitions"] = compared / (rates.gflops * 1e9)
        per_query = (partitions + shape.nprobes * shape.train_rows / partitions) * dim
    if bits is not None:
        seconds["index: quantize"] = shape.rows * dim / (rates.quantized * (1 if bits > 5 else 2.3))
    seconds["draw targets"] = shape.targets * per_query / rates.scanned
    return {name: value / HOUR for name, value in seconds.items()}


def estimate(shape: TableShape) -> dict[str, Any]:
    """Return all of it, JSON-ready: settings, bytes, index, hours, and what training reads."""
    columns, (kind, bits) = column_bytes(shape), shape.index()
    totals = {name: round(size * shape.rows) for name, size in columns.items()} | {"index": index_bytes(shape)}
    hours = worker_hours(shape)
    target = FLOAT16 * (shape.text_dim + shape.latent_dim)
    return {
        "settings": asdict(replace(shape, latent_shape=shape.latent_shape or shape.default_latent_shape)),
        "rows": shape.rows,
        "shards": shape.num_shards,
        "vector_dim": shape.vector_dim,
        "bytes_per_row": {name: round(size / shape.rows, 2) for name, size in totals.items()}
        | {"all": round(sum(totals.values()) / shape.rows, 2)},
        "bytes": totals | {"all": sum(totals.values())},
        "index": {
            "index_type": kind,
            "num_bits": bits,
            "num_partitions": None if kind == "none" else shape.num_partitions,
        },
        "worker_hours": hours,
        "hours": {name: value / shape.num_workers for name, value in hours.items()},
        "targets": {
            "targets": shape.targets,
            "bytes_drawn_ahead": TARGET_BYTES * shape.targets,
            "bytes_read_per_target": target,
            "bytes_read": target * shape.targets,
        },
    }


def tables_of(result: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return an estimate as tables to print: title -> row -> column -> value."""
    index, targets = result["index"], result["targets"]
    kind = index["index_type"]
    if kind != "none":
        bits = f", {index['num_bits']} bits" if index["num_bits"] else ""
        kind = f"{kind.upper()}{bits}, {index['num_partitions']:,} partitions"
    title = f"{result['rows']:,} rows in {result['shards']:,} shards, vectors of {result['vector_dim']:,}; index {kind}"
    num_workers = result["settings"]["num_workers"]
    return {
        title: {
            name: {"bytes per row": f"{size:,.0f}", "GB": f"{result['bytes'][name] / 1e9:,.1f}"}
            for name, size in result["bytes_per_row"].items()
        },
        "\nhours": {
            name: {"of one worker": f"{value:,.1f}", f"of {num_workers:,}": f"{result['hours'][name]:,.2f}"}
            for name, value in result["worker_hours"].items()
        },
        f"\n{targets['targets']:,} training images": {
            "targets drawn ahead": {"GB": f"{targets['bytes_drawn_ahead'] / 1e9:,.1f}"},
            "read by training": {"GB": f"{targets['bytes_read'] / 1e9:,.1f}"},
        },
    }
