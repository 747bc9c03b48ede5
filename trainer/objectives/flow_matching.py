"""Flow matching (Lipman et al., arXiv 2210.02747), the straight-line path: regress y - R at x_t = (1 - t) R + t y.

The velocity is the network's direction head; its other heads are not used. With `--coupling nearest` the pairs come
from the search, as in semi-discrete optimal transport.
"""

from dataclasses import dataclass

from torch import nn

from trainer.objectives.base import Loss, Objective, StepInput, StepOutput, Training, guide
from trainer.stream import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Euler(Objective):
    """Objectives that learn a velocity, sampled by Euler's method in n steps of equal size; the time is i/n."""

    def step_size(self, n: int) -> float | None:
        """Return the step size that the network is conditioned on for n steps; None for no such conditioning."""
        return None

    def step(self, network: nn.Module, inputs: StepInput) -> StepOutput:
        """Move by 1/n of the velocity; guidance extrapolates the velocity."""
        step_size = self.step_size(inputs.n)
        time = {"time": inputs.full(inputs.i / inputs.n)}
        if step_size is not None:
            time["step_size"] = inputs.full(step_size)
        velocity = guide(lambda mask: network(inputs.x, inputs.text, cond_mask=mask, **time).direction, inputs)
        return StepOutput.without_confidence(inputs.x + velocity / inputs.n)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowMatching(Euler):
    """Equation 23 of the paper with sigma_min = 0 and t uniform."""

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Return the mean squared error of the velocity, per dimension."""
        t, velocity = batch.uniforms[:, 1], batch.y - batch.r
        x = batch.r + t[:, None] * velocity
        prediction = network(x, batch.text, cond_mask=self.cond_mask(batch), time=t)
        error = (prediction.direction - velocity).square().mean()
        return Loss(error, {"velocity": error})
