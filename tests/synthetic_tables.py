"""Tables made from arrays, without encoders: as many rows and as wide as a test needs."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from index.space.geometry import Geometry
from index.space.moments import Moments
from index.table.commit import publish
from index.table.schema import HELDOUT, TRAIN, EncoderRef, TableMeta, encoded_schema
from index.table.storage import Storage
from index.table.table import list_array, open_table
from index.table.vectors import add_vectors


def write_table(uri: Path, text, latent, *, heldout=0, fragments=1, fitted=None, desc_scale=4.0, geometry="sphere"):
    """Write a table of text embeddings (N T) and latents (N L), the last `heldout` rows held out, and open it.

    The geometry is fitted to the first `fitted` training rows, or to all.
    """
    import lance

    count, size = len(text), latent.shape[1]
    encoded = encoded_schema(text.shape[1], size, keep_images=False)
    split = np.where(np.arange(count) < count - heldout, TRAIN, HELDOUT)
    numbers = [f"{number:032x}" for number in range(count)]
    values = {"id": numbers, "key": [str(number) for number in range(count)]}
    values |= {"caption": values["key"], "split": split.tolist()}
    values |= {"text": list_array(text), "latent": list_array(latent)}
    values = {
        name: values[name] if name in values else _filler(encoded.field(name).type, count) for name in encoded.names
    }
    rows = pa.Table.from_pydict(values, schema=encoded)
    written = lance.fragment.write_fragments(
        rows, str(uri), schema=encoded, mode="overwrite", max_rows_per_file=-(-count // fragments)
    )
    moments = Moments.of(text[split == TRAIN][:fitted], latent[split == TRAIN][:fitted])
    fitted = Geometry.fit(moments, name=geometry, desc_scale=desc_scale)
    encoder = EncoderRef(name="synthetic", class_name="none", digest="0" * 64)
    meta = TableMeta(
        image_encoder=encoder,
        text_encoder=encoder,
        image_size=8,
        crop="center",
        latent_shape=(1, 1, size),
        text_dim=text.shape[1],
        val_fraction=heldout / count,
        moments=moments,
        geometry=fitted,
        run_ids=("synthetic",),
    )
    with_vectors = [add_vectors(str(uri), fragment, encoded, fitted) for fragment in written]
    publish(str(uri), encoded, meta, with_vectors, "synthetic", Storage())
    return open_table(uri)


def random_table(uri: Path, rows: int, *, captions=None, text_dim=6, latent_dim=15, seed=0, **options):
    """Write a table of Gaussian latents with `captions` distinct text embeddings, or one for each row."""
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(captions or rows, text_dim))
    if captions:
        text = text[rng.integers(captions, size=rows)]
    return write_table(uri, text, rng.normal(size=(rows, latent_dim)), **options)


def _filler(kind: pa.DataType, count: int) -> pa.Array:
    if pa.types.is_fixed_size_binary(kind):
        return pa.array([number.to_bytes(kind.byte_width, "big") for number in range(count)], kind)
    return pa.array(["{}" if pa.types.is_string(kind) else 8] * count, kind)
