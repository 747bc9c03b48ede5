"""The toy benches' own maths against brute force and closed forms."""

import itertools

import numpy as np
import pytest

pytest.importorskip("scipy", reason="scipy is not installed: pip install 'coalescer[dev]'")
pytest.importorskip("ot", reason="POT is not installed: pip install 'coalescer[dev]'")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def moons(bench):
    import moons

    return moons


@pytest.fixture
def dial(bench):
    import dial

    return dial


@pytest.fixture
def bench(request, monkeypatch):
    monkeypatch.syspath_prepend(request.config.rootpath / "tests" / "bench")


def test_w2_of_a_moved_cloud_is_the_square_of_the_move(moons, rng):
    cloud = rng.standard_normal((50, 2))
    assert moons.wasserstein(cloud, rng.permutation(cloud) + np.array([3.0, 4.0])) == pytest.approx(25)
    assert moons.wasserstein(cloud, rng.permutation(cloud)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("weight", [0.0, 2.0, 1e4])
def test_assignment_is_the_cheapest_of_all_permutations(moons, rng, weight):
    r, targets = moons.eight_gaussians(5, rng), moons.moons(5, "label", rng)
    apart = np.square(r[:, None] - targets.y).sum(-1) + weight * np.square(targets.said[:, None] - targets.said)
    ways = [apart[np.arange(5), list(way)].sum() for way in itertools.permutations(range(5))]
    found = moons.assigned(r, targets, weight)
    assert apart[np.arange(5), found].sum() == pytest.approx(min(ways), rel=1e-5)
    assert sorted(found) == list(range(5))


def test_a_decisive_label_is_never_crossed(moons, rng):
    r, targets = moons.eight_gaussians(200, rng), moons.moons(200, "label", rng)
    assert (targets.said[moons.assigned(r, targets, moons.DECISIVE)] == targets.said).all()
    assert (targets.said[moons.assigned(r, targets, 0.0)] != targets.said).any()


def test_the_weight_of_a_place_leaves_so_many_no_farther(moons, rng):
    weight = moons.weight_of("place", rng)
    r, targets = moons.eight_gaussians(1024, rng), moons.moons(1024, "place", rng)
    own = np.diag(moons.cost(r, targets, 0.0))[:, None]
    assert (moons.cost(r, targets, weight) <= own).mean() == pytest.approx(moons.NO_FARTHER, abs=0.01)


def test_what_is_said_is_told_as_a_point_of_the_half_circle(moons, rng):
    for condition in moons.CONDITIONS:
        targets = moons.moons(100, condition, rng)
        assert np.abs(targets.said).max() <= 1
        assert np.allclose(np.arctan2(*targets.text().T[::-1]) * 2 / np.pi, targets.said, atol=1e-6)


def test_balanced_winners_are_those_of_all_pairs(bench, rng):
    from balanced_pairs import ArrayBlocks

    group = rng.integers(3, size=60)
    vectors = np.concatenate([10 * np.eye(3)[group], rng.standard_normal((60, 4))], 1).astype(np.float32)
    queries = vectors[rng.integers(60, size=40)] + rng.standard_normal((40, 7)).astype(np.float32)
    g = rng.random(60, dtype=np.float32)
    wanted = (np.square(queries[:, None] - vectors).sum(-1) - g).argmin(1)
    assert (ArrayBlocks(vectors, group, text_dim=3).winners(queries, g, at_once=16) == wanted).all()


@pytest.mark.parametrize("k", [2, 16, 64])
def test_clusters_have_their_dimension_and_coordinates_variance_one(dial, rng, k):
    label = dial.evenly(10_000)
    law = dial.mixture(k, rng)
    x = law.draw(label, rng)
    spread = np.linalg.eigvalsh(np.cov(x[label == 3].T))[::-1]
    assert np.allclose(spread[:k], 0.5 * dial.SIZE / k, rtol=0.6)
    assert (spread[k:] < 2 * dial.NOISE**2).all()
    # Half within clusters; ten centers make the other half known to a third.
    assert x.var(0).mean() == pytest.approx(1, abs=0.3)
    assert np.square(x - law.centers[label]).mean() == pytest.approx(0.5, rel=0.05)
