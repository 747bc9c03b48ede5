"""Metadata of schema version 1, as the software wrote it then, opens as the present version, field by field."""

import base64
import json

import numpy as np
import pytest

from index.errors import TableError
from index.table.migrations import SCHEMA_VERSION, migrate
from index.table.schema import METADATA_KEY, EncoderRef, IndexRef, TableMeta
from index.table.table import open_table

T, L = 3, 4


def packed(array: np.ndarray) -> dict:
    """An array as version 1 wrote it."""
    code = array.dtype.newbyteorder("<").str
    return {"dtype": code, "shape": list(array.shape), "base64": base64.b64encode(array.tobytes()).decode()}


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "latent_sum": rng.normal(size=L),
        "latent_square_sum": rng.normal(size=L) ** 2,
        "text_sum": rng.normal(size=T),
        "mean": rng.normal(size=L).astype(np.float32),
        "std": rng.uniform(1, 2, L).astype(np.float32),
        "weight": rng.normal(size=(T, L)).astype(np.float32),
        "bias": rng.normal(size=L).astype(np.float32),
        "residual_std": rng.uniform(1, 2, L).astype(np.float32),
    }


@pytest.fixture
def version_1(arrays) -> dict:
    return {
        "image_encoder": {"name": "stabilityai/sd-vae-ft-mse", "kind": "AutoencoderKL", "digest": "ab" * 32},
        "text_encoder": {"name": "encoders/text", "kind": "BertModel", "digest": "cd" * 32},
        "image_size": 32,
        "crop": "centre",
        "latent_shape": [1, 2, 2],
        "text_width": T,
        "heldout_share": 0.05,
        "moments": {
            "count": 17,
            "latent_sum": packed(arrays["latent_sum"]),
            "latent_square_sum": packed(arrays["latent_square_sum"]),
            "text_sum": packed(arrays["text_sum"]),
        },
        "geometry": {
            "kind": "standard",
            "desc_scale": 2.5,
            "kappa": 1.75,
            "mean": packed(arrays["mean"]),
            "std": packed(arrays["std"]),
            "text_width": T,
            "centring": {
                "weight": packed(arrays["weight"]),
                "bias": packed(arrays["bias"]),
                "std": packed(arrays["residual_std"]),
                "explained": 0.25,
            },
        },
        "index": {
            "kind": "ivf_rq",
            "num_partitions": 12,
            "nprobes": 3,
            "recall": 0.96,
            "num_bits": 8,
            "refine": 4,
        },
        "run_ids": ["a1", "b2"],
        "schema_version": 1,
    }


def test_every_field_of_version_1_is_read(version_1, arrays):
    meta = TableMeta.from_json(json.dumps(version_1))
    assert meta.image_encoder == EncoderRef(
        name="stabilityai/sd-vae-ft-mse", class_name="AutoencoderKL", digest="ab" * 32
    )
    assert meta.text_encoder == EncoderRef(
        name="encoders/text", class_name="BertModel", digest="cd" * 32, pooling="mean"
    )
    assert (meta.image_size, meta.crop, meta.latent_shape) == (32, "center", (1, 2, 2))
    assert (meta.text_dim, meta.val_fraction, meta.run_ids) == (T, 0.05, ("a1", "b2"))
    assert meta.index == IndexRef(
        index_type="ivf_rq", num_partitions=12, nprobes=3, recall_at_1=0.96, num_bits=8, refine_factor=4
    )
    assert meta.moments.count == 17
    for name in ("latent_sum", "latent_square_sum", "text_sum"):
        assert np.array_equal(getattr(meta.moments, name), arrays[name])
        assert getattr(meta.moments, name).dtype == np.float64
    geometry = meta.geometry
    assert (geometry.name, geometry.desc_scale, geometry.kappa, geometry.text_dim) == ("standard", 2.5, 1.75, T)
    centering = geometry.centering
    read = {"mean": geometry.mean, "std": geometry.std, "weight": centering.weight, "bias": centering.bias}
    for name, array in (read | {"residual_std": centering.std}).items():
        assert np.array_equal(array, arrays[name])
        assert array.dtype == np.float32
    assert centering.explained_variance == 0.25
    assert meta.schema_version == SCHEMA_VERSION
    assert meta.unknown == meta.image_encoder.unknown == meta.index.unknown == {}


def test_a_table_of_version_1_without_index_or_centering_is_read(version_1):
    version_1["index"] = None
    version_1["geometry"]["centring"] = None
    meta = TableMeta.from_json(json.dumps(version_1))
    assert meta.index is None
    assert meta.geometry.centering is None


def test_migrated_metadata_is_written_in_the_present_version(version_1):
    written = json.loads(TableMeta.from_json(json.dumps(version_1)).to_json())
    assert written["schema_version"] == SCHEMA_VERSION
    names = {*written, *written["geometry"], *written["geometry"]["centering"], *written["index"]}
    names |= {*written["image_encoder"], *written["text_encoder"]}
    assert not names & {"kind", "heldout_share", "text_width", "centring", "explained", "recall", "refine"}
    assert migrate(written) == written


def old_names(meta: TableMeta) -> dict:
    """A table's metadata as version 1 wrote it."""
    content = json.loads(meta.to_json())
    for name in ("image_encoder", "text_encoder"):
        content[name]["kind"] = content[name].pop("class_name")
    geometry = content["geometry"]
    geometry |= {"kind": geometry.pop("name"), "text_width": geometry.pop("text_dim")}
    geometry["centring"] = geometry.pop("centering")
    content |= {"text_width": content.pop("text_dim"), "heldout_share": content.pop("val_fraction")}
    return content | {"crop": "centre", "schema_version": 1}


def test_a_lance_table_of_version_1_opens(encoded, tmp_path):
    import lance

    rows = encoded.dataset().to_table()
    metadata = {METADATA_KEY: json.dumps(old_names(encoded.meta))}
    lance.write_dataset(rows.replace_schema_metadata(metadata), tmp_path / "old.lance")
    table = open_table(tmp_path / "old.lance")
    assert table.meta.to_json() == encoded.meta.to_json()
    assert table.meta.geometry.same_as(encoded.meta.geometry)


def test_a_newer_version_is_refused(version_1):
    newer = json.dumps(version_1 | {"schema_version": SCHEMA_VERSION + 1})
    with pytest.raises(
        TableError,
        match=rf"newer version of coalescer \(schema {SCHEMA_VERSION + 1}, this one reads up to {SCHEMA_VERSION}\): "
        "pip install --upgrade coalescer",
    ):
        TableMeta.from_json(newer)


@pytest.mark.parametrize("version", [None, "2", 0])
def test_metadata_without_a_version_number_is_refused(version_1, version):
    with pytest.raises(TableError, match=f"schema_version {version!r}"):
        TableMeta.from_json(json.dumps(version_1 | {"schema_version": version}))
