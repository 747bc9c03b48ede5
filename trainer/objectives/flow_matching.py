"""Flow matching (Lipman et al., arXiv 2210.02747), the straight-line path: regress y - R at x_t = (1 - t) R + t y.

The velocity is the network's direction head; its distance head is unused. Sampled by Euler
steps of equal length. With `--coupling nearest` the pairs come from the search, as in semi-discrete optimal transport.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from trainer.objectives.base import Loss, Training
from trainer.objectives.hyperparameters import check_shares
from trainer.objectives.steps import Euler
from trainer.stream import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowMatching(Euler):
    """Equation 23 of the paper with sigma_min = 0; t is uniform."""

    dropout: float = 0.1
    """Share of inputs without their description, for guidance."""

    def __post_init__(self) -> None:
        """Refuse hyperparameters that mean nothing."""
        check_shares(self, "dropout")

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Mean squared error of the velocity, per dimension."""
        told, t = batch.uniforms[:, 0], batch.uniforms[:, 1]
        velocity = batch.y - batch.r
        guess = network(batch.r + t[:, None] * velocity, batch.text, keep=told >= self.dropout, time=t)
        error = (guess.direction - velocity).square().mean()
        return Loss(error, {"velocity": error})


PRESETS: dict[str, Callable[..., FlowMatching]] = {"default": FlowMatching}
