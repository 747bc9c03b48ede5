"""The index that serves is the one that the metadata describes, whatever happens to a build and to the rows."""

import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import lancedb
import numpy as np
import pytest
from commits import KILLED, after_each_commit, build_until_commit
from synthetic_tables import random_table

from index.build.build_index import BuildConfig, build_index
from index.errors import TableError
from index.report.recall import evaluation_queries, find_ground_truth, measure_recall
from index.report.report import describe
from index.search.ann import open_search
from index.search.exact import ExactSearch
from index.search.lance_index import IndexPlan, build_whole
from index.table.commit import update_meta
from index.table.rows import RowReader
from index.table.table import index_is_current, index_uuid, open_table
from pipeline.beam.index_segments import beam_builder
from pipeline.config import RuntimeConfig

QUERIES = 1024


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """A table of 1,500 rows with an IVF_FLAT index."""
    uri = tmp_path_factory.mktemp("flat") / "pairs.lance"
    random_table(uri, 1500, heldout=200, fragments=3)
    return build_index(open_table(uri), BuildConfig(index_type="ivf_flat")).table


@pytest.fixture
def table(flat, tmp_path):
    """A copy of it that a test may change."""
    shutil.copytree(flat.uri, tmp_path / "pairs.lance")
    return open_table(tmp_path / "pairs.lance")


def state(table):
    index = table.meta.index
    return table.meta.geometry.desc_scale, index.index_type, index.num_bits


def check_serving(uri):
    """Open the version that serves: its vectors are those of its geometry, and its recall is what it promises."""
    table = open_table(uri, indexed=True)
    assert index_is_current(table.dataset(), table.meta.index)
    geometry, promised = table.meta.geometry, table.meta.index.recall_at_1
    vectors = table.column("vector", None)
    expected = geometry.vectors(table.column("text", None), table.column("latent", None), geometry.balance_of(vectors))
    assert np.array_equal(vectors, expected.astype(np.float16))
    truth = find_ground_truth(ExactSearch(table), evaluation_queries(table, QUERIES, seed=9))
    recall = measure_recall(open_search(table), truth).recall_at_1
    # Both are measured on 1,024 queries: three standard errors of their difference.
    assert recall >= promised - 3 * np.sqrt(2 * max(promised * (1 - promised), 1e-3) / QUERIES)
    return table


def update_rows(table):
    lancedb.connect(str(Path(table.uri).parent)).open_table("pairs").update(
        where="cast(key as int) % 5 = 0", values={"caption": "new"}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "commits", "beam"),
    [
        ({"index_type": "ivf_rq"}, ["create_index"], False),
        # IVF_PQ misses the target: another index replaces it before anything is described.
        ({"index_type": "ivf_pq"}, ["create_index", "create_index"], False),
        ({"index_type": "ivf_sq", "desc_scale": 2.5}, ["commit", "create_index"], False),
        ({"index_type": "ivf_rq", "balance": True, "geometry": "raw"}, ["commit", "create_index"], False),
        ({"index_type": "none"}, [], False),
        ({"index_type": "ivf_flat", "rows": "updated"}, ["optimize_indices", "optimize_indices"], False),
        ({"index_type": "ivf_rq"}, ["drop_index", "commit_existing_index_segments"], True),
    ],
)
def test_after_every_commit_of_a_build_a_complete_index_serves(table, tmp_path, monkeypatch, options, commits, beam):
    options, before, done = dict(options), state(table), []
    if options.pop("rows", None):
        update_rows(table)
    snapshots = tmp_path / "snapshots"

    def snapshot(name):
        # What a process that is killed now leaves behind.
        shutil.copytree(table.uri, snapshots / f"{len(done)}" / "pairs.lance")
        done.append(name)

    builder = beam_builder(RuntimeConfig(), "auto") if beam else build_whole
    with monkeypatch.context() as patches:
        after_each_commit(patches.setattr, snapshot)
        after = state(build_index(open_table(table.uri), BuildConfig(**options), builder).table)
    left = iter(done)
    assert all(name in left for name in [*commits, "create"]), done  # in this order, and the tag is last
    assert done[-1] == "create"
    served = [state(check_serving(snapshots / f"{number}" / "pairs.lance")) for number in range(len(done))]
    described = len(done) - 2
    assert served[:described] == [before] * described
    assert served[described:] == [after] * 2
    assert state(check_serving(table.uri)) == after


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"index_type": "ivf_sq"}, {"index_type": "ivf_rq", "desc_scale": 2.5}])
def test_a_build_killed_at_any_commit_leaves_a_complete_index(flat, tmp_path, options):
    spawn, number, before, served = multiprocessing.get_context("spawn"), 0, state(flat), []
    while True:
        number += 1
        uri = tmp_path / f"{number}" / "pairs.lance"
        shutil.copytree(flat.uri, uri)
        process = spawn.Process(target=build_until_commit, args=(str(uri), number, options))
        process.start()
        process.join()
        assert process.exitcode in (0, KILLED)
        served.append(state(check_serving(uri)))
        if process.exitcode == 0:
            break
    after = (
        options.get("desc_scale", before[0]),
        options["index_type"],
        8 if options["index_type"] == "ivf_rq" else None,
    )
    assert number >= 5
    assert served == [before] * (number - 3) + [after] * 3
    # The same command completes what was killed.
    assert state(build_index(open_table(tmp_path / "1" / "pairs.lance"), BuildConfig(**options)).table) == after
    assert state(check_serving(tmp_path / "1" / "pairs.lance")) == after


def test_a_build_killed_before_the_first_index_leaves_none(tmp_path, monkeypatch):
    table = random_table(tmp_path / "pairs.lance", 400, heldout=50)
    seen = []

    def look(name):
        if name == "create_index":
            with pytest.raises(TableError, match="has no index: run `pipeline build-index"):
                open_table(table.uri, indexed=True)
            seen.append(describe(open_table(table.uri)))

    after_each_commit(monkeypatch.setattr, look)
    build_index(table, BuildConfig(index_type="ivf_flat"))
    assert [(each["indexed"], each["index_type"], each["serving_version"]) for each in seen] == [(False, None, None)]


@pytest.mark.slow
def test_an_index_of_another_origin_does_not_serve(table):
    meta = table.meta
    # As a build of an earlier version of the software did: another index under the same metadata.
    other = build_whole(table, IndexPlan.train(table, "ivf_pq", 30, seed=0), None)
    false = update_meta(other, meta)
    assert index_uuid(false.dataset()) != meta.index.uuid == index_uuid(table.dataset())
    assert open_table(table.uri).version == false.version
    assert check_serving(table.uri).version == table.version
    shown = describe(open_table(table.uri))
    assert (shown["indexed"], shown["index_type"], shown["serving_version"]) == (False, None, table.version)
    with pytest.raises(TableError, match="has no index"):
        open_table(table.uri, version=false.version, indexed=True)
    # It is not kept as if it were the described one.
    built = build_index(open_table(table.uri), BuildConfig(index_type="ivf_flat"))
    assert built.report.index_choice.startswith("IVF_FLAT: ")
    assert check_serving(table.uri).version == built.table.version


def test_metadata_without_a_uuid_describes_the_index_of_the_last_tag(table):
    nameless = update_meta(table, replace(table.meta, index=replace(table.meta.index, uuid=None)))
    assert open_table(table.uri, indexed=True).version == nameless.version
    other = build_whole(nameless, IndexPlan.train(table, "ivf_pq", 30, seed=0), None)
    update_meta(other, nameless.meta)
    assert open_table(table.uri, indexed=True).version == table.version


@pytest.mark.slow
@pytest.mark.parametrize("index_type", ["none", "ivf_flat", "ivf_rq"])
def test_after_deletes_and_updates_the_report_counts_the_rows_that_are_there(tmp_path, index_type):
    uri = tmp_path / "pairs.lance"
    random_table(uri, 900, heldout=100, fragments=3)
    build_index(open_table(uri), BuildConfig(index_type=index_type))
    rows = lancedb.connect(str(tmp_path)).open_table("pairs")
    rows.delete("cast(key as int) < 50 or cast(key as int) in (310, 899)")
    rows.update(where="cast(key as int) in (60, 400, 850)", values={"caption": "new"})
    shown = describe(open_table(uri))
    assert (shown["rows"], shown["train_rows"], shown["indexed"]) == (848, 749, True)
    report = build_index(open_table(uri), BuildConfig(index_type=index_type)).report
    assert (report.rows, report.train_rows, report.sweep_rows, sum(report.hit_counts)) == (848, 749, 749, 749)
    assert (report.num_unindexed_rows, report.distinct_texts, report.duplicate_vectors) == (0, 749, 0)
    table = check_serving(uri)
    # Positions, row ids and columns mean the same rows: each retrieves itself.
    exact, vectors = ExactSearch(table), table.column("vector").astype(np.float32)
    positions = exact.nearest_positions(vectors)[:, 0]
    assert np.array_equal(positions, np.arange(749))
    assert np.array_equal(exact.take(positions, "text"), table.column("text"))
    assert np.array_equal(RowReader(table).take(exact.row_ids, ["key"])[0], table.column("key"))
    assert "310" not in table.column("key")


@pytest.mark.slow
def test_rows_are_added_to_an_index_with_its_partitions(table):
    partitions = table.meta.index.num_partitions
    update_rows(table)
    assert open_table(table.uri, indexed=True).lancedb().index_stats("vector_idx").num_unindexed_rows == 300
    report = build_index(open_table(table.uri), BuildConfig(index_type="ivf_flat")).report
    assert report.index_choice.startswith("kept, with 300 rows added; IVF_FLAT: recall@1 0.9")
    assert (report.num_unindexed_rows, report.num_partitions) == (0, partitions)
    segments = open_table(table.uri).dataset().stats.index_stats("vector_idx")["indices"]
    assert [each["num_partitions"] for each in segments] == [partitions] * 2
    check_serving(table.uri)


@pytest.mark.slow
def test_what_lancedb_optimizes_serves_once_it_is_measured(table):
    update_rows(table)
    lancedb.connect(str(Path(table.uri).parent)).open_table("pairs").optimize()
    assert check_serving(table.uri).version == table.version
    built = build_index(open_table(table.uri), BuildConfig(index_type="ivf_flat"))
    # LanceDB has joined its partitions, so it is built anew.
    assert built.report.index_choice.startswith("IVF_FLAT: recall@1 0.9")
    assert (built.report.rows, built.report.num_unindexed_rows) == (1500, 0)
    assert check_serving(table.uri).version == built.table.version
