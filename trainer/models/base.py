"""The network: a point in latent space and a text embedding in; a distance, a direction and a confidence out.

    network(x, text, cond_mask=, time=, step_size=) -> Prediction

Each architecture has its file: `mlp` for small latents, `transformer` for latents that are images themselves. Both are
diffusers models, so `save_pretrained`, `from_pretrained` and `push_to_hub` are diffusers' own. Time and step size are
for objectives that condition on them: the rivals of the coalescer, and the coalescer with `time_conditioning`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

SIZE_NAMES = ("tiny", "small", "base", "large")
"""Names of the sizes; each architecture says in its own SIZES what they stand for."""


class Prediction(NamedTuple):
    """The outputs of the network's three heads."""

    distance: Float[Tensor, "B"]
    """From x to the latent y of its pair, in coordinates."""
    direction: Float[Tensor, "B L"]
    """From x to y for the coalescer, a velocity or y itself for its rivals."""
    confidence: Float[Tensor, "B"]
    """0 to 1: the expected cosine between `direction` and the displacement y - x."""


class Network(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The base of both architectures: text conditioning, with a learned embedding for none, and the heads' units."""

    default_learning_rate: float
    """Peak learning rate of a run that sets none."""
    num_tokens: int = 0
    """Token embeddings that the network reads next to the pooled one."""
    _supports_gradient_checkpointing = True

    def __init__(self, latent_shape: Sequence[int], text_dim: int) -> None:
        """Draw fresh weights, here and in the subclasses, from torch's global generator.

        Args:
            latent_shape: C, H, W of a latent.
            text_dim: T, dimension of a text embedding.
        """
        super().__init__()
        self.latent_dim = math.prod(latent_shape)
        self.text_dim = text_dim
        self.null_text = nn.Parameter(torch.randn(text_dim) * 0.5)

    def forward(
        self,
        x: Float[Tensor, "B L"],
        text: Float[Tensor, "B K T"],
        *,
        cond_mask: Bool[Tensor, "B"] | None = None,
        time: Float[Tensor, "B"] | None = None,
        step_size: Float[Tensor, "B"] | None = None,
    ) -> Prediction:
        """Predict the pair of each point.

        Args:
            x: points, in coordinates.
            text: for each point the pooled text embedding, then its token embeddings, then zeros as padding.
            cond_mask: False for points to predict unconditionally; None conditions all on their text.
            time: position on the path from noise R (0) to the pair's latent (1).
            step_size: fraction of that path that a step covers.
        """
        raise NotImplementedError

    def condition(self, text: Float[Tensor, "B K T"], cond_mask: Bool[Tensor, "B"] | None) -> Float[Tensor, "B K T"]:
        """Scale embeddings to a root mean square of 1, and replace masked ones by the null embedding.

        Padding stays zero. Only the direction of an embedding counts, as in the search.
        """
        text = normalize(text, dim=-1) * math.sqrt(self.text_dim)
        if cond_mask is None:
            return text
        null = pad(self.null_text[None], (0, 0, 0, text.shape[1] - 1))
        return torch.where(cond_mask[:, None, None], text, null)

    def prediction(
        self, distance: Float[Tensor, "B"], direction: Float[Tensor, "B L"], confidence: Float[Tensor, "B"]
    ) -> Prediction:
        """Turn the raw outputs of the heads into a Prediction.

        Distances are about sqrt(L), so the distance head predicts in that unit, as an offset from 1.
        """
        return Prediction((distance + 1) * math.sqrt(self.latent_dim), direction, confidence.sigmoid())


def count_flops(network: Network) -> int:
    """Count the floating-point operations of one evaluation for one image; training takes about three times as many."""
    from torch.utils.flop_counter import FlopCounterMode

    device = network.null_text.device
    x = torch.zeros(1, network.latent_dim, device=device)
    text = torch.zeros(1, 1 + network.num_tokens, network.text_dim, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, text)
    return int(counter.get_total_flops())
