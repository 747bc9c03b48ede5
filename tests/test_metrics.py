"""Distances of point sets, against closed forms."""

import numpy as np
import pytest

from trainer.metrics import coverage, frechet, sliced_wasserstein


def test_frechet_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200_000, 3))
    b = rng.normal(size=(200_000, 3)) * [1, 2, 3] + [1, 0, -2]
    # Diagonal covariances: |m - n|^2 + sum (s - t)^2.
    assert frechet(a, b) == pytest.approx(5 + 0 + 1 + 4, rel=0.02)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_with_correlated_features_agrees_with_a_matrix_root():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(500, 4)) @ rng.normal(size=(4, 4)), rng.normal(size=(500, 4)) @ rng.normal(size=(4, 4))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values = np.linalg.eigvals(cov_a @ cov_b)  # the product is similar to a positive matrix
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b) - 2 * np.sqrt(values.real).sum()
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)


def test_sliced_wasserstein_of_a_shift_is_its_length_over_root_d():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(300, 5))
    shift = np.array([3.0, 0, 0, 4, 0])
    assert sliced_wasserstein(a, a + shift, projections=3000) == pytest.approx(5 / np.sqrt(5), rel=0.05)
    assert sliced_wasserstein(a, a) == 0
    assert sliced_wasserstein(a, a[:100]) < 0.3


def test_coverage_counts_the_real_points_with_a_found_one_near():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(600, 4)), rng.normal(size=(400, 4)) + 20
    real = np.concatenate([left, right])
    assert coverage(real, real) == 1
    assert coverage(real, rng.normal(size=(2000, 4))) == pytest.approx(0.6, abs=0.01)
    assert coverage(real, left[:1]) == pytest.approx(6 / 1000, abs=0.01)
    # Of two equal samples: 1 - (1/2)^k, about (Naeem et al., section 3.3).
    a, b = rng.normal(size=(3000, 4)), rng.normal(size=(3000, 4))
    assert coverage(a, b, k=5) == pytest.approx(1 - 0.5**5, abs=0.015)
