"""Endpoint regression: one head says where the pair is. What is left of the coalescer without distance and confidence.

The direction head is the whole way y - x, learned by its squared error; inputs lie where the coalescer's do, at R or,
with probability `segment`, on the segment from R to y, and two points of a segment should lead to the same end. Step i
of n goes 1/(n - i) of the way. With R alone as input and no consistency it is x-prediction at the noise end of a path,
so one step gives the mean of all pairs that R may have.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from trainer.objectives.base import Loss, Step, Training
from trainer.objectives.hyperparameters import check_shares, check_weights
from trainer.objectives.segment import Place, inconsistency, places_on, ramped
from trainer.objectives.steps import guided, unsure
from trainer.stream import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """The ablation of separate distance and direction; its hyperparameters are the coalescer's."""

    segment: float = 0.9
    """Share of inputs on the segment from R to y."""
    consistency: float = 30.0
    """Weight of |e(x) - e(x')|^2 / L, e the end point, x' nearer to y on the same segment and not learned from."""
    gap: float = 0.1
    """How far ahead x' is at most, as a share of the rest of the way."""
    ramp: float = 8.0
    """The weight of consistency grows as (share of the steps that are done)^ramp."""
    dropout: float = 0.1
    """Share of inputs without their description, for guidance."""

    def __post_init__(self) -> None:
        """Refuse hyperparameters that mean nothing."""
        check_shares(self, "segment", "gap", "dropout")
        check_weights(self, "consistency", "ramp")

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Mean squared error of the end point x + direction, per dimension, and the inconsistency of end points."""
        keep = batch.uniforms[:, 2] >= self.dropout

        def end_of(place: Place) -> Float[Tensor, "B L"]:
            end: Float[Tensor, "B L"] = place.x + network(place.x, batch.text, keep=keep).direction
            return end

        place = places_on(batch, self.segment)
        end = end_of(place)
        parts = {"endpoint": (end - batch.y).square().mean()}
        if self.consistency:
            parts["consistency"] = inconsistency(place, end, batch, self.gap, end_of).mean()
        weight = ramped(self.consistency, self.ramp, training.progress)
        return Loss(parts["endpoint"] + weight * parts.get("consistency", 0.0), parts)

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
