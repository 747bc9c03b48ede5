"""The query distribution: slot i of step s does not depend on the batch size, and noise is as its formula says."""

import numpy as np
import pytest

from index.space.geometry import Geometry
from index.space.moments import Moments
from index.space.queries import Purpose, draw_jitter, draw_points, draw_rows, draw_uniforms


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
        lambda count: draw_jitter(count, 4, seed=5, step=step),
    ):
        assert np.array_equal(draw(100)[:37], draw(37))


def test_steps_seeds_and_purposes_differ(geometry):
    noise = [draw_points(geometry, 8, seed=seed, step=step) for seed in (0, 1) for step in (0, 1)]
    assert len({each.tobytes() for each in noise}) == 4
    assert not np.array_equal(geometry.project(draw_jitter(8, 9, seed=0, step=0)), noise[0])


def test_noise_is_uniform_on_the_sphere(geometry):
    noise = draw_points(geometry, 20_000, seed=0, step=0)
    assert np.allclose(np.linalg.norm(noise, axis=1), 3, rtol=1e-5)
    assert np.abs(noise.mean(0)).max() < 0.04
    assert np.allclose(np.cov(noise, rowvar=False), np.eye(9), atol=0.05)


def test_rows_and_uniforms_are_uniform_and_jitter_has_unit_length():
    rows = draw_rows(10, 20_000, seed=0, step=0)
    assert np.abs(np.bincount(rows, minlength=10) / 2000 - 1).max() < 0.1
    uniforms = draw_uniforms(20_000, 3, seed=0, step=0)
    assert ((uniforms >= 0) & (uniforms < 1)).all()
    assert np.abs(uniforms.mean(0) - 0.5).max() < 0.01
    assert np.square(draw_jitter(20_000, 5, seed=0, step=0)).sum(1).mean() == pytest.approx(1, rel=0.02)


def test_each_purpose_has_queries_of_its_own_and_training_keeps_its_own(geometry):
    streams = [
        (
            draw_rows(10**9, 8, seed=0, step=3, purpose=purpose),
            draw_points(geometry, 8, seed=0, step=3, purpose=purpose),
        )
        for purpose in Purpose
    ]
    for number in (0, 1):
        assert len({stream[number].tobytes() for stream in streams}) == len(Purpose)
    # The stream of training is the one of earlier versions, for seeds of any size.
    for seed in (0, 7, 2**33 + 1):
        rows = np.random.default_rng([seed, 3, 0]).integers(10**9, size=8)
        assert np.array_equal(draw_rows(10**9, 8, seed=seed, step=3), rows)
        noise = np.random.default_rng([seed, 3, 1]).standard_normal((8, 9), dtype=np.float32)
        assert np.array_equal(draw_points(geometry, 8, seed=seed, step=3), geometry.project(noise))
