"""What descriptions tell of latents is taken out, and no more than they tell."""

import numpy as np
import pytest

from index.build.build_index import BuildConfig, build_index
from index.space.centering import PENALTIES, fit_centering
from index.space.moments import unit


def labelled(seed: int, n: int = 4000, classes: int = 4, dim: int = 6):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n)
    text = np.eye(classes)[label]
    x = rng.normal(size=(classes, dim))[label] * 3 + rng.normal(size=(n, dim)) * rng.uniform(0.5, 2, dim)
    return text, x, label


def test_for_labels_it_is_standardizing_within_each_class():
    text, x, label = labelled(0)
    residual = fit_centering([(text, x)]).residual(text, x)
    for each in range(4):
        assert np.allclose(residual[label == each].mean(0), 0, atol=0.02)
    assert np.allclose(residual.std(0), 1, atol=0.01)


def test_it_is_a_ridge_regression_whose_worth_is_foreseen():
    """Against the normal equations: some penalty of the list gives these weights. `explained` holds for fresh rows."""
    rng = np.random.default_rng(1)
    law = rng.normal(size=(8, 5))
    text, fresh = rng.normal(size=(500, 8)), rng.normal(size=(5000, 8))
    x, y = (unit(rows) @ law + rng.normal(size=(len(rows), 5)) for rows in (text, fresh))
    found = fit_centering([(text, x)])
    t = unit(text) - unit(text).mean(0)
    covariance, told = t.T @ t / 500, t.T @ (x - x.mean(0)) / 500
    penalties = PENALTIES * np.linalg.eigvalsh(covariance).max()
    weights = [np.linalg.solve(covariance + penalty * np.eye(8), told) for penalty in penalties]
    assert min(np.abs(weight - found.weight).max() for weight in weights) < 1e-5
    left = y - unit(fresh) @ found.weight - found.bias
    assert found.explained == pytest.approx(1 - left.var(0).sum() / y.var(0).sum(), abs=0.05)


def test_batches_do_not_matter():
    text, x, _ = labelled(2)
    whole, parts = (
        fit_centering([(text, x)]),
        fit_centering([(text[i : i + 700], x[i : i + 700]) for i in range(0, 4000, 700)]),
    )
    assert np.allclose(whole.weight, parts.weight, atol=1e-5)
    assert np.allclose(whole.std, parts.std, atol=1e-6)


@pytest.mark.parametrize("width", [3, 300])
def test_descriptions_that_tell_nothing_change_little(width):
    """Even nearly as many directions as rows: cross-validation leaves them out."""
    rng = np.random.default_rng(3)
    text, x = rng.normal(size=(400, width)), rng.normal(size=(400, 5))
    centering = fit_centering([(text, x)])
    assert centering.explained < 0.05
    assert np.corrcoef(centering.residual(text, x)[:, 0], x[:, 0])[0, 1] > 0.9


def test_one_description_for_all_and_still_dimensions_do_no_harm():
    text, x = np.ones((50, 4)), np.random.default_rng(4).normal(size=(50, 3))
    x[:, 1] = 2
    residual = fit_centering([(text, x)]).residual(text, x)
    assert np.isfinite(residual).all()
    assert np.allclose(residual[:, 1], 0, atol=1e-3)


def test_a_table_is_centered_and_put_back(shapes, encode_shapes, tmp_path):
    table = encode_shapes(shapes, tmp_path / "t.lance").table
    plain = table.meta.geometry
    centered = build_index(table, BuildConfig(center=True, index_type="none"))
    geometry = centered.table.meta.geometry
    assert centered.report.center
    assert geometry.centering.weight.shape == (16, 32)
    stored = centered.table.column("vector").astype(np.float32)
    expected = geometry.vectors(centered.table.column("text"), centered.table.column("latent"))
    assert np.allclose(stored, expected, rtol=2e-3, atol=2e-3)
    again = build_index(centered.table, BuildConfig(index_type="none")).table
    assert again.meta.geometry.same_as(geometry)
    back = build_index(again, BuildConfig(center=False, index_type="none")).table
    assert back.meta.geometry.same_as(plain)
    assert np.array_equal(back.column("vector"), table.column("vector"))
