"""Endpoint regression: the coalescer without separate distance, direction and confidence, as an ablation of them.

The direction head is the displacement y - x itself, with a squared loss. Inputs lie where the coalescer's do, at R or
on the segment from R to y, and two points of a segment should lead to the same end. Step i of n covers 1/(n - i) of the
predicted displacement. With R alone as input and no consistency this is x-prediction at the noise end of a path, so one
step ends at the mean of all pairs that R may have.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from trainer.objectives.base import Loss, Objective, StepInput, StepOutput, Training, guide
from trainer.objectives.hyperparameters import fraction, non_negative
from trainer.objectives.segment import Point, inconsistency, ramped_weight, sample_points
from trainer.stream import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint(Objective):
    """Hyperparameters are the coalescer's."""

    segment: float = fraction(0.9)
    """Fraction of inputs on the segment from R to y."""
    consistency: float = non_negative(30.0)
    """Weight of |e(x) - e(x')|^2 / L, e(x) the predicted end from x and x' a point nearer to y on the same segment,
    without gradient."""
    consistency_gap: float = fraction(0.1)
    """Largest distance from x to x', as a fraction of the rest of the segment."""
    consistency_ramp: float = non_negative(8.0)
    """The weight of consistency grows as (fraction of the training steps done)^ramp."""

    dropout_column: ClassVar[int] = 2

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Return the mean squared error of the end x + direction, per dimension, plus the inconsistency of ends."""
        cond_mask = self.cond_mask(batch)

        def end_of(point: Point) -> Float[Tensor, "B L"]:
            end: Float[Tensor, "B L"] = point.x + network(point.x, batch.text, cond_mask=cond_mask).direction
            return end

        point = sample_points(batch, self.segment)
        end = end_of(point)
        parts = {"endpoint": (end - batch.y).square().mean()}
        if self.consistency:
            parts["consistency"] = inconsistency(point, end, batch, self.consistency_gap, end_of).mean()
        weight = ramped_weight(self.consistency, self.consistency_ramp, training.progress)
        return Loss(parts["endpoint"] + weight * parts.get("consistency", 0.0), parts)

    def step(self, network: nn.Module, inputs: StepInput) -> StepOutput:
        """Move by 1/(n - i) of the displacement; guidance extrapolates the displacement."""
        displacement = guide(lambda mask: network(inputs.x, inputs.text, cond_mask=mask).direction, inputs)
        return StepOutput.without_confidence(inputs.x + displacement / (inputs.n - inputs.i))
