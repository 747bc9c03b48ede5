"""Perplexity and self-retrieval are those of the whole table; desc_scale `auto` says what it reached."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from synthetic_tables import random_table, write_table

from index.build.build_index import BuildConfig, build_index
from index.errors import TableError
from index.report.page import index_page, retrieve_examples
from index.report.sweep import entropy, find_targets, mean_perplexity, measure_sweep, rows_in, stored_rows
from index.search.ann import open_search
from index.search.blocks import VectorBlocks
from index.search.exact import ExactSearch
from index.space.moments import unit
from index.space.queries import draw_points
from index.table.table import open_table

SCALES = (1.1, 2.0, 5.0)


@pytest.mark.parametrize("captions", [None, 4])
@pytest.mark.parametrize("stored", [True, False])
def test_targets_are_those_of_brute_force_over_all_rows(tmp_path, captions, stored):
    table = random_table(tmp_path / "pairs.lance", 700, captions=captions, heldout=100, fragments=2)
    geometry = table.meta.geometry
    text, latent = table.column("text").astype(np.float32), table.column("latent")
    own, r = np.arange(0, 600, 60), draw_points(geometry, 50, seed=4, step=0)
    rows = stored_rows(geometry, VectorBlocks(table, block_rows=64)) if stored else rows_in(table, geometry, 1)
    targets = find_targets(rows, geometry, unit(text[own]), r, SCALES)
    image, part = geometry.image_part(text, latent).astype(np.float64), unit(text.astype(np.float64))
    for scale, target in zip(SCALES, targets, strict=True):
        cost = np.square(r[None, :, None] - image).sum(-1)
        cost = cost + (scale * geometry.kappa) ** 2 * np.square(part[own][:, None] - part).sum(-1)[:, None]
        # The stored parts are float16.
        found = np.take_along_axis(cost, target[..., None], 2)[..., 0]
        assert (found <= cost.min(2) + 0.05).all()
        assert (target == cost.argmin(2)).mean() > 0.97


@pytest.mark.parametrize("outcomes", [1, 3, 100, 500])
def test_entropy_is_corrected_for_outcomes_that_were_not_seen(outcomes):
    rng, n = np.random.default_rng(0), 512
    counts = [np.unique(rng.integers(outcomes, size=n), return_counts=True)[1] for _ in range(50)]
    perplexity = np.mean([np.exp(entropy(count)) for count in counts])
    assert perplexity == pytest.approx(outcomes, rel=0.1)
    plain = np.mean([np.exp(-(count / n * np.log(count / n)).sum()) for count in counts])
    assert abs(perplexity - outcomes) <= abs(plain - outcomes)
    if outcomes == 500:
        assert plain < 300


def test_more_rows_than_a_sample_have_a_higher_perplexity(tmp_path):
    rng = np.random.default_rng(0)
    text, latent = rng.normal(size=(4000, 4)), rng.normal(size=(4000, 8))
    small, large = (
        write_table(tmp_path / f"{rows}.lance", text[:rows], latent[:rows], desc_scale=2.0) for rows in (1000, 4000)
    )
    points = [measure_sweep(ExactSearch(table), table.meta.geometry, (2.0,)) for table in (small, large)]
    assert [size.sweep_rows for size, _ in points] == [1000, 4000]
    assert points[1][1][0].perplexity > 1.5 * points[0][1][0].perplexity
    assert points[1][1][0].self_retrieval_rate < points[0][1][0].self_retrieval_rate


@pytest.mark.slow
@pytest.mark.parametrize("target", [8.0, 40.0])
def test_auto_reaches_its_target_in_the_whole_table(tmp_path, target):
    table = random_table(tmp_path / "pairs.lance", 3000, text_dim=4, latent_dim=8)
    report = build_index(table, BuildConfig(desc_scale="auto", target_perplexity=target)).report
    # Measured on other captions and noise than it was chosen by.
    assert report.perplexity == pytest.approx(target, rel=0.2)
    assert report.target_perplexity == target
    assert not [warning for warning in report.warnings if "auto" in warning]
    assert (report.sweep_rows, report.sweep_captions, report.sweep_points) == (3000, 64, 1024)


@pytest.mark.slow
def test_auto_says_that_its_target_was_not_reached(tmp_path):
    # Captions so far apart that no desc_scale above 1 mixes them.
    rng = np.random.default_rng(0)
    table = write_table(tmp_path / "pairs.lance", np.eye(200), rng.normal(size=(200, 64)))
    report = build_index(table, BuildConfig(desc_scale="auto", target_perplexity=15.0)).report
    assert report.desc_scale == 1.01
    (warning,) = [each for each in report.warnings if "auto" in each]
    assert warning.startswith(
        f"--desc-scale auto reached a perplexity of {report.perplexity:.3g} at desc_scale 1.01, 15"
    )


@pytest.mark.slow
def test_a_desc_scale_that_the_table_has_changes_nothing(tmp_path):
    table = random_table(tmp_path / "pairs.lance", 600)
    built = build_index(table, BuildConfig(index_type="ivf_flat", geometry="standard", desc_scale=3.0)).table
    again = build_index(open_table(table.uri), BuildConfig(geometry="standard", desc_scale=3.0, index_type="ivf_flat"))
    assert again.table.meta.geometry.same_as(built.meta.geometry)
    assert again.report.index_choice.startswith("kept, with 0 rows added")
    assert again.table.meta.index.uuid == built.meta.index.uuid


@pytest.mark.slow
@pytest.mark.parametrize("index_type", ["auto", "ivf_rq", "ivf_flat", "ivf_sq", "ivf_hnsw_sq"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_few_training_rows_are_enough(tmp_path, rows, index_type):
    table = random_table(tmp_path / "pairs.lance", rows + 2, heldout=2)
    built = build_index(table, BuildConfig(index_type=index_type))
    assert (built.report.train_rows, built.report.recall_at_1, sum(built.report.hit_counts)) == (rows, 1, rows)
    assert (built.report.linear_probe_r2 is None) == (rows == 1)
    json.dumps(asdict(built.report), allow_nan=False)
    examples = retrieve_examples(built.table, lambda latents: np.zeros((len(latents), 4, 4, 3), np.uint8))
    assert {(len(example.captions), len(example.images)) for example in examples} <= {(rows, rows), (4, 4)}
    assert "All metrics" in index_page(built.table, built.report)


@pytest.mark.parametrize("options", [{"desc_scale": "auto"}, {"balance": True}, {"center": True, "geometry": "raw"}])
def test_one_row_can_be_laid_out_in_any_way(tmp_path, options):
    report = build_index(random_table(tmp_path / "pairs.lance", 1), BuildConfig(**options)).report
    assert (report.train_rows, report.perplexity, report.self_retrieval_rate) == (1, 1, 1)


def test_the_page_keeps_the_memory_budget(tmp_path, monkeypatch):
    table = build_index(random_table(tmp_path / "pairs.lance", 3000), BuildConfig()).table
    assert open_search(table).blocks.in_memory
    opened = []
    monkeypatch.setattr(VectorBlocks, "_sort", lambda *_: opened.append("all rows in memory"))
    assert not open_search(table, memory=2**18).blocks.in_memory
    assert len(retrieve_examples(table, memory=2**18)) == 6
    assert not opened


@pytest.mark.parametrize(
    ("damage", "advice"),
    [
        ("latent", r"1 latents are not finite, as the image encoder gave them: .*--dtype float32"),
        ("text", r"text embeddings are not finite, as the text encoder gave them: .*--dtype float32"),
        ("scale", r"text part overflows float16 at --desc-scale 60000.*use --desc-scale \d.* or less"),
        ("image", r"image part overflows float16 in --geometry standard.*use --geometry sphere"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_vectors_that_are_not_finite_are_explained(tmp_path, damage, advice):
    rng = np.random.default_rng(0)
    text, latent, options = rng.normal(size=(300, 4)), rng.normal(size=(300, 8)), {}
    if damage == "scale":
        options = {"desc_scale": 60_000.0}
    elif damage == "image":
        # A dimension that hardly varied before this row came.
        latent[:, 3], latent[250, 3] = 1e-6 * latent[:, 3], 1000
    else:
        (latent if damage == "latent" else text)[250] = np.inf
    table = write_table(tmp_path / "pairs.lance", text, latent, geometry="standard", fitted=200, **options)
    with pytest.raises(TableError, match=rf"vectors of .* are not finite: .*{advice}"):
        build_index(open_table(table.uri), BuildConfig())


def test_mean_perplexity_averages_over_captions():
    assert mean_perplexity(np.array([[0] * 100, [1, 2] * 50])) == pytest.approx(1.5)
