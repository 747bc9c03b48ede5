"""Search and the index report agree with brute force in numpy, over the training rows only."""

import json
import shutil
from dataclasses import asdict, fields, replace
from datetime import timedelta

import numpy as np
import pytest
import torch

from index.build.build_index import BuildConfig, build_index
from index.build.layout import lay_out
from index.build.potentials import fit_potentials, num_check_queries
from index.build.select import select_index
from index.errors import OptionError, SourceError, TableError
from index.report.hubness import chi_square, measure_hubness, ridge_r2
from index.report.recall import evaluation_queries, find_ground_truth, measure_recall
from index.report.report import IndexReport, describe
from index.report.sweep import measure_sweep, prior_skew
from index.search.ann import ApproximateSearch, open_search
from index.search.blocks import VectorBlocks
from index.search.exact import ExactSearch
from index.search.neighbors import NearestRows, RetrievedPairs
from index.space.queries import Purpose, draw_points, draw_rows
from index.table.schema import TRAIN
from index.table.table import open_table
from index.table.vectors import rewrite_vectors


@pytest.fixture
def table(encoded, tmp_path):
    """A copy of the shapes that a test may change."""
    shutil.copytree(encoded.uri, tmp_path / "shapes.lance")
    return open_table(tmp_path / "shapes.lance")


@pytest.fixture
def unbalanced(table):
    """The shapes in a geometry that makes hubs."""
    return build_index(table, BuildConfig(geometry="raw", desc_scale=1.5))


def brute_force(table, queries, k):
    vectors = table.column("vector", TRAIN).astype(np.float64)
    distance = np.square(queries[:, None].astype(np.float64) - vectors[None]).sum(-1)
    order = distance.argsort(1, kind="stable")[:, :k]
    return np.take_along_axis(distance, order, 1), order


def ground_truth(table, count=300, seed=1):
    return find_ground_truth(ExactSearch(table), evaluation_queries(table, count, seed=seed))


@pytest.mark.parametrize("memory", [1, None])
def test_exact_search_is_brute_force(encoded, memory):
    queries = evaluation_queries(encoded, 50)
    pairs = ExactSearch(encoded, blocks=VectorBlocks(encoded, memory=memory, block_rows=7)).nearest(queries, 5)
    distance, order = brute_force(encoded, queries, 5)
    assert np.allclose(pairs.distance, distance, rtol=1e-4, atol=1e-3)
    assert np.array_equal(pairs.latent[:, 0], encoded.column("latent")[order[:, 0]])
    assert np.array_equal(pairs.text[:, 0], encoded.column("text")[order[:, 0]])


def test_approximate_search_reaches_its_recall_and_returns_whole_pairs(indexed):
    search, truth = ApproximateSearch(indexed), ground_truth(indexed, 1000)
    recall = measure_recall(search, truth)
    # The target was reached on other queries: three standard errors of 1,000 below it are allowed.
    assert recall.recall_at_1 >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 1000)
    assert 0 <= recall.relative_distance_error < 0.02
    pairs, exact = search.nearest(truth.queries, 3), truth.exact
    positions = exact.positions_of(pairs.row_id)
    assert np.array_equal(exact.take(positions, "latent"), pairs.latent)
    assert np.array_equal(exact.take(positions, "text"), pairs.text)
    assert (np.diff(pairs.distance, axis=1) >= 0).all()


def test_only_training_rows_are_retrieved(indexed):
    rows = indexed.dataset().to_table(filter="split = 'heldout'", with_row_id=True, columns=["vector"])
    heldout = set(rows["_rowid"].to_pylist())
    assert heldout
    queries = indexed.column("vector", "heldout").astype(np.float32)
    for search in (ApproximateSearch(indexed), ExactSearch(indexed)):
        assert not heldout & set(search.nearest(queries, 4).row_id.ravel().tolist())


@pytest.mark.parametrize("refine_factor", [1, 4])
def test_a_batch_is_searched_in_one_shared_scan(indexed, refine_factor):
    search = ApproximateSearch(indexed, refine_factor=refine_factor)
    assert "ANNIvfBatch" in search.explain_plan(evaluation_queries(indexed, 8))


def test_a_refine_factor_orders_rows_by_their_exact_distance(indexed):
    truth = ground_truth(indexed)
    exact, most = truth.exact, indexed.meta.index.num_partitions
    plain, refined = (ApproximateSearch(indexed, nprobes=most, refine_factor=factor) for factor in (1, 4))
    pairs = refined.nearest(truth.queries, 3)
    assert np.allclose(pairs.distance, exact.distances(truth.queries, exact.positions_of(pairs.row_id)), rtol=1e-4)
    assert (np.diff(pairs.distance, axis=1) >= 0).all()
    assert measure_recall(plain, truth).recall_at_1 < measure_recall(refined, truth).recall_at_1 > 0.99


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_the_neighbors_of_a_query_do_not_depend_on_its_batch(indexed, size):
    queries = evaluation_queries(indexed, 128)
    search = ApproximateSearch(indexed)
    whole = search.nearest(queries, 2)
    for start in range(0, 128, size):
        part = search.nearest(queries[start : start + size], 2)
        assert np.array_equal(part.row_id, whole.row_id[start : start + size])
        assert np.array_equal(part.distance, whole.distance[start : start + size])


def in_table_order(blocks):
    parts = list(blocks)
    positions = np.concatenate([block.positions for block in parts])
    return np.concatenate([block.vectors for block in parts])[positions.argsort()]


def test_vectors_are_the_same_in_memory_or_read_in_blocks(encoded):
    held, read = VectorBlocks(encoded, block_rows=50), VectorBlocks(encoded, memory=1, block_rows=50)
    assert (held.in_memory, read.in_memory) == (True, False)
    assert max(len(block.vectors) for block in held) <= 50
    whole = encoded.column("vector").astype(np.float32)
    some = np.array([5, 3, 5, 120])
    for blocks in (held, read):
        assert len(list(blocks)) > 3
        assert np.array_equal(in_table_order(blocks), whole)
        assert np.array_equal(blocks.take(some), whole[some])
    assert np.array_equal(in_table_order(VectorBlocks(encoded, memory=1, stride=3)), whole[::3])


@pytest.mark.parametrize("memory", [1, None])
@pytest.mark.parametrize("k", [1, 7])
def test_balanced_neighbors_are_those_of_the_formula(encoded, memory, k):
    """argmin |q - v_i|^2 - g_i for any blocks, some of which are skipped."""
    whole = encoded.column("vector").astype(np.float32)
    queries = evaluation_queries(encoded, 64)
    g = np.random.default_rng(0).normal(size=len(whole)).astype(np.float32)
    expected = np.square(queries[:, None] - whole[None]).sum(-1) - g
    blocks = VectorBlocks(encoded, memory=memory, block_rows=8)
    cost, positions = blocks.nearest(queries, k, torch.from_numpy(g))
    # float32 of squares that are much larger than their differences.
    assert np.allclose(cost, np.sort(expected, 1)[:, :k], atol=0.02)
    assert np.allclose(np.take_along_axis(expected, positions.numpy(), 1), cost, atol=0.02)
    assert (positions.sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("potentials", [False, True])
def test_bounds_of_blocks_are_safe_and_exclude_most_of_them(encoded, potentials):
    queries = evaluation_queries(encoded, 64)
    g = torch.from_numpy(np.random.default_rng(0).normal(size=len(encoded.positions(TRAIN))).astype(np.float32))
    blocks = VectorBlocks(encoded, block_rows=8).sorted
    q = torch.from_numpy(queries)
    bounds = blocks.lower_bounds(q, g if potentials else None)
    costs = [torch.cdist(q, block.vectors).square() - (g[block.positions] if potentials else 0) for block in blocks]
    least = torch.stack([cost.min(1).values for cost in costs], 1)
    assert (bounds <= least + 1e-3).all()
    assert (bounds > least.min(1, keepdim=True).values).float().mean() > 0.5


@pytest.mark.slow
def test_the_report_is_the_same_in_memory_or_read_in_blocks(table):
    held = build_index(table, BuildConfig(index_type="ivf_rq")).report
    read = build_index(open_table(table.uri), BuildConfig(index_type="ivf_rq", max_memory=20_000)).report
    assert read.index_choice.startswith("kept, with 0 rows added; IVF_RQ (8 bits): recall@1 0.9")
    timed = {"version", "build_seconds", "p50_ms", "queries_per_second", "candidates", "index_choice"}
    assert {k: v for k, v in asdict(held).items() if k not in timed} == {
        k: v for k, v in asdict(read).items() if k not in timed
    }

    def settings(report):
        return [(each.nprobes, each.refine_factor, each.tuning_recall_at_1) for each in report.candidates]

    assert settings(held) == settings(read)


@pytest.mark.slow
def test_a_small_memory_budget_lowers_the_precision_of_the_index(table):
    built = build_index(table, BuildConfig(index_type="ivf_rq", max_memory=4_000, target_recall=1.0))
    assert built.table.meta.index.num_bits == 5
    assert {(each.index_type, each.num_bits) for each in built.report.candidates} == {("ivf_rq", 5)}
    assert built.report.index_choice.startswith("IVF_RQ (5 bits): recall@1 ")


def test_the_fewest_nprobes_that_reach_the_target_are_selected(indexed):
    queries = evaluation_queries(indexed, 1024, purpose=Purpose.NPROBES)
    truth = find_ground_truth(ExactSearch(indexed), queries)
    report, index = indexed.report("index"), indexed.meta.index
    assert max(each["tuning_recall_at_1"] for each in report["candidates"]) >= 0.95
    assert report["nprobes"] == index.nprobes > 2
    search = ApproximateSearch(indexed, nprobes=index.nprobes - max(1, index.nprobes // 8))
    assert measure_recall(search, truth).recall_at_1 < 0.95
    fewer = [each for each in report["candidates"] if each["nprobes"] < index.nprobes - max(1, index.nprobes // 8)]
    assert fewer
    assert max(each["tuning_recall_at_1"] for each in fewer) < 0.95


def test_recall_is_measured_on_queries_that_did_not_choose_nprobes(indexed):
    report, search = indexed.report("index"), ApproximateSearch(indexed)
    setting = report["nprobes"], report["refine_factor"]
    chosen = next(each for each in report["candidates"] if (each["nprobes"], each["refine_factor"]) == setting)
    for purpose, recall in (
        (Purpose.NPROBES, chosen["tuning_recall_at_1"]),
        (Purpose.RECALL, report["recall_at_1"]),
    ):
        queries = evaluation_queries(indexed, 1024, purpose=purpose)
        measured = measure_recall(search, find_ground_truth(ExactSearch(indexed), queries))
        assert measured.recall_at_1 == recall
    assert (report["recall_queries"], chosen["tuning_queries"]) == (1024, 1024)
    assert indexed.meta.index.recall_at_1 == report["recall_at_1"] != chosen["tuning_recall_at_1"]


def test_small_tables_are_searched_exactly_by_default(table):
    built = build_index(table, BuildConfig())
    assert (built.report.index_type, built.report.recall_at_1, built.report.candidates) == ("none", 1, [])
    assert isinstance(open_search(built.table), ExactSearch)
    assert open_table(table.uri, indexed=True).meta.index == built.table.meta.index


@pytest.mark.slow
@pytest.mark.parametrize("index_type", ["ivf_flat", "ivf_sq", "ivf_pq", "ivf_hnsw_sq", "ivf_rq"])
def test_every_index_type_is_built_and_reported(table, index_type):
    built = build_index(table, BuildConfig(index_type=index_type, target_recall=0.5))
    report = built.report
    assert report.index_type == index_type
    assert report.num_unindexed_rows == report.nonfinite_vectors == report.zero_vectors == 0
    assert report.index_bytes > 0
    assert report.recall_at_1 >= 0.5
    stored = built.table.report("index")
    assert stored == json.loads(json.dumps(asdict(report)))
    assert stored.keys() == {field.name for field in fields(IndexReport)}
    # The selected candidate is the one that serves.
    index = built.table.meta.index
    assert index.recall_at_1 == report.recall_at_1
    assert any(each.ref(index.recall_at_1, index.uuid) == index for each in report.candidates)
    # A trainer relies on this version: its tag keeps it from clean-up.
    tags = built.table.dataset().tags.list()
    assert built.table.version in {tag["version"] for tag in tags.values()}


@pytest.mark.slow
def test_ivf_flat_replaces_an_index_that_misses_the_target(table):
    options = {"index_type": "ivf_pq", "target_recall": 1.0, "memory": 2**30, "seed": 0, "refine_factors": (1,)}
    selection = select_index(table, ground_truth(table), ground_truth(table, seed=2), **options)
    assert selection.table.meta.index.index_type == "ivf_flat"
    assert {each.index_type for each in selection.candidates} == {"ivf_pq", "ivf_flat"}
    assert selection.recall.recall_at_1 > 0.99
    first, second = selection.reason.split("; ")
    assert first.startswith("IVF_PQ: recall@1 0.")
    assert first.endswith("below the target")
    assert second.startswith("IVF_FLAT: recall@1 ")


@pytest.mark.slow
def test_a_new_geometry_rewrites_the_vectors_and_is_kept(table):
    table = build_index(table, BuildConfig()).table
    after = build_index(open_table(table.uri), BuildConfig(desc_scale=2.0, geometry="standard")).table
    assert (after.meta.geometry.desc_scale, after.meta.geometry.name) == (2.0, "standard")
    assert np.array_equal(
        after.column("vector", None),
        after.meta.geometry.vectors(after.column("text", None), after.column("latent", None)).astype(np.float16),
    )
    assert build_index(open_table(table.uri), BuildConfig(desc_scale=2)).table.meta.geometry.desc_scale == 2
    again = build_index(open_table(table.uri), BuildConfig())
    assert again.table.meta.geometry.same_as(after.meta.geometry)


@pytest.mark.slow
def test_auto_desc_scale_reaches_the_target_perplexity(table):
    built = build_index(table, BuildConfig(desc_scale="auto", target_perplexity=4.0))
    scale = built.table.meta.geometry.desc_scale
    assert scale > 1
    # Measured on other captions than it was chosen by.
    assert built.report.perplexity == pytest.approx(4.0, rel=0.25)
    _, points = measure_sweep(ExactSearch(built.table), built.table.meta.geometry, (1.2, scale, 20.0))
    assert points[0].perplexity >= points[1].perplexity >= points[2].perplexity
    assert points[2].self_retrieval_rate >= points[0].self_retrieval_rate


@pytest.mark.slow
def test_auto_desc_scale_goes_below_one_only_if_allowed(table):
    options = {"desc_scale": "auto", "target_perplexity": 1000.0}
    assert build_index(table, BuildConfig(**options)).table.meta.geometry.desc_scale >= 1.01
    built = build_index(open_table(table.uri), BuildConfig(**options, allow_small_desc_scale=True))
    assert built.table.meta.geometry.desc_scale < 1
    assert built.report.perplexity == pytest.approx(built.report.train_rows / 10, rel=0.3)


@pytest.mark.slow
def test_balance_evens_the_hit_counts_and_is_stored(unbalanced):
    table, plain = unbalanced.table, unbalanced.report
    built = build_index(open_table(table.uri), BuildConfig(balance=True))
    assert plain.chi_square > 0.5
    assert built.report.chi_square < plain.chi_square / 5
    assert built.report.anti_hub_rate <= plain.anti_hub_rate
    geometry = built.table.meta.geometry
    assert geometry.balance_of(built.table.column("vector")).any()
    kept = build_index(open_table(table.uri), BuildConfig())
    assert geometry.balance_of(kept.table.column("vector")).any()
    removed = build_index(open_table(table.uri), BuildConfig(balance=False))
    assert not geometry.balance_of(removed.table.column("vector")).any()


@pytest.mark.slow
def test_balance_stops_when_balanced_and_resumes(unbalanced):
    uri = unbalanced.table.uri
    short = build_index(open_table(uri), BuildConfig(balance=True, balance_time_limit=0.05)).report.balance
    assert (short.stop_reason, short.resumed) == ("the time limit of 0.05 s is reached", False)
    more = build_index(open_table(uri), BuildConfig(balance=True)).report.balance
    assert (more.stop_reason, more.resumed) == ("chi-square is below 0.05", True)
    assert more.fit_chi_square < min(0.05, short.fit_chi_square)
    again = build_index(open_table(uri), BuildConfig(balance=True)).report.balance
    assert (again.steps, again.stop_reason) == (0, "chi-square is below 0.05")


@pytest.mark.slow
def test_rows_that_were_not_fitted_are_balanced_by_their_neighbors(unbalanced):
    table, train_rows = unbalanced.table, unbalanced.report.train_rows
    options = {"balance": True, "memory": 2**28, "time_limit": 300.0, "seed": 0, "log": None}
    laid_out, report = lay_out(table, table.meta.geometry, **options, max_fitted_rows=150)
    assert 150 < train_rows <= 300
    assert report.fitted_rows == -(-train_rows // 2)
    exact = ExactSearch(laid_out)
    measured = measure_hubness(table.meta.geometry, exact, exact).chi_square
    assert measured < 0.7 * unbalanced.report.chi_square
    assert report.chi_square == pytest.approx(measured, abs=0.15)
    assert report.chi_square_before == pytest.approx(unbalanced.report.chi_square, rel=0.2)


def test_balance_that_makes_hit_counts_less_even_is_left_out(unbalanced, monkeypatch, capsys):
    table = unbalanced.table
    options = {"balance": True, "memory": 2**28, "time_limit": 1.0, "seed": 0, "log": None, "max_fitted_rows": 150}
    spoiled = np.linspace(0, 30, unbalanced.report.train_rows, dtype=np.float32)
    monkeypatch.setattr("index.build.layout.extend_potentials", lambda *_, **__: spoiled)
    same, report = lay_out(table, table.meta.geometry, **options)
    assert report.chi_square > report.chi_square_before
    assert (same.version, same.meta.balanced) == (table.version, table.meta.balanced)
    assert "--balance was left out" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [1000, 10**6])
def test_a_check_counts_enough_queries(rows):
    """Of uniform hits; 16,384 queries at least."""
    queries = num_check_queries(rows)
    found = [
        chi_square(np.bincount(np.random.default_rng(seed).integers(rows, size=queries), minlength=rows))
        for seed in range(30)
    ]
    assert abs(np.mean(found)) < 0.01
    assert np.std(found) < 0.015


def test_potentials_even_the_hit_counts_of_fresh_queries(unbalanced):
    table, geometry = unbalanced.table, unbalanced.table.meta.geometry
    exact = ExactSearch(table)

    def queries(step):
        text = exact.take(draw_rows(len(exact.row_ids), 512, seed=3, step=step), "text")
        return geometry.queries(text, draw_points(geometry, 512, seed=3, step=step))

    *_, potentials = fit_potentials(VectorBlocks(table, memory=2**28, balance=False), queries, steps=300, target=0.0)
    assert potentials.stop_reason == "all steps are done"
    vectors = table.column("vector").astype(np.float32)
    fresh = np.concatenate([queries(step) for step in range(1000, 1020)])
    cost = -2 * fresh @ vectors.T + np.square(vectors).sum(1)

    def unevenness(g):
        return chi_square(np.bincount((cost - g).argmin(1), minlength=len(vectors)))

    assert unevenness(potentials.g) < 0.2 * unevenness(np.zeros(len(vectors)))
    # With the balance coordinate, plain distances have the same winners.
    shifted = cost + np.square(potentials.coordinate())
    assert np.array_equal(shifted.argmin(1), (cost - potentials.g).argmin(1))


@pytest.mark.slow
def test_the_old_index_serves_until_the_new_one_is_complete(table):
    with pytest.raises(TableError, match="has no index"):
        open_table(table.uri, indexed=True)
    built = build_index(table, BuildConfig(index_type="ivf_flat")).table
    *_, between = rewrite_vectors(built, replace(built.meta.geometry, desc_scale=9.0))
    assert between.meta.index is None
    serving = open_table(table.uri, indexed=True)
    assert (serving.version, serving.meta.geometry.desc_scale) == (built.version, 4.0)
    assert "ANNIvfBatch" in ApproximateSearch(serving).explain_plan(evaluation_queries(serving, 8))
    rebuilt = build_index(open_table(table.uri), BuildConfig(index_type="ivf_flat")).table
    assert open_table(table.uri, indexed=True).version == rebuilt.version > between.version
    # A version that a checkpoint may refer to survives a clean-up.
    rebuilt.dataset().cleanup_old_versions(older_than=timedelta(0), error_if_tagged_old_versions=False)
    assert open_table(table.uri, version=built.version).meta.index == built.meta.index


@pytest.mark.slow
def test_inspect_tells_the_open_table_from_its_last_report(table):
    assert describe(table)["index_report"] is None
    built = build_index(table, BuildConfig(index_type="ivf_flat")).table
    *_, relaid = rewrite_vectors(built, built.meta.geometry)
    shown = describe(relaid)
    assert (shown["version"], shown["indexed"], shown["serving_version"]) == (relaid.version, False, built.version)
    report = built.report("index")
    assert shown["index_report"]["recall_at_1"] == report["recall_at_1"]
    assert shown["index_report"]["measured_version"] == report["version"] == built.version < relaid.version
    assert "rows" not in shown["index_report"]


def test_chi_square_is_unbiased():
    rng = np.random.default_rng(0)
    even = [chi_square(np.bincount(rng.integers(50, size=400), minlength=50)) for _ in range(400)]
    assert abs(np.mean(even)) < 0.01
    q = np.arange(1, 51) / np.arange(1, 51).sum()
    uneven = [chi_square(np.bincount(rng.choice(50, 400, p=q), minlength=50)) for _ in range(400)]
    assert np.mean(uneven) == pytest.approx(50 * np.square(q).sum() - 1, abs=0.02)


def test_prior_skew_is_how_far_a_retrieved_text_moves_r():
    rng = np.random.default_rng(0)
    r = rng.normal(size=(512, 8)).astype(np.float32)
    independent = rng.integers(5, size=(16, 512))
    assert prior_skew(independent, r) < 0.03
    # Four texts, one per quadrant of R: E[R] is sqrt(2 / pi) in two of eight dimensions.
    quadrant = np.broadcast_to((r[:, 0] > 0) + 2 * (r[:, 1] > 0), (16, 512)).astype(np.int64)
    assert prior_skew(quadrant, r) == pytest.approx(np.sqrt(2 * (2 / np.pi) / 8), rel=0.1)
    assert prior_skew(np.arange(512)[None], r) == 0  # each text retrieved once: no estimate


def test_ridge_r2_is_one_for_a_line_and_zero_for_noise():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 6))
    assert ridge_r2(x, x @ rng.normal(size=(6, 3)) + 2, penalty=1e-6) > 0.999
    assert abs(ridge_r2(x, rng.normal(size=(4000, 3)))) < 0.02


class OneRow:
    """A search that retrieves the first training row for every query."""

    def __init__(self, exact):
        self.exact = exact

    def nearest(self, queries, k=1):
        positions = np.zeros((len(queries), k), np.int64)
        text, latent = (self.exact.take(positions, column) for column in ("text", "latent"))
        return RetrievedPairs(self.exact.row_ids[positions], np.zeros(positions.shape, np.float32), text, latent)

    def nearest_rows(self, queries, k=1):
        pairs = self.nearest(queries, k)
        return NearestRows(pairs.row_id, pairs.distance)


def test_hubness_of_a_single_hub(encoded):
    exact = ExactSearch(encoded)
    n = len(exact.row_ids)
    hubness = measure_hubness(encoded.meta.geometry, OneRow(exact), exact)
    assert hubness.hit_counts == [n - 1, *[0] * 31, 1]
    assert hubness.anti_hub_rate == pytest.approx(1 - 1 / n)
    assert (hubness.max_hit_rate, hubness.chi_square) == (1, pytest.approx(n - 1))
    assert hubness.effective_row_fraction == pytest.approx(1 / n)


def test_options_that_do_not_fit_are_refused(encoded, shapes, encode_shapes, tmp_path):
    first_rows = encode_shapes(shapes, tmp_path / "t.lance", limit=100).table
    with pytest.raises(OptionError, match=r"--index-type 'flat'.*ivf_rq"):
        BuildConfig(index_type="flat")
    with pytest.raises(OptionError, match=r"--target-recall 1.5 is out of range"):
        BuildConfig(target_recall=1.5)
    with pytest.raises(OptionError, match=r"--target-perplexity 2000 is out of range: use .* at most 1024"):
        BuildConfig(target_perplexity=2000.0)
    with pytest.raises(OptionError, match=r"--balance-time-limit 0 is out of range"):
        BuildConfig(balance_time_limit=0.0)
    with pytest.raises(OptionError, match=r"--max-memory 0 is out of range"):
        BuildConfig(max_memory=0)
    with pytest.raises(OptionError, match="--desc-scale 1 "):
        build_index(encoded, BuildConfig(desc_scale=1.0))
    with pytest.raises(OptionError, match="trains 256 centroids"):
        build_index(first_rows, BuildConfig(index_type="ivf_pq"))
    with pytest.raises(OptionError, match="geometry 'torus'"):
        build_index(encoded, BuildConfig(geometry="torus"))
    assert open_table(encoded.uri).version == encoded.version


@pytest.mark.slow
def test_a_table_without_training_rows_is_refused(shapes, encode_shapes, tmp_path):
    with pytest.raises(SourceError, match="--val-fraction"):
        encode_shapes(shapes, tmp_path / "t.lance", val_fraction=1.0)
    with pytest.raises(TableError, match="no table at"):
        open_table(tmp_path / "t.lance")


def test_held_out_rows_are_never_found_and_take_no_place(indexed, monkeypatch):
    """As by LanceDB's own filter, also where so many neighbors are held out that a query is searched again."""
    search, queries = ApproximateSearch(indexed), evaluation_queries(indexed, 64)
    assert search._more > 0
    expected = search._run(queries, 5 * search._refine_factor, filtered=True).row_id
    train = set(indexed.column("id"))
    assert set(indexed.dataset().to_table(columns=["id"], filter="split = 'train'")["id"].to_pylist()) == train
    found = search._search(queries, 5 * search._refine_factor).row_id
    assert found.tolist() == expected.tolist()
    monkeypatch.setattr(search, "_more", 1)
    asked = []
    monkeypatch.setattr(search, "_run", lambda q, *a, run=search._run, **k: asked.append(len(q)) or run(q, *a, **k))
    assert search._search(queries, 5 * search._refine_factor).row_id.tolist() == expected.tolist()
    assert len(asked) == 2
    assert 0 < asked[1] < 64
