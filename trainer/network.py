"""The network: a random point and a description in; a distance, a direction and whatever a rival needs out.

A residual MLP over flat latents that reads point, description and time side by side. Sizes are named; width and depth
follow. A learned vector stands in where the description is left out.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

SIZES = {"tiny": (192, 4), "small": (384, 4), "base": (768, 6), "large": (1536, 8)}
"""Width and number of blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """All that the network's shape depends on."""

    size: str
    latent_size: int
    """L, numbers of a latent."""
    text_width: int
    """T, numbers of a description."""


class Prediction(NamedTuple):
    """What the network says of a point."""

    distance: Float[Tensor, "B"]
    direction: Float[Tensor, "B L"]


class Network(nn.Module):
    """(x, description, time) -> Prediction. The coalescer gives no time; rivals that need one do."""

    def __init__(self, config: NetworkConfig) -> None:
        """Build it with fresh weights, from torch's global generator."""
        super().__init__()
        width, depth = SIZES[config.size]
        self.config = config
        self.radius = math.sqrt(config.latent_size)
        self.null = nn.Parameter(torch.randn(config.text_width) * 0.5)
        self.read = nn.Linear(config.latent_size + config.text_width + 1, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1 + config.latent_size)

    def forward(
        self,
        x: Float[Tensor, "B L"],
        text: Float[Tensor, "B T"],
        *,
        keep: Bool[Tensor, "B"] | None = None,
        time: Float[Tensor, "B"] | None = None,
    ) -> Prediction:
        """Predict for points in coordinates; where `keep` is false the description is left out."""
        text = normalize(text, dim=-1) * math.sqrt(self.config.text_width)
        if keep is not None:
            text = torch.where(keep[:, None], text, self.null)
        clock = torch.zeros_like(x[:, :1]) if time is None else time[:, None]
        h = self.read(torch.cat([x, text, clock], 1))  # B W
        h = self.norm(self.blocks(h))  # B W
        distance, direction = self.head(h).split([1, x.shape[1]], 1)
        # Distances are about sqrt(L): in that unit the head starts near its target.
        return Prediction((distance[:, 0] + 1) * self.radius, direction)


def count_flops(network: Network) -> int:
    """Floating-point operations of one evaluation for one picture; training takes about three times as many."""
    from torch.utils.flop_counter import FlopCounterMode

    device = network.null.device
    x, text = (torch.zeros(1, size, device=device) for size in (network.config.latent_size, network.config.text_width))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, text)
    return int(counter.get_total_flops())


class Block(nn.Module):
    """h + MLP(norm(h)); the MLP's last layer starts at zero, so the whole starts as the identity."""

    def __init__(self, width: int) -> None:
        """Twice as wide inside."""
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        nn.init.zeros_(self.narrow.weight)

    def forward(self, h: Float[Tensor, "B W"]) -> Float[Tensor, "B W"]:
        """One residual step."""
        step: Tensor = self.narrow(silu(self.widen(self.norm(h))))
        return h + step
