"""The arithmetic of the toy benchmarks against brute force and closed forms."""

import itertools

import numpy as np
import pytest

pytest.importorskip("scipy", reason="scipy is not installed: pip install 'coalescer[dev]'")
pytest.importorskip("ot", reason="POT is not installed: pip install 'coalescer[dev]'")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def bench(request, monkeypatch):
    monkeypatch.syspath_prepend(request.config.rootpath / "tests" / "bench")


@pytest.fixture
def moons(bench):
    import moons

    return moons


@pytest.fixture
def dimension(bench):
    import intrinsic_dimension

    return intrinsic_dimension


def test_w2_of_a_shifted_cloud_is_the_square_of_the_shift(moons, rng):
    cloud = rng.standard_normal((50, 2))
    assert moons.wasserstein(cloud, rng.permutation(cloud) + np.array([3.0, 4.0])) == pytest.approx(25)
    assert moons.wasserstein(cloud, rng.permutation(cloud)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("weight", [0.0, 2.0, 1e4])
def test_the_assignment_is_the_cheapest_of_all_permutations(moons, rng, weight):
    r, targets = moons.eight_gaussians(5, rng), moons.moons(5, "label", rng)
    distance = np.square(r[:, None] - targets.y).sum(-1)
    cost = distance + weight * np.square(targets.condition[:, None] - targets.condition)
    costs = [cost[np.arange(5), list(order)].sum() for order in itertools.permutations(range(5))]
    order = moons.assign(r, targets, weight)
    assert sorted(order) == list(range(5))
    assert cost[np.arange(5), order].sum() == pytest.approx(min(costs), rel=1e-5)


def test_the_weight_of_a_label_is_never_crossed(moons, rng):
    r, targets = moons.eight_gaussians(200, rng), moons.moons(200, "label", rng)
    assert (targets.condition[moons.assign(r, targets, moons.LABEL_WEIGHT)] == targets.condition).all()
    assert (targets.condition[moons.assign(r, targets, 0.0)] != targets.condition).any()


def test_the_weight_of_a_coordinate_leaves_5_percent_no_farther_than_the_own_pair(moons, rng):
    weight = moons.condition_weight("coordinate", rng)
    r, targets = moons.eight_gaussians(1024, rng), moons.moons(1024, "coordinate", rng)
    own = np.diag(moons.cost(r, targets, 0.0))[:, None]
    assert (moons.cost(r, targets, weight) <= own).mean() == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("condition", ["none", "label", "coordinate"])
def test_conditions_are_embedded_on_a_half_circle(moons, rng, condition):
    targets = moons.moons(100, condition, rng)
    assert np.abs(targets.condition).max() <= 1
    assert np.allclose(np.linalg.norm(targets.text(), axis=1), 1)
    assert np.allclose(np.arctan2(*targets.text().T[::-1]) * 2 / np.pi, targets.condition, atol=1e-6)


def test_balanced_winners_are_those_of_all_pairs(bench, rng):
    from balanced_pairs import ArrayBlocks

    group = rng.integers(3, size=60)
    vectors = np.concatenate([10 * np.eye(3)[group], rng.standard_normal((60, 4))], 1).astype(np.float32)
    queries = vectors[rng.integers(60, size=40)] + rng.standard_normal((40, 7)).astype(np.float32)
    g = rng.random(60, dtype=np.float32)
    expected = (np.square(queries[:, None] - vectors).sum(-1) - g).argmin(1)
    assert (ArrayBlocks(vectors, group, text_dim=3).winners(queries, g, at_once=16) == expected).all()


@pytest.mark.parametrize("k", [2, 16, 64])
def test_clusters_have_their_dimension_and_half_of_the_variance(dimension, rng, k):
    label = dimension.balanced_labels(10_000)
    mixture = dimension.mixture(k, rng)
    x = mixture.draw(label, rng)
    eigenvalues = np.linalg.eigvalsh(np.cov(x[label == 3].T))[::-1]
    assert np.allclose(eigenvalues[:k], 0.5 * dimension.DIM / k, rtol=0.6)
    assert (eigenvalues[k:] < 2 * dimension.NOISE**2).all()
    # Ten centers determine their half of the variance only to a third.
    assert x.var(0).mean() == pytest.approx(1, abs=0.3)
    assert np.square(x - mixture.centers[label]).mean() == pytest.approx(0.5, rel=0.05)
