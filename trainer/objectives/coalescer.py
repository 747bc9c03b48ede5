"""The coalescer: from a point, how far is its pair, which way, and how sure is that.

Distance and direction are learned apart, so that |direction| can shrink where the target changes fast. With
probability `segment` the input lies on the segment from R to its pair y and the target stays y: a second step starts
near the data, and without having seen such points it diverges. With probability `own` it lies on the segment from R to
where the network itself would go, which is where its second step starts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from index.errors import OptionError
from trainer.networks import Prediction
from trainer.objectives import Loss, Step, Training
from trainer.objectives.dials import check_shares
from trainer.objectives.steps import guided
from trainer.stream import Batch

RULES = ("even", "confident", "paper")


@dataclass(frozen=True, kw_only=True, slots=True)
class Coalescer:
    """The losses (distance - |y - x|)^2 and |direction - unit(y - x)|^p, and how a step uses what they teach."""

    p: float = 2.0
    """2: |direction| is the mean resultant length, a calibrated confidence. 0.5: as first proposed, seeks a mode."""
    segment: float = 0.7
    """Share of inputs on the segment from R to y."""
    own: float = 0.0
    """Share of inputs on the segment from R to the network's own first guess of y; costs an evaluation more."""
    rule: str = "even"
    """Step i of n moves distance / (n - i), that times the confidence (`confident`), or always the whole distance."""
    distance_weight: float | None = None
    """Weight of the distance loss; None is 1/L, which makes both losses of order one."""
    confidence_weight: float = 1.0
    """Weight of (confidence - cosine of direction and y - x)^2; 0: |direction| is the confidence."""
    consistency: float = 1.0
    """Weight of |e(x) - e(x')|^p / L^(p/2), e where a step leads that goes the whole distance, x' nearer to y on the
    same segment and not learned from; costs an evaluation more. As in consistency training (arXiv 2303.01469). At 3, or
    with p below 2, ends drift and more steps make pictures worse."""
    dropout: float = 0.1
    """Share of inputs without their description, for guidance."""

    def __post_init__(self) -> None:
        """Refuse dials that mean nothing."""
        if self.rule not in RULES:
            raise OptionError(f"rule {self.rule!r} is unknown: choose one of {', '.join(RULES)}")
        check_shares(self, "segment", "own", "dropout")
        if self.segment + self.own > 1:
            raise OptionError(f"segment {self.segment!r} and own {self.own!r} are more than 1 together: lower one")
        for name in ("confidence_weight", "consistency"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name} {getattr(self, name)!r} is no weight: give 0 or more")
        if self.p <= 0:
            raise OptionError(f"p {self.p!r} is no power: give a number above 0, such as 2 or 0.5")

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """All losses, averaged over the batch."""
        kind, place, told, nearer = (die[:, None] for die in batch.dice[:, :4].unbind(1))
        keep, size = told[:, 0] >= self.dropout, batch.y.shape[1]
        t = torch.where(kind < self.segment, place, 0.0)
        x = batch.r + t * (batch.y - batch.r)
        if self.own:
            with torch.no_grad():
                goal = end(batch.r, network(batch.r, batch.text, keep=keep))
            own = (self.segment <= kind) & (kind < self.segment + self.own)
            x = torch.where(own, batch.r + place * (goal - batch.r), x)
        guess: Prediction = network(x, batch.text, keep=keep)
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
            with torch.no_grad():
                ahead = x + nearer * way
                goal = end(ahead, network(ahead, batch.text, keep=keep))
            parts["consistency"] = _power((end(x, guess) - goal).square().mean(1), self.p).mean()
            total = total + self.consistency * parts["consistency"]
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
        guess = network(x, text)
        told = self._move(guess, i, n)
        move = guided(told, lambda nobody: self._move(network(x, text, keep=nobody), i, n), guidance)
        return Step(x + move, self.confidence(guess))

    def confidence(self, guess: Prediction) -> Float[Tensor, "B"]:
        """The third head where it is trained, else |direction|."""
        return guess.confidence if self.confidence_weight else guess.direction.norm(dim=1)

    def _move(self, guess: Prediction, i: int, n: int) -> Float[Tensor, "B L"]:
        share = 1.0 if self.rule == "paper" else 1 / (n - i)
        length = share * guess.distance
        if self.rule == "confident":
            length = length * self.confidence(guess)
        return length[:, None] * normalize(guess.direction, dim=1)


def end(x: Float[Tensor, "B L"], guess: Prediction) -> Float[Tensor, "B L"]:
    """Where a step leads that goes the whole distance."""
    return x + guess.distance[:, None] * normalize(guess.direction, dim=1)


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
