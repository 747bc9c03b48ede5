"""The query distribution: a caption of the training split and noise R, from counter-based random numbers.

Each step has its own generators, keyed by (seed, step, what is drawn, purpose), and a generator is read row by row. So
slot i of step s does not depend on the batch size, the number of processes, or the step from which training resumes.
Each purpose has queries of its own: what is measured on some of them was not fitted to the same ones.
"""

from enum import IntEnum

import numpy as np
from jaxtyping import Float32, Int

from index.space.geometry import Geometry

_ROW, _NOISE, _UNIFORM, _JITTER = range(4)


class Purpose(IntEnum):
    """What queries are drawn for."""

    TRAINING = 0
    BALANCE = 101
    """Fit dual potentials."""
    NPROBES = 102
    """Choose the index and nprobes."""
    RECALL = 103
    """Measure the recall of the chosen index."""
    HUBNESS = 104
    """Count hits, fit the linear probe."""
    DESC_SCALE = 105
    """Choose desc_scale."""
    SWEEP = 106
    """Measure perplexity and self-retrieval."""
    EXAMPLES = 107
    """Show retrieved pairs."""


def draw_rows(
    rows: int, count: int, *, seed: int, step: int, purpose: Purpose = Purpose.TRAINING
) -> Int[np.ndarray, "B"]:
    """Draw `count` positions below `rows`, uniformly and with replacement: the rows whose captions are the queries'."""
    return _generator(seed, step, _ROW, purpose).integers(rows, size=count)


def draw_points(
    geometry: Geometry, count: int, *, seed: int, step: int, purpose: Purpose = Purpose.TRAINING
) -> Float32[np.ndarray, "B L"]:
    """Draw noise R ~ N(0, I) for `count` queries, projected to the space in which image parts are compared."""
    rng = _generator(seed, step, _NOISE, purpose)
    return geometry.project(rng.standard_normal((count, geometry.latent_dim), dtype=np.float32))


def draw_uniforms(count: int, dim: int, *, seed: int, step: int) -> Float32[np.ndarray, "B D"]:
    """Draw `dim` uniform numbers in [0, 1) for each slot: the random choices of a training step."""
    return np.random.default_rng([seed, step, _UNIFORM]).random((count, dim), dtype=np.float32)


def draw_jitter(count: int, dim: int, *, seed: int, step: int) -> Float32[np.ndarray, "B T"]:
    """Draw a Gaussian vector of root mean square length 1 for each slot, to be added to a text embedding."""
    noise = np.random.default_rng([seed, step, _JITTER]).standard_normal((count, dim), dtype=np.float32)
    return noise / np.float32(np.sqrt(dim))


def _generator(seed: int, step: int, drawn: int, purpose: Purpose) -> np.random.Generator:
    # The stream of training is keyed without a purpose, as it was before there were others.
    return np.random.default_rng([seed, step, drawn, *([purpose] if purpose else [])])
