"""An index built in segments, by several processes, retrieves what the index built at once retrieves."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from index.build.build_index import BuildConfig, build_index
from index.errors import OptionError
from index.report.recall import evaluation_queries, find_ground_truth, measure_recall
from index.search.ann import ApproximateSearch
from index.search.exact import ExactSearch
from index.search.kmeans import partition_file, train_centroids
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
from pipeline.beam.index_segments import beam_builder, fragment_groups
from pipeline.config import RuntimeConfig


@pytest.fixture
def table(encoded, tmp_path):
    """A copy of the shapes that a test may change."""
    shutil.copytree(encoded.uri, tmp_path / "shapes.lance")
    return open_table(tmp_path / "shapes.lance")


def train_plan(table, index_type, seed=0):
    return IndexPlan.train(table, index_type, 12, num_bits=8 if index_type == "ivf_rq" else None, seed=seed)


def retrieved(table, queries):
    return ApproximateSearch(table, nprobes=2).nearest(queries, 3).row_id


@pytest.mark.parametrize("index_type", ["ivf_rq", "ivf_flat"])
def test_the_same_plan_builds_the_same_index(table, index_type):
    queries = evaluation_queries(table, 200)
    plan, same, other = (train_plan(table, index_type, seed) for seed in (3, 3, 4))
    assert np.array_equal(plan.centroids, same.centroids)
    assert not np.array_equal(plan.centroids, other.centroids)
    first = build_whole(table, plan, None)
    second = build_whole(first, from_json_dict(IndexPlan, to_json_dict(same)), None)
    assert second.version > first.version
    assert np.array_equal(retrieved(first, queries), retrieved(second, queries))


def test_each_row_is_assigned_to_its_nearest_centroid(table):
    import lance

    centroids = train_centroids(table, 7)
    with partition_file(table, centroids, [1, 2]) as path:
        partitions = lance.dataset(path).to_table()
    rows = table.dataset().to_table(columns=["vector"], with_row_id=True)
    vectors = column_array(rows["vector"]).astype(np.float32)
    nearest = np.square(vectors[:, None] - centroids[None]).sum(-1).argmin(1)
    expected = {
        row_id: partition
        for row_id, partition in zip(rows["_rowid"].to_pylist(), nearest.tolist(), strict=True)
        if row_id >> 32 in (1, 2)
    }
    assert expected
    assert {line["row_id"]: line["partition"] for line in partitions.to_pylist()} == expected
    assert not Path(path).exists()


@pytest.mark.parametrize("index_type", ["ivf_rq", "ivf_flat"])
def test_merged_segments_have_the_recall_of_the_whole_index(table, index_type):
    queries = evaluation_queries(table, 400)
    truth = find_ground_truth(ExactSearch(table), queries)
    plan = train_plan(table, index_type)
    whole = build_whole(table, plan, None)
    expected = measure_recall(ApproximateSearch(whole, nprobes=1), truth)
    bare = without_index(whole)
    segments = [build_segment(bare, plan, group) for group in fragment_groups(bare, 3)]
    assert len(segments) == 3
    merged = publish_segments(bare, segments)
    recall = measure_recall(ApproximateSearch(merged, nprobes=1), truth)
    assert 0.2 < expected.recall_at_1 < 1
    assert recall.recall_at_1 == pytest.approx(expected.recall_at_1, abs=0.01)
    assert "ANNIvfBatch" in ApproximateSearch(merged, nprobes=1).explain_plan(queries)
    stats = merged.lancedb().index_stats(VECTOR_INDEX)
    assert (stats.num_indices, stats.num_unindexed_rows) == (1, 0)
    # A runner may repeat a step.
    assert publish_segments(bare, segments).version == merged.version


@pytest.mark.slow
def test_two_workers_build_one_index_while_the_old_one_serves(table):
    before = build_index(table, BuildConfig(index_type="ivf_rq")).table
    whole = build_index(open_table(table.uri), BuildConfig(index_type="ivf_rq", desc_scale=2.0)).report
    on_workers, served = beam_builder(RuntimeConfig(num_workers=2), "ivf_rq"), []

    def build(table, plan, log):
        served.append(open_table(table.uri, indexed=True).meta)
        return on_workers(table, plan, log)

    first = build_index(open_table(table.uri), BuildConfig(index_type="ivf_rq", desc_scale=2.5), build).report
    assert (served[0].geometry.desc_scale, served[0].index.index_type) == (2.0, "ivf_rq")
    exact = build_index(
        open_table(table.uri), BuildConfig(desc_scale=2.0), beam_builder(RuntimeConfig(num_workers=2), "auto")
    ).report
    assert exact.index_type == "none"  # too few rows for an index
    split = build_index(open_table(table.uri), BuildConfig(index_type="ivf_rq"), on_workers).report
    assert split.recall_at_1 == pytest.approx(whole.recall_at_1, abs=0.01)
    assert split.num_partitions == whole.num_partitions
    assert first.num_unindexed_rows == split.num_unindexed_rows == 0
    assert open_table(table.uri, version=before.version).meta.index == before.meta.index
    assert not list(Path(table.uri).parent.glob("*.plan.json"))


def test_types_that_lose_recall_when_merged_are_built_by_one_process():
    with pytest.raises(OptionError, match="ivf_sq can only be built by one process: use one of ivf_rq, ivf_flat"):
        beam_builder(RuntimeConfig(num_workers=2), "ivf_sq")
