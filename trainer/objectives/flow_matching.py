"""Flow matching (Lipman et al., arXiv 2210.02747), the straight-line path: regress y - R at x_t = (1 - t) R + t y.

The velocity is the network's direction head; its distance head is unused. Sampled by Euler
steps of equal length. With `--coupling nearest` the pairs come from the search, as in semi-discrete optimal transport.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trainer.objectives import Loss, Step, Training
from trainer.stream import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowMatching:
    """Equation 23 of the paper with sigma_min = 0; t is uniform."""

    dropout: float = 0.1
    """Share of inputs without their description, for guidance."""

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Mean squared error of the velocity, per dimension."""
        told, t = batch.dice[:, 0], batch.dice[:, 1]
        x = batch.r + t[:, None] * (batch.y - batch.r)
        guess = network(x, batch.text, keep=told >= self.dropout, time=t)
        error = (guess.direction - (batch.y - batch.r)).square().mean()
        return Loss(error, {"velocity": error})

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
        """One Euler step of length 1/n from time i/n, classifier-free guidance on the velocity; no confidence."""
        t = torch.full((len(x),), i / n, device=x.device)
        velocity = network(x, text, time=t).direction
        if guidance != 1:
            blind = network(x, text, keep=torch.zeros(len(x), dtype=torch.bool, device=x.device), time=t).direction
            velocity = blind + guidance * (velocity - blind)
        return Step(x + velocity / n, torch.full((len(x),), torch.nan, device=x.device))


PRESETS: dict[str, Callable[..., FlowMatching]] = {"default": FlowMatching}
