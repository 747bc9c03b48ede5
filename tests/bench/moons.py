"""8 Gaussians to moons under three conditions: C2OT's test of couplings (arXiv 2503.10636, figure 1), and ours.

Data and measure are those of hkchengrex/C2OT: the Gaussians stand on a circle of radius 5, with variance sqrt(0.1) (its
code takes a root for a variance); of the half circles, evenly spaced, both coordinates get the same uniform noise,
before all is made three times as large. W2 is what POT's exact solver gives for squared distances, that is, the square.
The condition is nothing, the moon, or the target's first coordinate; that one's weight is such that 5% of a batch are
no farther than one's own pair. Assignments are of 1,024 points.

Other than there: points are divided by UNIT, so that R has about variance 1 as networks expect; the network is the
project's, 50,000 weights against 400,000, for a tenth of the 20,000 steps, on 16,384 pairs. W2 is of 2,000 points
against 10,000, hence the floors, and as many of each Gaussian, whose shares by chance would outweigh many a figure.
`nearest` searches among 2,000 fixed targets with dual potentials, the condition as heavy as in the assignments.
"""

import sys
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch
from balanced_pairs import ArrayBlocks, balance
from jaxtyping import Float, Float32, Float64, Int
from scipy.integrate import solve_ivp
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from small_runs import Bank, lead, objective_of, over_seeds, train

from trainer.models.base import Network

UNIT = 3.5
CONDITIONS = ("none", "label", "place")
ASSIGNED, BANK, TARGETS, TESTED = 1024, 16_384, 2_000, 2_000
ASCENT, EVEN = 6_000, 0.01
"""Steps and chi^2 of the search's balance: R lies in eight heaps, far from some targets, so it takes longer than
elsewhere, and with more targets longer still."""
DECISIVE, MOST = 30.0, 1e4
"""Weight of a label, with which no pair crosses and float32 still tells neighbors apart, and the most of a place."""
NO_FARTHER = 0.05
"""C2OT's r."""
WIDTH = 64
ROWS = (
    ("flow_matching", "default", "independent"),
    ("flow_matching", "default", "assigned"),
    ("flow_matching", "default", "assigned with condition"),
    ("flow_matching", "default", "nearest"),
    ("coalescer", "default", "nearest"),
    ("coalescer", "clock", "nearest"),
    ("coalescer", "paper", "nearest"),
)
PUBLISHED = {
    ("none", "independent"): (6.23, 0.120),
    ("none", "assigned"): (0.072, 0.050),
    ("label", "independent"): (2.57, 0.059),
    ("label", "assigned"): (0.483, 0.462),
    ("label", "assigned with condition"): (0.048, 0.018),
    ("place", "independent"): (0.732, 0.028),
    ("place", "assigned"): (8.28, 2.14),
    ("place", "assigned with condition"): (0.077, 0.013),
}
"""Of flow matching: with one step, and with an adaptive solver."""


class Targets(NamedTuple):
    """Points of the moons, and what is said of each."""

    y: Float32[np.ndarray, "N 2"]
    said: Float32[np.ndarray, "N"]
    """-1 to 1."""

    def text(self) -> Float32[np.ndarray, "N 2"]:
        """What is said as a point of a half circle: networks are told no lengths."""
        angle = self.said * np.float32(np.pi / 2)
        return np.stack([np.cos(angle), np.sin(angle)], 1)


def eight_gaussians(count: int, rng: np.random.Generator, *, evenly: bool = False) -> Float32[np.ndarray, "N 2"]:
    """Points R, as many of each Gaussian or by chance."""
    heap = rng.permutation(np.arange(count) % 8) if evenly else rng.integers(8, size=count)
    angle = heap * (np.pi / 4)
    noise = rng.standard_normal((count, 2)) * 0.1**0.25
    return ((5 * np.stack([np.cos(angle), np.sin(angle)], 1) + noise) / UNIT).astype(np.float32)


def moons(count: int, condition: str, rng: np.random.Generator) -> Targets:
    """Points of both moons in a random order, with what a condition says of them."""
    outer, inner = np.linspace(0, np.pi, count // 2), np.linspace(0, np.pi, count - count // 2)
    x = np.concatenate([np.cos(outer), 1 - np.cos(inner)])
    y = np.concatenate([np.sin(outer), 0.5 - np.sin(inner)])
    points = 3 * (np.stack([x, y], 1) + 0.2 * rng.random((count, 1))) - 1
    label = np.repeat([-1.0, 1.0], [len(outer), len(inner)])
    # The first coordinate is from -4 to 5.6.
    said = {"none": 0 * label, "label": label, "place": (points[:, 0] - 0.8) / 4.8}[condition]
    order = rng.permutation(count)
    return Targets((points[order] / UNIT).astype(np.float32), said[order].astype(np.float32))


def cost(r: Float32[np.ndarray, "N 2"], targets: Targets, weight: float) -> Float64[np.ndarray, "N N"]:
    """Squared distance, and that of what the i-th target and the j-th say times a weight."""
    said = targets.said[:, None].astype(np.float64)
    return cdist(r, targets.y, "sqeuclidean") + weight * cdist(said, said, "sqeuclidean")


def assigned(r: Float32[np.ndarray, "N 2"], targets: Targets, weight: float) -> Int[np.ndarray, "N"]:
    """The place of each point's target in the cheapest one-to-one coupling."""
    return linear_sum_assignment(cost(r, targets, weight))[1]


def weight_of(condition: str, rng: np.random.Generator) -> float:
    """How much a condition counts: for `place` by bisection, as C2OT does."""
    if condition != "place":
        return {"none": 0.0, "label": DECISIVE}[condition]
    r, targets = eight_gaussians(ASSIGNED, rng), moons(ASSIGNED, condition, rng)
    bare = cost(r, targets, 0.0)
    told = cost(r, targets, 1.0) - bare
    low, high = 0.0, MOST
    for _ in range(40):
        middle = (low + high) / 2
        farther = (bare + middle * told <= np.diag(bare)[:, None]).mean() < NO_FARTHER
        low, high = (low, middle) if farther else (middle, high)
    return high


class Balanced(NamedTuple):
    """The search: targets, and of each what is compared and its potential."""

    targets: Targets
    blocks: ArrayBlocks
    said: Float32[np.ndarray, "N"]
    """What is said, by the root of its weight."""
    g: Float32[np.ndarray, "N"]

    def bank(self, r: Float32[np.ndarray, "B 2"], asked: Int[np.ndarray, "B"]) -> Bank:
        """The balanced neighbors of random points with what is said of some targets."""
        place = self.blocks.winners(np.concatenate([self.said[asked, None], r], 1), self.g)
        return Bank(r, self.targets.text()[place], self.targets.y[place])


def balanced(targets: Targets, weight: float, rng: np.random.Generator) -> Balanced:
    """Fit the potentials of a search among some targets."""
    said = np.float32(np.sqrt(weight)) * targets.said
    group = np.digitize(targets.said, np.linspace(-1, 1, 9)[1:-1])
    blocks = ArrayBlocks(np.concatenate([said[:, None], targets.y], 1), group, text_dim=1)

    def queries(step: int) -> Float32[np.ndarray, "B 3"]:
        return np.concatenate([rng.choice(said, (ASSIGNED, 1)), eight_gaussians(ASSIGNED, rng)], 1)

    found = balance(blocks, queries, steps=ASCENT, target=EVEN)
    print(f"balanced: chi^2 {found.chi_square:.3f} after {found.step} steps", file=sys.stderr)
    return Balanced(targets, blocks, said, found.g)


def draw_bank(pairs: str, condition: str, rng: np.random.Generator) -> Bank:
    """Independent or assigned pairs, for training."""
    weight = 0.0 if pairs == "assigned" else weight_of(condition, rng)
    parts = []
    for _ in range(BANK // ASSIGNED):
        r, targets = eight_gaussians(ASSIGNED, rng), moons(ASSIGNED, condition, rng)
        place = np.arange(ASSIGNED) if pairs == "independent" else assigned(r, targets, weight)
        parts.append((r, targets.text()[place], targets.y[place]))
    return Bank(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def wasserstein(a: Float[np.ndarray, "N 2"], b: Float[np.ndarray, "N 2"]) -> float:
    """The exact cost of the best coupling by squared distance: W2 squared, which C2OT prints as W2."""
    import ot

    return float(ot.emd2([], [], ot.dist(a.astype(np.float64), b.astype(np.float64)), numItermax=10**8))


@torch.inference_mode()
def solved(
    network: Network, r: Float32[np.ndarray, "B 2"], text: Float32[np.ndarray, "B 2"]
) -> Float32[np.ndarray, "B 2"]:
    """Where the learned velocity leads, by an adaptive Runge-Kutta method of order 5."""
    told = torch.from_numpy(text)[:, None]

    def velocity(t: float, x: Float64[np.ndarray, "_"]) -> Float64[np.ndarray, "_"]:
        at = torch.from_numpy(x.reshape(-1, 2).astype(np.float32))
        return network(at, told, time=torch.full((len(at),), t)).direction.double().numpy().ravel()

    end = solve_ivp(velocity, (0, 1), r.ravel().astype(np.float64), "RK45", rtol=1e-4, atol=1e-4)
    return end.y[:, -1].reshape(-1, 2).astype(np.float32)


def measure(condition: str, seed: int, steps: int) -> dict[tuple[str, ...], dict[str, float]]:
    """W2 of every row under one condition from one seed."""
    rng = np.random.default_rng([seed, CONDITIONS.index(condition)])
    r, real = eight_gaussians(TESTED, rng, evenly=True), moons(TESTED, condition, rng)
    search = balanced(moons(TARGETS, condition, rng), weight_of(condition, rng), rng)
    banks = {"nearest": search.bank(eight_gaussians(BANK, rng), rng.integers(TARGETS, size=BANK))}
    # As many targets as tested points, which with equal shares say the same in the same order.
    like = np.argsort(search.targets.said)[np.argsort(np.argsort(real.said))]
    figures = {
        ("fresh points", "", ""): {"": _apart(moons(TESTED, condition, rng).y, real)},
        ("retrieved pairs", "", "nearest"): {"": _apart(search.bank(r, like).y, real)},
    }
    for name, preset, pairs in ROWS:
        if condition == "none" and pairs == "assigned with condition":
            continue
        if pairs not in banks:
            banks[pairs] = draw_bank(pairs, condition, rng)
        objective = objective_of(name, preset)
        network = train(objective, banks[pairs], steps=steps, width=WIDTH, seed=seed)
        velocity = name == "flow_matching"
        ends = {
            str(n): lead(objective, network, r, real.text(), n, lambda: eight_gaussians(TESTED, rng))
            for n in ((1, 2) if velocity else (1, 2, 8))
        }
        if velocity:
            ends["adaptive"] = solved(network, r, real.text())
        figures[name, preset, pairs] = {n: _apart(end, real) for n, end in ends.items()}
        print(condition, seed, name, preset, pairs, figures[name, preset, pairs], file=sys.stderr)
    return figures


def _apart(found: Float32[np.ndarray, "N 2"], real: Targets) -> float:
    return wasserstein(UNIT * found, UNIT * real.y)


def table(seeds: int, steps: int) -> list[dict[str, Any]]:
    """A line for each condition, coupling and objective: W2 by number of steps, over the seeds; floors first."""
    lines = []
    for condition in CONDITIONS:
        found: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for seed in range(seeds):
            for row, figures in measure(condition, seed, steps).items():
                for n, figure in figures.items():
                    found[row][n].append(figure)
        for (name, preset, pairs), each in found.items():
            line = {"condition": condition, "objective": name, "preset": preset, "pairs": pairs}
            line["w2"] = {n or "none": over_seeds(values) for n, values in each.items()}
            if name == "flow_matching" and (condition, pairs) in PUBLISHED:
                line["published"] = dict(zip(("1", "adaptive"), PUBLISHED[condition, pairs], strict=True))
            lines.append(line)
    return lines
