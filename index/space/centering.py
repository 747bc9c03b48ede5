"""Description-centered search: what a description already tells of a latent is taken out before latents are compared.

    residual = (x - W unit(t) - b) / s        of coordinates x and descriptions t

W and b are a ridge regression of coordinates on unit descriptions, s the standard deviation of what it leaves. For
captions that are class labels this is standardizing within each class, which lowers what search alone costs (design,
section 4). The penalty is the one of least generalized cross-validation (Golub, Heath and Wahba 1979), so descriptions
that tell nothing, or as many as there are rows, are hardly used. All of it comes from sums of one pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from index.space.moments import unit
from index.table.codec import pack, unpack

PENALTIES = np.logspace(-8, 2, 41)
"""Tried, relative to the largest variance of a description's direction."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Centering:
    """What is taken out of coordinates for a description."""

    weight: Float32[np.ndarray, "T L"]
    bias: Float32[np.ndarray, "L"]
    std: Float32[np.ndarray, "L"]
    explained: float
    """Share of the coordinates' variance that descriptions tell, by cross-validation."""

    def residual(self, text: Float[np.ndarray, "B T"], x: Float[np.ndarray, "B L"]) -> Float32[np.ndarray, "B L"]:
        """Coordinates less what their descriptions tell, each dimension standardized."""
        told = unit(text.astype(np.float32)) @ self.weight + self.bias
        return np.asarray((x - told) / self.std, np.float32)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; exact."""
        return {name: pack(getattr(self, name)) for name in self.__slots__}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Centering":
        """The inverse of `to_dict`."""
        return cls(**{name: unpack(value) for name, value in content.items()})


def fit_centering(batches: Iterable[tuple[Float[np.ndarray, "_B T"], Float[np.ndarray, "_B L"]]]) -> Centering:
    """Fit to batches of (descriptions, coordinates) of all training rows, each seen once; sums are float64."""
    count, sums = 0, None
    for text, x in batches:
        t, x = unit(text.astype(np.float64)), x.astype(np.float64)
        parts = (t.sum(0), x.sum(0), t.T @ t, t.T @ x, np.square(x).sum(0))
        sums = parts if sums is None else tuple(a + b for a, b in zip(sums, parts, strict=True))
        count += len(t)
    assert sums is not None, "no rows"
    t_mean, x_mean, tt, tx, xx = (part / count for part in sums)
    variance = np.maximum(xx - np.square(x_mean), 0.0)
    spread, directions = np.linalg.eigh(tt - np.outer(t_mean, t_mean))
    spread = np.maximum(spread, 0.0)
    told = directions.T @ (tx - np.outer(t_mean, x_mean))  # T L: covariance along each direction

    def left(penalty: float) -> Float[np.ndarray, "L"]:
        shrink = 1 / (spread + penalty)
        return np.asarray(variance - np.square(told).T @ (2 * shrink - spread * np.square(shrink)))

    def cross_validated(penalty: float) -> float:
        freedom = 1 + (spread / (spread + penalty)).sum()
        return float(left(penalty).sum() / max(1 - freedom / count, 1e-9) ** 2)

    penalties = PENALTIES * max(spread.max(), 1e-12)
    penalty = min(penalties, key=cross_validated)
    weight = directions @ (told / (spread + penalty)[:, None])
    remains = left(penalty)
    still = remains <= 1e-12 * np.maximum(variance, 1e-12)
    return Centering(
        weight=weight.astype(np.float32),
        bias=(x_mean - t_mean @ weight).astype(np.float32),
        std=np.sqrt(np.where(still, 1.0, remains)).astype(np.float32),
        explained=float(1 - cross_validated(penalty) / max(variance.sum(), 1e-12)),
    )
