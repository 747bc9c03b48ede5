"""Shortcut models (Frans et al., arXiv 2410.12557; kvfrans/shortcut-models: targets_shortcut.py).

The network is told how long a step is to be, d. Of the shortest, 1/128, it learns the velocity of flow matching, on a
share of inputs; of d = 1, 1/2 ... 1/64 what two steps of d/2 make together, as the averaged weights say (equation 4).
The authors leave descriptions away in the first part only and train guidance into the second; here both parts lack some
and guidance is asked for when sampling, as of the other objectives.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trainer.models.base import Prediction
from trainer.objectives.base import Loss, Training
from trainer.objectives.hyperparameters import check_positive, check_shares
from trainer.objectives.steps import Euler
from trainer.stream import Batch

HALVINGS = 7
"""From the whole path to the shortest step, 2^-7 = 1/128."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortcut(Euler):
    """Settings are the authors'."""

    share: float = 0.125
    """Of inputs that learn from two half steps."""
    clip: float = 4.0
    """Largest coordinate of a point and of a velocity in such a target; for unstandardized latents give inf."""
    dropout: float = 0.1
    """Share of inputs without their description, for guidance."""

    def __post_init__(self) -> None:
        """Refuse hyperparameters that mean nothing."""
        check_shares(self, "share", "dropout")
        check_positive(self, "clip")

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Mean squared error of the velocity, per dimension; times are multiples of the step's length."""
        told, place, kind, level = batch.uniforms[:, :4].unbind(1)
        keep, longer = told >= self.dropout, kind < self.share
        length = torch.where(longer, torch.exp2(-(HALVINGS * level).floor()), 2.0**-HALVINGS)
        time = (place / length).floor() * length
        target = batch.y - batch.r
        x = batch.r + time[:, None] * target
        if longer.any():
            own = (each[longer] for each in (x, batch.text, keep, time, length))
            target[longer] = self.two_halves(training.teacher, *own)
        guess = network(x, batch.text, keep=keep, time=time, span=reach(length))
        error = (guess.direction - target).square().mean(1)
        parts = {"velocity": (error * ~longer).mean(), "self_consistency": (error * longer).mean()}
        return Loss(error.mean(), parts)

    @torch.no_grad()
    def two_halves(
        self,
        teacher: Callable[..., Prediction],
        x: Float[Tensor, "B L"],
        text: Float[Tensor, "B K T"],
        keep: Bool[Tensor, "B"],
        time: Float[Tensor, "B"],
        length: Float[Tensor, "B"],
    ) -> Float[Tensor, "B L"]:
        """The mean velocity of two steps of half the length, one after the other."""
        half = length / 2
        first = teacher(x, text, keep=keep, time=time, span=reach(half)).direction
        middle = (x + half[:, None] * first).clamp(-self.clip, self.clip)
        second = teacher(middle, text, keep=keep, time=time + half, span=reach(half)).direction
        return ((first + second) / 2).clamp(-self.clip, self.clip)

    def span(self, n: int) -> float:
        """Of 1/n; numbers between the powers of two are interpolated, and none is shorter than 1/128."""
        return max(0.0, 1 - math.log2(n) / HALVINGS)


def reach(length: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """What the network is told of a step's length: its logarithm, as by the authors, 0 at the shortest and 1 at 1."""
    return 1 + length.log2() / HALVINGS


PRESETS: dict[str, Callable[..., Shortcut]] = {"default": Shortcut}
