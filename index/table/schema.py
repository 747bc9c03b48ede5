"""What a row is: the Arrow schema of a table and of its rejects, and the metadata that is stored with them.

Axes, here and everywhere: B rows of a batch, K neighbors, N rows of a table, T entries of a text embedding, C H W a
latent, L = C*H*W its entries, S entries of a search vector.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from index.errors import TableError
from index.space.geometry import Geometry
from index.space.moments import Moments
from index.table.codec import from_json_dict, to_json_dict
from index.table.migrations import SCHEMA_VERSION, migrate

METADATA_KEY = b"coalescer"
TRAIN, HELDOUT = "train", "heldout"
HASH_BYTES = 16
"""Length of an image hash, and of a row id as bytes."""

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
    """Which encoder wrote a column: enough to load it again and to notice that it has changed."""

    name: str
    """Absolute folder, or hub id without its revision."""
    class_name: str
    """Class that loads it, such as AutoencoderKL or BertModel."""
    digest: str
    """SHA-256 of the weights, in hex."""
    tokenizer_digest: str | None = None
    """SHA-256 of a text encoder's tokenizer, in hex; None for image encoders and tables of version 1."""
    revision: str | None = None
    """Commit of a hub id; None for a folder."""
    pooling: str = ""
    """How a text encoder's vector is made, such as mean; empty for image encoders."""
    prompt: str = ""
    """Text that a text encoder is given before each caption."""
    latents_mean: tuple[float, ...] = ()
    """What is subtracted from each channel of an image encoder's latents; empty: latents are stored unchanged."""
    latents_std: tuple[float, ...] = ()
    """What each channel is then divided by."""
    unknown: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Fields of other versions of the software, kept unchanged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexRef:
    """The index that serves a table's vectors, and the parameters to search it with."""

    index_type: str
    """ivf_rq, ivf_pq, ivf_sq, ivf_flat, ivf_hnsw_sq, or none for exact search."""
    num_partitions: int | None
    nprobes: int | None
    """Partitions visited per query, the fewest that reach the target recall."""
    recall_at_1: float
    """Against exact search on queries that did not choose nprobes, as measured when the index was built."""
    num_bits: int | None = None
    """Bits per dimension of IVF_RQ."""
    refine_factor: int = 1
    """k * refine_factor rows are retrieved and reordered by exact distance."""
    uuid: str | None = None
    """UUID of the Lance index that this describes; another one in the table does not serve. None for exact search, and
    in metadata of version 1."""
    unknown: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Fields of other versions of the software, kept unchanged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableMeta:
    """All that a trainer must know of a table, stored as JSON in the metadata of its schema."""

    image_encoder: EncoderRef
    text_encoder: EncoderRef
    image_size: int
    """Side of the square image that was encoded, in pixels."""
    crop: str
    """How an image was made square: `center`."""
    latent_shape: tuple[int, int, int]
    """C, H, W."""
    text_dim: int
    """T."""
    val_fraction: float
    """Fraction of rows whose split is `heldout`."""
    moments: Moments
    """Sums over the training split, from which a geometry is fitted."""
    geometry: Geometry
    balanced: bool | None = None
    """Whether a balance coordinate is stored that is not 0; None if an earlier version of the software wrote the
    vectors, which did not say it."""
    index: IndexRef | None = None
    """None until `pipeline build-index` has run."""
    run_ids: tuple[str, ...] = ()
    """One for each encode run whose rows the table holds."""
    schema_version: int = SCHEMA_VERSION
    unknown: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Fields of other versions of the software, kept unchanged."""

    @property
    def uses_exact_search(self) -> bool:
        """Whether no index serves the table, so that each query is compared with all training rows."""
        return self.index is None or self.index.index_type == "none"

    def to_json(self) -> str:
        """Write all fields as JSON; arrays are base64, so the round trip is exact."""
        return json.dumps(to_json_dict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "TableMeta":
        """Read what `to_json` wrote, now or in an earlier version.

        Raises TableError if a newer version of the software wrote it.
        """
        return from_json_dict(cls, migrate(json.loads(text)))

    def with_geometry(self, geometry: Geometry, *, balanced: bool = False) -> "TableMeta":
        """Return the metadata for vectors of another geometry, which no index serves yet."""
        return replace(self, geometry=geometry, balanced=balanced, index=None)


def content_hash(content: bytes) -> bytes:
    """Return the first 16 bytes of the SHA-256 of an image's bytes, which tell exact duplicates from other images."""
    return hashlib.sha256(content).digest()[:HASH_BYTES]


def sample_id(key: str, image: bytes, caption: str | None = None) -> str:
    """Return a row's id, the same in every run and place: 32 hex digits of SHA-256 over key, image bytes and caption.

    None as the caption gives the id that tables without the column `image_hash` have, those of version 1.
    """
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape"))
    digest.update(b"\0")
    if caption is None:
        digest.update(image)
    else:
        # The hash of the image has a fixed length, so no image and caption give the bytes of another pair.
        digest.update(hashlib.sha256(image).digest())
        digest.update(caption.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[: 2 * HASH_BYTES]


def split_of(image_hash: bytes, val_fraction: float) -> str:
    """Return the split of an image: `heldout` for `val_fraction` of all hashes, else `train`; the same everywhere.

    It depends on the image alone, so that no image is in both splits, whatever its keys and captions are.
    """
    return HELDOUT if int(image_hash.hex()[:13], 16) < val_fraction * 16**13 else TRAIN


def encoded_schema(text_dim: int, latent_dim: int, *, keep_images: bool, image_hash: bool = True) -> pa.Schema:
    """Return the columns that encoding writes: those of a row without its search vector.

    Tables of version 1 have no `image_hash`.
    """
    fields = [
        pa.field("id", pa.string()),  # stable across runs: hash of the source key, the image bytes and the caption
        pa.field("caption", pa.string()),  # as read
        pa.field("key", pa.string()),  # the sample's name in its source
        pa.field("shard", pa.string()),  # ... and its file
        pa.field("split", pa.string()),  # train or heldout, by image_hash
        *([pa.field("image_hash", pa.binary(HASH_BYTES))] if image_hash else []),  # of the original bytes
        pa.field("width", pa.int32()),  # of the original image, in pixels
        pa.field("height", pa.int32()),
        pa.field("meta", pa.string()),  # the sample's JSON sidecar, unchanged
        *([pa.field("image", pa.binary())] if keep_images else []),  # the original bytes
        pa.field("text", pa.list_(pa.float16(), text_dim)),  # text embedding
        pa.field("latent", pa.list_(pa.float16(), latent_dim)),  # of the autoencoder, normalized if it says how
    ]
    return pa.schema(fields)


def vector_field(dim: int) -> pa.Field:
    """Return the field of the search vector: always the last column, in data files of its own, rewritten alone."""
    return pa.field("vector", pa.list_(pa.float16(), dim))


def table_schema(encoded: pa.Schema, meta: TableMeta) -> pa.Schema:
    """Return the schema of the whole table: the encoded columns, the search vector, and the metadata."""
    return encoded.append(vector_field(meta.geometry.vector_dim)).with_metadata({METADATA_KEY: meta.to_json()})


def check_table(schema: pa.Schema) -> TableMeta:
    """Return the metadata of a table's schema.

    Raises TableError if there is none, if a newer version wrote it, or if the columns do not have its dimensions.
    """
    raw = (schema.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise TableError("the table has no coalescer metadata: it was not written by `pipeline encode`")
    meta = TableMeta.from_json(raw)
    geometry = meta.geometry
    dims = {"text": geometry.text_dim, "latent": geometry.latent_dim, "vector": geometry.vector_dim}
    for name, dim in dims.items():
        if name not in schema.names:
            raise TableError(f"the table has no column `{name}`: encode it again with `pipeline encode`")
        column_type = schema.field(name).type
        if column_type != pa.list_(pa.float16(), dim):
            raise TableError(
                f"column `{name}` is {column_type}, but the metadata says {dim} float16: "
                "encode the table again with `pipeline encode`"
            )
    return meta
