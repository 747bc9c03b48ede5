"""Pairs whose flow, mean velocity and consistency function are known, and networks to test rivals of the coalescer on.

R ~ N(0, I) and y ~ N(CENTER, SPREAD^2 I), or y = CENTER + SPREAD R, where the flow of the former ends.
"""

import pytest
import torch

from trainer.models.base import Network, Prediction
from trainer.objectives.base import StepInput, Training
from trainer.optimizer import Optimizer
from trainer.stream import Batch

TEXT_DIM = 3
CENTER, SPREAD = torch.tensor([0.8, -0.5]), 0.5
NO_TEACHER = Training(0.0, lambda *_, **__: pytest.fail("this objective has no teacher"))
HALFWAY = NO_TEACHER._replace(progress=0.5)


def make_batch(rows, seed=0, y=None, dim=2):
    """A batch of noise and uniforms; y is drawn from the Gaussian unless it is a function of R."""
    g = torch.Generator().manual_seed(seed)
    r, z = torch.randn(rows, dim, generator=g), torch.randn(rows, dim, generator=g)
    text, uniforms = torch.randn(rows, 1, TEXT_DIM, generator=g), torch.rand(rows, 8, generator=g)
    y = CENTER + SPREAD * z if y is None else y(r)
    return Batch(r=r, text=text, y=y, uniforms=uniforms)


class FakeNetwork(Network):
    """A network whose direction head is a function of point, time and step size; it records its calls."""

    def __init__(self, function):
        torch.nn.Module.__init__(self)
        self.function, self.calls = function, []

    def forward(self, x, text, *, cond_mask=None, time=None, step_size=None):
        self.calls.append({"x": x, "cond_mask": cond_mask, "time": time, "step_size": step_size})
        zero = torch.zeros(len(x))
        return Prediction(zero, self.function(x, time, step_size), zero)


class SmallNetwork(Network):
    """A network for two dimensions that ignores the text."""

    def __init__(self, hidden_dim=64):
        torch.nn.Module.__init__(self)
        hidden = [torch.nn.Linear(hidden_dim, hidden_dim), torch.nn.SiLU()]
        self.body = torch.nn.Sequential(
            torch.nn.Linear(4, hidden_dim), torch.nn.SiLU(), *hidden, torch.nn.Linear(hidden_dim, 2)
        )

    def forward(self, x, text, *, cond_mask=None, time=None, step_size=None):
        zero = torch.zeros(len(x))
        path = [zero if each is None else each for each in (time, step_size)]
        return Prediction(zero, self.body(torch.cat([x, torch.stack(path, 1)], 1)), zero)


def train(objective, steps, batches, seed=0):
    """A small network trained by an objective, with its averaged weights."""
    torch.manual_seed(seed)
    network = SmallNetwork()
    optimizer = Optimizer(network, steps=steps, learning_rate=5e-3, ema_decay=0.99)
    for step in range(steps):
        training = Training(step / steps, optimizer.teacher)
        optimizer.step(objective.loss(network, batches(step), training).total)
    return optimizer.averaged_model


def sample(objective, network, n, rows=2000, guidance_scale=1.0):
    """Samples of n steps, and the noise that they start from."""
    batch, generator = make_batch(rows, seed=99), torch.Generator().manual_seed(7)
    x, options = batch.r, {"n": n, "guidance_scale": guidance_scale}
    with torch.no_grad():
        for i in range(n):
            noise = lambda: torch.randn(rows, 2, generator=generator)  # noqa: E731
            output = objective.step(network, StepInput(x=x, text=batch.text, i=i, noise=noise, **options))
            x = output.x
    assert output.confidence.isnan().all()
    return x, batch.r


def derivative(loss, parameter):
    """The derivative of a loss by a number that it depends on."""
    return torch.autograd.grad(loss.total, parameter)[0].item()


def mean_velocity(x, time, step_size=None):
    """The mean velocity of the flow from N(0, I) to N(CENTER, SPREAD^2 I) over a step.

    With sd(t)^2 = (1 - t)^2 + t^2 SPREAD^2 a point x at time t moves to c t' + (x - c t) sd(t') / sd(t). Written so
    that a step size of 0 gives the velocity.
    """
    step_size = torch.zeros_like(time) if step_size is None else step_size
    square = 1 + SPREAD**2

    def sd(t):
        return (1 - 2 * t + square * t**2).sqrt()

    rate = (square * (2 * time + step_size) - 2) / (sd(time) * (sd(time) + sd(time + step_size)))
    return CENTER + rate[:, None] * (x - time[:, None] * CENTER)


def straight_velocity(x, time, step_size=None):
    """The velocity y - R of the segment from R to CENTER + SPREAD R that runs through x."""
    r = (x - time[:, None] * CENTER) / (1 - (1 - SPREAD) * time[:, None])
    return CENTER - (1 - SPREAD) * r
