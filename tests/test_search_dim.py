"""The reduced search space: `build-index --search-dim` projects text and image parts to principal components."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_tables import random_table, write_table

from index.build.build_index import BuildConfig, build_index
from index.errors import OptionError, TableError
from index.report.reduction import measure_agreement
from index.report.report import describe
from index.search.ann import ApproximateSearch
from index.search.exact import ExactSearch
from index.space.queries import draw_points
from index.space.reduction import fit_reduction, split_dim
from index.table.commit import append_rows
from index.table.prune import prune
from index.table.schema import TRAIN, TableMeta
from index.table.table import column_array, open_table, sampled_rows
from index.table.vectors import rewrite_vectors
from pipeline.beam.layout import Layout

ROWS, TEXT, LATENT = 500, 6, 15


def built(table, **options):
    return build_index(table, BuildConfig(**({"index_type": "none"} | options)))


def weights_of(table) -> list[Path]:
    return sorted(Path(table.uri, "_weights").glob("*.npz"))


def subspace_table(uri, *, text_rank=2, image_rank=3, **options):
    """Rows whose text embeddings and latents vary in few directions."""
    rng = np.random.default_rng(5)
    text = rng.normal(size=(ROWS, text_rank)) @ rng.normal(size=(text_rank, TEXT))
    latent = rng.normal(size=(ROWS, image_rank)) @ rng.normal(size=(image_rank, LATENT))
    return write_table(uri, text, latent, **options)


def nearest_in(geometry, table, queries):
    """Search by brute force in float64."""
    text, latent = table.column("text"), table.column("latent")
    vectors = geometry.vectors(text, latent).astype(np.float64)
    return np.square(queries[:, None].astype(np.float64) - vectors).sum(-1)


def some_queries(geometry, table, count=64):
    r = draw_points(geometry, count, seed=3, step=0)
    return table.column("text")[:count], r


@pytest.mark.parametrize("geometry", ["sphere", "standard", "raw"])
@pytest.mark.parametrize("center", [False, True])
def test_all_dimensions_give_the_distances_of_the_full_space(tmp_path, geometry, center):
    table = built(random_table(tmp_path / "t.lance", ROWS), geometry=geometry, center=center).table
    full = table.meta.geometry
    report = built(table, search_dim=TEXT + LATENT).report
    reduced = open_table(table.uri).meta.geometry
    text, r = some_queries(full, table)
    expected = nearest_in(full, table, full.queries(text, r))
    assert np.allclose(nearest_in(reduced, table, reduced.queries(text, r)), expected, rtol=1e-4, atol=1e-3)
    assert (report.search_text_dim, report.search_image_dim) == (TEXT, LATENT)
    assert (report.text_variance, report.image_variance) == pytest.approx((1, 1))
    assert report.full_space.full_space_recall_at_1 == 1
    assert report.full_space.full_space_distance_error == pytest.approx(0, abs=1e-5)


def test_a_subspace_that_holds_all_rows_loses_nothing(tmp_path):
    table = subspace_table(tmp_path / "t.lance", geometry="raw")
    full = table.meta.geometry
    # Unit text embeddings of rank 2 lie on a circle.
    reduced = built(table, search_dim=5)
    geometry = reduced.table.meta.geometry
    assert (geometry.reduction.text_dim, geometry.reduction.image_dim) == (2, 3)
    text, r = some_queries(full, table)
    distance = nearest_in(geometry, table, geometry.queries(text, r))
    expected = nearest_in(full, table, full.queries(text, r))
    # What R has outside of the subspace is the same for all rows.
    outside = expected - distance
    assert np.allclose(outside, outside[:, :1], rtol=1e-3, atol=1e-2)
    assert (outside > 1).all()
    assert reduced.report.full_space.full_space_recall_at_1 == 1
    assert geometry.vector_dim == 8 < full.vector_dim


def test_the_distance_is_the_expected_one_given_what_is_kept(tmp_path):
    table = built(random_table(tmp_path / "t.lance", 60, geometry="standard"), search_dim=8).table
    geometry = table.meta.geometry
    components = geometry.reduction.image_components
    kept, noise = np.ones(geometry.reduction.image_dim), np.random.default_rng(0).normal(size=(40_000, LATENT))
    r = kept @ components.T + noise - noise @ components @ components.T
    image = replace(geometry, reduction=None).image_part(table.column("text"), table.column("latent"))
    expected = np.square(r).sum(1).mean() - 2 * r.mean(0) @ image.T + np.square(image).sum(1)
    query, rows = geometry.query_image(r[:1]), geometry.image_part(table.column("text"), table.column("latent"))
    difference = expected - np.square(query - rows).sum(1)
    assert difference == pytest.approx(np.full(60, LATENT - geometry.reduction.image_dim), abs=0.3)


def test_components_are_split_by_variance_and_each_part_keeps_one():
    assert split_dim(np.array([9.0, 4.0, 0.5]), np.array([5.0, 1.0, 0.1]), 4) == (2, 2)
    assert split_dim(np.array([9.0, 8.0]), np.array([1.0, 1.0]), 2) == (1, 1)
    assert split_dim(np.array([0.0, 0.0]), np.array([1.0, 1.0]), 2) == (1, 1)
    assert split_dim(np.array([9.0, 8.0]), np.array([1.0, 1.0]), 4) == (2, 2)


def test_a_fit_does_not_depend_on_the_batches():
    rng = np.random.default_rng(1)
    text, image = ((rng.normal(size=(300, dim)) * np.arange(1, dim + 1)).astype(np.float32) for dim in (4, 7))
    whole = fit_reduction([(text, image)], 6, 2.0)
    parts = fit_reduction([(text[i : i + 70], image[i : i + 70]) for i in range(0, 300, 70)], 6, 2.0)
    assert whole.fitted_rows == parts.fitted_rows == 300
    assert (whole.text_dim, whole.image_dim) == (parts.text_dim, parts.image_dim)
    assert np.allclose(whole.text_components, parts.text_components, atol=1e-4)
    assert np.allclose(whole.image_components, parts.image_components, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("index_type", ["none", "ivf_flat"])
def test_search_balance_and_report_work_in_the_reduced_space(tmp_path, index_type):
    table = random_table(tmp_path / "t.lance", 1500, captions=10, heldout=100)
    result = built(table, search_dim=12, balance=True, balance_time_limit=5.0, index_type=index_type)
    table, report, geometry = result.table, result.report, result.table.meta.geometry
    assert (report.search_dim, report.vector_dim) == (12, 16)
    assert report.chi_square < 0.3
    assert report.recall_at_1 > 0.9
    assert len(report.sweep) == 6
    assert 0 < report.image_variance < 1
    assert 0 <= report.full_space.full_space_distance_error < 0.5
    text, r = some_queries(geometry, table)
    queries = geometry.queries(text, r)
    exact = ExactSearch(table)
    found = exact.nearest(queries)
    assert found.latent.shape == (64, 1, LATENT)
    assert found.text.shape == (64, 1, TEXT)
    vectors = table.column("vector").astype(np.float64)
    best = np.square(queries[:, None] - vectors).sum(-1)
    positions = exact.positions_of(found.row_id[:, 0])
    assert np.allclose(best[np.arange(64), positions], best.min(1), rtol=1e-3)
    if index_type != "none":
        assert (ApproximateSearch(table).nearest(queries).row_id == found.row_id).mean() > 0.9
    assert describe(table)["search_dim"].startswith("12 of 21 (")


@pytest.mark.slow
def test_what_is_not_asked_for_stays_and_full_returns(tmp_path):
    before = random_table(tmp_path / "t.lance", ROWS)
    full = before.meta.geometry
    reduced = built(before, search_dim=9).table
    assert open_table(before.uri, version=before.version).meta.geometry.reduction is None
    again = built(reduced).table
    assert again.meta.geometry.reduction.digest == reduced.meta.geometry.reduction.digest
    scaled = built(again, desc_scale=0.5, allow_small_desc_scale=True).table
    # Another desc_scale splits the components in another way.
    assert scaled.meta.geometry.reduction.dim == 9
    assert scaled.meta.geometry.reduction.digest != reduced.meta.geometry.reduction.digest
    back = built(scaled, search_dim="full", desc_scale=full.desc_scale).table
    assert back.meta.geometry.same_as(full)
    assert np.array_equal(back.column("vector"), before.column("vector"))
    old = open_table(before.uri, version=reduced.version)
    assert old.meta.geometry.same_as(reduced.meta.geometry)
    assert np.array_equal(old.column("vector")[:5], old.meta.geometry.vectors(
        old.column("text")[:5], old.column("latent")[:5]
    ).astype(np.float16))  # fmt: skip


@pytest.mark.slow
def test_arrays_are_in_a_file_of_the_table_and_prune_keeps_those_that_versions_need(tmp_path):
    table = random_table(tmp_path / "t.lance", ROWS, text_dim=40, latent_dim=60)
    narrow = built(table, search_dim=30, center=True).table
    assert len(weights_of(narrow)) == 2
    plain = len(table.meta.to_json())
    assert len(narrow.meta.to_json()) < plain + 2000
    kept = built(narrow, search_dim=20).table
    assert len(weights_of(kept)) == 3  # the centering is shared
    for path in weights_of(kept):
        os.utime(path, (0, 0))  # Lance takes what is older than a week for remains
    preview = prune(open_table(table.uri), dry_run=True)
    assert len(weights_of(kept)) == 3
    done = prune(open_table(table.uri))
    assert done.removed_files == preview.removed_files
    left = {path.stem for path in weights_of(kept)}
    assert left == {kept.meta.geometry.reduction.digest, kept.meta.geometry.centering.digest}
    reopened = open_table(table.uri).meta.geometry
    assert np.array_equal(reopened.reduction.image_components, kept.meta.geometry.reduction.image_components)


def test_a_missing_or_damaged_file_is_named_and_the_full_space_needs_none(tmp_path):
    table = built(random_table(tmp_path / "t.lance", ROWS), search_dim=9).table
    (path,) = weights_of(table)
    content = path.read_bytes()
    moved = tmp_path / "moved.lance"
    Path(table.uri).rename(moved)
    path = moved / "_weights" / path.name
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(TableError, match="damaged"):
        open_table(moved)
    path.unlink()
    lost = open_table(moved)
    with pytest.raises(TableError, match=r"_weights/[0-9a-f]{64}\.npz, which is missing.*--search-dim full"):
        lost.meta.geometry.queries(lost.column("text")[:2], np.zeros((2, LATENT), np.float32))
    assert describe(lost)["search_dim"].startswith("9 of 21")
    assert built(lost, search_dim="full").report.search_dim is None


def test_rows_are_appended_with_the_stored_projection(tmp_path):
    import lance

    from index.table.vectors import add_vectors, encoded_columns

    table = built(random_table(tmp_path / "t.lance", ROWS), search_dim=9).table
    Layout(table.meta.geometry).write(str(tmp_path / "layout.json"), table.storage)
    geometry = Layout.read(str(tmp_path / "layout.json"), table.storage, table.uri).geometry
    encoded = encoded_columns(table)
    rows = table.dataset().to_table(columns=encoded.names, limit=20).cast(encoded)
    (fragment,) = lance.fragment.write_fragments(rows, table.uri, schema=encoded, mode="append")
    fragment = add_vectors(table.uri, fragment, encoded, geometry)
    meta = replace(table.meta, run_ids=(*table.meta.run_ids, "second"))
    longer = append_rows(table, meta, [fragment], "second")
    vectors = column_array(longer.dataset().to_table(columns=["vector"])["vector"])
    assert len(vectors) == ROWS + 20
    assert np.array_equal(vectors[-20:], vectors[:20])
    assert built(open_table(table.uri)).report.search_dim == 9


def test_a_table_with_centering_in_its_metadata_still_opens(tmp_path):
    table = built(random_table(tmp_path / "t.lance", ROWS), center=True).table
    geometry = table.meta.geometry
    # As earlier versions wrote it.
    old = replace(geometry, centering=replace(geometry.centering, digest=""))
    content = json.loads(table.meta.with_geometry(old).to_json())
    del content["geometry"]["centering"]["digest"], content["geometry"]["reduction"]
    meta = TableMeta.from_json(json.dumps(content))
    assert np.array_equal(meta.geometry.centering.weight, geometry.centering.weight)
    assert meta.geometry.reduction is None
    *_, inline = rewrite_vectors(table, meta.geometry)
    for path in weights_of(table):
        path.unlink()
    again = open_table(inline.uri)
    assert again.meta.geometry.same_as(meta.geometry)
    reduced = built(again, search_dim=9).table.meta.geometry
    assert reduced.centering.digest
    assert reduced.reduction.digest


@pytest.mark.parametrize(
    ("dim", "message"),
    [
        (22, r"--search-dim 22 .* 21 dimensions \(6 of text, 15 of latents\), use 2 to 21, or full"),
        (1, "--search-dim 1 is out of range: use a whole number of at least 2"),
        ("wide", "--search-dim wide is out of range"),
    ],
)
def test_a_dimension_that_is_not_allowed_is_refused_in_one_line(tmp_path, dim, message):
    table = random_table(tmp_path / "t.lance", 50)
    with pytest.raises(OptionError, match=message):
        built(table, search_dim=dim)
    assert open_table(table.uri).version == table.version


def test_covariances_that_do_not_fit_into_memory_are_refused(tmp_path):
    table = random_table(tmp_path / "t.lance", 50)
    with pytest.raises(OptionError, match=r"--search-dim computes covariances of 6 and 15 .* raise it to 1"):
        built(table, search_dim=8, max_memory=4000)


def test_sampled_rows_are_evenly_spaced(tmp_path):
    table = random_table(tmp_path / "t.lance", 103, heldout=3)
    text = np.concatenate([text for text, _ in sampled_rows(table, 30, 7)])
    assert np.array_equal(text, table.column("text", TRAIN)[::4])


def test_agreement_counts_queries_whose_row_is_the_full_spaces(tmp_path):
    table = built(random_table(tmp_path / "t.lance", 300, geometry="standard"), search_dim=4).table
    agreement = measure_agreement(table, num_queries=50)
    assert agreement.full_space_queries == 50
    assert agreement.full_space_rows == 300
    assert 0 < agreement.full_space_recall_at_1 < 1
    assert agreement.full_space_distance_error > 0
    assert measure_agreement(replace(table, meta=replace(
        table.meta, geometry=replace(table.meta.geometry, reduction=None)
    ))) is None  # fmt: skip


@pytest.mark.slow
def test_append_fit_resume_and_sample_work_on_a_reduced_table(tmp_path, shapes, encode_shapes):
    from trainer.config import FitConfig, RuntimeConfig
    from trainer.fit import fit
    from trainer.sampler import CoalescerPipeline

    shards = sorted(shapes.glob("*.tar"))
    table = encode_shapes(shards[:2], tmp_path / "db" / "shapes.lance").table
    reduced = built(open_table(table.uri), search_dim=12, center=True).table
    longer = encode_shapes(shards, table.uri, append=True).table
    geometry = open_table(longer.uri).meta.geometry
    assert geometry.same_as(reduced.meta.geometry)
    rows = longer.dataset().to_table(columns=["text", "latent", "vector"])
    assert len(rows) > reduced.dataset().count_rows()
    text, latent, vectors = (column_array(rows[name]) for name in ("text", "latent", "vector"))
    assert np.allclose(vectors, geometry.vectors(text, latent), rtol=2e-3, atol=2e-3)
    indexed = built(open_table(longer.uri)).table
    config = FitConfig(size="tiny", images=20 * 32, batch_size=32)
    fit(indexed, replace(config, images=10 * 32), tmp_path / "run", runtime=RuntimeConfig(checkpoint_seconds=0.0))
    fit(indexed, config, tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["images"] == 20 * 32
    samples = CoalescerPipeline.from_pretrained(tmp_path / "run")(["a small red circle"])
    assert samples.latents.shape[1:] == indexed.meta.latent_shape
