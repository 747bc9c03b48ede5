"""Small networks that tell whether a picture follows its caption; what they see before they answer is its features.

A table with few captions has classes, and a classifier says which one it sees. Elsewhere captions are told apart by
a contrastive model, as CLIP is: pictures and the table's own description embeddings meet in one space.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize

FEATURES, SHARED = 64, 64
"""Numbers of a picture's features, and of the space in which pictures and captions meet."""
SIDE = 64
"""Larger pictures are scaled down to this side: what is judged is what they show, not their grain."""
Describe = Callable[[Sequence[str]], Float32[np.ndarray, "B T"]]


class Tower(nn.Module):
    """Pictures to features: a small residual network."""

    def __init__(self) -> None:
        """Fresh weights from torch's global generator."""
        from transformers import ResNetConfig, ResNetModel

        super().__init__()
        widths = {"embedding_size": 16, "hidden_sizes": [16, 32, FEATURES], "depths": [1, 1, 1]}
        self.see = ResNetModel(ResNetConfig(num_channels=3, layer_type="basic", **widths))

    def features(self, pictures: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B F"]:
        """What is seen of pictures."""
        x = shrunk(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1  # B 3 H W
        seen: Tensor = self.see(x).pooler_output.flatten(1)  # B F
        return seen


def shrunk(pictures: UInt8[Tensor, "B H W 3"]) -> UInt8[Tensor, "B h w 3"]:
    """Pictures as a tower sees them."""
    if pictures.shape[1] <= SIDE:
        return pictures
    means = interpolate(pictures.permute(0, 3, 1, 2).float(), (SIDE, SIDE), mode="area")
    return means.round().to(torch.uint8).permute(0, 2, 3, 1)


class Classifier(Tower):
    """For tables whose captions are few enough to be classes."""

    kind = "classifier"

    def __init__(self, labels: list[str]) -> None:
        """One class for each of these captions."""
        super().__init__()
        self.labels = labels
        self.answer = nn.Linear(FEATURES, len(labels))

    def loss(
        self, pictures: UInt8[Tensor, "B H W 3"], captions: Sequence[str], text: Float[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        """Cross entropy of the captions as classes."""
        return cross_entropy(self.answer(self.features(pictures)), self._places(captions).to(pictures.device))

    def adherence(
        self, features: Float[Tensor, "N F"], captions: Sequence[str], describe: Describe, among: int
    ) -> dict[str, float]:
        """Share of pictures that it takes for what their caption says."""
        called = self.answer(features).argmax(1).cpu()
        return {"class_accuracy": float((called == self._places(captions)).double().mean())}

    def _places(self, captions: Sequence[str]) -> Int[Tensor, "B"]:
        """Numbers of classes; -1, which is never right, for a caption that training rows do not have."""
        place = {label: number for number, label in enumerate(self.labels)}
        return torch.tensor([place.get(caption, -1) for caption in captions])


class Matcher(Tower):
    """For tables with many captions: which of a hundred is the picture's?"""

    kind = "matcher"

    def __init__(self, text_dim: int) -> None:
        """For description embeddings of this width."""
        super().__init__()
        self.show = nn.Linear(FEATURES, SHARED)
        self.read = nn.Sequential(nn.Linear(text_dim, 2 * SHARED), nn.SiLU(), nn.Linear(2 * SHARED, SHARED))
        self.sharpness = nn.Parameter(torch.tensor(2.0))
        """Logarithm of what cosines are multiplied by."""

    def loss(
        self, pictures: UInt8[Tensor, "B H W 3"], captions: Sequence[str], text: Float[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        """InfoNCE both ways (arXiv 2103.00020); another row with the same caption is no wrong answer."""
        logits = self.sharpness.exp() * self._shown(self.features(pictures)) @ self._read(text).T  # B B
        _, same = np.unique(list(captions), return_inverse=True)
        also = torch.from_numpy(same[:, None] == same).to(logits.device).fill_diagonal_(False)
        logits = logits.masked_fill(also, -torch.inf)
        true = torch.arange(len(logits), device=logits.device)
        return (cross_entropy(logits, true) + cross_entropy(logits.T, true)) / 2

    def adherence(
        self, features: Float[Tensor, "N F"], captions: Sequence[str], describe: Describe, among: int
    ) -> dict[str, float]:
        """Mean rank of the true caption among so many (1 is best), and how often it comes first."""
        distinct, true = np.unique(list(captions), return_inverse=True)
        parts = [describe(distinct[i : i + 256].tolist()) for i in range(0, len(distinct), 256)]
        text = self._read(torch.from_numpy(np.concatenate(parts)).to(features.device))
        ranks = retrieval_ranks(self._shown(features).cpu(), text.cpu(), torch.from_numpy(true), among=among)
        return {"caption_rank": float(ranks.mean()), "caption_first": float((ranks == 1).double().mean())}

    def _shown(self, features: Float[Tensor, "B F"]) -> Float[Tensor, "B E"]:
        return normalize(self.show(features), dim=1)

    def _read(self, text: Float[Tensor, "B T"]) -> Float[Tensor, "B E"]:
        return normalize(self.read(normalize(text.float(), dim=1) * text.shape[1] ** 0.5), dim=1)


def retrieval_ranks(
    pictures: Float[Tensor, "N E"], captions: Float[Tensor, "M E"], true: Int[Tensor, "N"], *, among: int
) -> Float[Tensor, "N"]:
    """Rank of each picture's true caption by inner product, among it and others at random; equal ones share a rank."""
    among = min(among, len(captions))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(captions)))
    # The others are those that follow the true one in a random order, so that none of them comes twice.
    asked = order[(order.argsort()[true][:, None] + torch.arange(among)) % len(captions)]  # N among
    scores = torch.cat(
        [(captions[asked[i : i + 1024]] @ pictures[i : i + 1024, :, None])[..., 0] for i in range(0, len(asked), 1024)]
    )
    own, others = scores[:, :1], scores[:, 1:]
    return 1 + (others > own).double().sum(1) + 0.5 * (others == own).double().sum(1)


def referee_network(content: dict[str, Any]) -> Classifier | Matcher:
    """A fresh network of a kind, as its JSON tells."""
    return Classifier(content["labels"]) if content["kind"] == "classifier" else Matcher(content["text_dim"])
