"""Consistency training by the recipe of ECT (Geng et al., arXiv 2406.14548; locuslab/ect: training/loss.py).

D(x, s) predicts at any noise level s where the path of x ends: D(y + t R, t) is trained to equal D(y + r R, r) for
r < t on the same R, and D(x, 0) = x. The gradient flows through the noisier point alone, and both use the current
weights. r(t) approaches t in stages; in the first it is mostly 0, which is training of a diffusion model. ECT starts
from a trained one, we from fresh weights as iCT does (Song and Dhariwal, arXiv 2310.14189), whose loss this is.

Coordinates have variance 1 and the authors' images sigma_data^2: we scale, and all noise levels below are theirs. On
the sphere geometry R is not Gaussian but uniform with the same mean and covariance, |R| = sqrt(L) exactly. What is
learned is then the flow of dx/ds = E[R | x], which needs no Gaussian: noise of all levels has that distribution, in
training and in sampling. A second step adds an R that is independent of y, so `--coupling independent` is the authors'
setting.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trainer.objectives.base import Loss, Objective, StepInput, StepOutput, Training, guide
from trainer.objectives.hyperparameters import positive
from trainer.stream import Batch

SIGMA_MIN = 0.002
"""Noise levels below it are one and the same to the network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Consistency(Objective):
    """Noise levels are in the authors' unit, in which the standard deviation of the data is sigma_data."""

    p_mean: float = -1.1
    """Mean of ln t."""
    p_std: float = positive(2.0)
    """Standard deviation of ln t."""
    q: float = positive(2.0)
    """In stage a = 0, 1 ... r is t (1 - n(t) / q^(a + 1)), and 0 if that is less."""
    stages: int = positive(8)
    """Stages of equal length; the authors double 8 times in 200,000 steps."""
    k: float = 8.0
    """k of n(t) = 1 + k sigmoid(-b t)."""
    b: float = 1.0
    """b of n(t)."""
    c: float = positive(0.00054)
    """c / sqrt(L) of the pseudo-Huber loss, as in iCT. ECT has 0, which has no gradient at the solution."""
    sigma_data: float = positive(0.5)
    sigma_max: float = positive(80.0)
    mid_sigma: float = positive(0.821)
    """Noise level of the second of two steps. With more steps, which the authors do not take, levels fall evenly in
    their logarithm."""

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Return (sqrt(|D_t - D_r|^2 + L c^2) - sqrt(L) c) / (t - r), weighted as by ECT on CIFAR-10."""
        cond_mask = self.cond_mask(batch)
        t = (self.p_mean + self.p_std * batch.normal(1)).exp()
        r = self.lower_level(t, training.progress)
        y = self.sigma_data * batch.y
        d_t = self.denoise(network, y + t[:, None] * batch.r, t, batch.text, cond_mask)
        with torch.no_grad():
            d_r = self.denoise(network, y + r[:, None] * batch.r, r, batch.text, cond_mask)
        c = self.c * math.sqrt(y.shape[1])
        pseudo_huber = ((d_t - d_r).square().sum(1) + c**2).sqrt() - c
        total = (pseudo_huber / (t - r)).mean()
        return Loss(total, {"consistency": total, "pseudo_huber": pseudo_huber.detach().mean()})

    def lower_level(self, t: Float[Tensor, "B"], progress: float) -> Float[Tensor, "B"]:
        """Return the noise level r that t is compared with, for the fraction of training that is done."""
        stage = min(math.floor(self.stages * progress), self.stages - 1)
        n = 1 + self.k * torch.sigmoid(-self.b * t)
        return (t * (1 - n / self.q ** (stage + 1))).clamp(min=0)

    def denoise(
        self,
        network: nn.Module,
        x: Float[Tensor, "B L"],
        sigma: Float[Tensor, "B"],
        text: Float[Tensor, "B K T"],
        cond_mask: Bool[Tensor, "B"] | None,
    ) -> Float[Tensor, "B L"]:
        """Return D(x, sigma) with EDM's c_in, c_skip and c_out (Karras et al., arXiv 2206.00364, table 1).

        The network's time is ln(sigma) as in EDM, shifted and scaled to 0 at sigma_max and 1 at SIGMA_MIN.
        """
        scale = (sigma.square() + self.sigma_data**2).sqrt()[:, None]
        time = (self.sigma_max / sigma.clamp(min=SIGMA_MIN)).log() / math.log(self.sigma_max / SIGMA_MIN)
        output: Tensor = network(x / scale, text, cond_mask=cond_mask, time=time).direction
        return (self.sigma_data / scale) ** 2 * x + sigma[:, None] * self.sigma_data / scale * output

    def step(self, network: nn.Module, inputs: StepInput) -> StepOutput:
        """Denoise R at sigma_max, or the previous end with fresh noise; guidance extrapolates the end."""
        if inputs.i == 0:
            level = self.sigma_max
            noisy = level * inputs.x
        else:
            level = self.mid_sigma * (self.sigma_max / self.mid_sigma) ** (1 - inputs.i / (inputs.n - 1))
            noisy = self.sigma_data * inputs.x + level * inputs.noise()
        sigma = inputs.full(level)
        end = guide(lambda mask: self.denoise(network, noisy, sigma, inputs.text, mask), inputs)
        return StepOutput.without_confidence(end / self.sigma_data)
