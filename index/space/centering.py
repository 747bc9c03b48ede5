"""Centering: latents are compared after a ridge regression on text embeddings has been subtracted from them.

    residual = (x - W t/|t| - b) / s        for coordinates x and text embeddings t

W and b are the regression's weights, s is the standard deviation of its residuals in each dimension. If captions are
class labels, this standardizes within each class, which lowers the error that search alone adds. The penalty is the
one of least generalized cross-validation (Golub, Heath and Wahba 1979, https://doi.org/10.1080/00401706.1979.10489751),
so embeddings that predict nothing, or that have as many dimensions as there are rows, get weights near zero. All sums
come from one pass over the rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float32

from index.space.moments import unit
from index.space.reduction import STORED, at_hand

PENALTIES = np.logspace(-8, 2, 41)
"""Ridge penalties to try, relative to the largest eigenvalue of the text embeddings' covariance."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Centering:
    """A fitted regression of coordinates on text embeddings."""

    bias: Float32[np.ndarray, "L"]
    std: Float32[np.ndarray, "L"]
    explained_variance: float
    """Fraction of the coordinates' variance that text embeddings explain, by cross-validation."""
    digest: str = ""
    """SHA-256 of the file that holds the weights; empty before it is written, and in tables of earlier versions."""
    weight: Float32[np.ndarray, "T L"] | None = field(default=None, metadata=STORED)

    def residual(self, text: Float[np.ndarray, "B T"], x: Float[np.ndarray, "B L"]) -> Float32[np.ndarray, "B L"]:
        """Subtract the prediction from coordinates and standardize each dimension."""
        predicted = unit(text.astype(np.float32)) @ at_hand(self.weight, self) + self.bias
        return np.asarray((x - predicted) / self.std, np.float32)


def fit_centering(batches: Iterable[tuple[Float[np.ndarray, "_B T"], Float[np.ndarray, "_B L"]]]) -> Centering:
    """Fit to batches of (text embeddings, coordinates) of all training rows, each row once; sums are float64."""
    count, sums = 0, None
    for text, x in batches:
        t, x = unit(text.astype(np.float64)), x.astype(np.float64)
        parts = (t.sum(0), x.sum(0), t.T @ t, t.T @ x, np.square(x).sum(0))
        sums = parts if sums is None else tuple(a + b for a, b in zip(sums, parts, strict=True))
        count += len(t)
    assert sums is not None, "no rows"
    t_mean, x_mean, tt, tx, xx = (part / count for part in sums)
    variance = np.maximum(xx - np.square(x_mean), 0.0)
    eigenvalues, directions = np.linalg.eigh(tt - np.outer(t_mean, t_mean))
    eigenvalues = np.maximum(eigenvalues, 0.0)
    covariance = directions.T @ (tx - np.outer(t_mean, x_mean))  # T L, along each eigenvector

    def residual_variance(penalty: float) -> Float[np.ndarray, "L"]:
        shrink = 1 / (eigenvalues + penalty)
        return np.asarray(variance - np.square(covariance).T @ (2 * shrink - eigenvalues * np.square(shrink)))

    def cross_validated(penalty: float) -> float:
        degrees_of_freedom = 1 + (eigenvalues / (eigenvalues + penalty)).sum()
        return float(residual_variance(penalty).sum() / max(1 - degrees_of_freedom / count, 1e-9) ** 2)

    penalties = PENALTIES * max(eigenvalues.max(), 1e-12)
    penalty = min(penalties, key=cross_validated)
    weight = directions @ (covariance / (eigenvalues + penalty)[:, None])
    left = residual_variance(penalty)
    constant = left <= 1e-12 * np.maximum(variance, 1e-12)
    return Centering(
        weight=weight.astype(np.float32),
        bias=(x_mean - t_mean @ weight).astype(np.float32),
        std=np.sqrt(np.where(constant, 1.0, left)).astype(np.float32),
        explained_variance=float(1 - cross_validated(penalty) / max(variance.sum(), 1e-12)),
    )
