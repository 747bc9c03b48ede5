"""How good and how fast approximate search is, against exact search on the real query law.

The real law is a held-out description with a random point R, never a row of the table: random R is the hardest query
there is.
"""

import time
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int

from index.search.ann import ExactSearch, NeighborSearch
from index.space.queries import draw_points, draw_rows
from index.table.schema import HELDOUT, TRAIN
from index.table.table import Table

BATCH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """Approximate against exact search, over the same queries."""

    recall_at_1: float
    recall_at_10: float
    relative_distance_error: float
    """mean(d_found / d_exact) - 1 for the nearest pair: what a miss costs."""
    p50_ms: float
    """Of a batch of 256 queries."""
    p99_ms: float
    queries_per_second: float


@dataclass(frozen=True, eq=False, slots=True)
class GroundTruth:
    """Queries and their exact answers, found once and compared with every candidate."""

    exact: ExactSearch
    queries: Float32[np.ndarray, "M S"]
    place: Int[np.ndarray, "M 10"]
    distance: Float32[np.ndarray, "M"]
    """Squared distance of the nearest row."""


def find_ground_truth(exact: ExactSearch, queries: Float32[np.ndarray, "M S"]) -> GroundTruth:
    """Answer the queries exactly, in one pass over the rows."""
    place = exact.nearest_positions(queries, 10)
    return GroundTruth(exact, queries, place, exact.distances(queries, place[:, :1])[:, 0])


def measure_recall(neighbors: NeighborSearch, truth: GroundTruth) -> Recall:
    """Ask `neighbors` the same queries by batches of 256, after one to warm up."""
    exact, found, tenth, seconds = truth.exact, [], [], []
    neighbors.nearest(truth.queries[:BATCH])
    for start in range(0, len(truth.queries), BATCH):
        q = truth.queries[start : start + BATCH]
        began = time.perf_counter()
        first = neighbors.nearest(q).row
        seconds.append(time.perf_counter() - began)
        found.append(exact.distances(q, exact.position_of(first))[:, 0])
        ten = exact.position_of(neighbors.nearest(q, 10).row)
        tenth += [np.isin(a, b).mean() for a, b in zip(truth.place[start : start + BATCH], ten, strict=True)]
    distance = np.concatenate(found)
    # Equal vectors are equally near: a found pair is right when none is nearer.
    right = distance <= truth.distance * (1 + 1e-5) + 1e-6
    apart = truth.distance > 1e-9
    return Recall(
        recall_at_1=float(right.mean()),
        recall_at_10=float(np.mean(tenth)),
        relative_distance_error=float(np.sqrt(distance[apart] / truth.distance[apart]).mean() - 1),
        p50_ms=float(np.percentile(seconds, 50) * 1e3),
        p99_ms=float(np.percentile(seconds, 99) * 1e3),
        queries_per_second=float(min(BATCH, len(truth.queries)) / np.median(seconds)),
    )


def evaluation_rows(table: Table, count: int, *, seed: int = 0) -> Int[np.ndarray, "M"]:
    """Positions of the rows whose descriptions `evaluation_queries` asks for."""
    offsets = table.positions(HELDOUT)
    if len(offsets) == 0:
        offsets = table.positions(TRAIN)
    return np.asarray(offsets[draw_rows(len(offsets), count, seed=seed, step=0)])


def evaluation_queries(table: Table, count: int, *, seed: int = 0) -> Float32[np.ndarray, "M S"]:
    """Queries by the real law: held-out descriptions (training ones where none are held out) with random points."""
    geometry, rows = table.meta.geometry, evaluation_rows(table, count, seed=seed)
    return geometry.queries(table.take(rows, "text"), draw_points(geometry, count, seed=seed, step=0))
