"""The queries of training steps, and the pair that a search retrieves for each: for the trainer and for targets ahead.

Both draw by the same code, so a training run gets the same pairs whether it searches itself or reads what was drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Float, Float16, Float32, Int

from index.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SEED, check_ranges
from index.search.neighbors import NeighborSearch
from index.space.queries import draw_jitter, draw_points, draw_rows, draw_uniforms
from index.table.rows import take_columns
from index.table.schema import TRAIN
from index.table.table import Table

NUM_UNIFORMS = 8
QUERIES_PER_SEARCH = 1024
"""One search serves several steps: 1,024 queries at once cost about half as much as four times 256."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairConfig:
    """What the retrieved pairs of training steps depend on, next to the table and its search."""

    batch_size: Annotated[int, COUNT]
    """Slots of a step."""
    seed: Annotated[int, SEED] = 0
    num_neighbors: Annotated[int, COUNT] = 1
    """k: each pair is sampled from the k nearest neighbors of its query."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """Softmax temperature over the squared distances of those k neighbors."""
    jitter: Annotated[float, NOT_NEGATIVE] = 0.0
    """Length of the Gaussian noise on query embeddings, as a fraction of their norm."""

    def __post_init__(self) -> None:
        """Raise OptionError if a value is out of range."""
        check_ranges(self)


class Captions(NamedTuple):
    """Whose captions are queried."""

    position: Int[np.ndarray, "B"]
    """Positions of the rows in the table."""
    text: Float32[np.ndarray, "B T"]
    """Text embeddings DE, with jitter if there is any."""


class Pairs(NamedTuple):
    """The pair of each query: text embedding, latent, and row id (None: the query's own row)."""

    text: Float32[np.ndarray, "B T"]
    latent: Float16[np.ndarray, "B L"]
    row_id: Int[np.ndarray, "B"] | None


class StepQueries:
    """The query distribution of a table's training rows, step by step; rows of a result are slot after slot."""

    def __init__(self, table: Table, config: PairConfig, slots: slice = slice(None)) -> None:
        """Draw only some slots of each step if `slots` is given."""
        self._table, self._config, self._slots = table, config, slots

    @cached_property
    def positions(self) -> Int[np.ndarray, "N"]:
        """Positions of the training rows, which are read when captions are drawn first."""
        return self._table.positions(TRAIN)

    def noise(self, steps: Sequence[int]) -> Float32[np.ndarray, "B L"]:
        """Return the noise R of the queries of some steps."""
        size, seed, geometry = self._config.batch_size, self._config.seed, self._table.meta.geometry
        return np.concatenate([draw_points(geometry, size, seed=seed, step=step)[self._slots] for step in steps])

    def uniforms(self, steps: Sequence[int]) -> Float32[np.ndarray, "B 8"]:
        """Return numbers uniform in [0, 1); the last column chooses among the nearest neighbors."""
        size, seed = self._config.batch_size, self._config.seed
        return np.concatenate([draw_uniforms(size, NUM_UNIFORMS, seed=seed, step=step)[self._slots] for step in steps])

    def captions(self, steps: Sequence[int]) -> Captions:
        """Return the rows whose captions are queried, and their text embeddings."""
        size, seed = self._config.batch_size, self._config.seed
        rows = [draw_rows(len(self.positions), size, seed=seed, step=step)[self._slots] for step in steps]
        position = self.positions[np.concatenate(rows)]
        (stored,) = take_columns(self._table, position, ["text"])
        text = stored.astype(np.float32)
        noise = np.concatenate([*map(self._jitter, steps)])
        return Captions(position, text + noise * np.linalg.norm(text, axis=1, keepdims=True))

    def _jitter(self, step: int) -> Float32[np.ndarray, "B _"]:
        config = self._config
        count = len(range(*self._slots.indices(config.batch_size)))
        if not config.jitter:
            return np.zeros((count, 1), np.float32)
        noise = draw_jitter(config.batch_size, self._table.meta.geometry.text_dim, seed=config.seed, step=step)
        return np.float32(config.jitter) * noise[self._slots]

    def retrieve(
        self,
        search: NeighborSearch,
        captions: Captions,
        noise: Float32[np.ndarray, "B L"],
        uniforms: Float32[np.ndarray, "B 8"],
    ) -> Pairs:
        """Return the pair of each query: the nearest, or one sampled from the k nearest."""
        vectors = self._table.meta.geometry.queries(captions.text, noise)
        nearest = search.nearest(vectors, self._config.num_neighbors)
        chosen = self._chosen(nearest.distance, uniforms)
        return Pairs(nearest.text[chosen].astype(np.float32), nearest.latent[chosen], nearest.row_id[chosen])

    def row_ids(self, search: NeighborSearch, steps: Sequence[int]) -> Int[np.ndarray, "B"]:
        """Return the row ids of the pairs of some steps."""
        vectors = self._table.meta.geometry.queries(self.captions(steps).text, self.noise(steps))
        nearest = search.nearest_rows(vectors, self._config.num_neighbors)
        return np.asarray(nearest.row_id[self._chosen(nearest.distance, self.uniforms(steps))])

    def _chosen(
        self, distance: Float32[np.ndarray, "B K"], uniforms: Float32[np.ndarray, "B 8"]
    ) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B"]]:
        """Return the index of one neighbor of each query."""
        neighbor = sample_neighbor(distance / self._config.temperature, uniforms[:, -1])
        return np.arange(len(neighbor)), neighbor


def sample_neighbor(energy: Float[np.ndarray, "B K"], uniform: Float32[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
    """Sample one of K neighbors per row, with probability proportional to exp(-energy), from uniform numbers."""
    weight = np.exp(energy.min(1, keepdims=True) - energy.astype(np.float64))
    reached = weight.cumsum(1) > uniform[:, None] * weight.sum(1, keepdims=True)
    return np.asarray(reached.argmax(1))
