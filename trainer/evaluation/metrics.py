"""Metrics of point sets: distances between distributions, overlap of neighborhoods.

A set is an array with one point per row. Pairwise distances are computed for a block of rows at a time, so memory grows
with the sizes of the sets and not with their product.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

BLOCK = 1024
"""Rows whose distances to all others are held at once."""
MMD_SUBSET, MMD_SUBSETS = 4000, 10
"""Points of each set in one estimate of the kernel distance; of larger sets the mean over ten random subsets."""


class Prdc(NamedTuple):
    """Overlap of two sets, each covered by the balls that reach from its points to their k-th nearest neighbors."""

    precision: float
    """Fraction of samples inside a ball of a real point (arXiv 1904.06991)."""
    recall: float
    """Fraction of real points inside a ball of a sample (arXiv 1904.06991)."""
    density: float
    """Mean number of real points' balls that contain a sample, over k; can exceed 1 (arXiv 2002.09797)."""
    coverage: float
    """Fraction of real points whose ball contains a sample (arXiv 2002.09797)."""


def frechet(a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"]) -> float:
    """Return the Frechet distance of the Gaussians fitted to both sets: |m - n|^2 + tr(A + B - 2 (A B)^(1/2)).

    FID (arXiv 1706.08500), if the points are features of an Inception network.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    # A = x'x and B = y'y.
    x, y = ((points - points.mean(0)) / np.sqrt(len(points) - 1) for points in (a, b))
    if a.shape[1] > min(len(a), len(b)):
        # The nonzero eigenvalues of A B are the squared singular values of x y', which is the smaller matrix.
        trace = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    else:
        # tr (A B)^(1/2) is the sum of the roots of the eigenvalues of the symmetric A^(1/2) B A^(1/2).
        values, vectors = np.linalg.eigh(x.T @ x)
        root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
        trace = np.sqrt(np.linalg.eigvalsh(root @ (y.T @ y) @ root).clip(min=0)).sum()
    variance = np.square(x).sum() + np.square(y).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + variance - 2 * trace)


def kernel_mmd(a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"], *, seed: int = 0) -> float:
    """Return the unbiased squared maximum mean discrepancy with the kernel (u.v / L + 1)^3.

    KID (arXiv 1801.01401), if the points are features of an Inception network.
    """
    size, rng = min(MMD_SUBSET, len(a), len(b)), np.random.default_rng(seed)
    repeats = 1 if size == len(a) == len(b) else MMD_SUBSETS
    subsets = ([points[rng.permutation(len(points))[:size]] for points in (a, b)] for _ in range(repeats))
    return float(np.mean([_mmd(x.astype(np.float64), y.astype(np.float64)) for x, y in subsets]))


def sliced_wasserstein(
    a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"], *, projections: int = 512, seed: int = 0
) -> float:
    """Return the sliced Wasserstein-2 distance: the root mean square over random directions of the distance in 1-D."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    left, right = (np.sort(points.astype(np.float64) @ directions, axis=0) for points in (a, b))
    count = min(len(a), len(b))
    return float(np.sqrt(np.square(_quantiles(left, count) - _quantiles(right, count)).mean()))


def energy_distance(a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"]) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased: zero on average for equal distributions, so maybe below."""
    return 2 * mean_distance_between(a, b) - mean_distance(a) - mean_distance(b)


def mean_distance_between(a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"]) -> float:
    """Return E|X - Y| over all pairs of a point of one set and a point of the other."""
    return _sum_distances(a, b) / (len(a) * len(b))


def mean_distance(a: Float[np.ndarray, "N L"]) -> float:
    """Return E|X - X'| over all pairs of different points; NaN for a single point."""
    return _sum_distances(a, a) / (len(a) * (len(a) - 1)) if len(a) > 1 else math.nan


def diversity(x: Float[np.ndarray, "N L"], group: Int[np.ndarray, "N"]) -> float:
    """Return the mean distance of two points of a group, all groups weighted equally; NaN if no group has two."""
    names, counts = np.unique(group, return_counts=True)
    means = [mean_distance(x[group == name]) for name in names[counts > 1]]
    return float(np.mean(means)) if means else math.nan


def two_sample_accuracy(
    a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"], *, steps: int = 300, seed: int = 0
) -> float:
    """Return how often a small classifier tells points of one set from the other's: 0.5 is best, 1 is worst.

    The classifier two-sample test (arXiv 1610.06545) with two-fold cross-validation; of the larger set the first points
    are used. Points at the same position of both sets, such as samples of the same caption, fall into the same fold;
    otherwise a caption overrepresented in one fold is underrepresented in the other, which biases equal distributions
    below 0.5. Points are assumed to be in random order.
    """
    count = min(len(a), len(b))
    assert count > 3, count
    x = torch.from_numpy(np.concatenate([a[:count], b[:count]]).astype(np.float32))
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    y = torch.arange(2 * count) // count
    even = torch.arange(count).repeat(2) % 2 == 0
    folds = ((even, ~even), (~even, even))
    return sum(_count_correct(x, y, fit, test, steps=steps, seed=seed) for fit, test in folds) / (2 * count)


def prdc(real: Float[np.ndarray, "N L"], samples: Float[np.ndarray, "M L"], *, k: int = 5) -> Prdc:
    """Return precision, recall, density and coverage; sets of k points or fewer use the farthest neighbor."""
    real_radii, sample_radii = _radii(real, k), _radii(samples, k)
    containing = torch.zeros(len(samples), dtype=torch.int64)
    recalled = covered = 0
    for block, radius in zip(pairwise_distances(real, samples), torch.split(real_radii, BLOCK), strict=True):
        containing += (block < radius[:, None]).sum(0)
        recalled += int((block < sample_radii).any(1).sum())
        covered += int((block.amin(1) < radius).sum())
    return Prdc(
        precision=float((containing > 0).double().mean()),
        recall=recalled / len(real),
        density=float(containing.double().mean()) / k,
        coverage=covered / len(real),
    )


def pairwise_distances(
    a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"], *, rows: int = BLOCK
) -> Iterator[Float32[Tensor, "n M"]]:
    """Yield the distances of consecutive blocks of `a` to all of `b`."""
    left, right = (torch.from_numpy(np.ascontiguousarray(points, np.float32)) for points in (a, b))
    for part in torch.split(left, rows):
        yield torch.cdist(part, right)


def _sum_distances(a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"]) -> float:
    return float(sum(block.double().sum() for block in pairwise_distances(a, b)))


def _radii(points: Float[np.ndarray, "N L"], k: int) -> Float32[Tensor, "N"]:
    """Return the distance of each point to its k-th nearest neighbor, itself not counted."""
    rank = min(k + 1, len(points))
    return torch.cat([block.kthvalue(rank, dim=1).values for block in pairwise_distances(points, points)])


def _mmd(x: Float64[np.ndarray, "N L"], y: Float64[np.ndarray, "N L"]) -> float:
    """Return the estimator of arXiv 1801.01401, equation 4, for sets of equal size."""

    def kernel(u: Float64[np.ndarray, "N L"], v: Float64[np.ndarray, "N L"]) -> Float64[np.ndarray, "N N"]:
        return np.asarray((u @ v.T / u.shape[1] + 1) ** 3)

    n = len(x)
    within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
    return float(within / (n * (n - 1)) - 2 * kernel(x, y).mean())


def _quantiles(ordered: Float64[np.ndarray, "N P"], count: int) -> Float64[np.ndarray, "M P"]:
    """Return the quantiles (i + 1/2) / count of sorted columns; the columns themselves if they have `count` rows."""
    position = ((np.arange(count) + 0.5) * len(ordered) / count - 0.5).clip(0, len(ordered) - 1)
    lower = np.floor(position).astype(int)
    upper, weight = np.minimum(lower + 1, len(ordered) - 1), (position - lower)[:, None]
    return np.asarray((1 - weight) * ordered[lower] + weight * ordered[upper])


def _count_correct(
    x: Float32[Tensor, "N L"],
    y: Int[Tensor, "N"],
    fit: Bool[Tensor, "N"],
    test: Bool[Tensor, "N"],
    *,
    steps: int,
    seed: int,
) -> int:
    """Train a small classifier on the rows that one mask selects and count its hits on those of the other."""
    x_fit, y_fit = x[fit], y[fit].float()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
        hidden = 64
        model = nn.Sequential(
            nn.Linear(x.shape[1], hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )
        adam = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
        for _ in range(steps):
            rows = torch.randint(len(x_fit), (256,))
            loss = binary_cross_entropy_with_logits(model(x_fit[rows])[:, 0], y_fit[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            adam.zero_grad()
    with torch.inference_mode():
        return int(((model(x[test])[:, 0] > 0) == (y[test] == 1)).sum())
