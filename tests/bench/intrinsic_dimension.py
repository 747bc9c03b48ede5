"""Quality of few steps as the data's intrinsic dimension grows, all else being equal.

The data are ten clusters in 64 dimensions, each a Gaussian along k orthogonal directions of its own about a center of
its own, with a little noise in all directions. For every k, centers and clusters have half of the variance each, there
are 10,000 training rows, and every network sees equally many pairs. The cluster is the caption, and decides in the
search. Geometry and balance are the project's: coordinates standardized, R and image parts on the sphere.

Quality is that of 2,000 samples against as many fresh points of the same clusters, in coordinates: the Frechet distance
over the number of dimensions, the energy distance, the sliced Wasserstein distance, precision and coverage. The Frechet
distance forgives samples off the clusters' planes, precision and coverage samples that have shrunk toward their means,
so read them together. References are training rows (as good as it gets) and retrieved pairs (a perfect network). The
linear probe is the held-out R^2 of a ridge fit from R and caption to the target, next to that of the caption alone.
Seeds change the data too.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from balanced_pairs import ArrayBlocks, balance
from jaxtyping import Float32, Float64, Int
from small_runs import Bank, make_toy_objective, over_seeds, sample, train

from index.report.hubness import ridge_r2
from index.space.geometry import Geometry
from index.space.moments import Moments
from index.space.queries import draw_points, draw_rows
from trainer.evaluation.metrics import energy_distance, frechet, prdc, sliced_wasserstein

DIM, CLUSTERS, NOISE = 64, 10, 0.03
TRAINING, BANK, TESTED = 10_000, 131_072, 2_000
DESC_SCALE = 4.0
"""Large enough that no neighbor is of another cluster."""
ASCENT_STEPS, BATCH, PROBED = 800, 1024, 8192
HIDDEN_DIM = 96
STEPS = (1, 2, 8)
ROWS = (
    ("coalescer", "default", "nearest"),
    ("coalescer", "time", "nearest"),
    ("coalescer", "paper", "nearest"),
    ("flow_matching", "default", "nearest"),
    ("flow_matching", "default", "independent"),
    ("mean_flow", "default", "nearest"),
    ("mean_flow", "default", "independent"),
    ("consistency", "default", "independent"),
)


class Mixture(NamedTuple):
    """The distribution of the data; C clusters in D dimensions."""

    centers: Float64[np.ndarray, "C D"]
    frames: Float64[np.ndarray, "C D k"]
    """Orthogonal directions, as long as the standard deviation along them."""

    def draw(self, label: Int[np.ndarray, "N"], rng: np.random.Generator) -> Float32[np.ndarray, "N D"]:
        """Draw a point of the cluster of each label."""
        along = rng.standard_normal((len(label), self.frames.shape[2]))
        noise = NOISE * rng.standard_normal((len(label), self.frames.shape[1]))
        x = self.centers[label] + noise
        for cluster, frame in enumerate(self.frames):
            x[label == cluster] += along[label == cluster] @ frame.T
        return x.astype(np.float32)


def mixture(k: int, rng: np.random.Generator) -> Mixture:
    """Draw clusters of intrinsic dimension k."""
    frames = np.linalg.qr(rng.standard_normal((CLUSTERS, DIM, k))).Q
    return Mixture(rng.standard_normal((CLUSTERS, DIM)) * 0.5**0.5, frames * (0.5 * DIM / k) ** 0.5)


def balanced_labels(count: int) -> Int[np.ndarray, "N"]:
    """Return the labels of all clusters in turn."""
    return np.arange(count) % CLUSTERS


def embed(label: Int[np.ndarray, "N"]) -> Float32[np.ndarray, "N C"]:
    """Return one-hot text embeddings."""
    return np.eye(CLUSTERS, dtype=np.float32)[label]


class Dataset(NamedTuple):
    """Training rows of a mixture, and the balanced search among them."""

    mixture: Mixture
    geometry: Geometry
    x: Float32[np.ndarray, "N D"]
    """Coordinates."""
    label: Int[np.ndarray, "N"]
    blocks: ArrayBlocks
    g: Float32[np.ndarray, "N"]
    """Potentials."""
    chi_square: float

    def retrieve(
        self, label: Int[np.ndarray, "B"], r: Float32[np.ndarray, "B D"], *, balanced: bool = True
    ) -> Float32[np.ndarray, "B D"]:
        """Return the coordinates of the neighbors."""
        g = self.g if balanced else np.zeros_like(self.g)
        return self.x[self.blocks.winners(self.geometry.queries(embed(label), r), g, BATCH)]

    def banks(self, seed: int) -> dict[str, Bank]:
        """Draw pairs of both couplings, with the same noise and captions."""
        rows = draw_rows(len(self.x), BANK, seed=seed, step=0)
        label, r = self.label[rows], draw_points(self.geometry, BANK, seed=seed, step=0)
        text = embed(label)
        return {"independent": Bank(r, text, self.x[rows]), "nearest": Bank(r, text, self.retrieve(label, r))}


def draw_dataset(k: int, seed: int) -> Dataset:
    """Draw a mixture and its rows, and balance the search."""
    rng = np.random.default_rng([seed, k])
    distribution, label = mixture(k, rng), balanced_labels(TRAINING)
    latent, text = distribution.draw(label, rng), embed(label)
    geometry = Geometry.fit(Moments.of(text, latent), kind="sphere", desc_scale=DESC_SCALE)
    blocks = ArrayBlocks(geometry.vectors(text, latent), label, geometry.text_dim)

    def queries(step: int) -> Float32[np.ndarray, "B S"]:
        at = {"seed": seed + 1_000, "step": step}
        rows = draw_rows(TRAINING, BATCH, **at)
        return geometry.queries(text[rows], draw_points(geometry, BATCH, **at))

    fitted = balance(blocks, queries, steps=ASCENT_STEPS)
    return Dataset(distribution, geometry, geometry.to_coordinates(latent), label, blocks, fitted.g, fitted.chi_square)


def quality(samples: Float32[np.ndarray, "N D"], real: Float32[np.ndarray, "N D"]) -> dict[str, float]:
    """Compare samples with fresh points."""
    near = prdc(real, samples)
    return {
        "frechet": frechet(samples, real) / DIM,
        "energy": energy_distance(samples, real),
        "sliced_wasserstein": sliced_wasserstein(samples, real),
        "precision": near.precision,
        "coverage": near.coverage,
    }


def linear_probe_r2(bank: Bank) -> dict[str, float]:
    """Return the held-out R^2 of ridge fits to the target.

    They are from R and caption as the project reports it, from the caption alone, and the mean of those from R within
    each cluster, where the frame is the same.
    """
    probed = slice(PROBED)
    # As heavy in the ridge fit as the coordinates of R.
    text = bank.text[probed] * np.float32(CLUSTERS**0.5)
    within = [ridge_r2(bank.r[rows], bank.y[rows]) for rows in bank.text.T > 0]
    return {
        "linear_probe_r2": ridge_r2(np.concatenate([bank.r[probed], text], 1), bank.y[probed]),
        "linear_probe_r2_of_caption": ridge_r2(text, bank.y[probed]),
        "linear_probe_r2_within_clusters": float(np.mean(within)),
    }


def measure(k: int, seed: int, steps: int) -> dict[tuple[Any, ...], dict[str, float]]:
    """Return all metrics at one dimension for one seed, by objective, preset, pairs and number of steps."""
    data = draw_dataset(k, seed)
    rng, label = np.random.default_rng([seed, k, 1]), balanced_labels(TESTED)
    real = data.geometry.to_coordinates(data.mixture.draw(label, rng))
    r = draw_points(data.geometry, TESTED, seed=seed + 2_000, step=0)
    banks = data.banks(seed)
    metrics: dict[tuple[Any, ...], dict[str, float]] = {
        ("search", "", "nearest", 0): {"chi_square": data.chi_square} | linear_probe_r2(banks["nearest"]),
        # Rows and samples have their labels in the same order.
        ("training rows", "", "", 0): quality(data.x[:TESTED], real),
        ("retrieved pairs", "", "nearest", 0): quality(data.retrieve(label, r), real),
        ("retrieved pairs", "unbalanced", "nearest", 0): quality(data.retrieve(label, r, balanced=False), real),
    }
    for name, preset, pairs in ROWS:
        objective = make_toy_objective(name, preset)
        network = train(objective, banks[pairs], steps=steps, hidden_dim=HIDDEN_DIM, seed=seed)
        noise = (draw_points(data.geometry, TESTED, seed=seed + 2_000, step=step) for step in range(1, 100))
        for n in STEPS:
            samples = sample(objective, network, r, embed(label), n, lambda: next(noise))  # noqa: B023
            metrics[name, preset, pairs, n] = quality(samples, real)
            print(k, seed, name, preset, pairs, n, metrics[name, preset, pairs, n], file=sys.stderr)
    return metrics


def table(dims: Sequence[int], seeds: int, steps: int) -> list[dict[str, Any]]:
    """Return the metrics over the seeds for each dimension, objective and number of steps, references first."""
    values: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in range(seeds):
        for k in dims:
            for row, metrics in measure(k, seed, steps).items():
                for name, value in metrics.items():
                    values[k, *row][name].append(value)
    keys = ("k", "objective", "preset", "pairs", "steps")
    return [
        dict(zip(keys, row, strict=True)) | {name: over_seeds(each) for name, each in metrics.items()}
        for row, metrics in sorted(values.items(), key=lambda item: item[0][0])
    ]
