"""The geometry's algebra, against the formulas of the design recomputed in float64."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.errors import OptionError
from index.space.centering import fit_centering
from index.space.geometry import GEOMETRIES, Geometry
from index.space.moments import Moments, unit


def some_rows(seed: int, n: int = 40, t: int = 5, dim: int = 7):
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(n, t)) + 0.5
    latent = rng.normal(size=(n, dim)) * rng.uniform(0.1, 5, dim) + rng.normal(size=dim)
    return text, latent


def fit(seed: int, name: str, scale: float = 3.0, *, center: bool = False) -> Geometry:
    text, latent = some_rows(seed)
    plain = Geometry.fit(Moments.of(text, latent), name=name, desc_scale=scale)
    if not center:
        return plain
    centering = fit_centering([(text, plain.to_coordinates(latent))])
    return Geometry.fit(Moments.of(text, latent), name=name, desc_scale=scale, centering=centering)


seeds = st.integers(0, 10_000)


@given(
    seed=seeds,
    name=st.sampled_from(GEOMETRIES),
    scale=st.floats(1.01, 20),
    balanced=st.booleans(),
    center=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_nearest_stored_vector_is_the_argmin_of_the_formula(seed, name, scale, balanced, center):
    geometry = fit(seed, name, scale, center=center)
    text, latent = some_rows(seed)
    rng = np.random.default_rng([seed, 1])
    g = rng.normal(size=len(text)) if balanced else np.zeros(len(text))
    query_text, r = rng.normal(size=(6, 5)), rng.normal(size=(6, 7))
    x = (latent - geometry.mean.astype(float)) / geometry.std.astype(float)
    if center:
        predicted = unit(text) @ geometry.centering.weight.astype(float) + geometry.centering.bias
        x = (x - predicted) / geometry.centering.std
    if name == "sphere":
        x = unit(x) * np.sqrt(7)
        r = unit(r) * np.sqrt(7)
    weight = (scale * geometry.kappa) ** 2
    cost = (
        weight * np.square(unit(query_text)[:, None] - unit(text)[None]).sum(-1)
        + np.square(r[:, None] - x[None]).sum(-1)
        - g
    )
    vectors = geometry.vectors(text, latent, np.sqrt(g.max() - g)).astype(float)
    queries = geometry.queries(query_text, r).astype(float)
    distance = np.square(queries[:, None] - vectors[None]).sum(-1)
    assert np.allclose(distance, cost + g.max(), rtol=1e-4, atol=1e-3)
    best = cost.min(1)
    assert np.allclose(cost[np.arange(6), distance.argmin(1)], best, rtol=1e-4, atol=1e-3)


@given(seed=seeds, name=st.sampled_from(GEOMETRIES))
@settings(deadline=None, max_examples=30)
def test_to_latent_inverts_to_coordinates(seed, name):
    geometry = fit(seed, name)
    latent = some_rows(seed)[1].astype(np.float32)
    assert np.allclose(geometry.to_latent(geometry.to_coordinates(latent)), latent, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sphere", "standard"])
def test_coordinates_have_mean_zero_and_variance_one(name):
    x = fit(3, name).to_coordinates(some_rows(3)[1])
    assert np.allclose(x.mean(0), 0, atol=1e-5)
    assert np.allclose(x.std(0), 1, atol=1e-5)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_text_parts_lie_as_far_apart_as_image_parts(name, center):
    rng = np.random.default_rng(0)
    text, latent = rng.normal(size=(2000, 5)) + 1, rng.normal(size=(2000, 40)) * 3
    geometry = Geometry.fit(Moments.of(text, latent), name=name, desc_scale=2.0)
    if center:
        centering = fit_centering([(text, geometry.to_coordinates(latent))])
        geometry = Geometry.fit(Moments.of(text, latent), name=name, desc_scale=2.0, centering=centering)
    vectors = geometry.vectors(text, latent).astype(float)
    text_part, image_part = vectors[:, :5] / geometry.desc_scale, vectors[:, 5:45]

    def spread(rows):
        return np.sqrt(2 * np.square(rows - rows.mean(0)).sum(1).mean())

    assert spread(text_part) == pytest.approx(spread(image_part), rel=0.02)


def test_vector_dim_is_a_multiple_of_eight_with_room_for_balance():
    geometry = fit(0, "sphere")
    assert geometry.vector_dim == 16
    vectors = geometry.vectors(*some_rows(0), np.full(40, 2.0))
    assert (geometry.balance_of(vectors) == 2).all()
    assert (vectors[:, 13:] == 0).all()
    assert (geometry.queries(*some_rows(0))[:, 12:] == 0).all()


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_equal_geometries_are_the_same_and_others_are_not(name, center):
    geometry = fit(1, name, center=center)
    assert fit(1, name, center=center).same_as(geometry)
    assert not fit(2, name, center=center).same_as(geometry)
    assert not fit(1, name, scale=3.5, center=center).same_as(geometry)
    assert not fit(1, name, center=not center).same_as(geometry)


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0, float("nan"), float("inf")])
def test_small_desc_scale_is_refused_unless_allowed(scale):
    moments = Moments.of(*some_rows(0))
    with pytest.raises(OptionError, match="--desc-scale"):
        Geometry.fit(moments, desc_scale=scale)
    assert Geometry.fit(moments, desc_scale=0.5, allow_small_desc_scale=True).desc_scale == 0.5


def test_an_unknown_geometry_is_refused():
    with pytest.raises(OptionError, match="sphere, standard, raw"):
        Geometry.fit(Moments.of(*some_rows(0)), name="torus", desc_scale=2.0)


def test_a_constant_dimension_gives_finite_vectors():
    text, latent = some_rows(0)
    latent[:, 2] = 4
    geometry = Geometry.fit(Moments.of(text, latent), desc_scale=2.0)
    assert np.isfinite(geometry.vectors(text, latent)).all()


@given(seed=seeds, cuts=st.lists(st.integers(1, 39), max_size=4))
@settings(deadline=None, max_examples=30)
def test_moments_of_parts_are_those_of_the_whole(seed, cuts):
    text, latent = some_rows(seed)
    edges = [0, *sorted(set(cuts)), len(text)]
    parts = [Moments.of(text[a:b], latent[a:b]) for a, b in itertools.pairwise(edges)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    assert whole.count == len(text)
    assert np.allclose(whole.latent_mean, latent.mean(0), atol=1e-10)
    assert np.allclose(whole.latent_std, latent.std(0), atol=1e-8)
    directions = unit(text)
    pairs = np.square(directions[:, None] - directions[None]).sum(-1).mean()
    assert whole.text_distance == pytest.approx(np.sqrt(pairs), rel=1e-9)
