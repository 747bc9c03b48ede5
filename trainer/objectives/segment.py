"""What is learned on the segment from R to its pair y: at which points, and that all of them lead to the same end.

A second step starts near the data, where a network that was trained on R alone has never been.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.stream import Batch


class Place(NamedTuple):
    """Points, and how far along their segments they are: 0 at R, 1 at y."""

    x: Float[Tensor, "B L"]
    t: Float[Tensor, "B"]


def places_on(batch: Batch, share: float) -> Place:
    """A point anywhere on the segment with probability `share`, else R."""
    kind, place = batch.uniforms[:, :2].unbind(1)
    t = torch.where(kind < share, place, 0.0)
    return Place(batch.r + t[:, None] * (batch.y - batch.r), t)


def inconsistency(
    place: Place,
    end: Float[Tensor, "B L"],
    batch: Batch,
    gap: float,
    end_of: Callable[[Place], Float[Tensor, "B L"]],
) -> Float[Tensor, "B"]:
    """Mean squared difference, per dimension, of where x leads and where a point does that is nearer to y.

    That point is up to a share `gap` of the rest of the way ahead, and is not learned from, as in consistency training
    (Song et al., arXiv 2303.01469).
    """
    ahead = gap * batch.uniforms[:, 3]
    with torch.no_grad():
        x, t = place.x + ahead[:, None] * (batch.y - place.x), place.t + ahead * (1 - place.t)
        goal = end_of(Place(x, t))
    return (end - goal).square().mean(1)


def ramped(weight: float, ramp: float, progress: float) -> float:
    """A weight that grows over training, as consistency's does in temporal ensembling (Laine, Aila, arXiv 1610.02242).

    What the network says elsewhere is no target before it has learned the pairs; captions are learned slowly then.
    """
    return weight * float(progress**ramp)
