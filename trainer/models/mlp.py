"""A residual MLP over flat latents; noise, text embedding, time and step size are concatenated at its input."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import silu

from trainer.models.base import Network, Prediction

SIZES = {"tiny": (192, 4), "small": (384, 4), "base": (768, 6), "large": (1536, 8)}
"""Hidden dimension and number of residual blocks."""


class LatentMLP(Network):
    """Reads the pooled text embedding alone."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, latent_shape: Sequence[int], text_dim: int, hidden_dim: int, num_layers: int) -> None:
        """Build the layers.

        Args:
            latent_shape: C, H, W of a latent.
            text_dim: T, dimension of a text embedding.
            hidden_dim: D, dimension between the blocks.
            num_layers: residual blocks.
        """
        super().__init__(latent_shape, text_dim)
        self.default_learning_rate = 5e-3 * SIZES["tiny"][0] / hidden_dim
        self.embed = nn.Linear(self.latent_dim + text_dim + 2, hidden_dim)
        self.blocks = nn.Sequential(*(Block(hidden_dim) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(hidden_dim)
        self.head = nn.Linear(hidden_dim, 2 + self.latent_dim)
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Float[Tensor, "B L"],
        text: Float[Tensor, "B K T"],
        *,
        cond_mask: Bool[Tensor, "B"] | None = None,
        time: Float[Tensor, "B"] | None = None,
        step_size: Float[Tensor, "B"] | None = None,
    ) -> Prediction:
        """Predict the pair of each point; see Network.forward for the arguments."""
        zero = torch.zeros_like(x[:, 0])
        path = torch.stack([zero if time is None else time, zero if step_size is None else step_size], 1)  # B 2
        pooled = self.condition(text[:, :1], cond_mask)[:, 0]  # B T
        h = self.embed(torch.cat([x, pooled, path], 1))  # B D
        for block in self.blocks:
            recomputed = self.gradient_checkpointing and torch.is_grad_enabled()
            h = self._gradient_checkpointing_func(block, h) if recomputed else block(h)  # B D
        distance, confidence, direction = self.head(self.norm(h)).split([1, 1, x.shape[1]], 1)
        return self.prediction(distance[:, 0], direction, confidence[:, 0])


class Block(nn.Module):
    """Computes h + MLP(norm(h)); the MLP's last layer starts at zero, so the block starts as the identity."""

    def __init__(self, hidden_dim: int) -> None:
        """Build an MLP with one hidden layer of twice the dimension."""
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim, elementwise_affine=False)
        self.up = nn.Linear(hidden_dim, 2 * hidden_dim)
        self.down = nn.Linear(2 * hidden_dim, hidden_dim)
        nn.init.zeros_(self.down.weight)

    def forward(self, h: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Add the MLP's output to its input."""
        residual: Tensor = self.down(silu(self.up(self.norm(h))))
        return h + residual
