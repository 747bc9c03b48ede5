"""The effect of desc_scale on retrieval, from exact search among a sample of rows.

If desc_scale is too large, every caption retrieves its own row regardless of R. If it is too small, it retrieves rows
with other captions, and the retrieved caption becomes correlated with R. The useful range is about one octave wide.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int

from index.space.geometry import Geometry
from index.space.moments import unit
from index.space.queries import draw_points
from index.table.schema import TRAIN
from index.table.table import Table

DESC_SCALES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
MAX_SAMPLE_ROWS = 20_000


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """What retrieval is like at one desc_scale."""

    desc_scale: float
    self_retrieval_rate: float
    """Fraction of queries that retrieve the row whose text embedding they carry."""
    perplexity: float
    """exp(entropy of the target over random R), averaged over captions: the number of targets R chooses among."""
    text_distance: float
    """Mean distance between the unit text embeddings of query and target."""
    prior_skew: float
    """|E[R given the retrieved text]| / |R|, root mean square over retrieved texts, corrected for few samples. Above
    0, a network conditioned on the retrieved text has not been trained on every R that it may be sampled with."""


@dataclass(frozen=True, eq=False, slots=True)
class RowSample:
    """A uniform sample of training rows."""

    text: Float[np.ndarray, "N T"]
    latent: Float[np.ndarray, "N L"]
    balance: Float32[np.ndarray, "N"]
    """Balance coordinates."""


def sample_rows(table: Table, *, seed: int = 0) -> RowSample:
    """Sample at most 20,000 training rows of a table without replacement."""
    train = table.positions(TRAIN)
    rng = np.random.default_rng([seed, len(train)])
    rows = train[np.sort(rng.choice(len(train), min(len(train), MAX_SAMPLE_ROWS), replace=False))]
    balance = table.meta.geometry.balance_of(table.take(rows, "vector")).astype(np.float32)
    return RowSample(table.take(rows, "text"), table.take(rows, "latent"), balance)


def sweep_desc_scale(
    geometry: Geometry,
    rows: RowSample,
    scales: tuple[float, ...] = DESC_SCALES,
    *,
    num_captions: int = 16,
    num_points: int = 512,
    seed: int = 0,
) -> list[SweepPoint]:
    """Measure retrieval at each desc_scale: `num_captions` captions, each with the same `num_points` noise points."""
    text = unit(rows.text.astype(np.float32))
    image = geometry.image_part(rows.text, rows.latent)
    r = draw_points(geometry, num_points, seed=seed, step=0)
    own = np.random.default_rng([seed, len(text)]).choice(len(text), min(num_captions, len(text)), replace=False)
    image_cost = np.square(image).sum(1) - 2 * r @ image.T + np.square(rows.balance)  # P N
    text_square = np.maximum(2 - 2 * text[own] @ text.T, 0)  # A N
    _, text_id = np.unique(rows.text, axis=0, return_inverse=True)
    points = []
    for scale in scales:
        weight = (scale * geometry.kappa) ** 2
        target = np.stack([(image_cost + weight * square).argmin(1) for square in text_square])  # A P
        points.append(
            SweepPoint(
                desc_scale=scale,
                self_retrieval_rate=float((target == own[:, None]).mean()),
                perplexity=float(np.mean([_perplexity(row) for row in target])),
                text_distance=float(np.sqrt(np.take_along_axis(text_square, target, 1)).mean()),
                prior_skew=prior_skew(text_id[target], r),
            )
        )
    return points


def _perplexity(target: Int[np.ndarray, "P"]) -> float:
    frequency = np.unique(target, return_counts=True)[1] / len(target)
    return float(np.exp(-(frequency * np.log(frequency)).sum()))


def prior_skew(text_id: Int[np.ndarray, "A P"], r: Float32[np.ndarray, "P L"]) -> float:
    """Return how far the mean of R moves once the retrieved text is known; see `SweepPoint.prior_skew`.

    `text_id[a, p]` names the text that caption a retrieves with noise point r[p]. Over the n queries that retrieve one
    text, |sum R|^2 less the products of a point with itself is an unbiased estimate of n^2 |E R|^2.
    """
    key, count = np.unique(text_id * len(r) + np.arange(len(r)), return_counts=True)
    _, group = np.unique(key // len(r), return_inverse=True)
    point, count = r[key % len(r)].astype(np.float64), count.astype(np.float64)
    total = np.zeros((group.max() + 1, r.shape[1]))
    np.add.at(total, group, count[:, None] * point)
    queries, repeats = np.bincount(group, count), np.bincount(group, np.square(count))
    same_point = np.bincount(group, np.square(count) * np.square(point).sum(1))
    several = np.square(queries) > repeats
    if not several.any():
        return 0.0
    square = (np.square(total).sum(1) - same_point)[several] / (np.square(queries) - repeats)[several]
    mean = float(np.average(square, weights=queries[several]))
    return float(np.sqrt(max(mean, 0.0) / np.square(r).sum(1).mean()))
