"""A residual MLP over flat latents that reads point, description, time and span side by side."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import silu

from trainer.models.base import Network, NetworkConfig, Prediction

SHAPES = {"tiny": (192, 4), "small": (384, 4), "base": (768, 6), "large": (1536, 8)}
"""Width and number of blocks."""


class MLP(Network):
    """Of a description it reads the pooled embedding alone."""

    def __init__(self, config: NetworkConfig) -> None:
        """Build it."""
        super().__init__(config)
        width, depth = SHAPES[config.size]
        self.learning_rate = 5e-3 * SHAPES["tiny"][0] / width
        self.read = nn.Linear(config.latent_dim + config.text_dim + 2, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2 + config.latent_dim)

    def forward(
        self,
        x: Float[Tensor, "B L"],
        text: Float[Tensor, "B K T"],
        *,
        keep: Bool[Tensor, "B"] | None = None,
        time: Float[Tensor, "B"] | None = None,
        span: Float[Tensor, "B"] | None = None,
    ) -> Prediction:
        """Predict for points in coordinates."""
        none = torch.zeros_like(x[:, 0])
        clock = torch.stack([none if time is None else time, none if span is None else span], 1)  # B 2
        h = self.read(torch.cat([x, self.told(text[:, :1], keep)[:, 0], clock], 1))  # B W
        h = self.norm(self.blocks(h))  # B W
        distance, confidence, direction = self.head(h).split([1, 1, x.shape[1]], 1)
        return self.prediction(distance[:, 0], direction, confidence[:, 0])


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
