"""Sums over a table's training split, from which its geometry is fitted.

Each shard sums its own rows in float64, and the sums of shards are added in any order. Their size does not depend on
the number of rows.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64


@dataclass(frozen=True, eq=False, slots=True)
class Moments:
    """Sums over `count` rows; those of two sets of rows are merged by `+`."""

    count: int
    latent_sum: Float64[np.ndarray, "L"]
    latent_square_sum: Float64[np.ndarray, "L"]
    text_sum: Float64[np.ndarray, "T"]
    """Sum of the text embeddings, each scaled to unit length."""

    @classmethod
    def of(cls, text: Float[np.ndarray, "B T"], latent: Float[np.ndarray, "B L"]) -> "Moments":
        """Sum text embeddings and latents of some rows."""
        latent = latent.astype(np.float64)
        return cls(len(latent), latent.sum(0), np.square(latent).sum(0), unit(text.astype(np.float64)).sum(0))

    def __add__(self, other: "Moments") -> "Moments":
        """Merge the moments of two sets of rows."""
        return Moments(
            self.count + other.count,
            self.latent_sum + other.latent_sum,
            self.latent_square_sum + other.latent_square_sum,
            self.text_sum + other.text_sum,
        )

    @property
    def latent_mean(self) -> Float64[np.ndarray, "L"]:
        """Mean of each latent dimension."""
        return self.latent_sum / self.count

    @property
    def latent_std(self) -> Float64[np.ndarray, "L"]:
        """Standard deviation of each latent dimension; 1 for a constant dimension."""
        variance = self.latent_square_sum / self.count - np.square(self.latent_mean)
        constant = variance <= 1e-12 * np.maximum(1.0, np.square(self.latent_mean))
        return np.sqrt(np.where(constant, 1.0, variance))

    @property
    def text_distance(self) -> float:
        """Root mean square distance of two random unit text embeddings: E|t - t'|^2 = 2 (1 - |E t|^2)."""
        resultant = float(np.square(self.text_sum / self.count).sum())
        return float(np.sqrt(max(2.0 * (1.0 - resultant), 0.0)))


def unit(rows: Float[np.ndarray, "*B D"]) -> Float[np.ndarray, "*B D"]:
    """Scale each row to length 1; a zero row stays zero."""
    norm = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(norm > 0, norm, 1.0).astype(rows.dtype))
