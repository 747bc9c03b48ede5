"""A transformer over the patches of a latent, with cross attention to the description's token states.

It is diffusers' PixArt transformer (Chen et al., arXiv 2310.00426): adaptive layer norm by time, one set of modulations
for all blocks. Distance and confidence are the means over the picture of two further output channels. Time is told from
0 to 1 as SiT, MeanFlow and shortcut models do, not in a thousand steps as PixArt: derivatives by it stay moderate.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trainer.models.base import Network, NetworkConfig, Prediction

SHAPES = {"tiny": (192, 6), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}
"""Width and number of blocks: from small on those of DiT (Peebles and Xie, arXiv 2212.09748)."""
HEAD_WIDTH = 64
PATCHED = 8
"""Latents of at least so many rows are read in patches of 2 x 2."""


class Transformer(Network):
    """The pooled embedding and the span are read as tokens beside the others."""

    def __init__(self, config: NetworkConfig) -> None:
        """Build it."""
        from diffusers import PixArtTransformer2DModel

        super().__init__(config)
        width, depth = SHAPES[config.size]
        self.learning_rate = 1e-3 * SHAPES["tiny"][0] / width
        self.body: Any = PixArtTransformer2DModel(
            num_attention_heads=width // HEAD_WIDTH,
            attention_head_dim=HEAD_WIDTH,
            in_channels=config.channels,
            out_channels=config.channels + 2,
            num_layers=depth,
            cross_attention_dim=width,
            sample_size=config.height,
            patch_size=2 if config.height >= PATCHED and config.height % 2 == 0 else 1,
            use_additional_conditions=False,
            caption_channels=config.text_dim,
        )
        self.span = nn.Linear(1, config.text_dim)

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
        reach = self.span((none if span is None else span)[:, None])  # B T
        words = torch.cat([reach[:, None], self.told(text, keep)], 1)  # B 1+K T
        out = self.body(
            x.reshape(-1, self.config.channels, self.config.height, self.config.width),
            encoder_hidden_states=words,
            encoder_attention_mask=(words != 0).any(-1),
            timestep=none if time is None else time,
            return_dict=False,
        )[0]  # B C+2 h w
        direction, heads = out[:, :-2].flatten(1), out[:, -2:].mean((2, 3))
        return self.prediction(heads[:, 0], direction, heads[:, 1])
