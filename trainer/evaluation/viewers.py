"""What looks at pictures: it turns each into features, and the features of many into figures.

    look(pictures, captions) -> features           a batch at a time
    figures(found, truth, captions) -> {name: figure}

The referee is trained on the table's own pictures; Inception and CLIP come from files that the user has.
"""

import warnings
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn

SUBSET = 4000
"""Features that one estimate of the kernel distance takes of each side; of larger sets ten are averaged."""


@runtime_checkable
class Viewer(Protocol):
    """The two functions."""

    def look(self, pictures: UInt8[np.ndarray, "B H W 3"], captions: Sequence[str]) -> Float32[np.ndarray, "B F"]:
        """What it makes of pictures that were drawn for captions."""
        ...

    def figures(
        self, found: Float32[np.ndarray, "N F"], truth: Float32[np.ndarray, "M F"], captions: Sequence[str]
    ) -> dict[str, float]:
        """The figures of N pictures, each with its caption, beside M true ones."""
        ...


class _AsTheyAre(nn.Module):
    """A feature extractor for what is features already: torchmetrics would see every picture once per metric."""

    def __init__(self, width: int) -> None:
        """Of so many numbers."""
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        """The same."""
        return features


def feature_distances(
    name: str, found: Float32[np.ndarray, "N F"], truth: Float32[np.ndarray, "M F"], *, seed: int = 0
) -> dict[str, float]:
    """Frechet distance and squared kernel distance (FID and KID, where the features are Inception's)."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    same = _AsTheyAre(found.shape[1])
    subset = min(SUBSET, len(found), len(truth))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save all extracted features", category=UserWarning)
        subsets = 1 if subset == len(found) == len(truth) else 10
        kernel = KernelInceptionDistance(feature=same, subset_size=subset, subsets=subsets)
    metrics = {"frechet": FrechetInceptionDistance(feature=same), "kernel": kernel}
    figures = {}
    with torch.random.fork_rng(devices=[]):  # the kernel distance draws its subsets from the global generator
        torch.manual_seed(seed)
        for kind, metric in metrics.items():
            metric.update(torch.from_numpy(truth), real=True)
            metric.update(torch.from_numpy(found), real=False)
            value = metric.compute()
            figures[f"{name}_{kind}"] = float(value[0] if isinstance(value, tuple) else value)
    return figures
