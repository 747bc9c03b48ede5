"""Training on the segment from noise R to the latent y of its pair: sample inputs there, and make their ends agree.

A second step starts near the data, where a network that was trained at R alone has never been.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.stream import Batch


class Point(NamedTuple):
    """Points x_t = (1 - t) R + t y and their t."""

    x: Float[Tensor, "B L"]
    t: Float[Tensor, "B"]


def sample_points(batch: Batch, fraction: float) -> Point:
    """Sample t uniformly for this fraction of the rows, and t = 0, which is R, for the others."""
    kind, uniform = batch.uniforms[:, :2].unbind(1)
    t = torch.where(kind < fraction, uniform, 0.0)
    return Point(batch.r + t[:, None] * (batch.y - batch.r), t)


def inconsistency(
    point: Point,
    end: Float[Tensor, "B L"],
    batch: Batch,
    gap: float,
    end_of: Callable[[Point], Float[Tensor, "B L"]],
) -> Float[Tensor, "B"]:
    """Return the mean squared difference, per dimension, between the ends predicted from two points of a segment.

    The second point is nearer to y, by up to a fraction `gap` of the rest of the segment. No gradient flows through its
    end, as in consistency training (Song et al., arXiv 2303.01469).

    Args:
        point: the first points.
        end: their predicted ends.
        batch: for y, and a column of uniforms that places the second points.
        gap: the largest gap.
        end_of: predicts the ends of points.
    """
    ahead = gap * batch.uniforms[:, 3]
    with torch.no_grad():
        x, t = point.x + ahead[:, None] * (batch.y - point.x), point.t + ahead * (1 - point.t)
        target = end_of(Point(x, t))
    return (end - target).square().mean(1)


def ramped_weight(weight: float, ramp: float, progress: float) -> float:
    """Return a weight that grows over training as progress^ramp, as in temporal ensembling (arXiv 1610.02242).

    Early on the network's own predictions are poor targets; with a ramp it fits the pairs first.
    """
    return weight * float(progress**ramp)
