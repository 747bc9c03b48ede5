"""MeanFlow (Geng et al., arXiv 2505.13447; Gsunshine/py-meanflow): the mean velocity over a span of the path.

u(x, t, s) is the velocity v of flow matching, averaged over the times t to t + s along the flow: x + s u is where it
leads. Time runs from R (0) to y (1), against the paper's; with the end t + s held fixed the paper's identity, its
equation 6, reads u = v + s du/dt, du/dt the derivative along (v, 1, -1) in (x, t, s). The right side is the target.

The derivative is forward-mode and nothing is learned through it, so it is taken from the bare network, in float32 and
with the attention that PyTorch can differentiate so. What is learned is an ordinary call of the network, so that
distributed training, compilation and low precision work as for any other objective, for one evaluation more.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.models.base import Network
from trainer.objectives.base import Loss, Training
from trainer.objectives.hyperparameters import check_positive, check_shares
from trainer.objectives.steps import Euler
from trainer.stream import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanFlow(Euler):
    """Settings are those of py-meanflow for CIFAR-10 and MNIST; times below are the authors', 1 at R and 0 at y.

    The authors bake guidance into the target; here it is asked for when sampling, as of the other objectives.
    """

    spanned: float = 0.75
    """Share of inputs with a span; the others are flow matching."""
    start_mean: float = -0.6
    start_std: float = 1.6
    """Of the logit of where a span begins."""
    end_mean: float = -4.0
    end_std: float = 1.6
    """Of the logit of where it ends, never before its beginning."""
    power: float = 0.75
    """p of the weight 1 / (|error|^2 + eps)^p, which is not learned through. The authors' for ImageNet is 1."""
    eps: float = 1e-3
    dropout: float = 0.1
    """Share of inputs without their description, for guidance."""

    def __post_init__(self) -> None:
        """Refuse hyperparameters that mean nothing."""
        check_shares(self, "spanned", "dropout")
        check_positive(self, "start_std", "end_std", "eps")

    def loss(self, network: nn.Module, batch: Batch, training: Training) -> Loss:
        """Algorithm 1: the squared error against the identity's right side, weighted."""
        keep = batch.uniforms[:, 0] >= self.dropout
        time, span = self.times(batch)
        velocity = batch.y - batch.r
        x = batch.r + time[:, None] * velocity
        guess = network(x, batch.text, keep=keep, time=time, span=span).direction
        change = slope(network, x, batch.text, keep, time, span, velocity)
        error = (guess - velocity - span[:, None] * change).square().sum(1)
        total = (error / (error.detach() + self.eps) ** self.power).mean()
        return Loss(total, {"mean_velocity": error.detach().mean(), "slope": change.square().sum(1).mean()})

    def times(self, batch: Batch) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Where spans begin, in our time, and how long they are: `sample_two_timesteps_t_r_v1`."""
        start = torch.sigmoid(self.start_mean + self.start_std * batch.normal(1))
        end = torch.sigmoid(self.end_mean + self.end_std * batch.normal(2))
        end = torch.where(batch.uniforms[:, 3] < self.spanned, torch.minimum(start, end), start)
        return 1 - start, start - end

    def span(self, n: int) -> float:
        """As it is."""
        return 1 / n


def slope(
    network: nn.Module,
    x: Float[Tensor, "B L"],
    text: Float[Tensor, "B K T"],
    keep: Bool[Tensor, "B"],
    time: Float[Tensor, "B"],
    span: Float[Tensor, "B"],
    velocity: Float[Tensor, "B L"],
) -> Float[Tensor, "B L"]:
    """How fast the direction head changes along the path, the end of the span held fixed; without gradient."""
    bare = unwrapped(network)

    def direction(x: Tensor, time: Tensor, span: Tensor) -> Tensor:
        # The class's own forward: accelerate replaces an instance's by one in low precision.
        answer: Tensor = type(bare).forward(bare, x, text, keep=keep, time=time, span=span).direction
        return answer

    one = torch.ones_like(time)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(direction, (x, time, span), (velocity, one, -one))[1]  # type: ignore[no-any-return]


def unwrapped(network: nn.Module) -> Network:
    """The network within the wrappers of torch.compile and of distributed training, in any order."""
    while not isinstance(network, Network):
        network = getattr(network, "_orig_mod" if hasattr(network, "_orig_mod") else "module")
    return network


PRESETS: dict[str, Callable[..., MeanFlow]] = {"default": MeanFlow}
