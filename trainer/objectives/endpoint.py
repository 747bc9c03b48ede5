"""Endpoint regression: one head says where the pair is. What is left of the coalescer without distance and confidence.

The direction head is the whole way y - x, learned by its squared error; inputs lie where the coalescer's do, at R or,
with probability `segment`, on the segment from R to y. Step i of n goes 1/(n - i) of the way. With R alone as input it
is x-prediction at the noise end of a path, so one step gives the mean of all pairs that R may have.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trainer.objectives import Loss, Step, Training
from trainer.objectives.dials import check_shares
from trainer.objectives.steps import guided, unsure
from trainer.stream import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """The ablation of separate distance and direction; its dials are the coalescer's."""

    segment: float = 0.5
    """Share of inputs on the segment from R to y."""
    dropout: float = 0.1
    """Share of inputs without their description, for guidance."""

    def __post_init__(self) -> None:
        """Refuse dials that mean nothing."""
        check_shares(self, "segment", "dropout")

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Mean squared error of the end point x + direction, per dimension."""
        kind, place, told = batch.dice[:, :3].unbind(1)
        t = torch.where(kind < self.segment, place, 0.0)[:, None]
        x = batch.r + t * (batch.y - batch.r)
        way = network(x, batch.text, keep=told >= self.dropout).direction
        error = (way - (batch.y - x)).square().mean()
        return Loss(error, {"endpoint": error})

    def step(
        self,
        network: nn.Module,
        x: Float[Tensor, "B L"],
        text: Float[Tensor, "B K T"],
        i: int,
        n: int,
        guidance: float,
        noise: Callable[[], Float[Tensor, "B L"]],
    ) -> Step:
        """(e - x) / (n - i) towards the end point e; guidance is on e."""
        told = network(x, text).direction
        way = guided(told, lambda nobody: network(x, text, keep=nobody).direction, guidance)
        return unsure(x + way / (n - i))


PRESETS: dict[str, Callable[..., Endpoint]] = {"default": Endpoint}
