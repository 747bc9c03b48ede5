"""What desc_scale does: how many targets a description chooses among, and how far it is from theirs.

Too large and every description finds its own pair whatever R is; too small and the descriptions found are others, and
tell of R. The useful band is about one octave wide.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int

from index.space.geometry import Geometry
from index.space.moments import unit
from index.space.queries import draw_points
from index.table.schema import TRAIN
from index.table.table import Table

LADDER = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
MOST_ROWS = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """What one desc_scale does to the search."""

    desc_scale: float
    self_retrieval_rate: float
    """How often a description with a random R finds the pair that it came from."""
    perplexity: float
    """exp(entropy of the target over random R), averaged over descriptions: choices that R has."""
    text_distance: float
    """Mean distance of unit descriptions, asked against found."""
    prior_skew: float
    """|E[R given the description found]| over the length of R, root mean square over targets, free of the bias of few
    draws: above 0 a network that is told the description found cannot be asked with any R."""


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """Some training rows, an even draw of them."""

    text: Float[np.ndarray, "N T"]
    latent: Float[np.ndarray, "N L"]
    balance: Float32[np.ndarray, "N"]
    """Their balance coordinate."""


def sample_rows(table: Table, *, seed: int = 0) -> Sample:
    """At most 20,000 training rows of a table."""
    offsets = table.positions(TRAIN)
    rng = np.random.default_rng([seed, len(offsets)])
    chosen = offsets[np.sort(rng.choice(len(offsets), min(len(offsets), MOST_ROWS), replace=False))]
    balance = table.meta.geometry.balance_of(table.take(chosen, "vector")).astype(np.float32)
    return Sample(table.take(chosen, "text"), table.take(chosen, "latent"), balance)


def measure_ladder(
    geometry: Geometry,
    rows: Sample,
    scales: tuple[float, ...] = LADDER,
    *,
    descriptions: int = 16,
    points: int = 512,
    seed: int = 0,
) -> list[Rung]:
    """What each desc_scale does, by exact search among some rows."""
    words = unit(rows.text.astype(np.float32))
    image = geometry.image_part(rows.text, rows.latent)
    r = draw_points(geometry, points, seed=seed, step=0)
    asked = np.random.default_rng([seed, len(words)]).choice(len(words), min(descriptions, len(words)), replace=False)
    image_cost = np.square(image).sum(1) - 2 * r @ image.T + np.square(rows.balance)
    text_square = np.maximum(2 - 2 * words[asked] @ words.T, 0)  # A N
    _, said = np.unique(rows.text, axis=0, return_inverse=True)
    rungs = []
    for scale in scales:
        weight = (scale * geometry.kappa) ** 2
        winner = np.stack([(image_cost + weight * square).argmin(1) for square in text_square])  # A P
        rungs.append(
            Rung(
                desc_scale=scale,
                self_retrieval_rate=float((winner == asked[:, None]).mean()),
                perplexity=float(np.mean([_perplexity(row) for row in winner])),
                text_distance=float(np.sqrt(np.take_along_axis(text_square, winner, 1)).mean()),
                prior_skew=prior_skew(said[winner], r),
            )
        )
    return rungs


def _perplexity(winner: Int[np.ndarray, "P"]) -> float:
    share = np.unique(winner, return_counts=True)[1] / len(winner)
    return float(np.exp(-(share * np.log(share)).sum()))


def prior_skew(said: Int[np.ndarray, "A P"], r: Float32[np.ndarray, "P L"]) -> float:
    """How far R's mean moves where it is known which description the target has; see `Rung.prior_skew`.

    Of n draws that found one description |sum R|^2 less the terms of a point with itself estimates n^2 |E R|^2.
    """
    key, count = np.unique(said * len(r) + np.arange(len(r)), return_counts=True)
    _, group = np.unique(key // len(r), return_inverse=True)
    point, count = r[key % len(r)].astype(np.float64), count.astype(np.float64)
    total = np.zeros((group.max() + 1, r.shape[1]))
    np.add.at(total, group, count[:, None] * point)
    draws, repeats = np.bincount(group, count), np.bincount(group, np.square(count))
    itself = np.bincount(group, np.square(count) * np.square(point).sum(1))
    several = np.square(draws) > repeats
    if not several.any():
        return 0.0
    square = (np.square(total).sum(1) - itself)[several] / (np.square(draws) - repeats)[several]
    mean = float(np.average(square, weights=draws[several]))
    return float(np.sqrt(max(mean, 0.0) / np.square(r).sum(1).mean()))
