"""Consistency training by the recipe of ECT (Geng et al., arXiv 2406.14548; locuslab/ect: training/loss.py).

D(x, s) says at any noise level s where the path of x ends: D(y + t R, t) is taught to equal D(y + r R, r) for r < t on
the same R, and D(x, 0) = x. The noisier point learns from the other, with the weights of the moment. r(t) nears t stage
by stage; at first it is mostly 0, which is training of a diffusion model. ECT starts from a trained one, we from fresh
weights as iCT does (Song and Dhariwal, arXiv 2310.14189), whose loss this is.

Coordinates have variance 1, the authors' pictures sigma_data^2: we scale, and every figure below is theirs. On the
sphere geometry R is not Gaussian but uniform with the same mean and covariance, |R| = sqrt(L) exactly. What is learned
is then the flow of dx/ds = E[R | x], which needs no Gaussian: noise of all levels is of that law, in training and in
sampling. A second step renoises with an R that knows nothing of y, so `--coupling independent` is the authors' setting.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trainer.objectives.base import Loss, Step, Training
from trainer.objectives.hyperparameters import check_positive, check_shares
from trainer.objectives.steps import guided, unsure
from trainer.stream import Batch

SIGMA_MIN = 0.002
"""Below it the network is told no difference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Consistency:
    """Noise levels are in the authors' unit: the data's standard deviation is sigma_data."""

    mean: float = -1.1
    std: float = 2.0
    """Of ln t."""
    q: float = 2.0
    """In stage a, from 0 on, r = t (1 - n(t) / q^(a + 1)), and 0 where that is less."""
    stages: int = 8
    """Of equal length; the authors double 8 times in 200,000 steps."""
    k: float = 8.0
    b: float = 1.0
    """n(t) = 1 + k sigmoid(-b t)."""
    c: float = 0.00054
    """Of the pseudo-Huber loss, for each root of L, as in iCT. ECT has 0, which has no gradient at the solution."""
    sigma_data: float = 0.5
    sigma_max: float = 80.0
    middle: float = 0.821
    """Noise level of the last of two steps. Of more, which the authors do not take, levels fall evenly in log."""
    dropout: float = 0.1
    """Share of inputs without their description, for guidance."""

    def __post_init__(self) -> None:
        """Refuse hyperparameters that mean nothing."""
        check_shares(self, "dropout")
        check_positive(self, "std", "q", "stages", "c", "sigma_data", "sigma_max", "middle")

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """(sqrt(|D_t - D_r|^2 + L c^2) - sqrt(L) c) / (t - r), the weight of ECT on CIFAR-10."""
        keep = batch.uniforms[:, 0] >= self.dropout
        t = (self.mean + self.std * batch.normal(1)).exp()
        r = self.earlier(t, training.progress)
        y = self.sigma_data * batch.y
        far = self.end(network, y + t[:, None] * batch.r, t, batch.text, keep)
        with torch.no_grad():
            near = self.end(network, y + r[:, None] * batch.r, r, batch.text, keep)
        c = self.c * math.sqrt(y.shape[1])
        apart = ((far - near).square().sum(1) + c**2).sqrt() - c
        total = (apart / (t - r)).mean()
        return Loss(total, {"consistency": total, "apart": apart.detach().mean()})

    def earlier(self, t: Float[Tensor, "B"], progress: float) -> Float[Tensor, "B"]:
        """The noise level r that t is compared with, by the share of training that is done."""
        stage = min(math.floor(self.stages * progress), self.stages - 1)
        near = 1 + self.k * torch.sigmoid(-self.b * t)
        return (t * (1 - near / self.q ** (stage + 1))).clamp(min=0)

    def end(
        self,
        network: nn.Module,
        x: Float[Tensor, "B L"],
        sigma: Float[Tensor, "B"],
        text: Float[Tensor, "B K T"],
        keep: Bool[Tensor, "B"] | None,
    ) -> Float[Tensor, "B L"]:
        """D(x, sigma) with EDM's c_in, c_skip and c_out (Karras et al., arXiv 2206.00364, table 1).

        The time that the network is told is ln(sigma) as in EDM, shifted and scaled: 0 at sigma_max, 1 at SIGMA_MIN.
        """
        size = (sigma.square() + self.sigma_data**2).sqrt()[:, None]
        time = (self.sigma_max / sigma.clamp(min=SIGMA_MIN)).log() / math.log(self.sigma_max / SIGMA_MIN)
        answer: Tensor = network(x / size, text, keep=keep, time=time).direction
        return (self.sigma_data / size) ** 2 * x + sigma[:, None] * self.sigma_data / size * answer

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
        """Where the path of R at sigma_max ends, or of the last answer with fresh noise; guidance is on that end."""
        level = self.sigma_max if i == 0 else self.middle * (self.sigma_max / self.middle) ** (1 - i / (n - 1))
        noisy = level * x if i == 0 else self.sigma_data * x + level * noise()
        sigma = torch.full((len(x),), level, device=x.device)
        told = self.end(network, noisy, sigma, text, None)
        end = guided(told, lambda nobody: self.end(network, noisy, sigma, text, nobody), guidance)
        return unsure(end / self.sigma_data)


PRESETS: dict[str, Callable[..., Consistency]] = {"default": Consistency}
