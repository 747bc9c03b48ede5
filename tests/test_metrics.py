"""Figures of point sets, against closed forms and brute force."""

from math import erf, exp, pi, sqrt

import numpy as np
import pytest
import torch

from trainer.evaluation.adherence import retrieval_ranks
from trainer.evaluation.metrics import (
    diversity,
    energy_distance,
    frechet,
    mean_distance,
    sliced_wasserstein,
    two_sample_accuracy,
)
from trainer.evaluation.neighborhoods import COPIED, manifold, nearest_ratio
from trainer.evaluation.reliability import rank_correlation, reliability
from trainer.evaluation.viewers import feature_distances


def apart(a, b):
    """All distances, one by one."""
    return np.linalg.norm(a[:, None] - b[None], axis=2)


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


def test_frechet_of_fewer_points_than_numbers_is_the_same():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 50)) * 2, rng.normal(size=(40, 50))
    root = np.linalg.cholesky(np.cov(a, rowvar=False) + 1e-10 * np.eye(50))
    values = np.linalg.eigvalsh(root.T @ np.cov(b, rowvar=False) @ root).clip(min=0)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    assert frechet(a, b) == pytest.approx(expected - 2 * np.sqrt(values).sum(), rel=1e-3)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_sliced_wasserstein_of_a_shift_is_its_length_over_root_d():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(300, 5))
    shift = np.array([3.0, 0, 0, 4, 0])
    assert sliced_wasserstein(a, a + shift, projections=3000) == pytest.approx(5 / np.sqrt(5), rel=0.05)
    assert sliced_wasserstein(a, a) == 0
    assert sliced_wasserstein(a, a[:100]) < 0.3


def test_sliced_wasserstein_of_unequal_numbers_reads_the_same_laws():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4000, 1)), 2 * rng.normal(size=(3000, 1))
    assert sliced_wasserstein(a, b) == pytest.approx(1, abs=0.08)  # in 1-D the difference of standard deviations
    assert sliced_wasserstein(a, b) == pytest.approx(sliced_wasserstein(a[:3000], b), abs=0.05)


def folded(mean: float, std: float) -> float:
    """E|N(mean, std^2)|."""
    return std * sqrt(2 / pi) * exp(-(mean**2) / (2 * std**2)) + mean * erf(mean / (std * sqrt(2)))


def test_energy_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4000, 1)), 2 * rng.normal(size=(3000, 1)) + 1.5
    expected = 2 * folded(1.5, sqrt(1 + 4)) - folded(0, sqrt(2)) - folded(0, sqrt(8))
    assert energy_distance(a, b) == pytest.approx(expected, rel=0.06)


def test_energy_distance_of_equal_laws_is_zero_on_average():
    rng = np.random.default_rng(0)
    found = [energy_distance(rng.normal(size=(20, 3)), rng.normal(size=(15, 3))) for _ in range(400)]
    # Without the correction for a point's distance to itself it would be about 0.26.
    assert np.mean(found) == pytest.approx(0, abs=4 * np.std(found) / 20)
    assert min(found) < 0 < max(found)


def test_distances_in_blocks_are_all_distances():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1500, 3)), rng.normal(size=(1100, 3)) + 1
    expected = 2 * apart(a, b).mean() - apart(a, a).sum() / (1500 * 1499) - apart(b, b).sum() / (1100 * 1099)
    assert energy_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert np.isnan(mean_distance(a[:1]))


def test_diversity_is_the_mean_distance_within_owners_that_have_two():
    rng = np.random.default_rng(0)
    x, owner = rng.normal(size=(7, 3)), np.array([0, 1, 0, 1, 1, 2, 0])
    within = [apart(x[owner == k], x[owner == k]).sum() / 6 for k in (0, 1)]
    assert diversity(x, owner) == pytest.approx(np.mean(within), rel=1e-6)
    assert np.isnan(diversity(x, np.arange(7)))


def test_a_classifier_tells_far_sets_apart_and_equal_laws_not():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1000, 6)), rng.normal(size=(1000, 6))
    assert two_sample_accuracy(a, b) == pytest.approx(0.5, abs=0.035)
    assert two_sample_accuracy(a, b + 8) == 1
    # The best rule for N(0, I) and N(m, I) is right with probability Phi(|m| / 2).
    shifted = b + np.array([2.0, 0, 0, 0, 0, 0])
    assert two_sample_accuracy(a, shifted) == pytest.approx(0.5 * (1 + erf(1 / sqrt(2))), abs=0.035)
    assert two_sample_accuracy(a, shifted) == two_sample_accuracy(a, shifted)
    # Unequal numbers leave chance at one half.
    assert two_sample_accuracy(a, b[:300]) == pytest.approx(0.5, abs=0.07)


def test_sets_with_the_same_captions_are_not_told_apart_by_what_a_half_has_too_many_of():
    rng = np.random.default_rng(0)
    captions = 20 * np.eye(30)[rng.integers(30, size=200)]
    found = [
        two_sample_accuracy(captions + rng.normal(size=captions.shape), captions + rng.normal(size=captions.shape))
        for _ in range(4)
    ]
    assert np.mean(found) == pytest.approx(0.5, abs=0.04)


def test_the_test_leaves_the_global_generator_alone():
    a = np.random.default_rng(0).normal(size=(40, 2))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    two_sample_accuracy(a, a, steps=2)
    feature_distances("f", a.astype(np.float32), a.astype(np.float32))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("k", [1, 5])
def test_precision_recall_density_and_coverage_are_those_of_brute_force(k):
    rng = np.random.default_rng(k)
    real, found = rng.normal(size=(1100, 3)), 0.7 * rng.normal(size=(60, 3)) + 0.5
    around_real, around_found = (np.sort(apart(each, each), axis=1)[:, k] for each in (real, found))
    between = apart(real, found)
    near_real = between < around_real[:, None]
    assert manifold(real, found, k=k) == pytest.approx(
        (
            near_real.any(0).mean(),
            (between < around_found[None]).any(1).mean(),
            near_real.sum() / (k * len(found)),
            near_real.any(1).mean(),
        ),
        abs=2e-3,
    )


def test_coverage_counts_the_real_points_with_a_found_one_near():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(600, 4)), rng.normal(size=(400, 4)) + 20
    real = np.concatenate([left, right])
    assert manifold(real, real).coverage == 1
    assert manifold(real, rng.normal(size=(2000, 4))).coverage == pytest.approx(0.6, abs=0.01)
    assert manifold(real, left[:1]).coverage == pytest.approx(6 / 1000, abs=0.01)
    # Of two equal samples: 1 - (1/2)^k, about (Naeem et al., section 3.3).
    a, b = rng.normal(size=(3000, 4)), rng.normal(size=(3000, 4))
    assert manifold(a, b, k=5).coverage == pytest.approx(1 - 0.5**5, abs=0.015)


def test_equal_laws_are_as_dense_as_they_should_be():
    rng = np.random.default_rng(0)
    same = manifold(rng.normal(size=(1500, 4)), rng.normal(size=(1500, 4)))
    assert same.density == pytest.approx(1, abs=0.08)
    assert same.precision == pytest.approx(same.recall, abs=0.04)
    far = manifold(rng.normal(size=(50, 4)), rng.normal(size=(50, 4)) + 50)
    assert far == (0, 0, 0, 0)


def test_copies_of_training_rows_are_found_and_new_points_are_not():
    rng = np.random.default_rng(0)
    train, fresh = rng.normal(size=(3000, 16)) * 3, rng.normal(size=(200, 16)) * 3
    blocks = [train[:1700], train[1700:1701], train[1701:]]
    near = np.sort(apart(fresh, train), axis=1)
    assert np.allclose(nearest_ratio(fresh, blocks), near[:, 0] / near[:, 1], atol=1e-4)
    assert (nearest_ratio(fresh, blocks) < COPIED).mean() == 0
    copied = nearest_ratio(train[::20] + 1e-3 * rng.normal(size=(150, 16)), blocks)
    assert copied.max() < 0.01
    # A row that stands twice in the table: both distances are zero.
    assert nearest_ratio(train[:1], [train, train]).max() <= 1


def test_a_calibrated_confidence_has_no_error_and_a_wrong_one_has_its_own():
    rng = np.random.default_rng(0)
    said = rng.uniform(0.2, 0.9, size=20_000)
    came = said + 0.1 * rng.normal(size=20_000)
    good = reliability(said, came)
    assert good["calibration_error"] < 0.005
    assert good["rank_correlation"] > 0.85
    assert [bin["count"] for bin in good["bins"]] == [2000] * 10
    assert [bin["said"] for bin in good["bins"]] == pytest.approx(np.linspace(0.235, 0.865, 10), abs=0.01)
    wrong = reliability(np.full(500, 0.9), 0.4 + 0.01 * rng.normal(size=500))
    assert wrong["calibration_error"] == pytest.approx(0.5, abs=0.01)
    assert wrong["rank_correlation"] == 0
    assert reliability(1 - said, said)["rank_correlation"] == pytest.approx(-1)
    assert reliability(said**2, said)["rank_correlation"] == pytest.approx(1)


def test_equal_values_share_a_rank():
    # Ranks 1.5 1.5 3 4 and 1 2 3.5 3.5: 4 / sqrt(4.5 * 4.5).
    assert rank_correlation(np.array([1.0, 1, 2, 3]), np.array([0.0, 5, 9, 9])) == pytest.approx(4 / 4.5)


def test_a_perfect_model_ranks_the_true_caption_first():
    captions = torch.eye(150)
    true = torch.arange(150).repeat(2)
    assert (retrieval_ranks(captions[true], captions, true, among=100) == 1).all()
    assert (retrieval_ranks(-captions[true], captions, true, among=100) == 100).all()
    assert (retrieval_ranks(torch.zeros(300, 150), captions, true, among=100) == 50.5).all()
    assert (retrieval_ranks(torch.zeros(300, 150), captions, true, among=1000) == 75.5).all()
    chance = retrieval_ranks(torch.randn(300, 150, generator=torch.manual_seed(0)), captions, true, among=100)
    assert chance.mean() == pytest.approx(50.5, abs=6)


def test_distances_of_features_are_those_of_their_formulas():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(n, 5)).astype(np.float32) + shift for n, shift in ((300, 0.5), (200, 0.0)))
    found = feature_distances("x", a[:200], b)
    assert found["x_frechet"] == pytest.approx(frechet(a[:200], b), rel=1e-3)
    # Of fewer than a thousand all are taken: the unbiased squared distance with the kernel (<u, v> / 5 + 1)^3.
    aa, ab, bb = ((u @ v.T / 5 + 1.0) ** 3 for u, v in ((a[:200], a[:200]), (a[:200], b), (b, b)))
    off = 1 - np.eye(200)
    assert found["x_kernel"] == pytest.approx(((aa + bb) * off).sum() / (200 * 199) - 2 * ab.mean(), rel=1e-3)
    assert feature_distances("x", a, b) == feature_distances("x", a, b)
