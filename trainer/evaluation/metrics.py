"""How far two sets of points are apart, without any downloaded weights. Rows are points.

Distances between all pairs are taken a block of rows at a time: memory grows with the sets, not with their product.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

BLOCK = 1024
"""Rows whose distances to all others are held at once."""


def sliced_wasserstein(
    a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"], *, projections: int = 512, seed: int = 0
) -> float:
    """Sliced Wasserstein-2 distance: root mean square over random directions of the exact distance in 1-D."""
    rng = np.random.default_rng(seed)
    ways = rng.standard_normal((a.shape[1], projections))
    ways /= np.linalg.norm(ways, axis=0)
    left, right = np.sort(a.astype(np.float64) @ ways, axis=0), np.sort(b.astype(np.float64) @ ways, axis=0)
    count = min(len(a), len(b))
    left, right = _levels(left, count), _levels(right, count)
    return float(np.sqrt(np.square(left - right).mean()))


def frechet(a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"]) -> float:
    """Frechet distance of the Gaussians fitted to both sets: |m - n|^2 + tr(A + B - 2 (A B)^(1/2))."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    # A = x'x and B = y'y.
    x, y = ((points - points.mean(0)) / np.sqrt(len(points) - 1) for points in (a, b))
    if a.shape[1] > min(len(a), len(b)):
        # The eigenvalues of A B that are not zero are the squared singular values of x y', which is smaller.
        cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    else:
        # tr (A B)^(1/2) is the sum of the roots of the eigenvalues of the symmetric A^(1/2) B A^(1/2).
        values, vectors = np.linalg.eigh(x.T @ x)
        root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
        cross = np.sqrt(np.linalg.eigvalsh(root @ (y.T @ y) @ root).clip(min=0)).sum()
    spread = np.square(x).sum() + np.square(y).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + spread - 2 * cross)


def energy_distance(a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"]) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased: of equal laws it is zero on average, so it may be negative."""
    return 2 * _total(a, b) / (len(a) * len(b)) - mean_distance(a) - mean_distance(b)


def mean_distance(a: Float[np.ndarray, "N L"]) -> float:
    """E|X - X'| over all pairs of different points; NaN where there is but one."""
    return _total(a, a) / (len(a) * (len(a) - 1)) if len(a) > 1 else math.nan


def diversity(x: Float[np.ndarray, "N L"], owner: Int[np.ndarray, "N"]) -> float:
    """Mean distance of two points with the same owner, every owner counting alike; NaN where none has two."""
    names, counts = np.unique(owner, return_counts=True)
    each = [mean_distance(x[owner == name]) for name in names[counts > 1]]
    return float(np.mean(each)) if each else math.nan


def two_sample_accuracy(
    a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"], *, steps: int = 300, seed: int = 0
) -> float:
    """How often a small network can tell unseen points of one set from the other's: 0.5 is perfect, 1 the worst.

    The classifier two-sample test (arXiv 1610.06545), with the first points of the larger set; each half of them is
    judged by a network that has learned from the other half. Points at the same place of both sets, such as answers to
    the same caption, are in the same half: else what one half has too many of the other has too few of, and equal laws
    come out below 0.5. Points are taken to be in a random order.
    """
    count = min(len(a), len(b))
    assert count > 3, count
    x = torch.from_numpy(np.concatenate([a[:count], b[:count]]).astype(np.float32))
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    y = torch.arange(2 * count) // count
    first = torch.arange(count).repeat(2) % 2 == 0
    halves = ((first, ~first), (~first, first))
    right = sum(_told_apart(x[fit], y[fit], x[test], y[test], steps=steps, seed=seed) for fit, test in halves)
    return right / (2 * count)


def _levels(ordered: Float64[np.ndarray, "N P"], count: int) -> Float64[np.ndarray, "M P"]:
    """The quantiles (i + 1/2) / count of ordered columns; the columns themselves where they have so many rows."""
    place = ((np.arange(count) + 0.5) * len(ordered) / count - 0.5).clip(0, len(ordered) - 1)
    lower = np.floor(place).astype(int)
    upper, share = np.minimum(lower + 1, len(ordered) - 1), (place - lower)[:, None]
    return np.asarray((1 - share) * ordered[lower] + share * ordered[upper])


def _told_apart(
    x: Float32[Tensor, "N L"],
    y: Int[Tensor, "N"],
    unseen: Float32[Tensor, "M L"],
    truth: Int[Tensor, "M"],
    *,
    steps: int,
    seed: int,
) -> int:
    """How many unseen points a fresh classifier puts into the right set."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        width = 64
        model = nn.Sequential(
            nn.Linear(x.shape[1], width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )
        adam = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
        for _ in range(steps):
            rows = torch.randint(len(x), (256,))
            loss = binary_cross_entropy_with_logits(model(x[rows])[:, 0], y[rows].float())
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            adam.zero_grad()
    with torch.inference_mode():
        return int(((model(unseen)[:, 0] > 0) == (truth == 1)).sum())


def distances(
    a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"], *, rows: int = BLOCK
) -> Iterator[Float32[Tensor, "n M"]]:
    """Distances of a block of `a` after the other to all of `b`."""
    left, right = (torch.from_numpy(np.ascontiguousarray(points, np.float32)) for points in (a, b))
    for part in torch.split(left, rows):
        yield torch.cdist(part, right)


def _total(a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"]) -> float:
    return float(sum(block.double().sum() for block in distances(a, b)))
