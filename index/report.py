"""How good a table's search is, measured against exact search on the real query law.

The real law is a held-out description with a random point R, never a row of the table: random R is the hardest query
there is. What each figure means is said at its field. Science behind them: hubness (Radovanovic 2010), the
chi-square of shares (SD-FM, arXiv 2509.25519), the perplexity of the target given a description.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from index.balance import chi_square
from index.geometry import Geometry
from index.moments import unit
from index.queries import draw_points, draw_rows
from index.schema import HELDOUT, TRAIN
from index.search import ExactNeighbours, Neighbours
from index.table import Table

LADDER = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
BATCH = 256
MOST_HITS = 32


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """How evenly the training rows are drawn as targets by the training law."""

    draws: int
    hits: list[int]
    """How many rows were drawn 0, 1, 2 ... times; the last number is of those drawn as often or oftener."""
    never_hit_share: float
    never_hit_share_if_even: float
    """What chance alone leaves out of a perfectly even table in as many draws."""
    largest_share: float
    effective_share: float
    """1 / (N sum q_i^2), q the shares of hits."""
    chi_square: float
    """Unbiased chi^2 of the shares against even ones; below 0.05 is balanced."""
    learnability: float
    """Held-out R^2 of a ridge fit from (R, DE) to the target's coordinates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """What one desc_scale does to the search."""

    desc_scale: float
    own_pair_rate: float
    """How often a description with a random R finds the pair that it came from."""
    perplexity: float
    """exp(entropy of the target over random R), averaged over descriptions: choices that R has."""
    description_distance: float
    """Mean distance of unit descriptions, asked against found."""


@dataclass(frozen=True, eq=False, slots=True)
class Truth:
    """Queries and their exact answers, found once and compared with every candidate."""

    exact: ExactNeighbours
    queries: Float32[np.ndarray, "M S"]
    place: Int[np.ndarray, "M 10"]
    distance: Float32[np.ndarray, "M"]
    """Squared distance of the nearest row."""


def find_truth(exact: ExactNeighbours, queries: Float32[np.ndarray, "M S"]) -> Truth:
    """Answer the queries exactly, in batches."""
    batches = [queries[i : i + BATCH] for i in range(0, len(queries), BATCH)]
    place = np.concatenate([exact.nearest_places(q, 10) for q in batches])
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


def draws_for(rows: int) -> int:
    """How many targets `measure_shares` draws of so many rows."""
    return int(np.clip(2 * rows, 2048, 20_480)) // 1024 * 1024


def measure_shares(
    table: Table,
    neighbours: Neighbours,
    exact: ExactNeighbours,
    *,
    seed: int = 0,
    drawn: Callable[[int], object] = lambda count: None,
) -> Shares:
    """Draw targets as training does, and count how often each row is one and how well a line predicts it."""
    geometry, n = table.meta.geometry, len(exact.row)
    counts = np.zeros(n, np.int64)
    inputs, targets = [], []
    for step in range(draws_for(n) // 1024):
        description = exact.text[draw_rows(n, 1024, seed=seed, step=step)]
        r = draw_points(geometry, 1024, seed=seed, step=step)
        pairs = neighbours.nearest(geometry.queries(description, r))
        counts += np.bincount(exact.place_of(pairs.row[:, 0]), minlength=n)
        drawn(1024)
        if step < 8:
            inputs.append(np.concatenate([r, unit(description.astype(np.float32)) * geometry.kappa], 1))
            targets.append(geometry.to_coordinates(pairs.latent[:, 0]))
    total = int(counts.sum())
    return Shares(
        draws=total,
        hits=np.bincount(np.minimum(counts, MOST_HITS), minlength=MOST_HITS + 1).tolist(),
        never_hit_share=float((counts == 0).mean()),
        never_hit_share_if_even=float((1 - 1 / n) ** total),
        largest_share=float(counts.max() / total),
        effective_share=float(total**2 / (n * np.square(counts.astype(np.float64)).sum())),
        chi_square=chi_square(counts),
        learnability=ridge_r2(np.concatenate(inputs), np.concatenate(targets)),
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


def measure_ladder(
    geometry: Geometry,
    text: Float[np.ndarray, "N T"],
    latent: Float[np.ndarray, "N L"],
    scales: tuple[float, ...] = LADDER,
    *,
    balance: Float[np.ndarray, "N"] | None = None,
    descriptions: int = 16,
    points: int = 512,
    seed: int = 0,
) -> list[Rung]:
    """What each desc_scale does, by exact search on at most 20,000 training rows."""
    rng = np.random.default_rng([seed, len(text)])
    sample = np.sort(rng.choice(len(text), min(len(text), 20_000), replace=False))
    words = unit(text[sample].astype(np.float32))
    image = geometry.image_part(text[sample], latent[sample])
    r = draw_points(geometry, points, seed=seed, step=0)
    asked = rng.choice(len(sample), min(descriptions, len(sample)), replace=False)
    image_cost = np.square(image).sum(1) - 2 * r @ image.T
    if balance is not None:
        image_cost += np.square(balance[sample])
    text_square = np.maximum(2 - 2 * words[asked] @ words.T, 0)  # A N
    rungs = []
    for scale in scales:
        own, perplexity, distance = [], [], []
        for row, square in zip(asked, text_square, strict=True):
            winner = (image_cost + (scale * geometry.kappa) ** 2 * square).argmin(1)
            share = np.bincount(winner, minlength=1) / points
            share = share[share > 0]
            own.append((winner == row).mean())
            perplexity.append(np.exp(-(share * np.log(share)).sum()))
            distance.append(np.sqrt(square[winner]).mean())
        rungs.append(
            Rung(
                desc_scale=scale,
                own_pair_rate=float(np.mean(own)),
                perplexity=float(np.mean(perplexity)),
                description_distance=float(np.mean(distance)),
            )
        )
    return rungs


def count_bad_vectors(vectors: Float[np.ndarray, "N S"]) -> dict[str, int]:
    """How many stored vectors are not finite, zero, or equal to an earlier one."""
    finite = np.isfinite(vectors).all(1)
    rows = np.ascontiguousarray(vectors).view(np.dtype((np.void, vectors.dtype.itemsize * vectors.shape[1])))
    return {
        "nan_vectors": int((~finite).sum()),
        "zero_vectors": int((vectors == 0).all(1).sum()),
        "duplicate_vectors": len(vectors) - len(np.unique(rows)),
    }


def settings_of(table: Table) -> dict[str, Any]:
    """What the figures of a report were measured at."""
    geometry, index = table.meta.geometry, table.meta.index
    assert index is not None
    return {
        "table": table.uri,
        "version": table.version,
        "geometry": geometry.kind,
        "centre": geometry.centring is not None,
        "variance_told_by_descriptions": geometry.centring and geometry.centring.explained,
        "desc_scale": geometry.desc_scale,
        "kappa": geometry.kappa,
        "dims": geometry.width,
        **{f"index_{name}": value for name, value in asdict(index).items() if name != "recall"},
    }


def describe(table: Table) -> dict[str, Any]:
    """What a table holds, with the figures of its last index report where there is one."""
    meta = table.meta
    return {
        "table": table.uri,
        "version": table.version,
        "rows": table.dataset().count_rows(),
        "train_rows": table.dataset().count_rows(filter=f"split = '{TRAIN}'"),
        "image_encoder": f"{meta.image_encoder.kind} {meta.image_encoder.name}",
        "text_encoder": f"{meta.text_encoder.kind} {meta.text_encoder.name}",
        "image_size": meta.image_size,
        "latent_shape": list(meta.latent_shape),
        "text_width": meta.text_width,
        "geometry": meta.geometry.kind,
        "desc_scale": meta.geometry.desc_scale,
        "indexed": meta.index is not None,
        **((table.report("index") or {}) if meta.index is not None else {}),
    }
