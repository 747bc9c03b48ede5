"""The dial: how good few steps are as the data's intrinsic dimension grows, all else being equal.

In 64 dimensions lie ten clusters, each a Gaussian along k orthogonal directions of its own about a center of its own,
and a little noise in all. Whatever k, centers and clusters have half of the variance each, there are 10,000 training
rows, and every network sees as many pairs. The cluster is the description, and decides in the search. Geometry and
balance are the project's: coordinates standardized, R and what it is compared with on the sphere.

Quality is that of 2,000 samples against as many fresh points of the same clusters, in coordinates: the Frechet distance
over the number of dimensions, the energy distance, the sliced Wasserstein distance, precision and coverage. The first
forgives samples beside the clusters' planes, the last those that have shrunk towards their means: read them together.
Floors are training rows (as good as it gets) and retrieved pairs (a perfect network). Learnability is the held-out R^2
of a ridge fit from R and description to the target, beside what the description alone tells. Seeds change the law too.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from balanced_pairs import ArrayBlocks, balance
from jaxtyping import Float32, Float64, Int
from small_runs import Bank, lead, objective_of, over_seeds, train

from index.report.hubness import ridge_r2
from index.space.geometry import Geometry
from index.space.moments import Moments
from index.space.queries import draw_points, draw_rows
from trainer.evaluation.metrics import energy_distance, frechet, prdc, sliced_wasserstein

SIZE, CLUSTERS, NOISE = 64, 10, 0.03
TRAINING, BANK, TESTED = 10_000, 131_072, 2_000
DESC_SCALE = 4.0
"""Of two clusters no points are near enough to be mistaken."""
ASCENT, AT_ONCE, FITTED = 800, 1024, 8192
WIDTH = 96
STEPS = (1, 2, 8)
ROWS = (
    ("coalescer", "default", "nearest"),
    ("coalescer", "clock", "nearest"),
    ("coalescer", "paper", "nearest"),
    ("flow_matching", "default", "nearest"),
    ("flow_matching", "default", "independent"),
    ("mean_flow", "default", "nearest"),
    ("mean_flow", "default", "independent"),
    ("consistency", "default", "independent"),
)


class Mixture(NamedTuple):
    """The law."""

    centers: Float64[np.ndarray, "C D"]
    frames: Float64[np.ndarray, "C D k"]
    """Orthogonal directions, as long as the standard deviation along them."""

    def draw(self, label: Int[np.ndarray, "N"], rng: np.random.Generator) -> Float32[np.ndarray, "N D"]:
        """A point of each of these clusters."""
        along = rng.standard_normal((len(label), self.frames.shape[2]))
        noise = NOISE * rng.standard_normal((len(label), self.frames.shape[1]))
        x = self.centers[label] + noise
        for cluster, frame in enumerate(self.frames):
            x[label == cluster] += along[label == cluster] @ frame.T
        return x.astype(np.float32)


def mixture(k: int, rng: np.random.Generator) -> Mixture:
    """Random clusters of intrinsic dimension k."""
    frames = np.linalg.qr(rng.standard_normal((CLUSTERS, SIZE, k))).Q
    return Mixture(rng.standard_normal((CLUSTERS, SIZE)) * 0.5**0.5, frames * (0.5 * SIZE / k) ** 0.5)


def evenly(count: int) -> Int[np.ndarray, "N"]:
    """As many labels of every cluster, in turn."""
    return np.arange(count) % CLUSTERS


def described(label: Int[np.ndarray, "N"]) -> Float32[np.ndarray, "N C"]:
    """One-hot descriptions."""
    return np.eye(CLUSTERS, dtype=np.float32)[label]


class World(NamedTuple):
    """Training rows of a law, and the balanced search among them."""

    law: Mixture
    geometry: Geometry
    x: Float32[np.ndarray, "N D"]
    """Coordinates."""
    label: Int[np.ndarray, "N"]
    blocks: ArrayBlocks
    g: Float32[np.ndarray, "N"]
    chi_square: float

    def retrieved(
        self, label: Int[np.ndarray, "B"], r: Float32[np.ndarray, "B D"], *, balanced: bool = True
    ) -> Float32[np.ndarray, "B D"]:
        """The coordinates of the neighbors."""
        g = self.g if balanced else np.zeros_like(self.g)
        return self.x[self.blocks.winners(self.geometry.queries(described(label), r), g, AT_ONCE)]

    def banks(self, seed: int) -> dict[str, Bank]:
        """RetrievedPairs of both couplings: the same random points and descriptions."""
        rows = draw_rows(len(self.x), BANK, seed=seed, step=0)
        label, r = self.label[rows], draw_points(self.geometry, BANK, seed=seed, step=0)
        text = described(label)
        return {"independent": Bank(r, text, self.x[rows]), "nearest": Bank(r, text, self.retrieved(label, r))}


def world(k: int, seed: int) -> World:
    """Draw a law and its rows, and balance them."""
    rng = np.random.default_rng([seed, k])
    law, label = mixture(k, rng), evenly(TRAINING)
    latent, text = law.draw(label, rng), described(label)
    geometry = Geometry.fit(Moments.of(text, latent), kind="sphere", desc_scale=DESC_SCALE)
    blocks = ArrayBlocks(geometry.vectors(text, latent), label, geometry.text_dim)

    def queries(step: int) -> Float32[np.ndarray, "B S"]:
        at = {"seed": seed + 1_000, "step": step}
        rows = draw_rows(TRAINING, AT_ONCE, **at)
        return geometry.queries(text[rows], draw_points(geometry, AT_ONCE, **at))

    found = balance(blocks, queries, steps=ASCENT)
    return World(law, geometry, geometry.to_coordinates(latent), label, blocks, found.g, found.chi_square)


def quality(found: Float32[np.ndarray, "N D"], real: Float32[np.ndarray, "N D"]) -> dict[str, float]:
    """How far samples are from fresh points."""
    near = prdc(real, found)
    return {
        "frechet": frechet(found, real) / SIZE,
        "energy": energy_distance(found, real),
        "sliced_wasserstein": sliced_wasserstein(found, real),
        "precision": near.precision,
        "coverage": near.coverage,
    }


def linear_probe_r2(bank: Bank) -> dict[str, float]:
    """Held-out R^2 of ridge fits to the target: from R and description as the project reports it, from the description
    alone, and from R in each cluster apart, where frames are the same."""
    some = slice(FITTED)
    # As heavy in the ridge fit as the coordinates of R.
    text = bank.text[some] * np.float32(CLUSTERS**0.5)
    apart = [ridge_r2(bank.r[rows], bank.y[rows]) for rows in bank.text.T > 0]
    return {
        "linear_probe_r2": ridge_r2(np.concatenate([bank.r[some], text], 1), bank.y[some]),
        "told_by_description": ridge_r2(text, bank.y[some]),
        "learnability_within_clusters": float(np.mean(apart)),
    }


def measure(k: int, seed: int, steps: int) -> dict[tuple[Any, ...], dict[str, float]]:
    """All figures at one dimension from one seed, by objective, preset, pairs and number of steps."""
    here = world(k, seed)
    rng, label = np.random.default_rng([seed, k, 1]), evenly(TESTED)
    real = here.geometry.to_coordinates(here.law.draw(label, rng))
    r = draw_points(here.geometry, TESTED, seed=seed + 2_000, step=0)
    banks = here.banks(seed)
    figures: dict[tuple[Any, ...], dict[str, float]] = {
        ("search", "", "nearest", 0): {"chi_square": here.chi_square} | linear_probe_r2(banks["nearest"]),
        # Rows stand by clusters in turn, so the first of them have the labels of the samples.
        ("training rows", "", "", 0): quality(here.x[:TESTED], real),
        ("retrieved pairs", "", "nearest", 0): quality(here.retrieved(label, r), real),
        ("retrieved pairs", "unbalanced", "nearest", 0): quality(here.retrieved(label, r, balanced=False), real),
    }
    for name, preset, pairs in ROWS:
        objective = objective_of(name, preset)
        network = train(objective, banks[pairs], steps=steps, width=WIDTH, seed=seed)
        noise = (draw_points(here.geometry, TESTED, seed=seed + 2_000, step=step) for step in range(1, 100))
        for n in STEPS:
            found = lead(objective, network, r, described(label), n, lambda: next(noise))  # noqa: B023
            figures[name, preset, pairs, n] = quality(found, real)
            print(k, seed, name, preset, pairs, n, figures[name, preset, pairs, n], file=sys.stderr)
    return figures


def table(dims: Sequence[int], seeds: int, steps: int) -> list[dict[str, Any]]:
    """A line for each dimension, objective and number of steps, floors and search first."""
    found: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in range(seeds):
        for k in dims:
            for row, figures in measure(k, seed, steps).items():
                for name, figure in figures.items():
                    found[k, *row][name].append(figure)
    keys = ("k", "objective", "preset", "pairs", "steps")
    return [
        dict(zip(keys, row, strict=True)) | {name: over_seeds(values) for name, values in figures.items()}
        for row, figures in sorted(found.items(), key=lambda item: item[0][0])
    ]
