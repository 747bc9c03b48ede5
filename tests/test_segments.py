"""An index built in parts, by several processes, finds what the index built at once finds."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from index.build.build_index import BuildConfig, build_index
from index.errors import OptionError
from index.report.recall import evaluation_queries, find_ground_truth, measure_recall
from index.search.ann import ApproximateSearch, ExactSearch
from index.search.kmeans import assigned, train_partitions
from index.search.lance_index import (
    VECTOR_INDEX,
    IndexPlan,
    build_segment,
    build_whole,
    publish_segments,
    without_index,
)
from index.table.codec import from_json_dict, to_json_dict
from index.table.table import column_array, open_table
from pipeline.beam.index_segments import fragment_groups, on_beam
from pipeline.config import RuntimeConfig


@pytest.fixture
def table(encoded, tmp_path):
    """A copy of the shapes, to be changed."""
    shutil.copytree(encoded.uri, tmp_path / "shapes.lance")
    return open_table(tmp_path / "shapes.lance")


def found(table, queries, **how):
    return ApproximateSearch(table, **how).nearest(queries, 3).row


@pytest.mark.parametrize("kind", ["ivf_rq", "ivf_flat"])
def test_the_same_plan_gives_the_same_index(table, kind):
    queries = evaluation_queries(table, 200)
    plans = [
        IndexPlan.train(table, kind, 12, num_bits=8 if kind == "ivf_rq" else None, seed=seed) for seed in (3, 3, 4)
    ]
    assert np.array_equal(plans[0].centroids, plans[1].centroids)
    assert not np.array_equal(plans[0].centroids, plans[2].centroids)
    rows = []
    for plan in plans[:2]:
        table = build_whole(table, plan, None)
        rows.append(found(table, queries, nprobes=2))
    assert np.array_equal(*rows)
    assert from_json_dict(IndexPlan, to_json_dict(plans[0])).options().keys() == plans[0].options().keys()


def test_each_row_is_assigned_to_its_nearest_partition(table):
    import lance

    centroids = train_partitions(table, 7)
    with assigned(table, centroids, [1, 2]) as path:
        given = lance.dataset(path).to_table()
    rows = table.dataset().to_table(columns=["vector"], with_row_id=True)
    vectors = column_array(rows["vector"]).astype(np.float32)
    nearest = np.square(vectors[:, None] - centroids[None]).sum(-1).argmin(1)
    expected = dict(zip(rows["_rowid"].to_pylist(), nearest.tolist(), strict=True))
    assert len(given) == sum(row >> 32 in (1, 2) for row in expected)
    assert all(expected[line["row_id"]] == line["partition"] for line in given.to_pylist())
    assert not Path(path).exists()


@pytest.mark.parametrize("kind", ["ivf_rq", "ivf_flat"])
def test_merged_segments_find_what_the_whole_index_finds(table, kind):
    queries = evaluation_queries(table, 400)
    truth = find_ground_truth(ExactSearch(table), queries)
    plan = IndexPlan.train(table, kind, 12, num_bits=8 if kind == "ivf_rq" else None, seed=0)
    whole = build_whole(table, plan, None)
    alone = measure_recall(ApproximateSearch(whole, nprobes=1), truth)
    bare = without_index(whole)
    segments = [build_segment(bare, plan, group) for group in fragment_groups(bare, 3)]
    assert len(segments) == 3
    merged = publish_segments(bare, segments)
    together = measure_recall(ApproximateSearch(merged, nprobes=1), truth)
    assert 0.2 < alone.recall_at_1 < 1
    assert together.recall_at_1 == pytest.approx(alone.recall_at_1, abs=0.01)
    assert "ANNIvfBatch" in ApproximateSearch(merged, nprobes=1).plan(queries)
    stats = merged.lancedb().index_stats(VECTOR_INDEX)
    assert (stats.num_indices, stats.num_unindexed_rows) == (1, 0)
    # An engine may run a step twice.
    assert publish_segments(bare, segments).version == merged.version


def test_two_worker_processes_build_one_index_while_the_old_one_serves(table):
    before = build_index(table, BuildConfig(index_type="ivf_rq")).table
    alone = build_index(open_table(table.uri), BuildConfig(index_type="ivf_rq", desc_scale=2.0))
    config, served = BuildConfig(index_type="ivf_rq", desc_scale=2.5), []
    beam = on_beam(RuntimeConfig(num_workers=2), "ivf_rq")

    def build(table, plan, log):
        served.append(open_table(table.uri, indexed=True).meta)
        return beam(table, plan, log)

    built = build_index(open_table(table.uri), config, build)
    assert (served[0].geometry.desc_scale, served[0].index.index_type) == (2.0, "ivf_rq")
    again = build_index(
        open_table(table.uri), BuildConfig(desc_scale=2.0), on_beam(RuntimeConfig(num_workers=2), "auto")
    )
    assert again.report["index_type"] == "none"  # small enough
    split = build_index(open_table(table.uri), BuildConfig(index_type="ivf_rq"), beam)
    assert split.report["recall_at_1"] == pytest.approx(alone.report["recall_at_1"], abs=0.01)
    assert split.report["index_num_partitions"] == alone.report["index_num_partitions"]
    assert built.report["num_unindexed_rows"] == split.report["num_unindexed_rows"] == 0
    assert open_table(table.uri, version=before.version).meta.index == before.meta.index
    assert not list(Path(table.uri).parent.glob("*.plan.json"))


def test_types_that_lose_recall_when_merged_are_built_by_one_process():
    with pytest.raises(OptionError, match="ivf_sq is built by one process: choose one of ivf_rq, ivf_flat"):
        on_beam(RuntimeConfig(num_workers=2), "ivf_sq")
