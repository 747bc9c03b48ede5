"""Dual potentials: every row gets its equal share of draws (semi-discrete optimal transport).

Plain search is unbalanced: a few rows answer most queries. With a potential g_i per row the balanced neighbour is
argmin_i |q - v_i|^2 - g_i, and the g that give every row the share 1/N maximise the concave semi-dual

    F(g) = E_q[min_i |q - v_i|^2 - g_i] + mean(g),    dF/dg_i = 1/N - P(i wins q),

by stochastic ascent over the real query law: a row that wins too often loses potential and moves away. Adam on that
gradient with the step falling to zero, and an average of the iterates (SD-FM, arXiv 2509.25519; AlignFlow, 2510.15038).
The ascent ends when the average, asked fresh queries, has even shares, or when its time is spent.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int

from index.blocks import VectorBlocks

TARGET = 0.05
"""chi^2 of shares below which a table counts as balanced."""
DRAWS_PER_ROW = 150
"""As many draws as exact potentials were seen to need."""
CHECKS = 10


@dataclass(frozen=True, eq=False, slots=True)
class Potentials:
    """The potentials so far, and how even the shares are with them."""

    g: Float32[np.ndarray, "N"]
    """One per training row, in squared distance; only differences matter."""
    chi_square: float
    """Of fresh queries."""
    step: int
    stopped: str | None = None
    """Why the ascent ended; None on the way."""

    def coordinate(self) -> Float32[np.ndarray, "N"]:
        """The balance coordinate sqrt(max(g) - g_i) of each row."""
        return np.asarray(np.sqrt(self.g.max() - self.g))


def chi_square(counts: Int[np.ndarray, "N"]) -> float:
    """Unbiased chi^2 of shares against even ones, N sum(c^2 - c) / (B (B - 1)) - 1 for B draws (ott, semidiscrete)."""
    draws = int(counts.sum())
    c = counts.astype(np.float64)
    return float(len(c) * (c * c - c).sum() / (draws * (draws - 1)) - 1.0)


def fit_potentials(
    blocks: VectorBlocks,
    queries: Callable[[int], Float32[np.ndarray, "B S"]],
    *,
    start: Float32[np.ndarray, "N"] | None = None,
    target: float = TARGET,
    seconds: float = np.inf,
    steps: int | None = None,
    learning_rate: float = 0.6,
) -> Iterator[Potentials]:
    """Ascend the semi-dual; yields the averaged g at first and every tenth of the way, at last with why it ended.

    `queries(step)` draws a batch by the query law. The learning rate is in squared distance per step, for coordinates
    of unit variance; from potentials that were fitted before (`start`) it begins lower. A time limit makes the result
    depend on the machine, steps alone do not.
    """
    import torch

    n, began = blocks.count, time.monotonic()
    drawn = len(queries(0))
    steps = steps or int(np.clip(DRAWS_PER_ROW * n / drawn, 400, 50_000))
    g = torch.zeros(n) if start is None else torch.from_numpy(start - start.mean())
    rate = learning_rate if start is None else learning_rate / 3
    g = g.to(blocks.device)
    average, first, second = g.clone(), torch.zeros_like(g), torch.zeros_like(g)

    def wins(asked: Float32[np.ndarray, "B S"], g: torch.Tensor) -> torch.Tensor:
        return torch.bincount(blocks.nearest(asked, g=g)[1][:, 0], minlength=n)

    def check(step: int, stopped: str | None) -> Potentials:
        counts = torch.zeros(n, dtype=torch.int64, device=blocks.device)
        for number in range(-(-max(2 * n, 16_384) // drawn)):
            counts += wins(queries(steps + number), average)
        found = chi_square(counts.cpu().numpy())
        if found < target:
            stopped = f"chi^2 of shares is below {target:g}"
        return Potentials(average.cpu().numpy().astype(np.float32), found, step, stopped)

    now = check(0, None)
    yield now
    if now.stopped:
        return
    checked, gone = 0.0, 0.0
    for step in range(steps):
        counts = wins(queries(step), g)
        gradient = 1.0 - counts * (n / drawn)
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient.square()
        corrected = first / (1 - 0.9 ** (step + 1))
        scale = (second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8
        g = g + rate * (1 - gone) * corrected / scale
        g = g - g.mean()
        average = g.clone() if gone < 0.05 else 0.98 * average + 0.02 * g
        gone = max((step + 1) / steps, (time.monotonic() - began) / seconds)
        if gone >= 1 or gone - checked >= 1 / CHECKS:
            checked = gone
            spent = (
                None if gone < 1 else "all steps are done" if step + 1 == steps else f"{seconds:g} seconds are spent"
            )
            now = check(step + 1, spent)
            yield now
            if now.stopped:
                return


def extend(
    sample: VectorBlocks,
    g: Float32[np.ndarray, "M"],
    blocks: VectorBlocks,
    queries: Callable[[int], Float32[np.ndarray, "B S"]],
    *,
    draws: int = 65_536,
) -> Float32[np.ndarray, "N"]:
    """Potentials of all rows from those of a sample, by the c-transform of the semi-dual over drawn queries.

    g(v) = min_q |q - v|^2 - f(q), with f(q) = min_j |q - v_j|^2 - g_j over the sample: the largest potential with
    which a row wins no query from it.
    """
    import torch

    potential = torch.from_numpy(g).to(sample.device)
    # |q - v|^2 - f(q) = |v|^2 - 2 q.v + |q|^2 - f(q)
    lines = list[tuple[torch.Tensor, torch.Tensor]]()
    for step in range(-(-draws // len(queries(0)))):
        asked = queries(step)
        cost, _ = sample.nearest(asked, g=potential)
        q = torch.from_numpy(asked).to(sample.device)
        lines.append((q, q.square().sum(1) - cost[:, 0]))
    out = np.empty(blocks.count, np.float32)
    for block in blocks:
        least = torch.full((len(block.vectors),), torch.inf, device=blocks.device)
        for q, offset in lines:
            least = torch.minimum(least, torch.addmm(offset, block.vectors, q.T, alpha=-2).min(1).values)
        out[block.place.cpu().numpy()] = (least + block.squares).cpu().numpy()
    return out
