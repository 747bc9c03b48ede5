"""Balanced nearest pairs among vectors in memory: the project's search and ascent, without a table.

VectorBlocks sorts a table's rows by their descriptions to pass over those that are too far; here the groups are given.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float32, Int

from index.build.potentials import TARGET, Potentials, fit_potentials
from index.search.exact import Block, VectorBlocks


class ArrayBlocks(VectorBlocks):
    """Held blocks, one for each group of vectors; the first `text_dim` numbers of a vector are its description's."""

    def __init__(self, vectors: Float32[np.ndarray, "N S"], group: Int[np.ndarray, "N"], text_dim: int) -> None:
        self.count, self.device, self.held = len(vectors), torch.device("cpu"), True
        places = [torch.from_numpy(np.flatnonzero(group == name)) for name in np.unique(group)]
        self._blocks = [Block.of(place, torch.from_numpy(vectors)[place]) for place in places]
        texts = [block.vectors[:, :text_dim] for block in self._blocks]
        self._centers = torch.stack([text.mean(0) for text in texts])
        self._radii = torch.stack(
            [(text - center).norm(dim=1).max() for text, center in zip(texts, self._centers, strict=True)]
        )

    def winners(
        self, queries: Float32[np.ndarray, "B S"], g: Float32[np.ndarray, "N"], at_once: int = 1024
    ) -> Int[np.ndarray, "B"]:
        """The place of the balanced neighbor of each query."""
        potential = torch.from_numpy(g)
        parts = [queries[start : start + at_once] for start in range(0, len(queries), at_once)]
        return np.concatenate([self.nearest(part, g=potential)[1][:, 0].numpy() for part in parts])


def balance(
    blocks: VectorBlocks, queries: Callable[[int], Float32[np.ndarray, "B S"]], *, steps: int, target: float = TARGET
) -> Potentials:
    """The potentials where the project's ascent ends, with even shares or after so many steps."""
    *_, found = fit_potentials(blocks, queries, steps=steps, target=target)
    return found
