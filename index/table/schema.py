"""What a row is: the Arrow schema of a table and of its rejects, and the metadata that travels with them.

Axes, here and everywhere: B rows of a batch, K neighbors, N rows of a table, T width of a description embedding,
C H W a latent, L = C*H*W its numbers, S width of a search vector.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from index.errors import TableError
from index.space.geometry import Geometry
from index.space.moments import Moments

SCHEMA_VERSION = 1
METADATA_KEY = b"coalescer"
TRAIN, HELDOUT = "train", "heldout"

REJECTS = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("reason", pa.string()),  # one of pipeline.rejects.RejectReason
        pa.field("detail", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderRef:
    """Which encoder made a column: enough to open it again and to notice that it is another one."""

    name: str
    """A folder or hub id, as the user gave it."""
    kind: str
    """The class that loads it, such as AutoencoderKL or BertModel."""
    digest: str
    """SHA-256 of the weights, in hex."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexRef:
    """The index that serves a table's vectors, and how hard to search it."""

    kind: str
    """ivf_rq, ivf_pq, ivf_sq, ivf_flat, ivf_hnsw_sq, or none for exact search."""
    num_partitions: int | None
    nprobes: int | None
    """Partitions visited per query, the fewest that reach the target recall."""
    recall: float
    """recall@1 against exact search on the real query law, as measured when the index was built."""
    num_bits: int | None = None
    """Bits per dimension of IVF_RQ."""
    refine_factor: int = 1
    """How many times the wanted rows are asked for, to be ordered by exact distance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableMeta:
    """All that a trainer must know of a table, stored as JSON in its schema metadata."""

    image_encoder: EncoderRef
    text_encoder: EncoderRef
    image_size: int
    """Side of the square picture that was encoded, in pixels."""
    crop: str
    """How a picture was made square: `center`."""
    latent_shape: tuple[int, int, int]
    """C, H, W."""
    text_dim: int
    val_fraction: float
    """Share of rows whose split is `heldout`."""
    moments: Moments
    """Statistics of the training split, from which a geometry is made."""
    geometry: Geometry
    index: IndexRef | None = None
    """None until `pipeline build-index` has run."""
    run_ids: tuple[str, ...] = ()
    """One for each encode run whose rows the table holds."""
    schema_version: int = SCHEMA_VERSION

    @property
    def uses_exact_search(self) -> bool:
        """Whether no index serves the table, so that every query is compared with all rows."""
        return self.index is None or self.index.kind == "none"

    def to_json(self) -> str:
        """All fields as JSON; arrays become base64 of their little-endian bytes, so the round trip is exact."""
        content = {field: getattr(self, field) for field in self.__slots__}
        content |= {"moments": self.moments.to_dict(), "geometry": self.geometry.to_dict()}
        content |= {name: asdict(content[name]) for name in ("image_encoder", "text_encoder")}
        content["index"] = asdict(self.index) if self.index else None
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str | bytes) -> "TableMeta":
        """The inverse of `to_json`; TableError where another version of the software wrote it."""
        content: dict[str, Any] = json.loads(text)
        if content.get("schema_version") != SCHEMA_VERSION:
            raise TableError(
                f"the table has schema version {content.get('schema_version')}, this software reads "
                f"{SCHEMA_VERSION}: encode it again with `pipeline encode`"
            )
        content |= {
            "image_encoder": EncoderRef(**content["image_encoder"]),
            "text_encoder": EncoderRef(**content["text_encoder"]),
            "latent_shape": tuple(content["latent_shape"]),
            "moments": Moments.from_dict(content["moments"]),
            "geometry": Geometry.from_dict(content["geometry"]),
            "index": IndexRef(**content["index"]) if content["index"] else None,
            "run_ids": tuple(content["run_ids"]),
        }
        return cls(**content)

    def with_geometry(self, geometry: Geometry) -> "TableMeta":
        """The same table compared in another geometry, which no index serves yet."""
        return replace(self, geometry=geometry, index=None)


def row_id(key: str, image: bytes) -> str:
    """A row's id, stable across runs: 32 hex digits of SHA-256 over the source key and the image bytes."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape"))
    digest.update(b"\0")
    digest.update(image)
    return digest.hexdigest()[:32]


def split_of(row: str, val_fraction: float) -> str:
    """`heldout` for the given share of ids, `train` for the rest; the same on every machine."""
    return HELDOUT if int(row[:13], 16) < val_fraction * 16**13 else TRAIN


def encoded_schema(text_dim: int, latent_dim: int, *, keep_images: bool) -> pa.Schema:
    """The columns that encoding one shard yields: a row without its search vector."""
    fields = [
        pa.field("id", pa.string()),  # stable across runs: hash of the source key and the image bytes
        pa.field("caption", pa.string()),  # the description, as read
        pa.field("key", pa.string()),  # where it came from: the sample's name
        pa.field("shard", pa.string()),  # ... and its file
        pa.field("split", pa.string()),  # train or heldout, by hash of id
        pa.field("width", pa.int32()),  # of the original picture
        pa.field("height", pa.int32()),
        pa.field("meta", pa.string()),  # the sample's JSON sidecar, unchanged
        *([pa.field("image", pa.binary())] if keep_images else []),  # the original bytes
        pa.field("text", pa.list_(pa.float16(), text_dim)),  # description embedding
        pa.field("latent", pa.list_(pa.float16(), latent_dim)),  # as the autoencoder gives it
    ]
    return pa.schema(fields)


def vector_field(width: int) -> pa.Field:
    """The search vector: always the last column, in a data file of its own, so that it alone is rewritten."""
    return pa.field("vector", pa.list_(pa.float16(), width))


def table_schema(encoded: pa.Schema, meta: TableMeta) -> pa.Schema:
    """The whole table: the encoded columns, the search vector, and the metadata."""
    return encoded.append(vector_field(meta.geometry.vector_dim)).with_metadata({METADATA_KEY: meta.to_json()})


def check_table(schema: pa.Schema) -> TableMeta:
    """The metadata of a table whose columns fit it; TableError says what does not fit and what to type."""
    raw = (schema.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise TableError("the table was not written by `pipeline encode`: it carries no coalescer metadata")
    meta = TableMeta.from_json(raw)
    geometry = meta.geometry
    widths = {"text": geometry.text_dim, "latent": geometry.latent_dim, "vector": geometry.vector_dim}
    for name, width in widths.items():
        if name not in schema.names:
            raise TableError(f"the table has no column `{name}`: encode it again with `pipeline encode`")
        given = schema.field(name).type
        if given != pa.list_(pa.float16(), width):
            raise TableError(
                f"column `{name}` is {given}, its metadata says {width} float16: encode it again with `pipeline encode`"
            )
    return meta
