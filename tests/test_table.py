"""A table is committed whole, its vectors are rewritten alone, and it is refused if columns and metadata differ."""

import hashlib
import json
import pickle
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from index.build.build_index import BuildConfig, build_index
from index.errors import TableError
from index.report.integrity import check_vectors
from index.report.report import describe
from index.search.ann import ApproximateSearch
from index.search.exact import ExactSearch
from index.space.centering import fit_centering
from index.space.geometry import Geometry
from index.space.moments import Moments
from index.table.codec import from_json_dict, to_json_dict
from index.table.commit import append_rows, commit_fragments, update_meta
from index.table.rows import RowReader
from index.table.schema import (
    HELDOUT,
    METADATA_KEY,
    TRAIN,
    IndexRef,
    TableMeta,
    check_table,
    content_hash,
    sample_id,
    split_of,
)
from index.table.table import Table, column_array, list_array, open_table, table_uri
from index.table.vectors import rewrite_vectors
from pipeline.sources.listing import list_shards


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
        "image_hash": pa.binary(16),
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
    assert (geometry.name, geometry.desc_scale) == ("sphere", 4.0)
    vectors = geometry.vectors(encoded.column("text", None), encoded.column("latent", None))
    assert np.array_equal(encoded.column("vector", None), vectors.astype(np.float16))


def test_moments_are_those_of_the_training_split(encoded):
    latent = encoded.column("latent", TRAIN).astype(np.float64)
    moments = encoded.meta.moments
    assert moments.count == len(latent)
    assert np.allclose(moments.latent_mean, latent.mean(0), atol=1e-9)
    assert np.allclose(moments.latent_std, latent.std(0), atol=1e-9)


def test_split_is_by_hash_of_the_image_and_has_its_fraction():
    hashes = [content_hash(str(i).encode()) for i in range(20_000)]
    fraction = np.mean([split_of(each, 0.1) == HELDOUT for each in hashes])
    assert abs(fraction - 0.1) < 0.01
    assert all(split_of(each, 0.0) == TRAIN and split_of(each, 1.0) == HELDOUT for each in hashes[:100])


def test_ids_cover_key_image_and_caption():
    ids = [sample_id(*each) for each in (("a", b"x", "w"), ("b", b"x", "w"), ("a", b"y", "w"), ("a", b"x", "v"))]
    assert len(set(ids)) == 4
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)
    assert sample_id("a", b"x", "yz") != sample_id("a", b"xy", "z")
    # As tables of version 1 have them.
    assert sample_id("a", b"x") == hashlib.sha256(b"a\0x").hexdigest()[:32]


# --- metadata


@pytest.mark.parametrize("centered", [False, True])
def test_metadata_round_trips_exactly(encoded, centered):
    meta = encoded.meta
    if centered:
        text, latent = encoded.column("text"), encoded.column("latent")
        meta = replace(meta, geometry=replace(meta.geometry, centering=fit_centering([(text, latent)])))
    meta = replace(meta, index=IndexRef(index_type="none", num_partitions=None, nprobes=None, recall_at_1=1.0))
    again = TableMeta.from_json(meta.to_json())
    assert again.to_json() == meta.to_json()
    assert again.geometry.same_as(meta.geometry)
    assert again.index == meta.index
    assert again.latent_shape == (2, 4, 4)
    assert again.geometry.mean.dtype == np.float32


def test_arrays_of_any_byte_order_and_shape_round_trip():
    sums = np.arange(6, dtype=">f8")
    moments = Moments(3, sums[::2].astype(">f8"), np.zeros(3), np.empty(0))
    again = from_json_dict(Moments, json.loads(json.dumps(to_json_dict(moments))))
    assert again.latent_sum.tolist() == [0.0, 2.0, 4.0]
    assert again.text_sum.shape == (0,)
    assert again.latent_sum.dtype.isnative


def test_unknown_metadata_survives_a_change(copied):
    content = json.loads(copied.meta.to_json())
    content["license"] = {"name": "CC0", "urls": ["https://example.org"]}
    content["image_encoder"]["revision"] = "abc"
    dataset = copied.dataset()
    dataset.update_schema_metadata({METADATA_KEY.decode(): json.dumps(content)}, replace=True)
    opened = open_table(copied.uri)
    index = IndexRef(index_type="none", num_partitions=None, nprobes=None, recall_at_1=1.0)
    update_meta(opened, replace(opened.meta, index=index))
    written = json.loads(open_table(copied.uri).dataset().schema.metadata[METADATA_KEY])
    assert written == content | {"index": to_json_dict(index)}


# --- versions


def test_a_version_is_opened_once(encoded):
    table = encoded.at(encoded.version)
    assert table.dataset() is table.dataset()


def test_a_table_stays_at_its_version_while_others_commit_through_its_dataset(copied):
    before = copied.dataset().schema.metadata
    after = update_meta(copied, replace(copied.meta, image_size=99))
    assert (after.version, after.meta.image_size) == (copied.version + 1, 99)
    assert copied.dataset().version == copied.version
    assert copied.dataset().schema.metadata == before


def test_a_table_is_pickled_without_its_open_dataset(encoded):
    encoded.dataset()
    again = pickle.loads(pickle.dumps(encoded))
    assert "_handle" not in vars(again)
    assert (again.uri, again.version, again.meta.to_json()) == (encoded.uri, encoded.version, encoded.meta.to_json())
    assert again.dataset().count_rows() == encoded.dataset().count_rows()


# --- reading


def test_scan_reads_columns_of_a_split_in_table_order(encoded):
    rows = encoded.dataset().to_table(columns=["id", "split"]).to_pylist()
    for split in (TRAIN, HELDOUT, None):
        ids = [each for batch in encoded.scan(["id"], split, batch_size=50) for each in batch["id"].to_pylist()]
        assert ids == [row["id"] for row in rows if split in (row["split"], None)]
    positions = encoded.positions(HELDOUT)
    assert [rows[each]["split"] for each in positions] == [HELDOUT] * len(positions)
    assert len(positions) + len(encoded.positions(TRAIN)) == len(rows)


def test_take_keeps_order_and_repeats(encoded):
    positions = np.array([7, 3, 7, 0])
    rows = encoded.dataset().to_table(columns=["id"], with_row_id=True)
    ids, row_ids = rows["id"].to_pylist(), rows["_rowid"].to_numpy().astype(np.int64)
    expected = [ids[7], ids[3], ids[7], ids[0]]
    assert encoded.take(positions, "id").tolist() == expected
    assert RowReader(encoded).take(row_ids[positions], ["id"])[0].tolist() == expected
    assert encoded.take(positions, "text").shape == (4, 16)


# --- rewriting vectors


def test_rewriting_changes_the_vectors_and_nothing_else(copied):
    geometry = Geometry.fit(copied.meta.moments, name="standard", desc_scale=2.5)
    *steps, after = rewrite_vectors(copied, geometry)
    assert steps[-1] == copied.dataset().count_rows()
    assert after.version == copied.version + 1
    before = copied.dataset().to_table()
    rows = after.dataset().to_table()
    assert rows.drop_columns(["vector"]).equals(before.drop_columns(["vector"]))
    expected = geometry.vectors(column_array(rows["text"]), column_array(rows["latent"]))
    assert np.array_equal(column_array(rows["vector"]), expected.astype(np.float16))
    assert open_table(copied.uri).meta.geometry.same_as(geometry)
    # Readers that have the older version open keep it.
    assert open_table(copied.uri, version=copied.version).meta.geometry.same_as(copied.meta.geometry)
    assert copied.dataset().to_table().equals(before)


def test_rewriting_works_after_compaction(copied):
    dataset = copied.dataset()
    dataset.optimize.compact_files(target_rows_per_fragment=1000)
    compacted = open_table(copied.uri)
    assert len(compacted.dataset().get_fragments()) == 1
    geometry = Geometry.fit(copied.meta.moments, desc_scale=7.0)
    *_, after = rewrite_vectors(compacted, geometry)
    rows = after.dataset().to_table()
    expected = geometry.vectors(column_array(rows["text"]), column_array(rows["latent"]))
    assert np.array_equal(column_array(rows["vector"]), expected.astype(np.float16))


def test_rewriting_refuses_a_table_with_added_columns(copied):
    copied.dataset().add_columns({"score": "1.0"})
    geometry = Geometry.fit(copied.meta.moments, desc_scale=7.0)
    with pytest.raises(TableError, match=r"were added or dropped.*pipeline encode"):
        list(rewrite_vectors(open_table(copied.uri), geometry))


# --- rows that LanceDB deletes, updates and compacts


def delete(table: Table) -> None:
    """Delete the whole first fragment, every fifth row of the second, and one row of the last."""
    rows = table.dataset().to_table(columns=["id"])["id"].to_pylist()
    gone = [*rows[:120], *rows[120:240:5], rows[-1]]
    table.dataset().delete(f"id IN ({', '.join(repr(each) for each in gone)})")


def update(table: Table) -> None:
    """Correct captions; LanceDB moves the rows to a new fragment."""
    import lancedb

    folder, name = table._lancedb_name()
    lancedb.connect(folder).open_table(name).update(where="split = 'heldout'", values={"caption": "corrected"})


def optimize(table: Table) -> None:
    """Compact what is left of the fragments, and remove old versions."""
    import lancedb

    delete(table)
    folder, name = table._lancedb_name()
    lancedb.connect(folder).open_table(name).optimize()
    newest = open_table(table.uri).dataset()
    newest.cleanup_old_versions(timedelta(milliseconds=1), error_if_tagged_old_versions=False)
    assert len(newest.versions()) == 1 + len(newest.tags.list())


CHANGES = pytest.mark.parametrize("change", [delete, update, optimize])


def check_vectors_of(table: Table, balance: np.ndarray) -> None:
    rows = table.dataset().to_table()
    geometry = table.meta.geometry
    expected = geometry.vectors(column_array(rows["text"]), column_array(rows["latent"]), balance)
    assert np.array_equal(column_array(rows["vector"]), expected.astype(np.float16))


@CHANGES
def test_rewriting_keeps_each_row_with_its_balance_after_changes(copied, change):
    change(copied)
    changed = open_table(copied.uri)
    count = changed.dataset().count_rows()
    before = changed.dataset().to_table()
    balance = np.arange(count, dtype=np.float32) / count
    geometry = replace(copied.meta.geometry, desc_scale=7.0)
    *steps, after = rewrite_vectors(changed, geometry, balance)
    assert (steps[-1], after.dataset().count_rows()) == (count, count)
    check_vectors_of(after, balance)
    rows = after.dataset().to_table()
    assert rows.drop_columns(["vector"]).equals(before.drop_columns(["vector"]))
    # Once more, over vectors that this rewrite has put in files of their own.
    *_, again = rewrite_vectors(after, replace(geometry, desc_scale=2.0))
    check_vectors_of(again, np.zeros(count, np.float32))


@CHANGES
def test_columns_in_memory_are_those_of_the_version(copied, change):
    columns = ("split", "caption", "text", "latent", "vector")
    before = open_table(copied.uri)
    before.hold(columns, 1000)
    assert not any(map(before.holds, columns))
    before.hold(columns, 2**30)
    assert all(map(before.holds, columns))
    change(copied)
    changed = before.at(open_table(copied.uri).version)
    assert not any(map(changed.holds, columns))
    changed.hold(columns, 2**30)
    *_, after = rewrite_vectors(changed, replace(changed.meta.geometry, desc_scale=2.0))
    assert [name for name in columns if not after.holds(name)] == ["vector"]
    after.hold(columns, 2**30)
    check_vectors_of(after, np.zeros(after.dataset().count_rows(), np.float32))
    read, order = open_table(after.uri), np.array([5, 2, 5, 0])
    for name in ("caption", "text", "latent", "vector"):
        assert np.array_equal(after.take(order, name), read.take(order, name))
        batches = [*after.column_batches(name, TRAIN, 7)]
        assert [len(batch) for batch in batches[:-1]] == [7] * (len(batches) - 1)
        assert np.array_equal(np.concatenate(batches), read.column(name))
        assert np.array_equal(np.concatenate([*read.column_batches(name, TRAIN, 7)]), read.column(name))
    assert np.array_equal(after.positions(HELDOUT), read.positions(HELDOUT))


@CHANGES
def test_positions_and_counts_are_those_of_the_rows_that_are_left(copied, change):
    change(copied)
    table = open_table(copied.uri)
    rows = table.dataset().to_table(columns=["id", "split"], with_row_id=True)
    ids, row_ids = rows["id"].to_pylist(), rows["_rowid"].to_numpy().astype(np.int64)
    for split in (TRAIN, HELDOUT):
        positions = table.positions(split)
        expected = [row["id"] for row in rows.to_pylist() if row["split"] == split]
        assert table.take(positions, "id").tolist() == expected == table.column("id", split).tolist()
        assert RowReader(table).take(row_ids[positions], ["id"])[0].tolist() == expected
        assert np.array_equal(RowReader(table).row_ids(positions), row_ids[positions])
    assert len(ids) == describe(table)["rows"] == table.dataset().count_rows()


@pytest.mark.slow
@CHANGES
def test_a_table_is_indexed_searched_and_appended_to_after_changes(shapes, encode_shapes, tmp_path, change):
    shards = list_shards([str(shapes)])
    table = encode_shapes(shards[:2], tmp_path / "t.lance").table
    table = build_index(table, BuildConfig(index_type="ivf_flat", balance=True, balance_time_limit=1.0)).table
    change(table)
    changed = open_table(table.uri)
    left = set(changed.column("id", None).tolist())
    for options in ({"balance": True, "balance_time_limit": 1.0}, {"desc_scale": 3.0}, {"geometry": "standard"}, {}):
        built = build_index(open_table(table.uri), BuildConfig(index_type="ivf_flat", **options))
        assert set(built.table.column("id", None).tolist()) == left
        assert (built.report.rows, built.report.num_unindexed_rows) == (len(left), 0)
        exact = ExactSearch(built.table)
        assert len(exact.row_ids) == built.report.train_rows == len(built.table.positions(TRAIN))
        # At all nprobes IVF_FLAT is exact search, over the rows that are left alone.
        queries = built.table.column("vector")[:64].astype(np.float32)
        partitions = built.table.meta.index.num_partitions
        found = ApproximateSearch(built.table, nprobes=partitions).nearest(queries)
        assert np.allclose(found.distance, exact.nearest(queries).distance, atol=1e-3)
        assert set(found.row_id.ravel()) <= set(exact.row_ids)
    added = encode_shapes(shards, tmp_path / "t.lance", append=True, geometry="standard", desc_scale=3.0).table
    ids = added.column("id", None).tolist()
    assert len(ids) == len(set(ids)) >= len(left) + 120
    assert left <= set(ids)
    check_vectors_of(added, added.meta.geometry.balance_of(added.column("vector", None)).astype(np.float32))
    assert added.lancedb().index_stats("vector_idx").num_unindexed_rows == len(ids) - len(left)


@pytest.mark.slow
def test_an_appended_fragment_is_never_taken_for_an_indexed_one(copied):
    """The fragment with the highest id is deleted whole: its id is in the index, and must not be used again."""
    import lance

    table = build_index(copied, BuildConfig(index_type="ivf_flat")).table
    last = table.dataset().get_fragments()[-1]
    rows = last.to_table()
    table.dataset().delete(f"id IN ({', '.join(repr(each) for each in rows['id'].to_pylist())})")
    table = open_table(table.uri)
    written = lance.fragment.write_fragments(rows, table.uri, schema=rows.schema, mode="overwrite")
    meta = replace(table.meta, run_ids=(*table.meta.run_ids, "new"))
    after = append_rows(table, meta, written, "new")
    assert [each.fragment_id for each in after.dataset().get_fragments()][-1] > last.fragment_id
    assert after.lancedb().index_stats("vector_idx").num_unindexed_rows == len(rows)
    assert append_rows(after, meta, written, "new").version == after.version


# --- commits and what came in between


def commits(table: Table) -> dict[str, Callable[[], object]]:
    """Return every change of a table, computed from the version that is open."""
    import lance

    rows = table.dataset().head(7)
    written = lance.fragment.write_fragments(rows, table.uri, schema=rows.schema, mode="overwrite")
    meta = replace(table.meta, run_ids=(*table.meta.run_ids, "new"))
    schema, fragments = table.dataset().schema, [each.metadata for each in table.dataset().get_fragments()]
    overwrite = {"mode": "overwrite", "read_version": table.version}
    return {
        "append": lambda: append_rows(table, meta, written, "new"),
        "rewrite": lambda: list(rewrite_vectors(table, replace(table.meta.geometry, desc_scale=9.0))),
        "metadata": lambda: update_meta(table, replace(table.meta, image_size=99)),
        "overwrite": lambda: commit_fragments(table.uri, schema, fragments, run_id=uuid.uuid4().hex, **overwrite),
    }


@pytest.mark.parametrize("second", ["append", "rewrite", "metadata", "overwrite"])
@pytest.mark.parametrize("first", ["append", "rewrite", "metadata", "overwrite"])
def test_a_commit_computed_from_an_older_version_is_refused(copied, content, first, second):
    from_same_version = commits(copied)
    from_same_version[first]()
    between = open_table(copied.uri)
    rows, meta = content(between), between.meta.to_json()
    message = rf"{copied.uri} changed meanwhile \(version 1 -> {between.version}\): rerun the same command"
    with pytest.raises(TableError, match=message):
        from_same_version[second]()
    after = open_table(copied.uri)
    assert (after.version, content(after), after.meta.to_json()) == (between.version, rows, meta)


def test_an_append_laid_out_for_other_metadata_is_refused(copied):
    append = commits(copied)["append"]
    *_, between = rewrite_vectors(copied, replace(copied.meta.geometry, desc_scale=9.0))
    with pytest.raises(TableError, match="changed meanwhile"):
        append()
    meta = replace(copied.meta, run_ids=(*copied.meta.run_ids, "new"))
    with pytest.raises(TableError, match=r"changed while rows were encoded for it \(now version 2\): rerun"):
        append_rows(between, meta, [], "new")


def test_create_never_overwrites(copied, content):
    dataset = copied.dataset()
    fragments = [each.metadata for each in dataset.get_fragments()][:1]
    with pytest.raises(TableError, match=r"copy\.lance exists \(version 1\)"):
        commit_fragments(copied.uri, dataset.schema, fragments, run_id="x", mode="create")
    assert len(content(open_table(copied.uri))) == 360


def test_deletions_do_not_disturb_metadata(copied):
    delete(copied)
    after = update_meta(copied, replace(copied.meta, image_size=99))
    assert (after.version, after.dataset().count_rows()) == (3, 215)


# --- refusals


@pytest.mark.parametrize("path", ["shapes", "db/shapes", ".lance", "shapes.parquet"])
def test_a_path_that_does_not_name_a_table_is_refused(path):
    with pytest.raises(TableError, match=r"DB/NAME\.lance"):
        table_uri(path)


def test_a_uri_passed_as_a_path_is_refused():
    with pytest.raises(TableError, match=r"gs:/bucket/db/pairs.lance' has lost a slash"):
        open_table(Path("gs://bucket/db/pairs.lance"))


def test_a_missing_or_unreadable_table_is_refused(tmp_path):
    with pytest.raises(TableError, match="pipeline encode"):
        open_table(tmp_path / "none.lance")
    (tmp_path / "empty.lance" / "_versions").mkdir(parents=True)
    (tmp_path / "empty.lance" / "_versions" / "1.manifest").write_bytes(b"nothing")
    with pytest.raises(TableError, match="cannot be opened"):
        open_table(tmp_path / "empty.lance")


def test_a_table_without_index_names_the_command_that_builds_it(encoded):
    with pytest.raises(TableError, match="pipeline build-index"):
        open_table(encoded.uri, indexed=True)


def test_tables_of_other_software_are_refused(tmp_path):
    import lance

    lance.write_dataset(pa.table({"x": [1]}), str(tmp_path / "foreign.lance"))
    with pytest.raises(TableError, match="was not written by"):
        open_table(tmp_path / "foreign.lance")


def test_columns_that_contradict_the_metadata_are_refused(encoded):
    schema = encoded.dataset().schema
    column = schema.get_field_index("text")
    wrong = schema.set(column, pa.field("text", pa.list_(pa.float16(), 24))).with_metadata(schema.metadata)
    with pytest.raises(TableError, match=r"`text`.*24.*16 float16"):
        check_table(wrong)
    with pytest.raises(TableError, match="no column `latent`"):
        check_table(schema.remove(schema.get_field_index("latent")).with_metadata(schema.metadata))


def test_vectors_that_no_index_can_serve_are_counted(encoded, tmp_path):
    import lance

    rows = encoded.dataset().to_table(filter=f"split = '{TRAIN}'")
    expected = check_vectors(encoded)
    vectors = column_array(rows["vector"]).copy()
    vectors[0, 3], vectors[1, 0], vectors[2] = np.nan, np.inf, 0
    vectors[4:7] = vectors[3]
    vectors[3, -1], vectors[5, -1] = 0.0, -0.0  # equal numbers of different bits
    rows = rows.set_column(rows.schema.get_field_index("vector"), "vector", list_array(vectors))
    lance.write_dataset(rows.replace_schema_metadata(encoded.dataset().schema.metadata), tmp_path / "bad.lance")
    counts = check_vectors(open_table(tmp_path / "bad.lance"))
    assert (counts.nonfinite_vectors, counts.zero_vectors) == (2, 1)
    assert counts.duplicate_vectors == expected.duplicate_vectors + 3
