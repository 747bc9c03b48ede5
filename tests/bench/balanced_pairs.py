"""Balanced nearest neighbors among vectors in memory: the project's search and ascent, without a table.

VectorBlocks groups the rows of a table by their text embeddings so that it can skip blocks; here the groups are given.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float32, Int

from index.build.potentials import TARGET, Potentials, fit_potentials
from index.search.blocks import SortedBlocks, VectorBlocks


class ArrayBlocks(VectorBlocks):
    """One block for each group of vectors, whose first `text_dim` entries are the text part."""

    def __init__(self, vectors: Float32[np.ndarray, "N S"], group: Int[np.ndarray, "N"], text_dim: int) -> None:
        self.count, self.device = len(vectors), torch.device("cpu")
        groups = [torch.from_numpy(np.flatnonzero(group == name)) for name in np.unique(group)]
        self.sorted = SortedBlocks.of(torch.from_numpy(vectors), groups, text_dim)

    def winners(
        self, queries: Float32[np.ndarray, "B S"], g: Float32[np.ndarray, "N"], at_once: int = 1024
    ) -> Int[np.ndarray, "B"]:
        """Return the position of the balanced neighbor of each query."""
        potential = torch.from_numpy(g)
        parts = [queries[start : start + at_once] for start in range(0, len(queries), at_once)]
        return np.concatenate([self.nearest(part, g=potential)[1][:, 0].numpy() for part in parts])


def balance(
    blocks: VectorBlocks, queries: Callable[[int], Float32[np.ndarray, "B S"]], *, steps: int, target: float = TARGET
) -> Potentials:
    """Fit potentials until the hit counts are balanced, for at most `steps` steps."""
    *_, potentials = fit_potentials(blocks, queries, steps=steps, target=target)
    return potentials
