"""Implicit maximum likelihood (Li and Malik, arXiv 1809.09087) with rejection (RS-IMLE: Vashist et al., 2409.17439).

The search runs the other way round: of a pool of random points the one whose output comes nearest to y is pulled to y,
so no y is left out. Outputs within eps of y already are passed over, because the nearest of a large pool is no fair
sample of what R gives; where all are, y teaches nothing. Conditional: pool and y share the description. The pool is R
and that of slots beside it, which know nothing of y; where processes share a batch each has its own slots.

The authors keep one pool of 10 N outputs for N pictures for some epochs, compare and learn in the features of a
perceptual network, and drop what lies near any picture; here each y has its own pool each time, and latents count.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trainer.objectives.base import Loss, Step, Training
from trainer.objectives.hyperparameters import check_positive, check_shares
from trainer.objectives.steps import guided, unsure
from trainer.stream import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class IMLE:
    """One step: the direction head is the output itself, from R alone."""

    pool: int = 10
    """Random points for each y, an evaluation each; the authors' `force_factor`."""
    eps: float = 0.1
    """Radius of rejection in units of sqrt(L), the length of coordinates, as the authors' features have length 1."""
    dropout: float = 0.1
    """Share of inputs without their description, for guidance."""

    def __post_init__(self) -> None:
        """Refuse hyperparameters that mean nothing."""
        check_shares(self, "dropout", "eps")
        check_positive(self, "pool")

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Mean squared error per dimension of the nearest output that is not near enough."""
        keep = batch.uniforms[:, 0] >= self.dropout
        nearest, chosen = torch.full_like(batch.uniforms[:, 0], torch.inf), batch.r
        rejected = torch.zeros_like(nearest)
        with torch.no_grad():
            for slot in range(self.pool):
                r = batch.r.roll(slot, 0)
                miss = (network(r, batch.text, keep=keep).direction - batch.y).square().mean(1)
                near = miss < self.eps**2
                better = ~near & (miss < nearest)
                nearest, chosen = torch.where(better, miss, nearest), torch.where(better[:, None], r, chosen)
                rejected += near / self.pool
        error = (network(chosen, batch.text, keep=keep).direction - batch.y).square().mean(1)
        total = (error * nearest.isfinite()).mean()
        return Loss(total, {"nearest": total, "rejected": rejected.mean()})

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
        """The output for R, with guidance on it; further steps stay there, so the answer for all n is the same."""
        if i > 0:
            return unsure(x)
        told = network(x, text).direction
        return unsure(guided(told, lambda nobody: network(x, text, keep=nobody).direction, guidance))


PRESETS: dict[str, Callable[..., IMLE]] = {"default": IMLE}
