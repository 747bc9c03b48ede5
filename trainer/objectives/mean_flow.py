"""MeanFlow (Geng et al., arXiv 2505.13447; Gsunshine/py-meanflow): the mean velocity over an interval of the path.

u(x, t, s) is the velocity v of flow matching, averaged over the times t to t + s along the flow, so that x + s u is
where the flow arrives. Time runs from R (0) to y (1), opposite to the paper's. With the end t + s fixed the paper's
identity, its equation 6, reads u = v + s du/dt, where du/dt is the derivative along (v, 1, -1) in (x, t, s). The right
side is the target.

du/dt is a forward-mode derivative without gradient, so it is computed on the unwrapped network, in float32, and with
the attention kernel that PyTorch can differentiate in forward mode. The gradient comes from an ordinary call of the
network, so that distributed training, compilation and low precision work as for any objective; it costs another
evaluation.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.models.base import Network
from trainer.objectives.base import Loss, Training
from trainer.objectives.flow_matching import Euler
from trainer.objectives.hyperparameters import fraction, positive
from trainer.stream import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanFlow(Euler):
    """Defaults are py-meanflow's for CIFAR-10 and MNIST; the times below are the authors', 1 at R and 0 at y.

    The authors train guidance into the target; here it is applied in sampling, as for the other objectives.
    """

    interval_fraction: float = fraction(0.75)
    """Fraction of inputs with an interval; the others learn flow matching."""
    start_mean: float = -0.6
    """Mean of the logit of an interval's start."""
    start_std: float = positive(1.6)
    """Standard deviation of the logit of an interval's start."""
    end_mean: float = -4.0
    """Mean of the logit of an interval's end; an end before the start is moved to it."""
    end_std: float = positive(1.6)
    """Standard deviation of the logit of an interval's end."""
    norm_p: float = 0.75
    """p of the weight 1 / (|error|^2 + eps)^p, which has no gradient. The authors' for ImageNet is 1."""
    norm_eps: float = positive(1e-3)
    """eps of that weight."""

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Return the weighted squared error against the right side of the identity: the paper's algorithm 1."""
        cond_mask = self.cond_mask(batch)
        time, step_size = self.sample_intervals(batch)
        velocity = batch.y - batch.r
        x = batch.r + time[:, None] * velocity
        u = network(x, batch.text, cond_mask=cond_mask, time=time, step_size=step_size).direction
        du_dt = path_derivative(network, x, batch.text, cond_mask, time, step_size, velocity)
        error = (u - velocity - step_size[:, None] * du_dt).square().sum(1)
        total = (error / (error.detach() + self.norm_eps) ** self.norm_p).mean()
        return Loss(total, {"mean_velocity": error.detach().mean(), "du_dt": du_dt.square().sum(1).mean()})

    def sample_intervals(self, batch: Batch) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Sample where intervals start, in our time, and how long they are: `sample_two_timesteps_t_r_v1`."""
        start = torch.sigmoid(self.start_mean + self.start_std * batch.normal(1))
        end = torch.sigmoid(self.end_mean + self.end_std * batch.normal(2))
        end = torch.where(batch.uniforms[:, 3] < self.interval_fraction, torch.minimum(start, end), start)
        return 1 - start, start - end

    def step_size(self, n: int) -> float:
        """Return 1/n."""
        return 1 / n


def path_derivative(
    network: nn.Module,
    x: Float[Tensor, "B L"],
    text: Float[Tensor, "B K T"],
    cond_mask: Bool[Tensor, "B"],
    time: Float[Tensor, "B"],
    step_size: Float[Tensor, "B"],
    velocity: Float[Tensor, "B L"],
) -> Float[Tensor, "B L"]:
    """Return du/dt, the derivative of the direction head along the path with the interval's end fixed; no gradient."""
    bare = unwrap(network)

    def direction(x: Tensor, time: Tensor, step_size: Tensor) -> Tensor:
        # The class's forward: for low precision accelerate replaces the instance's.
        prediction = type(bare).forward(bare, x, text, cond_mask=cond_mask, time=time, step_size=step_size)
        return prediction.direction

    one = torch.ones_like(time)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(direction, (x, time, step_size), (velocity, one, -one))[1]  # type: ignore[no-any-return]


def unwrap(network: nn.Module) -> Network:
    """Return the network inside the wrappers of torch.compile and of distributed training, in any order."""
    while not isinstance(network, Network):
        network = getattr(network, "_orig_mod" if hasattr(network, "_orig_mod") else "module")
    return network
