"""A transformer over the patches of a latent, with cross-attention to the token embeddings of the caption.

It is diffusers' PixArt transformer (Chen et al., arXiv 2310.00426): adaptive layer norm by time, with one set of
modulations for all blocks. Distance and confidence are spatial means of two further output channels. Time runs from 0
to 1 as in SiT, MeanFlow and shortcut models, not over PixArt's thousand steps, so that derivatives by it stay moderate.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trainer.models.base import Network, Prediction

SIZES = {"tiny": (192, 6), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}
"""Hidden dimension and number of blocks; from small on those of DiT (Peebles and Xie, arXiv 2212.09748)."""
MAX_TOKENS = 77
"""Default number of token embeddings, the most that CLIP's text models have."""
HEAD_DIM = 64
MIN_PATCHED_HEIGHT = 8
"""Latents of this height or more, if even, are cut into 2 x 2 patches; smaller ones into single positions."""


class LatentTransformer(Network):
    """Attends to the step size, the pooled text embedding and the token embeddings, in this order."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, latent_shape: Sequence[int], text_dim: int, hidden_dim: int, num_layers: int, num_tokens: int = 0
    ) -> None:
        """Build the layers.

        Args:
            latent_shape: C, H, W of a latent.
            text_dim: T, dimension of a text embedding.
            hidden_dim: D, dimension of a patch; a multiple of 64, the dimension of an attention head.
            num_layers: transformer blocks.
            num_tokens: token embeddings to read; 0 for the pooled text embedding alone.
        """
        super().__init__(latent_shape, text_dim)
        channels, height, _ = latent_shape
        self.latent_shape, self.num_tokens = tuple(latent_shape), num_tokens
        self.default_learning_rate = 1e-3 * SIZES["tiny"][0] / hidden_dim
        self.transformer: Any = PixArtTransformer2DModel(
            num_attention_heads=hidden_dim // HEAD_DIM,
            attention_head_dim=HEAD_DIM,
            in_channels=channels,
            out_channels=channels + 2,
            num_layers=num_layers,
            cross_attention_dim=hidden_dim,
            sample_size=height,
            patch_size=2 if height >= MIN_PATCHED_HEIGHT and height % 2 == 0 else 1,
            use_additional_conditions=False,
            caption_channels=text_dim,
        )
        self.embed_step_size = nn.Linear(1, text_dim)

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
        step = self.embed_step_size((zero if step_size is None else step_size)[:, None])  # B T
        context = torch.cat([step[:, None], self.condition(text, cond_mask)], 1)  # B 1+K T
        out = self.transformer(
            x.reshape(-1, *self.latent_shape),
            encoder_hidden_states=context,
            encoder_attention_mask=(context != 0).any(-1),
            timestep=zero if time is None else time,
            return_dict=False,
        )[0]  # B C+2 H W
        direction, heads = out[:, :-2].flatten(1), out[:, -2:].mean((2, 3))
        return self.prediction(heads[:, 0], direction, heads[:, 1])
