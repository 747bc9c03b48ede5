"""Running statistics of a table's training split, from which its geometry is made.

Every shard sums its own rows in float64; sums of shards are merged in any order. Nothing else is kept, so the
statistics of a billion rows cost a few kilobytes a shard.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from index.table.codec import pack, unpack


@dataclass(frozen=True, eq=False, slots=True)
class Moments:
    """Sums over `count` rows, mergeable by `+`."""

    count: int
    latent_sum: Float64[np.ndarray, "L"]
    latent_square_sum: Float64[np.ndarray, "L"]
    text_sum: Float64[np.ndarray, "T"]
    """Sum of the description embeddings, each scaled to unit length."""

    @classmethod
    def of(cls, text: Float[np.ndarray, "B T"], latent: Float[np.ndarray, "B L"]) -> "Moments":
        """The moments of some rows."""
        latent = latent.astype(np.float64)
        return cls(len(latent), latent.sum(0), np.square(latent).sum(0), unit(text.astype(np.float64)).sum(0))

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows together."""
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
        """Standard deviation of each latent dimension; 1 where a dimension never changes."""
        variance = self.latent_square_sum / self.count - np.square(self.latent_mean)
        still = variance <= 1e-12 * np.maximum(1.0, np.square(self.latent_mean))
        return np.sqrt(np.where(still, 1.0, variance))

    @property
    def text_distance(self) -> float:
        """Root mean square distance of two random unit descriptions: E|t - t'|^2 = 2 (1 - |E t|^2)."""
        resultant = float(np.square(self.text_sum / self.count).sum())
        return float(np.sqrt(max(2.0 * (1.0 - resultant), 0.0)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; exact."""
        return {name: pack(getattr(self, name)) for name in self.__slots__}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Moments":
        """The inverse of `to_dict`."""
        return cls(**{name: unpack(value) for name, value in content.items()})


def unit(rows: Float[np.ndarray, "*B D"]) -> Float[np.ndarray, "*B D"]:
    """Each row scaled to length 1; a zero row stays zero."""
    norm = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(norm > 0, norm, 1.0).astype(rows.dtype))
