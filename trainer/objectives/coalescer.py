"""The coalescer: from a point, how far is its pair, which way, and how sure is that.

Distance and direction are learned apart, so that |direction| can shrink where the target changes fast. With
probability `segment` the input lies on the segment from R to its pair y and the target stays y: a second step starts
near the data, and without having seen such points it diverges. With probability `own` it lies on the segment from R to
where the network itself would go, which is where its second step starts.

Under the squared loss distance * direction is about E[y - x], the way to the mean of the pairs that x may have, and its
end is that mean. A step that is as long as the distance alone overshoots wherever the network is unsure.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from index.errors import OptionError
from trainer.models.base import Prediction
from trainer.objectives.base import Loss, Step, Training
from trainer.objectives.hyperparameters import check_shares, check_weights
from trainer.objectives.segment import Place, inconsistency, places_on, ramped
from trainer.objectives.steps import guided
from trainer.stream import Batch

RULES = ("mean", "even", "confident", "paper")


@dataclass(frozen=True, kw_only=True, slots=True)
class Coalescer:
    """The losses (distance - |y - x|)^2 and |direction - unit(y - x)|^p, and how a step uses what they teach."""

    p: float = 2.0
    """2: |direction| is the mean resultant length, a calibrated confidence. 0.5: as first proposed, seeks a mode."""
    segment: float = 0.9
    """Share of inputs on the segment from R to y."""
    own: float = 0.0
    """Share of inputs on the segment from R to the network's own first guess of y; costs an evaluation more."""
    rule: str = "mean"
    """Step i of n moves distance * direction / (n - i). Along the direction alone: distance / (n - i) (`even`), that
    times the confidence (`confident`), or always the whole distance (`paper`)."""
    distance_weight: float | None = None
    """Weight of the distance loss; None is 1/L, which makes both losses of order one."""
    confidence_weight: float = 1.0
    """Weight of (confidence - cosine of direction and y - x)^2; 0: |direction| is the confidence."""
    consistency: float = 30.0
    """Weight of |e(x) - e(x')|^p / L^(p/2), e where a step leads that goes the whole way, x' nearer to y on the same
    segment and not learned from; costs an evaluation more."""
    gap: float = 0.1
    """How far ahead x' is at most, as a share of the rest of the way. What x' leads to is then about what the flow from
    x leads to; from far ahead it is y itself again, and ends are drawn to the mean of the pairs."""
    ramp: float = 8.0
    """The weight of consistency grows as (share of the steps that are done)^ramp; 0: it is there from the start."""
    clock: bool = False
    """Tell the network how far along its segment a point is. In few dimensions a point cannot tell by itself whether it
    is an end or on the way to another one; in many it can."""
    dropout: float = 0.1
    """Share of inputs without their description, for guidance."""

    def __post_init__(self) -> None:
        """Refuse hyperparameters that mean nothing."""
        if self.rule not in RULES:
            raise OptionError(f"rule {self.rule!r} is unknown: choose one of {', '.join(RULES)}")
        check_shares(self, "segment", "own", "gap", "dropout")
        if self.segment + self.own > 1:
            raise OptionError(f"segment {self.segment!r} and own {self.own!r} are more than 1 together: lower one")
        check_weights(self, "confidence_weight", "consistency", "ramp")
        if self.p <= 0:
            raise OptionError(f"p {self.p!r} is no power: give a number above 0, such as 2 or 0.5")

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """All losses, averaged over the batch."""
        kind, along, told = batch.uniforms[:, :3].unbind(1)
        keep, size = told >= self.dropout, batch.y.shape[1]

        def said_at(place: Place) -> Prediction:
            return ask(network, place.x, batch.text, keep=keep, time=place.t if self.clock else None)

        def end_of(place: Place) -> Float[Tensor, "B L"]:
            return place.x + self.way(said_at(place))

        x, t = places_on(batch, self.segment)
        if self.own:
            with torch.no_grad():
                goal = end_of(Place(batch.r, torch.zeros_like(t)))
            own = (self.segment <= kind) & (kind < self.segment + self.own)
            x = torch.where(own[:, None], batch.r + along[:, None] * (goal - batch.r), x)
            t = torch.where(own, along, t)
        guess = said_at(Place(x, t))
        way = batch.y - x
        unit = normalize(way, dim=1)
        distance = (guess.distance - way.norm(dim=1)).square().mean()
        direction = _power((guess.direction - unit).square().sum(1), self.p).mean()
        weight = 1 / size if self.distance_weight is None else self.distance_weight
        total = weight * distance + direction
        parts = {"distance": distance, "direction": direction}
        if self.confidence_weight:
            cosine = (normalize(guess.direction.detach(), dim=1) * unit).sum(1)
            parts["confidence"] = (guess.confidence - cosine).square().mean()
            total = total + self.confidence_weight * parts["confidence"]
        if self.consistency:
            apart = inconsistency(Place(x, t), x + self.way(guess), batch, self.gap, end_of)
            parts["consistency"] = _power(apart, self.p).mean()
            total = total + ramped(self.consistency, self.ramp, training.progress) * parts["consistency"]
        parts["direction_length"] = guess.direction.detach().norm(dim=1).mean()
        return Loss(total, parts)

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
        """Move towards the pair; with guidance w to x_u + w (x_c - x_u), c told the description and u not."""
        time = torch.full((len(x),), i / n, device=x.device) if self.clock else None
        guess = ask(network, x, text, time=time)
        told = self._move(guess, i, n)
        move = guided(told, lambda nobody: self._move(ask(network, x, text, keep=nobody, time=time), i, n), guidance)
        return Step(x + move, self.confidence(guess))

    def predict(self, network: nn.Module, x: Float[Tensor, "B L"], text: Float[Tensor, "B K T"]) -> Prediction:
        """Return what the network predicts at points x, the direction in coordinates."""
        return ask(network, x, text)

    def confidence(self, guess: Prediction) -> Float[Tensor, "B"]:
        """The third head where it is trained, else |direction|."""
        return guess.confidence if self.confidence_weight else guess.direction.norm(dim=1)

    def way(self, guess: Prediction) -> Float[Tensor, "B L"]:
        """The whole way to where the network would go."""
        direction = guess.direction if self.rule == "mean" else normalize(guess.direction, dim=1)
        return guess.distance[:, None] * direction

    def _move(self, guess: Prediction, i: int, n: int) -> Float[Tensor, "B L"]:
        share = 1.0 if self.rule == "paper" else 1 / (n - i)
        move = share * self.way(guess)
        return move * self.confidence(guess)[:, None] if self.rule == "confident" else move


def ask(
    network: nn.Module,
    x: Float[Tensor, "B L"],
    text: Float[Tensor, "B K T"],
    *,
    keep: Bool[Tensor, "B"] | None = None,
    time: Float[Tensor, "B"] | None = None,
) -> Prediction:
    """What the network says of points, its direction head read in units of 1/sqrt(L).

    The numbers of a unit vector are about that large; a head that had to give them as they are would start sqrt(L)
    times too long, and steps of the optimizer that suit the rest of the network would be as coarse for it.
    """
    guess: Prediction = network(x, text, keep=keep, time=time)
    return guess._replace(direction=guess.direction / math.sqrt(x.shape[1]))


def _power(square: Float[Tensor, "B"], p: float) -> Float[Tensor, "B"]:
    """The p-th power of a length; a root has no gradient at zero, so the length is kept a hair away from it."""
    return (square + 1e-12).pow(p / 2)


PRESETS: dict[str, Callable[..., Coalescer]] = {
    "default": Coalescer,
    "paper": partial(
        Coalescer,
        p=0.5,
        segment=0.0,
        rule="paper",
        distance_weight=1.0,
        confidence_weight=0.0,
        consistency=0.0,
        dropout=0.0,
    ),
}
