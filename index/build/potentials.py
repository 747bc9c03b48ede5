"""Dual potentials of semi-discrete optimal transport, which give every row an equal fraction of the queries.

Plain nearest-neighbor search is unbalanced: a few rows answer most queries. With a potential g_i per row, the balanced
neighbor of q is argmin_i |q - v_i|^2 - g_i, and the g for which each of N rows wins 1/N of the queries maximizes the
concave semi-dual

    F(g) = E_q[min_i |q - v_i|^2 - g_i] + mean(g),    dF/dg_i = 1/N - P(i wins q)

It is maximized by stochastic ascent over the query distribution: a row that wins too often loses potential and moves
away (SD-FM, arXiv 2509.25519; AlignFlow, 2510.15038). The step size is proportional to the distance between the first
and the eighth neighbor, so that it has the data's units; it decays to zero, and the last iterates are averaged. With
72 queries per row on a quarter of MNIST this leaves a chi-square of 0.014, and Adam one of 0.034. The ascent ends when
the average is balanced on fresh queries, or at its time limit.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from index.report.hubness import chi_square
from index.search.blocks import VectorBlocks
from index.search.memory import working_bytes

if TYPE_CHECKING:
    import torch

TARGET = 0.05
"""Chi-square of hit counts below which a table counts as balanced."""
QUERIES_PER_ROW = 80
"""Slightly more than exact potentials were measured to need."""
STEP_SIZE = 0.25
"""What a win costs at first, as a fraction of the distance between the first and the eighth neighbor."""
MAX_WINS = 5
"""Wins that count in one step, as a multiple of the expected ones: without a limit hubs overshoot."""
NUM_CHECKS = 10
MIN_CHECK_QUERIES = 16_384
CHECK_ERROR = 0.01
"""Standard error of the chi-square of a check, as a fraction of 1 + chi-square."""

Queries = Callable[[int], Float32[np.ndarray, "B S"]]
"""The batch of queries of a step, sampled from the query distribution."""


@dataclass(frozen=True, eq=False, slots=True)
class Potentials:
    """Potentials during or after the ascent, and how balanced they are."""

    g: Float32[np.ndarray, "N"]
    """One per training row, in squared distance; only differences matter."""
    chi_square: float
    """Of the hit counts of fresh queries."""
    step: int
    stop_reason: str | None = None
    """Why the ascent ended; None before its end."""

    def coordinate(self) -> Float32[np.ndarray, "N"]:
        """Return the balance coordinate sqrt(max(g) - g_i) of each row."""
        return np.asarray(np.sqrt(self.g.max() - self.g))


def fit_potentials(
    blocks: VectorBlocks,
    queries: Queries,
    *,
    start: Float32[np.ndarray, "N"] | None = None,
    target: float = TARGET,
    time_limit: float = np.inf,
    steps: int | None = None,
) -> Iterator[Potentials]:
    """Maximize the semi-dual; yield the averaged potentials at the start, every tenth of the way, and at the end.

    The ascent from earlier potentials (`start`) takes smaller steps. A time limit in seconds makes the result depend
    on the machine; a number of steps does not.
    """
    import torch

    n, began = blocks.count, time.monotonic()
    batch = queries(0)
    batch_size = len(batch)
    steps = steps or int(np.clip(QUERIES_PER_ROW * n / batch_size, 400, 50_000))
    near, _ = blocks.nearest(batch, k=8)
    gap = float((near[:, -1] - near[:, 0]).mean()) or 1.0
    rate = STEP_SIZE * gap * batch_size / n * (1.0 if start is None else 1 / 3)
    g = torch.zeros(n) if start is None else torch.from_numpy(start - start.mean())
    g = g.to(blocks.device)
    average = g.clone()

    def check(step: int, stop_reason: str | None) -> Potentials:
        chi2 = chi_square_of(blocks, queries, average, range(steps, steps + -(-num_check_queries(n) // batch_size)))
        if chi2 < target:
            stop_reason = f"chi-square is below {target:g}"
        return Potentials(average.cpu().numpy().astype(np.float32), chi2, step, stop_reason)

    potentials = check(0, None)
    yield potentials
    if potentials.stop_reason:
        return
    checked, progress = 0.0, 0.0
    for step in range(steps):
        gradient = 1.0 - _wins(blocks, queries(step), g) * (n / batch_size)
        g = g + rate * (1 - progress) ** 2 * gradient.clamp(min=-MAX_WINS * max(n / batch_size, 1.0))
        g = g - g.mean()
        average = g.clone() if progress < 0.05 else 0.98 * average + 0.02 * g
        progress = max((step + 1) / steps, (time.monotonic() - began) / time_limit)
        if progress < 1 and progress - checked < 1 / NUM_CHECKS:
            continue
        checked, end = progress, None
        if progress >= 1:
            end = "all steps are done" if step + 1 == steps else f"the time limit of {time_limit:g} s is reached"
        potentials = check(step + 1, end)
        yield potentials
        if potentials.stop_reason:
            return


def chi_square_of(blocks: VectorBlocks, queries: Queries, g: "torch.Tensor | None", steps: range) -> float:
    """Return the chi-square of the hits, with potentials g (N) or without, of the queries of some steps."""
    return chi_square(sum(_wins(blocks, queries(step), g) for step in steps).cpu().numpy())  # type: ignore[union-attr]


def _wins(blocks: VectorBlocks, batch: Float32[np.ndarray, "B S"], g: "torch.Tensor | None") -> "torch.Tensor":
    """Return how many of the queries each row wins."""
    import torch

    return torch.bincount(blocks.nearest(batch, g=g)[1][:, 0], minlength=blocks.count)


def num_check_queries(rows: int) -> int:
    """Return how many queries a check counts: Q of them make Q^2 / 2N pairs, whose number has a Poisson error."""
    return max(MIN_CHECK_QUERIES, int(np.sqrt(2 * rows) / CHECK_ERROR))


def rows_in_time(blocks: VectorBlocks, batch: Float32[np.ndarray, "B S"], time_limit: float) -> int:
    """Return to how many rows potentials can be fitted in a time limit, by how long some rows take to be compared."""
    blocks.nearest(batch)
    began = time.monotonic()
    blocks.nearest(batch)
    comparisons = len(batch) * blocks.count / (time.monotonic() - began)
    return int(np.sqrt(comparisons * time_limit / QUERIES_PER_ROW))


def extend_potentials(
    sample: VectorBlocks,
    g: Float32[np.ndarray, "M"],
    blocks: VectorBlocks,
    queries: Queries,
    *,
    num_queries: int = 65_536,
    memory: int | None = None,
) -> Float32[np.ndarray, "N"]:
    """Derive the potentials of all rows from those of a sample, by the c-transform of the semi-dual over queries.

    g(v) = min_q |q - v|^2 - f(q) with f(q) = min_j |q - v_j|^2 - g_j over the sample: the largest potential with which
    a row takes no query from the sample. One pass over the rows serves as many batches of queries as a quarter of
    `memory` bytes holds (None: all).
    """
    import torch

    potential = torch.from_numpy(g).to(sample.device)
    size, dim = queries(0).shape
    steps = -(-num_queries // size)
    at_once = steps if memory is None else max(1, working_bytes(memory) // (4 * size * dim))
    extended = np.full(blocks.count, np.inf, np.float32)
    for first in range(0, steps, at_once):
        # |q - v|^2 - f(q) = |v|^2 - 2 q.v + |q|^2 - f(q)
        lines = list[tuple[torch.Tensor, torch.Tensor]]()
        for step in range(first, min(first + at_once, steps)):
            batch = queries(step)
            cost, _ = sample.nearest(batch, g=potential)
            q = torch.from_numpy(batch).to(sample.device)
            lines.append((q, q.square().sum(1) - cost[:, 0]))
        for block in blocks:
            least = torch.full((len(block.vectors),), torch.inf, device=blocks.device)
            for q, offset in lines:
                least = torch.minimum(least, torch.addmm(offset, block.vectors, q.T, alpha=-2).min(1).values)
            positions = block.positions.cpu().numpy()
            extended[positions] = np.minimum(extended[positions], (least + block.squares).cpu().numpy())
    return extended
