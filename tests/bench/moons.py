"""8 Gaussians to two moons under three conditions: C2OT's test of couplings (arXiv 2503.10636, figure 1), and ours.

Data and metric are those of hkchengrex/C2OT. The Gaussians stand on a circle of radius 5, with variance sqrt(0.1) (its
code takes a root for a variance). The half circles are evenly spaced, both coordinates get the same uniform noise, and
all is scaled by three. W2 is the squared Wasserstein distance, as POT's exact solver returns it. The condition is none,
the moon (`label`), or the target's first coordinate (`coordinate`), whose weight leaves 5% of a batch no farther from a
point than its own pair. Assignments are of 1,024 points.

Differences: points are divided by UNIT, so that R has about variance 1 as networks expect. The network is ours, with
50,000 weights against 400,000, for a tenth of the 20,000 training steps, on 16,384 pairs. W2 is of 2,000 points against
10,000, hence the references, and of equally many points of each Gaussian, whose counts by chance would outweigh many a
difference. `nearest` searches among 2,000 fixed targets with dual potentials, with the assignments' weight of the
condition.
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
from small_runs import Bank, make_toy_objective, over_seeds, sample, train

from trainer.models.base import Network

UNIT = 3.5
CONDITIONS = ("none", "label", "coordinate")
ASSIGNED, BANK, TARGETS, TESTED = 1024, 16_384, 2_000, 2_000
ASCENT_STEPS, MAX_CHI_SQUARE = 6_000, 0.01
"""For the search's potentials: R lies in eight clusters, far from some targets, so the ascent takes longer than
elsewhere, and longer still with more targets."""
LABEL_WEIGHT, MAX_WEIGHT = 30.0, 1e4
"""With this weight of the label no pair crosses, and float32 still separates neighbors; the largest weight tried for a
coordinate."""
NO_FARTHER = 0.05
"""C2OT's r."""
HIDDEN_DIM = 64
ROWS = (
    ("flow_matching", "default", "independent"),
    ("flow_matching", "default", "assigned"),
    ("flow_matching", "default", "assigned with condition"),
    ("flow_matching", "default", "nearest"),
    ("coalescer", "default", "nearest"),
    ("coalescer", "time", "nearest"),
    ("coalescer", "paper", "nearest"),
)
PUBLISHED = {
    ("none", "independent"): (6.23, 0.120),
    ("none", "assigned"): (0.072, 0.050),
    ("label", "independent"): (2.57, 0.059),
    ("label", "assigned"): (0.483, 0.462),
    ("label", "assigned with condition"): (0.048, 0.018),
    ("coordinate", "independent"): (0.732, 0.028),
    ("coordinate", "assigned"): (8.28, 2.14),
    ("coordinate", "assigned with condition"): (0.077, 0.013),
}
"""W2 of flow matching with one step, and with an adaptive solver."""


class Targets(NamedTuple):
    """Points of the moons and their conditions."""

    y: Float32[np.ndarray, "N 2"]
    condition: Float32[np.ndarray, "N"]
    """-1 to 1."""

    def text(self) -> Float32[np.ndarray, "N 2"]:
        """Return the condition as a point of a half circle, because networks normalize text embeddings."""
        angle = self.condition * np.float32(np.pi / 2)
        return np.stack([np.cos(angle), np.sin(angle)], 1)


def eight_gaussians(count: int, rng: np.random.Generator, *, evenly: bool = False) -> Float32[np.ndarray, "N 2"]:
    """Draw points R, equally many of each Gaussian or by chance."""
    component = rng.permutation(np.arange(count) % 8) if evenly else rng.integers(8, size=count)
    angle = component * (np.pi / 4)
    noise = rng.standard_normal((count, 2)) * 0.1**0.25
    return ((5 * np.stack([np.cos(angle), np.sin(angle)], 1) + noise) / UNIT).astype(np.float32)


def moons(count: int, condition: str, rng: np.random.Generator) -> Targets:
    """Draw points of both moons in a random order, with their conditions."""
    outer, inner = np.linspace(0, np.pi, count // 2), np.linspace(0, np.pi, count - count // 2)
    x = np.concatenate([np.cos(outer), 1 - np.cos(inner)])
    y = np.concatenate([np.sin(outer), 0.5 - np.sin(inner)])
    points = 3 * (np.stack([x, y], 1) + 0.2 * rng.random((count, 1))) - 1
    label = np.repeat([-1.0, 1.0], [len(outer), len(inner)])
    # The first coordinate runs from -4 to 5.6.
    value = {"none": 0 * label, "label": label, "coordinate": (points[:, 0] - 0.8) / 4.8}[condition]
    order = rng.permutation(count)
    return Targets((points[order] / UNIT).astype(np.float32), value[order].astype(np.float32))


def cost(r: Float32[np.ndarray, "N 2"], targets: Targets, weight: float) -> Float64[np.ndarray, "N N"]:
    """Return squared distances plus the weighted squared differences between the i-th and the j-th condition."""
    condition = targets.condition[:, None].astype(np.float64)
    return cdist(r, targets.y, "sqeuclidean") + weight * cdist(condition, condition, "sqeuclidean")


def assign(r: Float32[np.ndarray, "N 2"], targets: Targets, weight: float) -> Int[np.ndarray, "N"]:
    """Return the position of each point's target in the one-to-one coupling of the least cost."""
    return linear_sum_assignment(cost(r, targets, weight))[1]


def condition_weight(condition: str, rng: np.random.Generator) -> float:
    """Return the weight of a condition in the cost: for `coordinate` by bisection, as C2OT does."""
    if condition != "coordinate":
        return {"none": 0.0, "label": LABEL_WEIGHT}[condition]
    r, targets = eight_gaussians(ASSIGNED, rng), moons(ASSIGNED, condition, rng)
    distances = cost(r, targets, 0.0)
    differences = cost(r, targets, 1.0) - distances
    low, high = 0.0, MAX_WEIGHT
    for _ in range(40):
        middle = (low + high) / 2
        enough = (distances + middle * differences <= np.diag(distances)[:, None]).mean() < NO_FARTHER
        low, high = (low, middle) if enough else (middle, high)
    return high


class BalancedSearch(NamedTuple):
    """Balanced nearest-neighbor search among targets."""

    targets: Targets
    blocks: ArrayBlocks
    scaled_condition: Float32[np.ndarray, "N"]
    """Condition times the root of its weight, the first entry of a search vector."""
    g: Float32[np.ndarray, "N"]
    """Potentials."""

    def bank(self, r: Float32[np.ndarray, "B 2"], queries: Int[np.ndarray, "B"]) -> Bank:
        """Retrieve the balanced neighbor for each R and the condition of a target."""
        vectors = np.concatenate([self.scaled_condition[queries, None], r], 1)
        winners = self.blocks.winners(vectors, self.g)
        return Bank(r, self.targets.text()[winners], self.targets.y[winners])


def balanced_search(targets: Targets, weight: float, rng: np.random.Generator) -> BalancedSearch:
    """Fit the potentials of a search among targets."""
    condition = np.float32(np.sqrt(weight)) * targets.condition
    group = np.digitize(targets.condition, np.linspace(-1, 1, 9)[1:-1])
    blocks = ArrayBlocks(np.concatenate([condition[:, None], targets.y], 1), group, text_dim=1)

    def queries(step: int) -> Float32[np.ndarray, "B 3"]:
        return np.concatenate([rng.choice(condition, (ASSIGNED, 1)), eight_gaussians(ASSIGNED, rng)], 1)

    fitted = balance(blocks, queries, steps=ASCENT_STEPS, target=MAX_CHI_SQUARE)
    print(f"balanced: chi^2 {fitted.chi_square:.3f} after {fitted.step} steps", file=sys.stderr)
    return BalancedSearch(targets, blocks, condition, fitted.g)


def draw_bank(pairs: str, condition: str, rng: np.random.Generator) -> Bank:
    """Draw independent or assigned pairs for training."""
    weight = 0.0 if pairs == "assigned" else condition_weight(condition, rng)
    parts = []
    for _ in range(BANK // ASSIGNED):
        r, targets = eight_gaussians(ASSIGNED, rng), moons(ASSIGNED, condition, rng)
        order = np.arange(ASSIGNED) if pairs == "independent" else assign(r, targets, weight)
        parts.append((r, targets.text()[order], targets.y[order]))
    return Bank(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def wasserstein(a: Float[np.ndarray, "N 2"], b: Float[np.ndarray, "N 2"]) -> float:
    """Return the exact squared Wasserstein-2 distance, which C2OT prints as W2."""
    import ot

    return float(ot.emd2([], [], ot.dist(a.astype(np.float64), b.astype(np.float64)), numItermax=10**8))


@torch.inference_mode()
def solve_flow(
    network: Network, r: Float32[np.ndarray, "B 2"], text: Float32[np.ndarray, "B 2"]
) -> Float32[np.ndarray, "B 2"]:
    """Integrate the learned velocity with an adaptive Runge-Kutta method of order 5."""
    embedding = torch.from_numpy(text)[:, None]

    def velocity(t: float, x: Float64[np.ndarray, "_"]) -> Float64[np.ndarray, "_"]:
        points = torch.from_numpy(x.reshape(-1, 2).astype(np.float32))
        return network(points, embedding, time=torch.full((len(points),), t)).direction.double().numpy().ravel()

    solution = solve_ivp(velocity, (0, 1), r.ravel().astype(np.float64), "RK45", rtol=1e-4, atol=1e-4)
    return solution.y[:, -1].reshape(-1, 2).astype(np.float32)


def measure(condition: str, seed: int, steps: int) -> dict[tuple[str, ...], dict[str, float]]:
    """Return W2 of every row under one condition, for one seed."""
    rng = np.random.default_rng([seed, CONDITIONS.index(condition)])
    r, real = eight_gaussians(TESTED, rng, evenly=True), moons(TESTED, condition, rng)
    search = balanced_search(moons(TARGETS, condition, rng), condition_weight(condition, rng), rng)
    banks = {"nearest": search.bank(eight_gaussians(BANK, rng), rng.integers(TARGETS, size=BANK))}
    # There are as many targets as tested points: the k-th smallest condition of one goes with that of the other.
    matching = np.argsort(search.targets.condition)[np.argsort(np.argsort(real.condition))]
    metrics = {
        ("fresh points", "", ""): {"": _w2(moons(TESTED, condition, rng).y, real)},
        ("retrieved pairs", "", "nearest"): {"": _w2(search.bank(r, matching).y, real)},
    }
    for name, preset, pairs in ROWS:
        if condition == "none" and pairs == "assigned with condition":
            continue
        if pairs not in banks:
            banks[pairs] = draw_bank(pairs, condition, rng)
        objective = make_toy_objective(name, preset)
        network = train(objective, banks[pairs], steps=steps, hidden_dim=HIDDEN_DIM, seed=seed)
        is_flow = name == "flow_matching"
        samples = {
            str(n): sample(objective, network, r, real.text(), n, lambda: eight_gaussians(TESTED, rng))
            for n in ((1, 2) if is_flow else (1, 2, 8))
        }
        if is_flow:
            samples["adaptive"] = solve_flow(network, r, real.text())
        metrics[name, preset, pairs] = {n: _w2(x, real) for n, x in samples.items()}
        print(condition, seed, name, preset, pairs, metrics[name, preset, pairs], file=sys.stderr)
    return metrics


def _w2(samples: Float32[np.ndarray, "N 2"], real: Targets) -> float:
    return wasserstein(UNIT * samples, UNIT * real.y)


def table(seeds: int, steps: int) -> list[dict[str, Any]]:
    """Return W2 over the seeds by number of steps, for each condition, coupling and objective, references first."""
    lines = []
    for condition in CONDITIONS:
        values: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for seed in range(seeds):
            for row, metrics in measure(condition, seed, steps).items():
                for n, value in metrics.items():
                    values[row][n].append(value)
        for (name, preset, pairs), by_steps in values.items():
            line = {"condition": condition, "objective": name, "preset": preset, "pairs": pairs}
            line["w2"] = {n or "none": over_seeds(each) for n, each in by_steps.items()}
            if name == "flow_matching" and (condition, pairs) in PUBLISHED:
                line["published"] = dict(zip(("1", "adaptive"), PUBLISHED[condition, pairs], strict=True))
            lines.append(line)
    return lines
