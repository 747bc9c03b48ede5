"""Implicit maximum likelihood (Li and Malik, arXiv 1809.09087) with rejection (RS-IMLE: Vashist et al., 2409.17439).

The search runs the other way round: from a pool of noise the one whose output is nearest to y is trained toward y, so
that no y is left out. Outputs within eps of y are rejected, because the nearest of a large pool is not a fair sample
of the outputs; if all are, y has no loss. Pool and y share the caption. The pool is R and the R of other rows of the
batch, which are independent of y, also where gradients are accumulated over parts of it; processes that share a batch
use the rows of their own.

The authors keep one pool of 10 N outputs for N images for some epochs, compare and learn in the features of a
perceptual network, and reject what is near any image; here each y has a pool of its own in each step, in latent space.
"""

from dataclasses import dataclass

import torch
from torch import nn

from trainer.objectives.base import Loss, Objective, StepInput, StepOutput, Training, guide
from trainer.objectives.hyperparameters import fraction, positive
from trainer.stream import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class IMLE(Objective):
    """The direction head is the output itself, a function of R."""

    pool_size: int = positive(10)
    """Noise in the pool of each y, at one evaluation each; the authors' `force_factor`."""
    eps: float = fraction(0.1)
    """Radius of rejection in units of sqrt(L), the length of coordinates, as the authors' features have length 1."""

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Return the mean squared error, per dimension, of the nearest output that is not rejected."""
        cond_mask, pool = self.cond_mask(batch), (training.whole or batch).r
        rows = slice(training.first, training.first + len(batch.r))
        nearest, chosen = torch.full_like(batch.uniforms[:, 0], torch.inf), batch.r
        rejected = torch.zeros_like(nearest)
        with torch.no_grad():
            for shift in range(self.pool_size):
                r = pool.roll(shift, 0)[rows]
                error = (network(r, batch.text, cond_mask=cond_mask).direction - batch.y).square().mean(1)
                reject = error < self.eps**2
                better = ~reject & (error < nearest)
                nearest, chosen = torch.where(better, error, nearest), torch.where(better[:, None], r, chosen)
                rejected += reject / self.pool_size
        error = (network(chosen, batch.text, cond_mask=cond_mask).direction - batch.y).square().mean(1)
        total = (error * nearest.isfinite()).mean()
        return Loss(total, {"nearest_error": total, "rejected_fraction": rejected.mean()})

    def step(self, network: nn.Module, inputs: StepInput) -> StepOutput:
        """Return the output for R, with guidance on it; further steps stay there, so all n give the same result."""
        if inputs.i > 0:
            return StepOutput.without_confidence(inputs.x)
        output = guide(lambda mask: network(inputs.x, inputs.text, cond_mask=mask).direction, inputs)
        return StepOutput.without_confidence(output)
