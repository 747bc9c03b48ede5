"""What is learned on the segment from R to its pair y: at which points, and that all of them lead to the same end.

A second step starts near the data, where a network that was trained on R alone has never been.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.stream import Batch

Points = Float[Tensor, "B L"]


def points_on(batch: Batch, share: float) -> Float[Tensor, "B L"]:
    """A point anywhere on the segment with probability `share`, else R."""
    kind, place = batch.dice[:, :1], batch.dice[:, 1:2]
    return batch.r + torch.where(kind < share, place, 0.0) * (batch.y - batch.r)


def inconsistency(
    x: Float[Tensor, "B L"],
    end: Float[Tensor, "B L"],
    batch: Batch,
    gap: float,
    end_of: Callable[[Points], Points],
) -> Float[Tensor, "B"]:
    """Mean squared difference, per dimension, of where x leads and where a point does that is nearer to y.

    That point is up to a share `gap` of the rest of the way ahead, and is not learned from, as in consistency training
    (Song et al., arXiv 2303.01469).
    """
    with torch.no_grad():
        goal = end_of(x + gap * batch.dice[:, 3:4] * (batch.y - x))
    return (end - goal).square().mean(1)
