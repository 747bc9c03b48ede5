"""What the nearest neighbors of points tell: whether a set of samples lies among real points, and beside which.

The neighborhood of a point is the ball that reaches to its k-th nearest fellow.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from trainer.evaluation.metrics import BLOCK, distances

COPIED = 1 / 3
"""A sample so much nearer to one training row than to any other counts as a copy of it."""


class Manifold(NamedTuple):
    """How two sets cover each other."""

    precision: float
    """Share of found points in the neighborhood of a real one (arXiv 1904.06991)."""
    recall: float
    """Share of real points in the neighborhood of a found one (arXiv 1904.06991)."""
    density: float
    """Neighborhoods of real points that a found one lies in, over k; may exceed 1 (arXiv 2002.09797)."""
    coverage: float
    """Share of real points with a found one in their neighborhood (arXiv 2002.09797)."""


def manifold(real: Float[np.ndarray, "N L"], found: Float[np.ndarray, "M L"], *, k: int = 5) -> Manifold:
    """All four, by the k-th nearest neighbors; of sets of k points or fewer, by the farthest."""
    around_real, around_found = _radii(real, k), _radii(found, k)
    inside = torch.zeros(len(found), dtype=torch.int64)
    recalled = covered = 0
    for block, radius in zip(distances(real, found), torch.split(around_real, BLOCK), strict=True):
        inside += (block < radius[:, None]).sum(0)
        recalled += int((block < around_found).any(1).sum())
        covered += int((block.amin(1) < radius).sum())
    return Manifold(
        precision=float((inside > 0).double().mean()),
        recall=recalled / len(real),
        density=float(inside.double().mean()) / k,
        coverage=covered / len(real),
    )


def _radii(points: Float[np.ndarray, "N L"], k: int) -> Float32[Tensor, "N"]:
    """Distance of each point to its k-th nearest fellow; it is its own nearest neighbor."""
    rank = min(k + 1, len(points))
    return torch.cat([block.kthvalue(rank, dim=1).values for block in distances(points, points)])


def nearest_ratio(x: Float[np.ndarray, "N L"], blocks: Iterable[Float[np.ndarray, "_ L"]]) -> Float32[np.ndarray, "N"]:
    """Distance to the nearest row of all blocks over that to the second: about 0 for a copy, near 1 between rows."""
    points = torch.from_numpy(np.ascontiguousarray(x, np.float32))
    best = torch.full((len(points), 2), torch.inf)
    for block in blocks:
        rows = torch.from_numpy(np.ascontiguousarray(block, np.float32))
        squares = rows.square().sum(1)
        for start in range(0, len(points), BLOCK):
            part = points[start : start + BLOCK]
            # |x|^2 is the same for all rows of a point, so the order needs it not.
            near = torch.addmm(squares, part, rows.T, alpha=-2).topk(min(2, len(rows)), largest=False).indices
            # Differences, not products: they alone tell a copy's distance from rounding.
            exact = (rows[near] - part[:, None]).norm(dim=2)
            known = torch.cat([best[start : start + BLOCK], exact], 1)
            best[start : start + BLOCK] = known.topk(2, largest=False).values
    ratio = best[:, 0] / best[:, 1].clamp(min=1e-12)
    return np.asarray(ratio.clamp(max=1))
