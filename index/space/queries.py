"""The query law: a random description of the table and a random point R, from counters instead of state.

Slot i of step s is the same whatever the batch size, the number of processes or the point of resuming: every step
has its own generators, keyed by (seed, step, purpose), and a generator is read row by row.
"""

import numpy as np
from jaxtyping import Float32, Int

from index.space.geometry import Geometry

_ROW, _POINT, _DICE, _JITTER = range(4)


def draw_rows(rows: int, count: int, *, seed: int, step: int) -> Int[np.ndarray, "B"]:
    """For each of `count` slots one of `rows` row numbers, uniformly."""
    return np.random.default_rng([seed, step, _ROW]).integers(rows, size=count)


def draw_points(geometry: Geometry, count: int, *, seed: int, step: int) -> Float32[np.ndarray, "B L"]:
    """For each slot a random point R ~ N(0, I), in the space in which image parts are compared."""
    rng = np.random.default_rng([seed, step, _POINT])
    return geometry.project(rng.standard_normal((count, geometry.latent_dim), dtype=np.float32))


def draw_uniforms(count: int, faces: int, *, seed: int, step: int) -> Float32[np.ndarray, "B D"]:
    """For each slot `faces` numbers uniform in [0, 1), for whatever else a training step must decide by chance."""
    return np.random.default_rng([seed, step, _DICE]).random((count, faces), dtype=np.float32)


def draw_jitter(count: int, width: int, *, seed: int, step: int) -> Float32[np.ndarray, "B T"]:
    """For each slot a random vector of root mean square length 1."""
    noise = np.random.default_rng([seed, step, _JITTER]).standard_normal((count, width), dtype=np.float32)
    return noise / np.float32(np.sqrt(width))
