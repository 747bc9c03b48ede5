"""How evenly the training rows are retrieved as targets, and how well a linear probe predicts them.

Hubness: Radovanovic et al., JMLR 11 (2010) 2487. Chi-square of hit counts: SD-FM, arXiv 2509.25519.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from index.search.exact import ExactSearch
from index.search.neighbors import NeighborSearch
from index.space.geometry import Geometry
from index.space.moments import unit
from index.space.queries import Purpose, draw_points, draw_rows

BATCH = 1024
PROBE_BATCHES = 8
"""Batches of queries that the linear probe is fitted to and tested on."""
MAX_HITS = 32


@dataclass(frozen=True, kw_only=True)
class Hubness:
    """How often each training row is retrieved by queries of the training distribution that fitted nothing."""

    hubness_queries: int
    """Queries whose hits are counted."""
    hit_counts: list[int]
    """hit_counts[k] is the number of rows retrieved exactly k times; the last bin is 32 or more."""
    anti_hub_rate: float
    """Fraction of rows that were never retrieved."""
    expected_anti_hub_rate: float
    """The same under uniform sampling with as many queries."""
    max_hit_rate: float
    """Fraction of queries that retrieved the most frequent row."""
    effective_row_fraction: float
    """1 / (N sum q_i^2) for hit rates q_i: 1 if all N rows are retrieved equally often."""
    chi_square: float
    """Unbiased chi-square of the hit counts against uniform ones; a table below 0.05 counts as balanced."""
    linear_probe_queries: int
    """Queries to which the linear probe is fitted (four fifths) and on which it is tested (one fifth)."""
    linear_probe_r2: float | None
    """Held-out R^2 of a ridge regression from (R, text embedding) to the target's coordinates; None if all targets are
    equal."""


def num_hubness_queries(rows: int) -> int:
    """Return how many queries `measure_hubness` samples for a number of training rows."""
    return int(np.clip(2 * rows, 2048, 20_480)) // BATCH * BATCH


def measure_hubness(
    geometry: Geometry,
    neighbors: NeighborSearch,
    exact: ExactSearch,
    *,
    seed: int = 0,
    progress: Callable[[int], object] = lambda count: None,
) -> Hubness:
    """Retrieve targets as training does; count how often each row is one, and fit a linear probe to them.

    `progress` is called with the number of queries after each batch.
    """
    n = len(exact.row_ids)
    retrieved, inputs, targets = [], [], []
    for step in range(num_hubness_queries(n) // BATCH):
        stream: dict[str, Any] = {"seed": seed, "step": step, "purpose": Purpose.HUBNESS}
        text = exact.take(draw_rows(n, BATCH, **stream), "text")
        r = draw_points(geometry, BATCH, **stream)
        row_id = neighbors.nearest_rows(geometry.queries(text, r)).row_id[:, 0]
        retrieved.append(row_id)
        progress(BATCH)
        if step < PROBE_BATCHES:
            inputs.append(np.concatenate([r, unit(text.astype(np.float32)) * geometry.kappa], 1))
            targets.append(geometry.to_coordinates(exact.take(exact.positions_of(row_id), "latent")))
    _, hits = np.unique(np.concatenate(retrieved), return_counts=True)
    total, never = int(hits.sum()), n - len(hits)
    hit_counts = np.bincount(np.minimum(hits, MAX_HITS), minlength=MAX_HITS + 1)
    hit_counts[0] = never
    return Hubness(
        hubness_queries=total,
        hit_counts=hit_counts.tolist(),
        anti_hub_rate=never / n,
        expected_anti_hub_rate=float((1 - 1 / n) ** total),
        max_hit_rate=float(hits.max() / total),
        effective_row_fraction=float(total**2 / (n * np.square(hits.astype(np.float64)).sum())),
        chi_square=chi_square(hits, n),
        linear_probe_queries=sum(map(len, inputs)),
        linear_probe_r2=ridge_r2(np.concatenate(inputs), np.concatenate(targets)),
    )


def chi_square(hits: Int[np.ndarray, "M"], rows: int | None = None) -> float:
    """Return the unbiased chi-square of the hit counts c of N rows against uniform ones.

    N sum(c^2 - c) / (Q (Q - 1)) - 1 for Q queries (ott-jax, semidiscrete solver). Rows that were never retrieved may be
    left out of `hits` if `rows` says how many there are.
    """
    total = int(hits.sum())
    c = hits.astype(np.float64)
    return float((len(c) if rows is None else rows) * (c * c - c).sum() / (total * (total - 1)) - 1.0)


def ridge_r2(x: Float[np.ndarray, "M D"], y: Float[np.ndarray, "M L"], penalty: float = 1e-2) -> float | None:
    """Return the R^2 of a ridge regression with intercept, fitted to the first four fifths and tested on the rest.

    None if `y` does not vary.
    """
    cut = len(x) * 4 // 5
    x_mean, y_mean = x[:cut].mean(0), y[:cut].mean(0)
    variation = float(np.square(y[cut:] - y_mean).sum())
    if variation <= 1e-9 * float(np.square(y[cut:]).sum()):
        return None
    gram, moment = np.zeros((x.shape[1], x.shape[1])), np.zeros((x.shape[1], y.shape[1]))
    for start in range(0, cut, BATCH):
        rows = slice(start, min(start + BATCH, cut))
        a = (x[rows] - x_mean).astype(np.float64)
        gram += a.T @ a
        moment += a.T @ (y[rows] - y_mean)
    gram[np.diag_indices_from(gram)] += penalty * np.trace(gram) / len(gram)
    weights = np.linalg.solve(gram, moment)
    squares = 0.0
    for start in range(cut, len(x), BATCH):
        rows = slice(start, start + BATCH)
        squares += float(np.square(y[rows] - y_mean - (x[rows] - x_mean) @ weights).sum())
    return 1 - squares / variation
