"""What a reduced search space loses: its nearest rows, measured in the full space."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float32, Int

from index.report.recall import evaluation_rows
from index.space.queries import Purpose, draw_points
from index.table.table import Table, sampled_rows

NUM_QUERIES = 256
MAX_ROWS = 2**18
"""Training rows that are compared; of larger tables an even sample."""
BATCH_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class FullSpaceAgreement:
    """The nearest rows of a reduced space, compared with those of the full one, both without balance."""

    full_space_queries: int
    full_space_rows: int
    """Training rows that both spaces were searched for."""
    full_space_recall_at_1: float
    """Fraction of queries whose nearest row is that of the full space, or one that is equally near there."""
    full_space_distance_error: float
    """mean(d_reduced / d_full) - 1, where both are distances in the full space, of the nearest rows of each."""


def measure_agreement(table: Table, *, seed: int = 0, num_queries: int = NUM_QUERIES) -> FullSpaceAgreement | None:
    """Search held-out captions with random R in both spaces, in one pass over the rows; None without a reduction."""
    reduced = table.meta.geometry
    if reduced.reduction is None:
        return None
    full = replace(reduced, reduction=None)
    purpose = Purpose.RECALL
    captions = table.take(evaluation_rows(table, num_queries, seed=seed, purpose=purpose), "text")
    r = draw_points(full, num_queries, seed=seed, step=0, purpose=purpose)
    wide, narrow = full.queries(captions, r), reduced.queries(captions, r)
    best = np.full((3, num_queries), np.inf)  # in the full space; in the reduced one; that row's in the full space
    count = 0
    for text, latent in sampled_rows(table, MAX_ROWS, BATCH_ROWS):
        costs = _square_distances(wide, full.vectors(text, latent))
        best[0] = np.minimum(best[0], costs.min(1))
        in_reduced = _square_distances(narrow, reduced.vectors(text, latent))
        nearest: Int[np.ndarray, M] = in_reduced.argmin(1)
        each = np.arange(num_queries)
        nearer = in_reduced[each, nearest] < best[1]
        best[1:, nearer] = np.stack([in_reduced[each, nearest], costs[each, nearest]])[:, nearer]
        count += len(text)
    exact, found = best[0], best[2]
    apart = exact > 1e-9
    ratios = np.sqrt(found[apart] / exact[apart])
    return FullSpaceAgreement(
        full_space_queries=num_queries,
        full_space_rows=count,
        full_space_recall_at_1=float((found <= exact * (1 + 1e-5) + 1e-6).mean()),
        full_space_distance_error=float(ratios.mean() - 1) if len(ratios) else 0.0,
    )


def _square_distances(
    queries: Float32[np.ndarray, "M S"], vectors: Float32[np.ndarray, "B S"]
) -> Float[np.ndarray, "M B"]:
    squares = np.square(queries).sum(1)[:, None] + np.square(vectors).sum(1)
    return np.asarray(np.maximum(squares - 2 * queries @ vectors.T, 0.0))
