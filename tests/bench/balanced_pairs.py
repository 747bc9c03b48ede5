"""Balanced nearest pairs among vectors in memory: the project's search and ascent, without a table.

VectorBlocks sorts a table's rows by their descriptions to pass over those that are too far; here the groups are given.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float32, Int

from index.balance import TARGET, Potentials, fit_potentials
from index.blocks import Block, VectorBlocks


class ArrayBlocks(VectorBlocks):
    """Held blocks, one for each group of vectors; the first `text_width` numbers of a vector are its description's."""

    def __init__(self, vectors: Float32[np.ndarray, "N S"], group: Int[np.ndarray, "N"], text_width: int) -> None:
        self.count, self.device, self.held = len(vectors), torch.device("cpu"), True
        places = [torch.from_numpy(np.flatnonzero(group == name)) for name in np.unique(group)]
        self._blocks = [Block.of(place, torch.from_numpy(vectors)[place]) for place in places]
        texts = [block.vectors[:, :text_width] for block in self._blocks]
        self._centres = torch.stack([text.mean(0) for text in texts])
        self._radii = torch.stack(
            [(text - centre).norm(dim=1).max() for text, centre in zip(texts, self._centres, strict=True)]
        )

    def winners(
        self, queries: Float32[np.ndarray, "B S"], g: Float32[np.ndarray, "N"], at_once: int = 1024
    ) -> Int[np.ndarray, "B"]:
        """The place of the balanced neighbour of each query."""
        potential = torch.from_numpy(g)
        parts = [queries[start : start + at_once] for start in range(0, len(queries), at_once)]
        return np.concatenate([self.nearest(part, g=potential)[1][:, 0].numpy() for part in parts])


def balance(
    blocks: VectorBlocks, queries: Callable[[int], Float32[np.ndarray, "B S"]], *, steps: int, target: float = TARGET
) -> Potentials:
    """The potentials where the project's ascent ends, with even shares or after so many steps."""
    *_, found = fit_potentials(blocks, queries, steps=steps, target=target)
    return found
