"""Shortcut models (Frans et al., arXiv 2410.12557; kvfrans/shortcut-models: targets_shortcut.py).

The network is conditioned on the size d of a step. For the smallest, 1/128, it learns the velocity of flow matching;
for d = 1, 1/2 ... 1/64, on a fraction of the inputs, what two steps of d/2 amount to with the averaged weights
(equation 4). The authors drop captions for the first only and train guidance into the second; here both drop some and
guidance is applied in sampling, as for the other objectives.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trainer.models.base import Prediction
from trainer.objectives.base import Loss, Training
from trainer.objectives.flow_matching import Euler
from trainer.objectives.hyperparameters import fraction, positive
from trainer.stream import Batch, send

HALVINGS = 7
"""From the whole path to the smallest step, 2^-7 = 1/128."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortcut(Euler):
    """Defaults are the authors'."""

    bootstrap_fraction: float = fraction(0.125)
    """Fraction of inputs that learn from two half steps."""
    clip: float = positive(4.0)
    """Largest coordinate of a point and of a velocity in such a target; use inf if latents are not standardized."""

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Return the mean squared error of the velocity, per dimension; times are multiples of the step size."""
        position, kind, level = batch.uniforms[:, 1:4].unbind(1)
        cond_mask, bootstrap = self.cond_mask(batch), kind < self.bootstrap_fraction
        size = torch.where(bootstrap, torch.exp2(-(HALVINGS * level).floor()), 2.0**-HALVINGS)
        time = (position / size).floor() * size
        target = batch.y - batch.r
        x = batch.r + time[:, None] * target
        (chosen,) = torch.nonzero(batch.host_uniforms[:, 2] < self.bootstrap_fraction, as_tuple=True)
        if len(chosen):
            chosen = send(chosen, x.device)
            rows = (each.index_select(0, chosen) for each in (x, batch.text, cond_mask, time, size))
            target.index_copy_(0, chosen, self.two_half_steps(training.teacher, *rows))
        prediction = network(x, batch.text, cond_mask=cond_mask, time=time, step_size=log_size(size))
        error = (prediction.direction - target).square().mean(1)
        parts = {"velocity": (error * ~bootstrap).mean(), "self_consistency": (error * bootstrap).mean()}
        return Loss(error.mean(), parts)

    @torch.no_grad()
    def two_half_steps(
        self,
        teacher: Callable[..., Prediction],
        x: Float[Tensor, "B L"],
        text: Float[Tensor, "B K T"],
        cond_mask: Bool[Tensor, "B"],
        time: Float[Tensor, "B"],
        size: Float[Tensor, "B"],
    ) -> Float[Tensor, "B L"]:
        """Return the mean velocity of two consecutive steps of half the size."""
        half = size / 2
        step_size = log_size(half)
        first = teacher(x, text, cond_mask=cond_mask, time=time, step_size=step_size).direction
        middle = (x + half[:, None] * first).clamp(-self.clip, self.clip)
        second = teacher(middle, text, cond_mask=cond_mask, time=time + half, step_size=step_size).direction
        return ((first + second) / 2).clamp(-self.clip, self.clip)

    def step_size(self, n: int) -> float:
        """Return `log_size` of 1/n; it interpolates between powers of two, and no step counts as less than 1/128."""
        return max(0.0, 1 - math.log2(n) / HALVINGS)


def log_size(size: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Return the logarithm of a step size, scaled to 0 for 1/128 and 1 for 1, which the network is conditioned on."""
    return 1 + size.log2() / HALVINGS
