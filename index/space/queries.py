"""The query distribution: a caption of the training split and noise R, from counter-based random numbers.

Each step has its own generators, keyed by (seed, step, purpose), and a generator is read row by row. So slot i of step
s does not depend on the batch size, the number of processes, or the step from which training resumes.
"""

import numpy as np
from jaxtyping import Float32, Int

from index.space.geometry import Geometry

_ROW, _NOISE, _UNIFORM, _JITTER = range(4)


def draw_rows(rows: int, count: int, *, seed: int, step: int) -> Int[np.ndarray, "B"]:
    """Draw `count` positions below `rows`, uniformly and with replacement: the rows whose captions are the queries'."""
    return np.random.default_rng([seed, step, _ROW]).integers(rows, size=count)


def draw_points(geometry: Geometry, count: int, *, seed: int, step: int) -> Float32[np.ndarray, "B L"]:
    """Draw noise R ~ N(0, I) for `count` queries, projected to the space in which image parts are compared."""
    rng = np.random.default_rng([seed, step, _NOISE])
    return geometry.project(rng.standard_normal((count, geometry.latent_dim), dtype=np.float32))


def draw_uniforms(count: int, dim: int, *, seed: int, step: int) -> Float32[np.ndarray, "B D"]:
    """Draw `dim` uniform numbers in [0, 1) for each slot: the random choices of a training step."""
    return np.random.default_rng([seed, step, _UNIFORM]).random((count, dim), dtype=np.float32)


def draw_jitter(count: int, dim: int, *, seed: int, step: int) -> Float32[np.ndarray, "B T"]:
    """Draw a Gaussian vector of root mean square length 1 for each slot, to be added to a text embedding."""
    noise = np.random.default_rng([seed, step, _JITTER]).standard_normal((count, dim), dtype=np.float32)
    return noise / np.float32(np.sqrt(dim))
