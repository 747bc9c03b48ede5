"""The interface of a nearest-neighbor search; `ann` and `exact` implement it.

A search covers the training rows only. It returns their text embeddings and latents along with their row ids, because
a trainer needs the pairs themselves. Distances are squared L2 between the query and the stored vector.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float16, Float32, Int


@dataclass(frozen=True, eq=False, slots=True)
class RetrievedPairs:
    """The K nearest pairs of each of B queries, nearest first."""

    row_id: Int[np.ndarray, "B K"]
    """Lance's `_rowid`."""
    distance: Float32[np.ndarray, "B K"]
    text: Float16[np.ndarray, "B K T"]
    latent: Float16[np.ndarray, "B K L"]


class NearestRows(NamedTuple):
    """The K nearest rows of each of B queries, nearest first, without what they hold."""

    row_id: Int[np.ndarray, "B K"]
    distance: Float32[np.ndarray, "B K"]


@runtime_checkable
class NeighborSearch(Protocol):
    """Nearest-neighbor search over the training rows of one table."""

    def nearest(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> RetrievedPairs:
        """Return the `k` nearest pairs of each query."""
        ...

    def nearest_rows(self, queries: Float32[np.ndarray, "B S"], k: int = 1) -> NearestRows:
        """Return the rows of the same pairs, without reading text embeddings and latents."""
        ...


@runtime_checkable
class LockstepSearch(NeighborSearch, Protocol):
    """A search in which all processes of a training run take part: each search of one is a search of all.

    So every process searches as often, one search at a time.
    """

    def close(self) -> None:
        """Tell the other processes that this one searches no more; afterwards all can begin anew."""
        ...
