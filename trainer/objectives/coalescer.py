"""The coalescer: from a point, how far is its pair and which way.

Distance and direction are learned apart, so that |direction| can shrink where the target changes fast. With
probability `segment` the input lies on the segment from R to its pair y and the target stays y: a second step starts
near the data, and without having seen such points it diverges.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from index.errors import OptionError
from trainer.network import Prediction
from trainer.objectives import Loss, Step
from trainer.stream import Batch

RULES = ("even", "confident", "paper")
CONDITIONS = ("close", "query")


@dataclass(frozen=True, kw_only=True, slots=True)
class Coalescer:
    """The losses (distance - |y - x|)^2 and |direction - unit(y - x)|^p, and how a step uses what they teach."""

    p: float = 2.0
    """2: |direction| is the mean resultant length, a calibrated confidence. 0.5: as first proposed, seeks a mode."""
    segment: float = 0.5
    """Share of inputs on the segment from R to y."""
    rule: str = "even"
    """Step i of n moves distance / (n - i), that times |direction| (`confident`), or always the whole distance."""
    distance_weight: float | None = None
    """Weight of the distance loss; None is 1/L, which makes both losses of order one."""
    dropout: float = 0.1
    """Share of inputs without their description, for guidance."""
    condition: str = "close"
    """Which description the network is told: the close pair's, or the one that was asked for."""

    def __post_init__(self) -> None:
        """Refuse dials that mean nothing."""
        allowed = {"rule": RULES, "condition": CONDITIONS}
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise OptionError(f"{name} {getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}")
        for name in ("segment", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} {getattr(self, name)!r} is no share: give a number from 0 to 1")
        if self.p <= 0:
            raise OptionError(f"p {self.p!r} is no power: give a number above 0, such as 2 or 0.5")

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        """Both losses, averaged over the batch."""
        on_segment, place, told, _ = batch.dice.unbind(1)
        t = torch.where(on_segment < self.segment, place, 0.0)[:, None]
        x = batch.r + t * (batch.y - batch.r)
        text = batch.text if self.condition == "close" else batch.query
        guess = network(x, text, keep=told >= self.dropout)
        way = batch.y - x
        distance = (guess.distance - way.norm(dim=1)).square().mean()
        # The root has no gradient at zero, so it is kept a hair away from it.
        gap = (guess.direction - normalize(way, dim=1)).square().sum(1)
        direction = (gap + 1e-12).pow(self.p / 2).mean()
        weight = 1 / batch.y.shape[1] if self.distance_weight is None else self.distance_weight
        total = weight * distance + direction
        length = guess.direction.detach().norm(dim=1).mean()
        return Loss(total, {"distance": distance, "direction": direction, "direction_length": length})

    def step(
        self,
        network: nn.Module,
        x: Float[Tensor, "B L"],
        text: Float[Tensor, "B T"],
        i: int,
        n: int,
        guidance: float,
    ) -> Step:
        """Move towards the pair; with guidance w to x_u + w (x_c - x_u), c told the description and u not."""
        guess = network(x, text)
        move = self._move(guess, i, n)
        if guidance != 1:
            blind = network(x, text, keep=torch.zeros(len(x), dtype=torch.bool, device=x.device))
            away = self._move(blind, i, n)
            move = away + guidance * (move - away)
        return Step(x + move, guess.direction.norm(dim=1))

    def _move(self, guess: Prediction, i: int, n: int) -> Float[Tensor, "B L"]:
        share = 1.0 if self.rule == "paper" else 1 / (n - i)
        way = guess.direction if self.rule == "confident" else normalize(guess.direction, dim=1)
        return (share * guess.distance)[:, None] * way


PRESETS: dict[str, Callable[..., Coalescer]] = {
    "default": Coalescer,
    "paper": partial(Coalescer, p=0.5, segment=0.0, rule="paper", distance_weight=1.0, dropout=0.0),
}
