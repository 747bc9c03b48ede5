"""The network: a random point and a description in; a distance, a direction and a confidence out.

    network(x, text, keep=, time=, span=) -> Prediction

One file for each kind: `mlp` for small latents, `transformer` for those that are pictures themselves. Sizes are named;
width and depth follow. Only rivals of the coalescer give a time and a span.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from index.errors import OptionError
from index.table.schema import TableMeta

KINDS = ("auto", "mlp", "transformer")
SIZES = ("tiny", "small", "base", "large")
SPATIAL = 16
"""Latents of at least so many rows are read by a transformer unless the user says otherwise."""
MOST_TOKENS = 77
"""Token states that a transformer reads unless told; CLIP's text models have no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """All that the network's shape depends on."""

    kind: str
    size: str
    channels: int
    height: int
    width: int
    """Of a latent: C, h, w."""
    text_dim: int
    """T, numbers of a description."""
    tokens: int = 0
    """Token states that come with a description; 0: the pooled embedding alone."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if self.tokens < 0 or (self.tokens and self.kind == "mlp"):
            raise OptionError(
                f"--tokens {self.tokens} cannot be read by --network {self.kind}: give a transformer some"
            )

    @classmethod
    def of(cls, meta: TableMeta, *, size: str, kind: str = "auto", tokens: int | None = None) -> "NetworkConfig":
        """The network for a table's latents and descriptions; `auto` and None are decided here."""
        channels, height, width = meta.latent_shape
        if kind == "auto":
            kind = "transformer" if height >= SPATIAL else "mlp"
        if tokens is None:
            tokens = MOST_TOKENS if kind == "transformer" else 0
        shape = {"channels": channels, "height": height, "width": width, "text_dim": meta.text_dim}
        return cls(kind=kind, size=size, tokens=tokens, **shape)

    @property
    def latent_dim(self) -> int:
        """L, numbers of a latent."""
        return self.channels * self.height * self.width


class Prediction(NamedTuple):
    """What the network says of a point."""

    distance: Float[Tensor, "B"]
    direction: Float[Tensor, "B L"]
    confidence: Float[Tensor, "B"]
    """0 to 1: the cosine that it expects between `direction` and the way to the pair."""


class Network(nn.Module):
    """What both kinds share: the scale of distances, and how a description is told or left out."""

    learning_rate: float
    """The highest one to train it with, unless the user knows better."""

    def __init__(self, config: NetworkConfig) -> None:
        """Fresh weights, here and in the kinds, from torch's global generator."""
        super().__init__()
        self.config = config
        self.radius = math.sqrt(config.latent_dim)
        self.null = nn.Parameter(torch.randn(config.text_dim) * 0.5)

    def forward(
        self,
        x: Float[Tensor, "B L"],
        text: Float[Tensor, "B K T"],
        *,
        keep: Bool[Tensor, "B"] | None = None,
        time: Float[Tensor, "B"] | None = None,
        span: Float[Tensor, "B"] | None = None,
    ) -> Prediction:
        """Predict for points in coordinates.

        Args:
            x: the points.
            text: of each description the pooled embedding, then its token states, then zeros.
            keep: where it is false the description is left out.
            time: of a path from R (0) to its pair (1).
            span: how much of that path a step is to go.
        """
        raise NotImplementedError

    def told(self, text: Float[Tensor, "B K T"], keep: Bool[Tensor, "B"] | None) -> Float[Tensor, "B K T"]:
        """Embeddings of root mean square 1, and a learned one where the description is left out; zeros stay zero."""
        text = normalize(text, dim=-1) * math.sqrt(self.config.text_dim)
        if keep is None:
            return text
        return torch.where(keep[:, None, None], text, pad(self.null[None], (0, 0, 0, text.shape[1] - 1)))

    def prediction(
        self, distance: Float[Tensor, "B"], direction: Float[Tensor, "B L"], confidence: Float[Tensor, "B"]
    ) -> Prediction:
        """What three heads say. Distances are about sqrt(L): in that unit the head starts near its target."""
        return Prediction((distance + 1) * self.radius, direction, confidence.sigmoid())


def make_network(config: NetworkConfig) -> Network:
    """A network with fresh weights."""
    from trainer.models.mlp import MLP
    from trainer.models.transformer import Transformer

    return {"mlp": MLP, "transformer": Transformer}[config.kind](config)


def count_flops(network: Network) -> int:
    """Floating-point operations of one evaluation for one picture; training takes about three times as many."""
    from torch.utils.flop_counter import FlopCounterMode

    config, device = network.config, network.null.device
    x = torch.zeros(1, config.latent_dim, device=device)
    text = torch.zeros(1, 1 + config.tokens, config.text_dim, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, text)
    return int(counter.get_total_flops())
