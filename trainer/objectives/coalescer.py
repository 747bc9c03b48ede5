"""The coalescer: predict from a point how far its pair is, in which direction, and with what confidence.

Distance and direction have losses of their own, so that |direction| can shrink where the target changes fast. A
fraction `segment` of the inputs lies on the segment from noise R to the latent y of its pair, with y as the target: a
second step starts near the data, and diverges if the network has not seen such points. A fraction `self_segment` lies
on the segment from R to where the network itself would end, which is where its second step starts.

Under the squared loss distance * direction is about E[y - x], the displacement to the mean of the pairs that x may
have, so steps end at that mean. A step of the full distance overshoots if the network is not confident.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from index.errors import OptionError
from trainer.models.base import Prediction
from trainer.objectives.base import Loss, Objective, StepInput, StepOutput, Training, guide
from trainer.objectives.hyperparameters import choice, fraction, non_negative, positive
from trainer.objectives.segment import Point, inconsistency, ramped_weight, sample_points
from trainer.stream import Batch

STEP_RULES = ("mean", "even", "confident", "paper")


@dataclass(frozen=True, kw_only=True, slots=True)
class Coalescer(Objective):
    """The losses (distance - |y - x|)^2 and |direction - unit(y - x)|^p, and a step that uses both predictions."""

    p: float = positive(2.0)
    """2: |direction| is the mean resultant length, a calibrated confidence. 0.5: as first proposed, seeks a mode."""
    segment: float = fraction(0.9)
    """Fraction of inputs on the segment from R to y."""
    self_segment: float = fraction(0.0)
    """Fraction of inputs on the segment from R to the network's own prediction of y; costs another evaluation."""
    step_rule: str = choice("mean", STEP_RULES)
    """How far step i of n moves. mean: distance * direction / (n - i). The others normalize the direction; even:
    distance / (n - i), confident: that times the confidence, paper: the whole distance each time."""
    distance_weight: float | None = None
    """Weight of the distance loss; None is 1/L, which makes both losses of order one."""
    confidence_weight: float = non_negative(1.0)
    """Weight of (confidence - cosine of direction and y - x)^2; 0: |direction| is the confidence."""
    consistency: float = non_negative(30.0)
    """Weight of |e(x) - e(x')|^p / L^(p/2), e(x) the end of a full step from x and x' a point nearer to y on the same
    segment, without gradient; costs another evaluation."""
    consistency_gap: float = fraction(0.1)
    """Largest distance from x to x', as a fraction of the rest of the segment. e(x') is then about where the flow from
    x ends; far ahead it is y itself again, which draws ends to the mean of the pairs."""
    consistency_ramp: float = non_negative(8.0)
    """The weight of consistency grows as (fraction of the training steps done)^ramp; 0: constant."""
    time_conditioning: bool = False
    """Condition the network on t, the position on the segment. In few dimensions a point alone does not tell whether
    it is an end or on its way to another one; in many it does."""

    dropout_column: ClassVar[int] = 2
    has_confidence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise OptionError if a hyperparameter is out of its range."""
        Objective.__post_init__(self)
        if self.segment + self.self_segment > 1:
            raise OptionError(
                f"--set segment={self.segment} and --set self_segment={self.self_segment} are more than 1 together: "
                "lower one of them"
            )

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Return the weighted sum of all losses."""
        cond_mask = self.cond_mask(batch)

        def predict(point: Point) -> Prediction:
            time = point.t if self.time_conditioning else None
            return self.predict(network, point.x, batch.text, cond_mask=cond_mask, time=time)

        def end_of(point: Point) -> Float[Tensor, "B L"]:
            return point.x + self.displacement(predict(point))

        point = sample_points(batch, self.segment)
        if self.self_segment:
            with torch.no_grad():
                end = end_of(Point(batch.r, torch.zeros_like(point.t)))
            point = self._with_self_segment(point, end, batch)
        prediction = predict(point)
        total, parts = self._pair_losses(prediction, batch.y - point.x)
        if self.consistency:
            end = point.x + self.displacement(prediction)
            square = inconsistency(point, end, batch, self.consistency_gap, end_of)
            parts["consistency"] = _power(square, self.p).mean()
            weight = ramped_weight(self.consistency, self.consistency_ramp, training.progress)
            total = total + weight * parts["consistency"]
        parts["direction_length"] = prediction.direction.detach().norm(dim=1).mean()
        return Loss(total, parts)

    def _with_self_segment(self, point: Point, end: Float[Tensor, "B L"], batch: Batch) -> Point:
        """Replace a fraction of the points by points on the segment from R to the network's own end."""
        kind, t = batch.uniforms[:, 0], batch.uniforms[:, 1]
        replaced = (self.segment <= kind) & (kind < self.segment + self.self_segment)
        x = torch.where(replaced[:, None], batch.r + t[:, None] * (end - batch.r), point.x)
        return Point(x, torch.where(replaced, t, point.t))

    def _pair_losses(
        self, prediction: Prediction, displacement: Float[Tensor, "B L"]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Return the losses against the displacement y - x, and their weighted sum."""
        unit = normalize(displacement, dim=1)
        distance = (prediction.distance - displacement.norm(dim=1)).square().mean()
        direction = _power((prediction.direction - unit).square().sum(1), self.p).mean()
        weight = 1 / displacement.shape[1] if self.distance_weight is None else self.distance_weight
        total = weight * distance + direction
        parts = {"distance": distance, "direction": direction}
        if self.confidence_weight:
            cosine = (normalize(prediction.direction.detach(), dim=1) * unit).sum(1)
            parts["confidence"] = (prediction.confidence - cosine).square().mean()
            total = total + self.confidence_weight * parts["confidence"]
        return total, parts

    def step(self, network: nn.Module, inputs: StepInput) -> StepOutput:
        """Move toward the pair; guidance extrapolates the move."""
        time = inputs.full(inputs.i / inputs.n) if self.time_conditioning else None
        conditional = self.predict(network, inputs.x, inputs.text, time=time)

        def move(cond_mask: Bool[Tensor, "B"] | None) -> Float[Tensor, "B L"]:
            if cond_mask is None:
                return self._move(conditional, inputs)
            return self._move(self.predict(network, inputs.x, inputs.text, cond_mask=cond_mask, time=time), inputs)

        return StepOutput(inputs.x + guide(move, inputs), self.confidence(conditional))

    def predict(
        self,
        network: nn.Module,
        x: Float[Tensor, "B L"],
        text: Float[Tensor, "B K T"],
        *,
        cond_mask: Bool[Tensor, "B"] | None = None,
        time: Float[Tensor, "B"] | None = None,
    ) -> Prediction:
        """Predict the pair of each point, with the direction head read in units of 1/sqrt(L).

        Entries of a unit vector in R^L are of that order. The head then predicts numbers of order one, so that one
        learning rate suits the whole network and |direction| does not start sqrt(L) times too long.
        """
        prediction: Prediction = network(x, text, cond_mask=cond_mask, time=time)
        return prediction._replace(direction=prediction.direction / math.sqrt(x.shape[1]))

    def confidence(self, prediction: Prediction) -> Float[Tensor, "B"]:
        """Return the confidence head's output if it is trained, else |direction|."""
        return prediction.confidence if self.confidence_weight else prediction.direction.norm(dim=1)

    def displacement(self, prediction: Prediction) -> Float[Tensor, "B L"]:
        """Return the displacement of a full step."""
        direction = prediction.direction if self.step_rule == "mean" else normalize(prediction.direction, dim=1)
        return prediction.distance[:, None] * direction

    def _move(self, prediction: Prediction, inputs: StepInput) -> Float[Tensor, "B L"]:
        scale = 1.0 if self.step_rule == "paper" else 1 / (inputs.n - inputs.i)
        move = scale * self.displacement(prediction)
        return move * self.confidence(prediction)[:, None] if self.step_rule == "confident" else move


def _power(square: Float[Tensor, "B"], p: float) -> Float[Tensor, "B"]:
    """Return the p-th power of a length given its square; the small constant keeps the gradient finite at zero."""
    return (square + 1e-12).pow(p / 2)


PAPER: dict[str, Any] = {
    "p": 0.5,
    "segment": 0.0,
    "step_rule": "paper",
    "distance_weight": 1.0,
    "confidence_weight": 0.0,
    "consistency": 0.0,
    "dropout": 0.0,
}
"""The losses and steps as first proposed."""
