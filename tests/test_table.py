"""A table is published whole, rewritten in its vectors alone, and refused where it does not fit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from index.errors import TableError
from index.space.geometry import Geometry
from index.table.schema import HELDOUT, TRAIN, TableMeta, check_table, row_id, split_of
from index.table.table import Table, column_array, list_array, open_table, rewrite_vectors, table_uri


@pytest.fixture
def copied(encoded, tmp_path) -> Table:
    """A copy of the encoded table that a test may change."""
    shutil.copytree(encoded.uri, tmp_path / "copy.lance")
    return open_table(tmp_path / "copy.lance")


def test_columns_are_those_of_the_design(encoded):
    schema = encoded.dataset().schema
    half = pa.float16()
    assert {f.name: f.type for f in schema} == {
        "id": pa.string(),
        "caption": pa.string(),
        "key": pa.string(),
        "shard": pa.string(),
        "split": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "meta": pa.string(),
        "image": pa.binary(),
        "text": pa.list_(half, 16),
        "latent": pa.list_(half, 32),
        "vector": pa.list_(half, 56),
    }


def test_stored_vectors_are_the_geometry_of_the_other_columns(encoded):
    geometry = encoded.meta.geometry
    assert (geometry.kind, geometry.desc_scale) == ("sphere", 4.0)
    vectors = geometry.vectors(encoded.column("text", None), encoded.column("latent", None))
    assert np.array_equal(encoded.column("vector", None), vectors.astype(np.float16))


def test_statistics_are_those_of_the_training_split(encoded):
    latent = encoded.column("latent", TRAIN).astype(np.float64)
    moments = encoded.meta.moments
    assert moments.count == len(latent)
    assert np.allclose(moments.latent_mean, latent.mean(0), atol=1e-9)
    assert np.allclose(moments.latent_std, latent.std(0), atol=1e-9)


def test_metadata_round_trips_exactly(encoded):
    again = TableMeta.from_json(encoded.meta.to_json())
    assert again.to_json() == encoded.meta.to_json()
    assert again.latent_shape == (2, 4, 4)


def test_split_is_by_hash_of_id_and_keeps_its_share():
    ids = [row_id(str(i), b"picture") for i in range(20_000)]
    share = np.mean([split_of(row, 0.1) == HELDOUT for row in ids])
    assert abs(share - 0.1) < 0.01
    assert all(split_of(row, 0.0) == TRAIN and split_of(row, 1.0) == HELDOUT for row in ids[:100])
    assert row_id("a", b"x") != row_id("a", b"y") != row_id("b", b"y")


def test_rewriting_changes_the_vectors_and_nothing_else(copied):
    geometry = Geometry.fit(copied.meta.moments, kind="standard", desc_scale=2.5)
    *steps, after = rewrite_vectors(copied, geometry)
    assert steps[-1] == copied.dataset().count_rows()
    assert after.version == copied.version + 1
    before = copied.dataset().to_table()
    now = after.dataset().to_table()
    assert now.drop_columns(["vector"]).equals(before.drop_columns(["vector"]))
    expected = geometry.vectors(column_array(now["text"]), column_array(now["latent"]))
    assert np.array_equal(column_array(now["vector"]), expected.astype(np.float16))
    assert open_table(copied.uri).meta.geometry.same_as(geometry)
    # Whoever has the older version open keeps it.
    assert open_table(copied.uri, version=copied.version).meta.geometry.same_as(copied.meta.geometry)
    assert copied.dataset().to_table().equals(before)


def test_rewriting_works_after_compaction(copied):
    dataset = copied.dataset()
    dataset.optimize.compact_files(target_rows_per_fragment=1000)
    compacted = open_table(copied.uri)
    assert len(compacted.dataset().get_fragments()) == 1
    geometry = Geometry.fit(copied.meta.moments, desc_scale=7.0)
    *_, after = rewrite_vectors(compacted, geometry)
    now = after.dataset().to_table()
    expected = geometry.vectors(column_array(now["text"]), column_array(now["latent"]))
    assert np.array_equal(column_array(now["vector"]), expected.astype(np.float16))


def test_take_keeps_order_and_repeats(encoded):
    offsets = np.array([7, 3, 7, 0])
    ids = encoded.dataset().to_table(columns=["id"])["id"].to_pylist()
    assert encoded.take(offsets, "id").tolist() == [ids[7], ids[3], ids[7], ids[0]]
    assert encoded.take(offsets, "text").shape == (4, 16)


@pytest.mark.parametrize("given", ["shapes", "db/shapes", ".lance", "shapes.parquet"])
def test_a_name_that_is_no_table(given):
    with pytest.raises(TableError, match=r"DB/NAME\.lance"):
        table_uri(given)


def test_a_uri_that_became_a_path_is_said():
    with pytest.raises(TableError, match=r"gs:/bucket/db/pairs.lance' has lost a slash"):
        open_table(Path("gs://bucket/db/pairs.lance"))


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(TableError, match="pipeline encode"):
        open_table(tmp_path / "none.lance")
    (tmp_path / "empty.lance" / "_versions").mkdir(parents=True)
    (tmp_path / "empty.lance" / "_versions" / "1.manifest").write_bytes(b"nothing")
    with pytest.raises(TableError, match="cannot be opened"):
        open_table(tmp_path / "empty.lance")


def test_a_table_without_index_says_what_to_type(encoded):
    with pytest.raises(TableError, match="pipeline build-index"):
        open_table(encoded.uri, indexed=True)


def test_foreign_tables_are_refused(encoded, tmp_path):
    import lance

    lance.write_dataset(pa.table({"x": [1]}), str(tmp_path / "foreign.lance"))
    with pytest.raises(TableError, match="was not written by"):
        open_table(tmp_path / "foreign.lance")


def test_widths_that_do_not_fit_are_refused(encoded):
    schema = encoded.dataset().schema
    place = schema.get_field_index("text")
    wrong = schema.set(place, pa.field("text", pa.list_(pa.float16(), 24))).with_metadata(schema.metadata)
    with pytest.raises(TableError, match=r"`text`.*24.*16 float16"):
        check_table(wrong)
    with pytest.raises(TableError, match="no column `latent`"):
        check_table(schema.remove(schema.get_field_index("latent")).with_metadata(schema.metadata))


def test_another_schema_version_is_refused(encoded):
    content = json.loads(replace(encoded.meta).to_json()) | {"schema_version": 99}
    with pytest.raises(TableError, match="schema version 99"):
        TableMeta.from_json(json.dumps(content))


def test_vectors_that_no_index_can_serve_are_counted(encoded):
    from index.report.integrity import check_vectors

    vectors = encoded.column("vector").copy()
    sound = check_vectors(encoded)
    vectors[0, 3], vectors[1, 0], vectors[2] = np.nan, np.inf, 0
    vectors[4:7] = vectors[3]
    vectors[3, -1], vectors[5, -1] = 0.0, -0.0

    class Changed(Table):
        def dataset(self):
            return self

        def to_batches(self, **_):
            for part in np.array_split(vectors, 3):
                yield pa.record_batch([list_array(part)], ["vector"])

    found = check_vectors(Changed(encoded.uri, encoded.version, encoded.meta))
    assert (found.nonfinite_vectors, found.zero_vectors) == (2, 1)
    assert found.duplicate_vectors == sound.duplicate_vectors + 3
