"""Recall and speed of approximate search against exact search, on the query distribution of training.

An evaluation query is the text embedding of a held-out row with random noise R, never a row of the table: its nearest
neighbors are far away and hard to tell apart, which makes it harder for an index than a query near the data. The
queries that choose nprobes are not those of which recall is reported: the fewest nprobes that pass one sample of
queries pass another one less often.
"""

import time
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int

from index.search.exact import ExactSearch
from index.search.neighbors import NeighborSearch
from index.space.queries import Purpose, draw_points, draw_rows
from index.table.schema import HELDOUT, TRAIN
from index.table.table import Table

BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Approximate against exact search on queries that chose nothing."""

    recall_queries: int
    """Queries of which these metrics are measured."""
    recall_at_1: float
    """Fraction of queries whose nearest row was retrieved, or another one that is equally near."""
    recall_at_10: float
    """Mean fraction of a query's ten nearest rows that were retrieved."""
    relative_distance_error: float
    """mean(d_retrieved / d_exact) - 1 for the nearest row."""
    p50_ms: float
    """Median latency of finding the rows of a batch of at most 256 queries, without reading them."""
    queries_per_second: float

    def standard_error(self, recall: float) -> float:
        """Return the standard error of a recall@1 that is measured on as many queries."""
        return float(np.sqrt(recall * (1 - recall) / self.recall_queries))


@dataclass(frozen=True, eq=False, slots=True)
class GroundTruth:
    """Queries and their exact neighbors, computed once for all candidate indexes."""

    exact: ExactSearch
    queries: Float32[np.ndarray, "M S"]
    positions: Int[np.ndarray, "M K"]
    """Positions among the training rows of the ten nearest, or of all if there are fewer."""
    distance: Float32[np.ndarray, "M"]
    """Squared distance of the nearest row."""

    def split(self, count: int) -> "tuple[GroundTruth, GroundTruth]":
        """Return the first `count` queries, and the others."""
        first, rest = (
            GroundTruth(self.exact, self.queries[part], self.positions[part], self.distance[part])
            for part in (slice(count), slice(count, None))
        )
        return first, rest


def find_ground_truth(exact: ExactSearch, queries: Float32[np.ndarray, "M S"]) -> GroundTruth:
    """Search the queries exactly, in one pass over the rows."""
    positions = exact.nearest_positions(queries, 10)
    return GroundTruth(exact, queries, positions, exact.distances(queries, positions[:, :1])[:, 0])


def measure_recall(neighbors: NeighborSearch, truth: GroundTruth) -> Recall:
    """Search the same queries with `neighbors`, in batches of 256 after one to warm up."""
    exact, distances, recalls_at_10, seconds = truth.exact, [], [], []
    neighbors.nearest_rows(truth.queries[:BATCH])
    for start in range(0, len(truth.queries), BATCH):
        queries, expected = truth.queries[start : start + BATCH], truth.positions[start : start + BATCH]
        began = time.perf_counter()
        nearest = neighbors.nearest_rows(queries).row_id
        seconds.append(time.perf_counter() - began)
        distances.append(exact.distances(queries, exact.positions_of(nearest))[:, 0])
        ten = exact.positions_of(neighbors.nearest_rows(queries, 10).row_id)
        recalls_at_10 += [np.isin(a, b).mean() for a, b in zip(expected, ten, strict=True)]
    distance = np.concatenate(distances)
    # Equal vectors are equally near: a retrieved row is correct if none is nearer.
    correct = distance <= truth.distance * (1 + 1e-5) + 1e-6
    apart = truth.distance > 1e-9
    ratios = np.sqrt(distance[apart] / truth.distance[apart])
    return Recall(
        recall_queries=len(truth.queries),
        recall_at_1=float(correct.mean()),
        recall_at_10=float(np.mean(recalls_at_10)),
        relative_distance_error=float(ratios.mean() - 1) if len(ratios) else 0.0,
        p50_ms=float(np.percentile(seconds, 50) * 1e3),
        queries_per_second=float(min(BATCH, len(truth.queries)) / np.median(seconds)),
    )


def evaluation_rows(
    table: Table, count: int, *, seed: int = 0, purpose: Purpose = Purpose.RECALL
) -> Int[np.ndarray, "M"]:
    """Return the table positions of the rows whose captions `evaluation_queries` uses."""
    positions = table.positions(HELDOUT)
    if len(positions) == 0:
        positions = table.positions(TRAIN)
    return np.asarray(positions[draw_rows(len(positions), count, seed=seed, step=0, purpose=purpose)])


def evaluation_queries(
    table: Table, count: int, *, seed: int = 0, purpose: Purpose = Purpose.RECALL
) -> Float32[np.ndarray, "M S"]:
    """Sample queries: held-out text embeddings (training ones if none are held out), each with random noise R."""
    geometry, rows = table.meta.geometry, evaluation_rows(table, count, seed=seed, purpose=purpose)
    points = draw_points(geometry, count, seed=seed, step=0, purpose=purpose)
    return geometry.queries(table.take(rows, "text"), points)
