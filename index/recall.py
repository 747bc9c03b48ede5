"""How good and how fast approximate search is, against exact search on the real query law.

The real law is a held-out description with a random point R, never a row of the table: random R is the hardest query
there is.
"""

import time
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int

from index.queries import draw_points, draw_rows
from index.schema import HELDOUT, TRAIN
from index.search import ExactNeighbours, Neighbours
from index.table import Table

BATCH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """Approximate against exact search, over the same queries."""

    recall_at_1: float
    recall_at_10: float
    excess_distance: float
    """mean(d_found / d_exact) - 1 for the nearest pair: what a miss costs."""
    p50_ms: float
    """Of a batch of 256 queries."""
    p99_ms: float
    queries_per_second: float


@dataclass(frozen=True, eq=False, slots=True)
class Truth:
    """Queries and their exact answers, found once and compared with every candidate."""

    exact: ExactNeighbours
    queries: Float32[np.ndarray, "M S"]
    place: Int[np.ndarray, "M 10"]
    distance: Float32[np.ndarray, "M"]
    """Squared distance of the nearest row."""


def find_truth(exact: ExactNeighbours, queries: Float32[np.ndarray, "M S"]) -> Truth:
    """Answer the queries exactly, in one pass over the rows."""
    place = exact.nearest_places(queries, 10)
    return Truth(exact, queries, place, exact.distances(queries, place[:, :1])[:, 0])


def measure_recall(neighbours: Neighbours, truth: Truth) -> Recall:
    """Ask `neighbours` the same queries by batches of 256, after one to warm up."""
    exact, found, tenth, seconds = truth.exact, [], [], []
    neighbours.nearest(truth.queries[:BATCH])
    for start in range(0, len(truth.queries), BATCH):
        q = truth.queries[start : start + BATCH]
        began = time.perf_counter()
        first = neighbours.nearest(q).row
        seconds.append(time.perf_counter() - began)
        found.append(exact.distances(q, exact.place_of(first))[:, 0])
        ten = exact.place_of(neighbours.nearest(q, 10).row)
        tenth += [np.isin(a, b).mean() for a, b in zip(truth.place[start : start + BATCH], ten, strict=True)]
    distance = np.concatenate(found)
    # Equal vectors are equally near: a found pair is right when none is nearer.
    right = distance <= truth.distance * (1 + 1e-5) + 1e-6
    apart = truth.distance > 1e-9
    return Recall(
        recall_at_1=float(right.mean()),
        recall_at_10=float(np.mean(tenth)),
        excess_distance=float(np.sqrt(distance[apart] / truth.distance[apart]).mean() - 1),
        p50_ms=float(np.percentile(seconds, 50) * 1e3),
        p99_ms=float(np.percentile(seconds, 99) * 1e3),
        queries_per_second=float(min(BATCH, len(truth.queries)) / np.median(seconds)),
    )


def real_rows(table: Table, count: int, *, seed: int = 0) -> Int[np.ndarray, "M"]:
    """Positions of the rows whose descriptions `real_queries` asks for."""
    offsets = table.offsets(HELDOUT)
    if len(offsets) == 0:
        offsets = table.offsets(TRAIN)
    return np.asarray(offsets[draw_rows(len(offsets), count, seed=seed, step=0)])


def real_queries(table: Table, count: int, *, seed: int = 0) -> Float32[np.ndarray, "M S"]:
    """Queries by the real law: held-out descriptions (training ones where none are held out) with random points."""
    geometry, rows = table.meta.geometry, real_rows(table, count, seed=seed)
    return geometry.queries(table.take(rows, "text"), draw_points(geometry, count, seed=seed, step=0))
