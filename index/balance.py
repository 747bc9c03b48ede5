"""Dual potentials: every row gets its equal share of draws (semi-discrete optimal transport).

Plain search is unbalanced: a few rows answer most queries. With a potential g_i per row the balanced neighbour is
argmin_i |q - v_i|^2 - g_i, and the g that give every row the share 1/N maximise the concave semi-dual

    F(g) = E_q[min_i |q - v_i|^2 - g_i] + mean(g),    dF/dg_i = 1/N - P(i wins q),

by stochastic ascent over the real query law: a row that wins too often loses potential and moves away. Adam on that
gradient with the step falling to zero, and an average of the iterates (SD-FM, arXiv 2509.25519; AlignFlow, 2510.15038).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int

from index.search import ExactNeighbours


@dataclass(frozen=True, eq=False, slots=True)
class Potentials:
    """The potentials so far, and how even the shares were when they were last used."""

    g: Float32[np.ndarray, "N"]
    """One per training row, in squared distance; only differences matter."""
    chi_square: float
    step: int

    def coordinate(self) -> Float32[np.ndarray, "N"]:
        """The balance coordinate sqrt(max(g) - g_i) of each row."""
        return np.asarray(np.sqrt(self.g.max() - self.g))


def chi_square(counts: Int[np.ndarray, "N"]) -> float:
    """Unbiased chi^2 of shares against even ones, N sum(c^2 - c) / (B (B - 1)) - 1 for B draws (ott, semidiscrete)."""
    draws = int(counts.sum())
    c = counts.astype(np.float64)
    return float(len(c) * (c * c - c).sum() / (draws * (draws - 1)) - 1.0)


def fit_potentials(
    exact: ExactNeighbours,
    queries: Callable[[int], Float32[np.ndarray, "B S"]],
    *,
    steps: int = 400,
    learning_rate: float = 0.6,
    block: int = 65_536,
) -> Iterator[Potentials]:
    """Ascend the semi-dual from zero; yields after every tenth of the steps, the last time with the averaged g.

    `queries(step)` draws a batch by the query law; vectors must carry a zero balance coordinate. The learning rate
    is in squared distance per step, for coordinates of unit variance.
    """
    import torch

    vectors = exact.vectors
    n = len(vectors)
    offset = -vectors.square().sum(1)
    g, average = torch.zeros(n, device=vectors.device), torch.zeros(n, device=vectors.device)
    first, second = torch.zeros_like(g), torch.zeros_like(g)
    window = torch.zeros(n, dtype=torch.int64, device=vectors.device)
    for step in range(steps):
        q = torch.from_numpy(queries(step)).to(vectors.device)
        best = torch.full((len(q),), -torch.inf, device=vectors.device)
        winner = torch.zeros(len(q), dtype=torch.int64, device=vectors.device)
        for start in range(0, n, block):
            rows = slice(start, start + block)
            top = (2 * q @ vectors[rows].T + (offset + g)[rows]).max(1)
            better = top.values > best
            best = torch.where(better, top.values, best)
            winner = torch.where(better, top.indices + start, winner)
        counts = torch.bincount(winner, minlength=n)
        gradient = 1.0 - counts * (n / len(q))
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient.square()
        corrected = first / (1 - 0.9 ** (step + 1))
        scale = (second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8
        g = g + learning_rate * (1 - step / steps) * corrected / scale
        g = g - g.mean()
        average = g.clone() if step < steps // 2 else 0.98 * average + 0.02 * g
        window += counts
        if (step + 1) % max(steps // 10, 1) == 0 or step + 1 == steps:
            chi = chi_square(window.cpu().numpy())
            yield Potentials(average.cpu().numpy().astype(np.float32), chi, step + 1)
            window.zero_()
