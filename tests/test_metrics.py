"""Metrics of point sets, against closed forms, brute force and other libraries."""

from math import erf, exp, pi, sqrt

import numpy as np
import pytest
import torch

from trainer.evaluation.calibration import calibrate
from trainer.evaluation.energy_score import energy_score, energy_score_of_rows
from trainer.evaluation.memorization import COPY_RATIO, nearest_ratio
from trainer.evaluation.metrics import (
    diversity,
    energy_distance,
    frechet,
    kernel_mmd,
    mean_distance,
    prdc,
    sliced_wasserstein,
    two_sample_accuracy,
)
from trainer.evaluation.referee import retrieval_ranks, standard_error


def pairwise(a, b):
    """All distances at once, by their definition."""
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


def test_frechet_of_fewer_points_than_dimensions_is_the_same():
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


def test_sliced_wasserstein_of_sets_of_unequal_size_compares_their_distributions():
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


def test_energy_distance_of_equal_distributions_is_zero_on_average():
    rng = np.random.default_rng(0)
    values = [energy_distance(rng.normal(size=(20, 3)), rng.normal(size=(15, 3))) for _ in range(400)]
    # Without the correction for a point's distance to itself it would be about 0.26.
    assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / 20)
    assert min(values) < 0 < max(values)


def test_distances_in_blocks_are_all_distances():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1500, 3)), rng.normal(size=(1100, 3)) + 1
    expected = 2 * pairwise(a, b).mean() - pairwise(a, a).sum() / (1500 * 1499) - pairwise(b, b).sum() / (1100 * 1099)
    assert energy_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert np.isnan(mean_distance(a[:1]))


def test_diversity_is_the_mean_distance_within_groups_of_at_least_two():
    rng = np.random.default_rng(0)
    x, group = rng.normal(size=(7, 3)), np.array([0, 1, 0, 1, 1, 2, 0])
    within = [pairwise(x[group == k], x[group == k]).sum() / 6 for k in (0, 1)]
    assert diversity(x, group) == pytest.approx(np.mean(within), rel=1e-6)
    assert np.isnan(diversity(x, np.arange(7)))


@pytest.mark.slow
def test_two_sample_accuracy_is_one_for_distant_sets_and_one_half_for_equal_distributions():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1000, 6)), rng.normal(size=(1000, 6))
    assert two_sample_accuracy(a, b) == pytest.approx(0.5, abs=0.035)
    assert two_sample_accuracy(a, b + 8) == 1
    # The best rule for N(0, I) and N(m, I) is right with probability Phi(|m| / 2).
    shifted = b + np.array([2.0, 0, 0, 0, 0, 0])
    assert two_sample_accuracy(a, shifted) == pytest.approx(0.5 * (1 + erf(1 / sqrt(2))), abs=0.035)
    assert two_sample_accuracy(a, shifted) == two_sample_accuracy(a, shifted)
    # Sets of unequal size leave chance at one half.
    assert two_sample_accuracy(a, b[:300]) == pytest.approx(0.5, abs=0.07)


@pytest.mark.slow
def test_two_sample_accuracy_is_not_biased_by_the_caption_frequencies_of_a_fold():
    rng = np.random.default_rng(0)
    captions = 20 * np.eye(30)[rng.integers(30, size=200)]
    values = [
        two_sample_accuracy(captions + rng.normal(size=captions.shape), captions + rng.normal(size=captions.shape))
        for _ in range(4)
    ]
    assert np.mean(values) == pytest.approx(0.5, abs=0.04)


def test_two_sample_accuracy_leaves_the_global_generator_unchanged():
    a = np.random.default_rng(0).normal(size=(40, 2))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    two_sample_accuracy(a, a, steps=2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("k", [1, 5])
def test_precision_recall_density_and_coverage_agree_with_brute_force(k):
    rng = np.random.default_rng(k)
    real, samples = rng.normal(size=(1100, 3)), 0.7 * rng.normal(size=(60, 3)) + 0.5
    real_radii, sample_radii = (np.sort(pairwise(each, each), axis=1)[:, k] for each in (real, samples))
    between = pairwise(real, samples)
    near_real = between < real_radii[:, None]
    assert prdc(real, samples, k=k) == pytest.approx(
        (
            near_real.any(0).mean(),
            (between < sample_radii[None]).any(1).mean(),
            near_real.sum() / (k * len(samples)),
            near_real.any(1).mean(),
        ),
        abs=2e-3,
    )


def test_coverage_counts_the_real_points_with_a_sample_nearby():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(600, 4)), rng.normal(size=(400, 4)) + 20
    real = np.concatenate([left, right])
    assert prdc(real, real).coverage == 1
    assert prdc(real, rng.normal(size=(2000, 4))).coverage == pytest.approx(0.6, abs=0.01)
    assert prdc(real, left[:1]).coverage == pytest.approx(6 / 1000, abs=0.01)
    # Of two equal samples: 1 - (1/2)^k, about (Naeem et al., section 3.3).
    a, b = rng.normal(size=(3000, 4)), rng.normal(size=(3000, 4))
    assert prdc(a, b, k=5).coverage == pytest.approx(1 - 0.5**5, abs=0.015)


def test_equal_distributions_have_density_one_and_distant_ones_no_overlap():
    rng = np.random.default_rng(0)
    same = prdc(rng.normal(size=(1500, 4)), rng.normal(size=(1500, 4)))
    assert same.density == pytest.approx(1, abs=0.08)
    assert same.precision == pytest.approx(same.recall, abs=0.04)
    far = prdc(rng.normal(size=(50, 4)), rng.normal(size=(50, 4)) + 50)
    assert far == (0, 0, 0, 0)


def test_nearest_ratio_separates_copies_of_training_rows_from_new_points():
    rng = np.random.default_rng(0)
    train, fresh = rng.normal(size=(3000, 16)) * 3, rng.normal(size=(200, 16)) * 3
    blocks = [train[:1700], train[1700:1701], train[1701:]]
    near = np.sort(pairwise(fresh, train), axis=1)
    assert np.allclose(nearest_ratio(fresh, lambda: blocks), near[:, 0] / near[:, 1], atol=1e-4)
    assert (nearest_ratio(fresh, lambda: blocks) < COPY_RATIO).mean() == 0
    copied = nearest_ratio(train[::20] + 1e-3 * rng.normal(size=(150, 16)), lambda: blocks)
    assert copied.max() < 0.01


@pytest.mark.parametrize("difference", [0.0, 2e-3])
def test_copies_of_images_that_are_stored_several_times_are_copies(difference):
    """An image with several captions has a row for each; encoded in other batches their latents differ a little."""
    rng = np.random.default_rng(0)
    images, fresh = rng.normal(size=(2, 400, 16))
    train = images.repeat(5, axis=0)[rng.permutation(2000)]
    train += difference * rng.normal(size=train.shape)
    blocks = [train[:700], train[700:]]
    assert (nearest_ratio(images[:300] + 1e-3 * rng.normal(size=(300, 16)), lambda: blocks) < 0.02).all()
    once = np.sort(pairwise(fresh, images), axis=1)
    ratio = nearest_ratio(fresh, lambda: blocks)
    assert np.allclose(ratio, once[:, 0] / once[:, 1], atol=1e-4 + 10 * difference)
    assert (ratio < COPY_RATIO).mean() < 0.01
    assert np.isnan(nearest_ratio(fresh, lambda: [images[:1].repeat(7, axis=0)])).all()  # there is no other image


def test_the_energy_score_is_least_for_samples_of_the_distribution_itself():
    rng = np.random.default_rng(0)
    captions, draws, size = 300, 8, 6
    means = 5 * rng.normal(size=(captions, size))
    real, group = means + rng.normal(size=(captions, size)), np.arange(captions).repeat(draws)
    noise = rng.normal(size=(captions * draws, size))
    scores = {
        scale: energy_score(means[group] + scale * noise, group, real, np.arange(captions), captions)
        for scale in (0.3, 1, 2)
    }
    best = scores[1]
    # Half the mean distance of two points, sqrt(2) times that of a chi distribution with six degrees of freedom.
    assert best.score == pytest.approx(2**0.5 * 2.35 / 2, abs=3 * best.error)
    assert min(scores.values()) == best
    assert scores[0.3].distance < best.distance < scores[2].distance
    assert scores[0.3].spread < best.spread < scores[2].spread
    other = energy_score(means[group] + noise, (group + 1) % captions, real, np.arange(captions), captions)
    assert other.score > 4 * best.score


def test_the_energy_score_takes_captions_with_held_out_rows_and_enough_samples():
    rng = np.random.default_rng(0)
    x, real = rng.normal(size=(10, 3)), rng.normal(size=(5, 3))
    group, truth = np.array([0] * 4 + [1] * 3 + [2] + [3] * 2), np.array([0, 0, 1, 2, -1])
    first = pairwise(x[:4], real[:2]).mean() - pairwise(x[:4], x[:4]).sum() / 12 / 2
    assert energy_score(x, group, real, truth, 2).score == pytest.approx(first, rel=1e-5)
    assert energy_score(x, group, real, truth, 4) is None  # one of four captions would not tell
    score, point = energy_score(x, group, real, truth, 4, points=True), np.linalg.norm(x[7] - real[3])
    assert score.score == pytest.approx((first + point) / 2, rel=1e-5)
    assert score.error == pytest.approx(abs(first - point) / 2, rel=1e-5)
    assert energy_score(x, group, real, np.full(5, -1), 4) is None
    itself = energy_score_of_rows(real, np.array([0, 0, 2, 1, 1]), 3)
    halves = [np.linalg.norm(real[i] - real[i + 1]) / 2 for i in (0, 3)]
    assert itself.score == pytest.approx(np.mean(halves), rel=1e-5)
    assert energy_score_of_rows(real, np.array([0, 0, 2, 1, 1]), 5) is None


def test_standard_errors_take_samples_of_one_caption_together():
    rng = np.random.default_rng(0)
    alike = torch.from_numpy(rng.integers(2, size=400)).double().repeat_interleave(5)
    captions = torch.arange(400).repeat_interleave(5)
    assert standard_error(alike, captions) == pytest.approx(0.5 / 20, rel=0.02)
    assert standard_error(alike) == pytest.approx(0.5 / 2000**0.5, rel=0.02)


@pytest.mark.slow
def test_calibration_error_is_zero_for_a_calibrated_confidence_and_else_the_gap():
    rng = np.random.default_rng(0)
    predicted = rng.uniform(0.2, 0.9, size=20_000)
    observed = predicted + 0.1 * rng.normal(size=20_000)
    good = calibrate(predicted, observed)
    assert good["calibration_error"] < 0.005
    assert good["rank_correlation"] > 0.85
    assert [row["count"] for row in good["bins"]] == [2000] * 10
    assert [row["predicted"] for row in good["bins"]] == pytest.approx(np.linspace(0.235, 0.865, 10), abs=0.01)
    wrong = calibrate(np.full(500, 0.9), 0.4 + 0.01 * rng.normal(size=500))
    assert wrong["calibration_error"] == pytest.approx(0.5, abs=0.01)
    assert wrong["rank_correlation"] == 0


def test_rank_correlation_agrees_with_scipy_also_for_ties():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    for levels in (3, 20, 10**6):
        a, b = rng.integers(levels, size=(2, 300)) / levels
        b = b + 0.5 * a.round(1)
        assert calibrate(a, b)["rank_correlation"] == pytest.approx(spearmanr(a, b).statistic, abs=1e-5)
    assert calibrate(1 - a, a)["rank_correlation"] == pytest.approx(-1, abs=1e-5)
    assert calibrate(a**2, a)["rank_correlation"] == pytest.approx(1, abs=1e-5)


def test_a_perfect_model_ranks_the_true_caption_first():
    captions = torch.eye(150)
    true = torch.arange(150).repeat(2)
    assert (retrieval_ranks(captions[true], captions, true, candidates=100) == 1).all()
    assert (retrieval_ranks(-captions[true], captions, true, candidates=100) == 100).all()
    assert (retrieval_ranks(torch.zeros(300, 150), captions, true, candidates=100) == 50.5).all()
    assert (retrieval_ranks(torch.zeros(300, 150), captions, true, candidates=1000) == 75.5).all()
    chance = retrieval_ranks(torch.randn(300, 150, generator=torch.manual_seed(0)), captions, true, candidates=100)
    assert chance.mean() == pytest.approx(50.5, abs=6)


class Identity(torch.nn.Module):
    """A feature extractor of torchmetrics for inputs that are features already."""

    num_features = 5

    def forward(self, features):
        return features


def test_frechet_and_kernel_mmd_agree_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import poly_mmd

    rng = np.random.default_rng(0)
    samples, real = (rng.normal(size=(200, 5)).astype(np.float32) + shift for shift in (0.5, 0.0))
    fid = FrechetInceptionDistance(feature=Identity())
    fid.update(torch.from_numpy(real), real=True)
    fid.update(torch.from_numpy(samples), real=False)
    assert frechet(samples, real) == pytest.approx(float(fid.compute()), rel=1e-3)
    mmd = poly_mmd(torch.from_numpy(real).double(), torch.from_numpy(samples).double())
    assert kernel_mmd(samples, real) == pytest.approx(float(mmd), rel=1e-9)


def test_kernel_mmd_of_sets_of_unequal_size_is_that_of_random_subsets():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(600, 3)) + 0.7, rng.normal(size=(200, 3))
    aa, ab, bb = ((u @ v.T / 3 + 1) ** 3 for u, v in ((a, a), (a, b), (b, b)))
    whole = (aa.sum() - np.trace(aa)) / (600 * 599) + (bb.sum() - np.trace(bb)) / (200 * 199) - 2 * ab.mean()
    assert kernel_mmd(a, b) == pytest.approx(whole, rel=0.1)
    assert kernel_mmd(a, b) == kernel_mmd(a, b)
    assert kernel_mmd(a, b) != kernel_mmd(a, b, seed=1)
    assert kernel_mmd(a[:300] - 0.7, b) == pytest.approx(0, abs=0.05)
