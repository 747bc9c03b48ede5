"""Centering subtracts what text embeddings predict of latents, and no more than that."""

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


def test_for_class_labels_it_standardizes_within_each_class():
    text, x, label = labelled(0)
    residual = fit_centering([(text, x)]).residual(text, x)
    for each in range(4):
        assert np.allclose(residual[label == each].mean(0), 0, atol=0.02)
    assert np.allclose(residual.std(0), 1, atol=0.01)


def test_it_is_a_ridge_regression_with_a_sound_estimate_of_its_explained_variance():
    """The weights solve the normal equations of one of PENALTIES; `explained_variance` holds for new rows."""
    rng = np.random.default_rng(1)
    coefficients = rng.normal(size=(8, 5))
    text, new_text = rng.normal(size=(500, 8)), rng.normal(size=(5000, 8))
    x, y = (unit(rows) @ coefficients + rng.normal(size=(len(rows), 5)) for rows in (text, new_text))
    centering = fit_centering([(text, x)])
    t = unit(text) - unit(text).mean(0)
    covariance, cross = t.T @ t / 500, t.T @ (x - x.mean(0)) / 500
    penalties = PENALTIES * np.linalg.eigvalsh(covariance).max()
    weights = [np.linalg.solve(covariance + penalty * np.eye(8), cross) for penalty in penalties]
    assert min(np.abs(weight - centering.weight).max() for weight in weights) < 1e-5
    residual = y - unit(new_text) @ centering.weight - centering.bias
    assert centering.explained_variance == pytest.approx(1 - residual.var(0).sum() / y.var(0).sum(), abs=0.05)


def test_the_fit_does_not_depend_on_the_batch_size():
    text, x, _ = labelled(2)
    whole, parts = (
        fit_centering([(text, x)]),
        fit_centering([(text[i : i + 700], x[i : i + 700]) for i in range(0, 4000, 700)]),
    )
    assert np.allclose(whole.weight, parts.weight, atol=1e-5)
    assert np.allclose(whole.std, parts.std, atol=1e-6)


@pytest.mark.parametrize("dim", [3, 300])
def test_embeddings_that_predict_nothing_get_small_weights(dim):
    """Even with nearly as many dimensions as rows: cross-validation chooses a large penalty."""
    rng = np.random.default_rng(3)
    text, x = rng.normal(size=(400, dim)), rng.normal(size=(400, 5))
    centering = fit_centering([(text, x)])
    assert centering.explained_variance < 0.05
    assert np.corrcoef(centering.residual(text, x)[:, 0], x[:, 0])[0, 1] > 0.9


def test_equal_embeddings_and_constant_dimensions_give_finite_residuals():
    text, x = np.ones((50, 4)), np.random.default_rng(4).normal(size=(50, 3))
    x[:, 1] = 2
    residual = fit_centering([(text, x)]).residual(text, x)
    assert np.isfinite(residual).all()
    assert np.allclose(residual[:, 1], 0, atol=1e-3)


@pytest.mark.slow
def test_a_table_is_centered_and_restored(shapes, encode_shapes, tmp_path):
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
    restored = build_index(again, BuildConfig(center=False, index_type="none")).table
    assert restored.meta.geometry.same_as(plain)
    assert np.array_equal(restored.column("vector"), table.column("vector"))
