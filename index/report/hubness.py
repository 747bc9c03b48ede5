"""How evenly the training rows are drawn as targets, and how well a line predicts them.

Hubness: Radovanovic et al., JMLR 11 (2010) 2487. The chi-square of shares: SD-FM, arXiv 2509.25519.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from index.build.potentials import chi_square
from index.search.ann import ExactSearch, NeighborSearch
from index.space.geometry import Geometry
from index.space.moments import unit
from index.space.queries import draw_points, draw_rows

MOST_HITS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """How evenly the training rows are drawn as targets by the training law."""

    draws: int
    hits: list[int]
    """How many rows were drawn 0, 1, 2 ... times; the last number is of those drawn as often or oftener."""
    anti_hub_rate: float
    expected_anti_hub_rate: float
    """What chance alone leaves out of a perfectly even table in as many draws."""
    largest_share: float
    effective_share: float
    """1 / (N sum q_i^2), q the shares of hits."""
    chi_square: float
    """Unbiased chi^2 of the shares against even ones; below 0.05 is balanced."""
    linear_probe_r2: float
    """Held-out R^2 of a ridge fit from (R, DE) to the target's coordinates."""


def draws_for(rows: int) -> int:
    """How many targets `measure_shares` draws of so many rows."""
    return int(np.clip(2 * rows, 2048, 20_480)) // 1024 * 1024


def measure_shares(
    geometry: Geometry,
    neighbors: NeighborSearch,
    exact: ExactSearch,
    *,
    seed: int = 0,
    drawn: Callable[[int], object] = lambda count: None,
) -> Shares:
    """Draw targets as training does, and count how often each row is one and how well a line predicts it."""
    n = len(exact.row)
    counts = np.zeros(n, np.int64)
    inputs, targets = [], []
    for step in range(draws_for(n) // 1024):
        description = exact.of("text", draw_rows(n, 1024, seed=seed, step=step))
        r = draw_points(geometry, 1024, seed=seed, step=step)
        pairs = neighbors.nearest(geometry.queries(description, r))
        counts += np.bincount(exact.position_of(pairs.row[:, 0]), minlength=n)
        drawn(1024)
        if step < 8:
            inputs.append(np.concatenate([r, unit(description.astype(np.float32)) * geometry.kappa], 1))
            targets.append(geometry.to_coordinates(pairs.latent[:, 0]))
    total = int(counts.sum())
    return Shares(
        draws=total,
        hits=np.bincount(np.minimum(counts, MOST_HITS), minlength=MOST_HITS + 1).tolist(),
        anti_hub_rate=float((counts == 0).mean()),
        expected_anti_hub_rate=float((1 - 1 / n) ** total),
        largest_share=float(counts.max() / total),
        effective_share=float(total**2 / (n * np.square(counts.astype(np.float64)).sum())),
        chi_square=chi_square(counts),
        linear_probe_r2=ridge_r2(np.concatenate(inputs), np.concatenate(targets)),
    )


def ridge_r2(x: Float[np.ndarray, "M D"], y: Float[np.ndarray, "M L"], penalty: float = 1e-2) -> float:
    """R^2 of a ridge regression with intercept, fitted on four fifths of the rows and measured on the rest."""
    cut = len(x) * 4 // 5
    mean, level = x[:cut].mean(0), y[:cut].mean(0)
    a = (x[:cut] - mean).astype(np.float64)
    gram = a.T @ a
    gram[np.diag_indices_from(gram)] += penalty * np.trace(gram) / len(gram)
    weights = np.linalg.solve(gram, a.T @ (y[:cut] - level))
    residual = y[cut:] - level - (x[cut:] - mean) @ weights
    return float(1 - np.square(residual).sum() / np.square(y[cut:] - level).sum())
