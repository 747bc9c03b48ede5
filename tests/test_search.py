"""Search finds what brute force in numpy finds, among training rows only."""

import json
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch

from index.build import select as choose
from index.build.build_index import BuildConfig, build_index
from index.build.potentials import chi_square, fit_potentials
from index.errors import OptionError, TableError
from index.report.hubness import ridge_r2
from index.report.recall import evaluation_queries, find_ground_truth, measure_recall
from index.report.sweep import measure_ladder, prior_skew, sample_rows
from index.search import exact as blocks
from index.search.ann import ApproximateSearch, ExactSearch, open_search
from index.search.exact import VectorBlocks
from index.space.queries import draw_points, draw_rows
from index.table.commit import rewrite_vectors
from index.table.schema import TRAIN
from index.table.table import open_table


def brute_force(table, queries, k):
    vectors = table.column("vector", TRAIN).astype(np.float64)
    distance = np.square(queries[:, None].astype(np.float64) - vectors[None]).sum(-1)
    order = distance.argsort(1, kind="stable")[:, :k]
    return np.take_along_axis(distance, order, 1), order


def test_exact_search_is_brute_force(encoded, monkeypatch):
    monkeypatch.setattr(blocks, "LEAST_ROWS", 7)
    queries = evaluation_queries(encoded, 50)
    for memory in (1, None):
        pairs = ExactSearch(encoded, memory=memory).nearest(queries, 5)
        distance, order = brute_force(encoded, queries, 5)
        assert np.allclose(pairs.distance, distance, rtol=1e-4, atol=1e-3)
        assert np.array_equal(pairs.latent[:, 0], encoded.column("latent")[order[:, 0]])
        assert np.array_equal(pairs.text[:, 0], encoded.column("text")[order[:, 0]])


def test_ann_search_reaches_its_recall_and_returns_the_pairs_themselves(indexed):
    queries = evaluation_queries(indexed, 300, seed=1)
    neighbors, exact = ApproximateSearch(indexed), ExactSearch(indexed)
    recall = measure_recall(neighbors, find_ground_truth(exact, queries))
    assert recall.recall_at_1 >= 0.85
    assert 0 <= recall.relative_distance_error < 0.05
    pairs = neighbors.nearest(queries, 3)
    place = exact.position_of(pairs.row)
    assert np.array_equal(exact.of("latent", place), pairs.latent)
    assert np.array_equal(exact.of("text", place), pairs.text)
    assert (np.diff(pairs.distance, axis=1) >= 0).all()


def test_only_training_rows_are_found(indexed):
    heldout = indexed.dataset().to_table(filter="split = 'heldout'", with_row_id=True, columns=["vector"])
    rows = set(heldout["_rowid"].to_pylist())
    assert rows
    queries = indexed.column("vector", "heldout").astype(np.float32)
    for neighbors in (ApproximateSearch(indexed), ExactSearch(indexed)):
        assert not rows & set(neighbors.nearest(queries, 4).row.ravel().tolist())


@pytest.mark.parametrize("refine_factor", [1, 4])
def test_a_batch_is_answered_in_one_shared_scan(indexed, refine_factor):
    assert "ANNIvfBatch" in ApproximateSearch(indexed, refine_factor=refine_factor).plan(evaluation_queries(indexed, 8))


def test_rows_are_ranked_again_by_their_exact_distance(indexed):
    queries = evaluation_queries(indexed, 300, seed=1)
    exact = ExactSearch(indexed)
    truth = find_ground_truth(exact, queries)
    most = indexed.meta.index.num_partitions
    plain, ranked = (ApproximateSearch(indexed, nprobes=most, refine_factor=refine_factor) for refine_factor in (1, 4))
    pairs = ranked.nearest(queries, 3)
    assert np.allclose(pairs.distance, exact.distances(queries, exact.position_of(pairs.row)), rtol=1e-4)
    assert (np.diff(pairs.distance, axis=1) >= 0).all()
    assert measure_recall(plain, truth).recall_at_1 < measure_recall(ranked, truth).recall_at_1 > 0.99


def test_a_table_is_measured_alike_in_memory_or_read_block_by_block(shapes, encode_shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "LEAST_ROWS", 50)
    table = encode_shapes(shapes, tmp_path / "t.lance").table
    held = build_index(table, BuildConfig(index_type="ivf_rq")).report
    read = build_index(open_table(table.uri), BuildConfig(index_type="ivf_rq", max_memory=20_000)).report
    timed = {"version", "build_seconds", "p50_ms", "p99_ms", "queries_per_second", "alternatives", "index_choice"}
    assert {k: v for k, v in held.items() if k not in timed} == {k: v for k, v in read.items() if k not in timed}


def test_where_memory_is_short_the_index_is_coarser(shapes, encode_shapes, tmp_path):
    table = encode_shapes(shapes, tmp_path / "t.lance").table
    built = build_index(table, BuildConfig(index_type="ivf_rq", max_memory=4_000, target_recall=1.0))
    assert built.table.meta.index.num_bits == 5
    assert {line["index_type"] for line in built.report["alternatives"]} == {"ivf_rq"}
    assert "ivf_rq of 5 bits finds" in built.report["index_choice"]


def test_the_fewest_probes_are_taken(indexed):
    report, index = indexed.report("index"), indexed.meta.index
    assert index.recall_at_1 >= 0.95
    fewer = [line for line in report["alternatives"] if line["nprobes"] < index.nprobes - max(1, index.nprobes // 8)]
    assert all(line["recall_at_1"] < 0.95 for line in fewer)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_what_a_query_finds_does_not_depend_on_its_batch(indexed, size):
    queries = evaluation_queries(indexed, 128)
    neighbors = ApproximateSearch(indexed)
    together = neighbors.nearest(queries, 2)
    for start in range(0, 128, size):
        part = neighbors.nearest(queries[start : start + size], 2)
        assert np.array_equal(part.row, together.row[start : start + size])
        assert np.array_equal(part.distance, together.distance[start : start + size])


def test_small_tables_are_searched_exactly_unless_asked(encoded, shapes, encode_shapes, tmp_path):
    table = encode_shapes(shapes, tmp_path / "t.lance").table
    built = build_index(table, BuildConfig())
    assert built.report["index_type"] == "none"
    assert built.report["recall_at_1"] == 1
    assert isinstance(open_search(built.table), ExactSearch)
    assert open_table(table.uri, indexed=True).meta.index == built.table.meta.index


REPORT_KEYS = {
    "rows", "dims", "index_type", "index_bytes", "build_seconds", "index_nprobes", "recall_at_1", "recall_at_10",
    "p50_ms", "p99_ms", "queries_per_second", "num_unindexed_rows", "anti_hub_rate", "largest_share",
    "effective_share", "chi_square", "self_retrieval_rate", "perplexity", "text_distance", "ladder", "linear_probe_r2",
    "nan_vectors", "zero_vectors", "duplicate_vectors", "relative_distance_error", "prior_skew",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_sq", "ivf_pq", "ivf_hnsw_sq", "ivf_rq"])
def test_every_index_type_builds_and_reports_all_keys(shapes, encode_shapes, tmp_path, kind):
    table = encode_shapes(shapes, tmp_path / "t.lance").table
    built = build_index(table, BuildConfig(index_type=kind, target_recall=0.5))
    assert built.report.keys() >= REPORT_KEYS
    assert built.report["num_unindexed_rows"] == 0
    assert built.report["index_bytes"] > 0
    assert built.report["nan_vectors"] == built.report["zero_vectors"] == 0
    assert built.report["recall_at_1"] >= 0.5
    assert built.table.report("index") == json.loads(json.dumps(built.report))
    # What a trainer relies on is tagged, so that clean-up leaves it.
    tags = built.table.dataset().tags.list()
    assert built.table.version in {tag["version"] for tag in tags.values()}


def test_where_a_coarse_index_falls_short_the_finer_one_replaces_it(shapes, encode_shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "RERANKED", 1)
    table = encode_shapes(shapes, tmp_path / "t.lance").table
    built = build_index(table, BuildConfig(index_type="ivf_pq", target_recall=1.0))
    assert built.table.meta.index.index_type == "ivf_flat"
    assert {line["index_type"] for line in built.report["alternatives"]} == {"ivf_pq", "ivf_flat"}
    assert built.report["recall_at_1"] > 0.99
    assert "ivf_pq finds 0." in built.report["index_choice"]
    assert "more do not help; ivf_flat finds" in built.report["index_choice"]


def test_a_new_desc_scale_rewrites_and_the_index_must_be_built_again(shapes, encode_shapes, tmp_path):
    table = build_index(encode_shapes(shapes, tmp_path / "t.lance").table, BuildConfig()).table
    after = build_index(open_table(table.uri), BuildConfig(desc_scale=2.0, geometry="standard")).table
    assert (after.meta.geometry.desc_scale, after.meta.geometry.name) == (2.0, "standard")
    assert np.array_equal(
        after.column("vector", None),
        after.meta.geometry.vectors(after.column("text", None), after.column("latent", None)).astype(np.float16),
    )
    assert build_index(open_table(table.uri), BuildConfig(desc_scale=2)).table.meta.geometry.desc_scale == 2
    again = build_index(open_table(table.uri), BuildConfig())
    assert again.table.meta.geometry.same_as(after.meta.geometry)


def test_auto_desc_scale_meets_its_perplexity(shapes, encode_shapes, tmp_path):
    table = encode_shapes(shapes, tmp_path / "t.lance").table
    built = build_index(table, BuildConfig(desc_scale="auto", target_perplexity=4.0))
    scale = built.table.meta.geometry.desc_scale
    assert scale > 1
    rungs = measure_ladder(built.table.meta.geometry, sample_rows(built.table), (1.2, scale, 20.0))
    assert rungs[0].perplexity >= rungs[1].perplexity >= rungs[2].perplexity
    assert rungs[2].self_retrieval_rate >= rungs[0].self_retrieval_rate


def test_auto_goes_below_one_only_where_that_is_allowed(shapes, encode_shapes, tmp_path):
    table = encode_shapes(shapes, tmp_path / "t.lance").table
    wide = {"desc_scale": "auto", "perplexity": 1000.0}
    assert build_index(table, BuildConfig(**wide)).table.meta.geometry.desc_scale >= 1.01
    built = build_index(open_table(table.uri), BuildConfig(**wide, allow_small_desc_scale=True))
    assert built.table.meta.geometry.desc_scale < 1
    assert built.report["perplexity"] == pytest.approx(built.report["train_rows"] / 10, rel=0.3)


def test_balance_evens_the_shares_and_is_stored(shapes, encode_shapes, tmp_path):
    table = encode_shapes(shapes, tmp_path / "t.lance").table
    plain = build_index(table, BuildConfig(geometry="raw", desc_scale=1.5)).report
    built = build_index(open_table(table.uri), BuildConfig(balance=True))
    assert plain["chi_square"] > 0.5
    assert built.report["chi_square"] < plain["chi_square"] / 5
    assert built.report["anti_hub_rate"] <= plain["anti_hub_rate"]
    geometry = built.table.meta.geometry
    assert geometry.balance_of(built.table.column("vector")).any()
    kept = build_index(open_table(table.uri), BuildConfig())
    assert geometry.balance_of(kept.table.column("vector")).any()
    undone = build_index(open_table(table.uri), BuildConfig(balance=False))
    assert not geometry.balance_of(undone.table.column("vector")).any()


def test_the_old_index_serves_until_the_new_one_is_complete(shapes, encode_shapes, tmp_path):
    table = encode_shapes(shapes, tmp_path / "t.lance").table
    with pytest.raises(TableError, match="has no index"):
        open_table(table.uri, indexed=True)
    built = build_index(table, BuildConfig(index_type="ivf_flat")).table
    *_, between = rewrite_vectors(built, replace(built.meta.geometry, desc_scale=9.0))
    assert between.meta.index is None
    serving = open_table(table.uri, indexed=True)
    assert (serving.version, serving.meta.geometry.desc_scale) == (built.version, 4.0)
    assert "ANNIvfBatch" in ApproximateSearch(serving).plan(evaluation_queries(serving, 8))
    rebuilt = build_index(open_table(table.uri), BuildConfig(index_type="ivf_flat")).table
    assert open_table(table.uri, indexed=True).version == rebuilt.version > between.version
    # What a checkpoint may refer to survives a clean-up.
    rebuilt.dataset().cleanup_old_versions(older_than=timedelta(0), error_if_tagged_old_versions=False)
    assert open_table(table.uri, version=built.version).meta.index == built.meta.index


def test_potentials_even_the_shares_of_fresh_queries(shapes, encode_shapes, tmp_path):
    table = encode_shapes(shapes, tmp_path / "t.lance", geometry="raw", desc_scale=1.5).table
    exact, geometry = ExactSearch(table), table.meta.geometry

    def queries(step):
        text = exact.of("text", draw_rows(len(exact.row), 512, seed=3, step=step))
        return geometry.queries(text, draw_points(geometry, 512, seed=3, step=step))

    *_, potentials = fit_potentials(VectorBlocks(table, memory=2**28, balance=False), queries, steps=300, target=0.0)
    assert potentials.stopped == "all steps are done"
    vectors = table.column("vector").astype(np.float32)
    fresh = np.concatenate([queries(step) for step in range(1000, 1020)])
    cost = -2 * fresh @ vectors.T + np.square(vectors).sum(1)

    def unevenness(g):
        return chi_square(np.bincount((cost - g).argmin(1), minlength=len(vectors)))

    assert unevenness(potentials.g) < 0.2 * unevenness(np.zeros(len(vectors)))
    # The balance coordinate gives the same winners through an ordinary distance.
    shifted = cost + np.square(potentials.coordinate())
    assert np.array_equal(shifted.argmin(1), (cost - potentials.g).argmin(1))


def test_balance_stops_when_shares_are_even_and_goes_on_from_there(shapes, encode_shapes, tmp_path):
    table = encode_shapes(shapes, tmp_path / "t.lance", geometry="raw", desc_scale=1.5).table
    short = build_index(table, BuildConfig(balance=True, balance_time_limit=0.05)).report
    assert short["balance_stopped"] == "0.05 seconds are spent"
    assert not short["balance_continued"]
    more = build_index(open_table(table.uri), BuildConfig(balance=True)).report
    assert more["balance_continued"]
    assert more["balance_stopped"] == "chi^2 of shares is below 0.05"
    assert more["balance_chi_square"] < min(0.05, short["balance_chi_square"])
    again = build_index(open_table(table.uri), BuildConfig(balance=True)).report
    assert (again["balance_steps"], again["balance_stopped"]) == (0, "chi^2 of shares is below 0.05")


def in_table_order(vector_blocks):
    parts = list(vector_blocks)
    place = np.concatenate([block.place for block in parts])
    return np.concatenate([block.vectors for block in parts])[place.argsort()]


def test_vectors_are_the_same_in_memory_or_read_block_by_block(encoded, monkeypatch):
    monkeypatch.setattr(blocks, "LEAST_ROWS", 50)
    held, read = VectorBlocks(encoded), VectorBlocks(encoded, memory=1)
    assert (held.held, read.held, len(list(held)), len(list(read)) > 3) == (True, False, 1, True)
    whole = encoded.column("vector").astype(np.float32)
    some = np.array([5, 3, 5, 120])
    for each in (held, read):
        assert np.array_equal(in_table_order(each), whole)
        assert np.array_equal(each.take(some), whole[some])
    assert np.array_equal(in_table_order(VectorBlocks(encoded, memory=1, every=3)), whole[::3])


@pytest.mark.parametrize("memory", [1, None])
@pytest.mark.parametrize("k", [1, 7])
def test_the_balanced_nearest_are_those_of_the_formula(encoded, monkeypatch, memory, k):
    """argmin |q - v_i|^2 - g_i, whatever the blocks, though some are passed over."""
    monkeypatch.setattr(blocks, "LEAST_ROWS", 50)
    monkeypatch.setattr(blocks, "ROWS_AT_ONCE", {"cpu": 8})
    whole = encoded.column("vector").astype(np.float32)
    queries = evaluation_queries(encoded, 64)
    g = np.random.default_rng(0).normal(size=len(whole)).astype(np.float32)
    cost = np.square(queries[:, None] - whole[None]).sum(-1) - g
    found, place = VectorBlocks(encoded, memory=memory).nearest(queries, k, torch.from_numpy(g))
    # float32 of squares that are much larger than their differences.
    assert np.allclose(found, np.sort(cost, 1)[:, :k], atol=0.02)
    assert np.allclose(np.take_along_axis(cost, place.numpy(), 1), found, atol=0.02)
    assert (place.sort(1).values.diff(dim=1) > 0).all()


def test_blocks_of_other_descriptions_are_passed_over(encoded, monkeypatch):
    monkeypatch.setattr(blocks, "ROWS_AT_ONCE", {"cpu": 8})
    seen = []
    of = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *given, **named: seen.append(given[1].shape[0]) or of(*given, **named))
    held = VectorBlocks(encoded)
    seen.clear()
    held.nearest(evaluation_queries(encoded, 64))
    assert sum(seen) < 0.5 * 64 * len(list(held))


def test_a_large_table_is_balanced_on_a_sample(shapes, encode_shapes, tmp_path, monkeypatch):
    """Rows that were not fitted take their neighbor's potential: better than none, and said."""
    from index.build import layout as settle

    monkeypatch.setattr(settle, "MOST_FITTED", 150)
    table = encode_shapes(shapes, tmp_path / "t.lance", geometry="raw", desc_scale=1.5).table
    plain = build_index(table, BuildConfig()).report
    built = build_index(open_table(table.uri), BuildConfig(balance=True)).report
    assert (built["balance_fitted_rows"], built["train_rows"]) == (-(-plain["train_rows"] // 2), plain["train_rows"])
    assert built["chi_square"] < 0.7 * plain["chi_square"]


def test_chi_square_is_unbiased():
    rng = np.random.default_rng(0)
    even = [chi_square(np.bincount(rng.integers(50, size=400), minlength=50)) for _ in range(400)]
    assert abs(np.mean(even)) < 0.01
    q = np.arange(1, 51) / np.arange(1, 51).sum()
    uneven = [chi_square(np.bincount(rng.choice(50, 400, p=q), minlength=50)) for _ in range(400)]
    assert np.mean(uneven) == pytest.approx(50 * np.square(q).sum() - 1, abs=0.02)


def test_prior_skew_is_how_far_a_description_moves_r():
    rng = np.random.default_rng(0)
    r = rng.normal(size=(512, 8)).astype(np.float32)
    anyone = rng.integers(5, size=(16, 512))
    assert prior_skew(anyone, r) < 0.03
    # Four descriptions, each found for the points of one quadrant: E[r] is sqrt(2 / pi) in two of eight dimensions.
    quadrant = np.broadcast_to((r[:, 0] > 0) + 2 * (r[:, 1] > 0), (16, 512)).astype(np.int64)
    assert prior_skew(quadrant, r) == pytest.approx(np.sqrt(2 * (2 / np.pi) / 8), rel=0.1)
    assert prior_skew(np.arange(512)[None], r) == 0  # each found once: nothing can be told


def test_ridge_r2_is_one_for_a_line_and_none_for_noise():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 6))
    assert ridge_r2(x, x @ rng.normal(size=(6, 3)) + 2, penalty=1e-6) > 0.999
    assert abs(ridge_r2(x, rng.normal(size=(4000, 3)))) < 0.02


def test_what_cannot_be_built_is_refused(encoded, shapes, encode_shapes, tmp_path):
    first_rows = encode_shapes(shapes, tmp_path / "t.lance", limit=100).table
    with pytest.raises(OptionError, match=r"--index-type 'flat'.*ivf_rq"):
        BuildConfig(index_type="flat")
    with pytest.raises(OptionError, match=r"--target-recall 1.5"):
        BuildConfig(target_recall=1.5)
    with pytest.raises(OptionError, match="--desc-scale 1 "):
        build_index(encoded, BuildConfig(desc_scale=1.0))
    with pytest.raises(OptionError, match="learns 256 centroids"):
        build_index(first_rows, BuildConfig(index_type="ivf_pq"))
    with pytest.raises(OptionError, match="geometry 'torus'"):
        build_index(encoded, BuildConfig(geometry="torus"))
    assert open_table(encoded.uri).version == encoded.version


def test_a_table_with_nothing_to_train_on_is_refused(shapes, encode_shapes, tmp_path):
    from index.errors import SourceError

    with pytest.raises(SourceError, match="--val-fraction"):
        encode_shapes(shapes, tmp_path / "t.lance", val_fraction=1.0)
    with pytest.raises(TableError, match="no table at"):
        open_table(tmp_path / "t.lance")
