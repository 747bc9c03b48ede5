"""Slot i of step s is the same whatever the batch size."""

import numpy as np
import pytest

from index.space.geometry import Geometry
from index.space.moments import Moments
from index.space.queries import draw_points, draw_rows, draw_uniforms


@pytest.fixture
def geometry() -> Geometry:
    rng = np.random.default_rng(0)
    return Geometry.fit(Moments.of(rng.normal(size=(50, 4)), rng.normal(size=(50, 9))), desc_scale=2.0)


@pytest.mark.parametrize("step", [0, 1, 123_456])
def test_a_larger_batch_begins_with_the_smaller_one(geometry, step):
    for draw in (
        lambda count: draw_rows(1_000_003, count, seed=5, step=step),
        lambda count: draw_points(geometry, count, seed=5, step=step),
        lambda count: draw_uniforms(count, 4, seed=5, step=step),
    ):
        assert np.array_equal(draw(100)[:37], draw(37))


def test_steps_seeds_and_purposes_differ(geometry):
    draws = [draw_points(geometry, 8, seed=seed, step=step) for seed in (0, 1) for step in (0, 1)]
    assert len({draw.tobytes() for draw in draws}) == 4
    assert not np.array_equal(draw_uniforms(8, 9, seed=0, step=0), draws[0])


def test_points_lie_on_the_sphere_and_are_spread_evenly(geometry):
    points = draw_points(geometry, 20_000, seed=0, step=0)
    assert np.allclose(np.linalg.norm(points, axis=1), 3, rtol=1e-5)
    assert np.abs(points.mean(0)).max() < 0.04
    assert np.allclose(np.cov(points, rowvar=False), np.eye(9), atol=0.05)
