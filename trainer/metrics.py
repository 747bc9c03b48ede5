"""How far two sets of points are apart, without any downloaded weights. Rows are points."""

import numpy as np
from jaxtyping import Float


def sliced_wasserstein(
    a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"], *, projections: int = 512, seed: int = 0
) -> float:
    """Sliced Wasserstein-2 distance: root mean square over random directions of the exact distance in 1-D."""
    rng = np.random.default_rng(seed)
    ways = rng.standard_normal((a.shape[1], projections))
    ways /= np.linalg.norm(ways, axis=0)
    count = min(len(a), len(b))
    levels = (np.arange(count) + 0.5) / count
    left = np.quantile(a.astype(np.float64) @ ways, levels, axis=0)
    right = np.quantile(b.astype(np.float64) @ ways, levels, axis=0)
    return float(np.sqrt(np.square(left - right).mean()))


def frechet(a: Float[np.ndarray, "N L"], b: Float[np.ndarray, "M L"]) -> float:
    """Frechet distance of the Gaussians fitted to both sets: |m - n|^2 + tr(A + B - 2 (A B)^(1/2))."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr (A B)^(1/2) is the sum of the roots of the eigenvalues of the symmetric A^(1/2) B A^(1/2).
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def coverage(real: Float[np.ndarray, "N L"], found: Float[np.ndarray, "M L"], *, k: int = 5) -> float:
    """The share of real points that a found one comes nearer to than their k-th real neighbour (arXiv 2002.09797)."""
    import torch

    points, others = (torch.from_numpy(np.ascontiguousarray(rows, np.float32)) for rows in (real, found))
    covered = 0
    for part in torch.split(points, 1024):
        # A point is its own nearest neighbour.
        radius = torch.cdist(part, points).kthvalue(k + 1, dim=1).values
        covered += int((torch.cdist(part, others).amin(1) < radius).sum())
    return covered / len(points)
