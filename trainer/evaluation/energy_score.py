"""The energy score: how well samples of a caption fit the image that was held out for it.

    score = mean |g_i - y|  -  1/2 mean |g_i - g_j|     over samples g of a caption, its held-out rows y, and i != j

It is least on average if samples have the distribution that y is drawn from (a strictly proper score; Gneiting and
Raftery 2007, https://doi.org/10.1198/016214506000001437), and needs one held-out image per caption. The first half
is least for a mean image, the second rewards variety: neither alone says which samples are better.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from index.space.centering import fit_centering
from index.space.moments import unit
from index.table.schema import TRAIN
from index.table.table import Table, sampled_rows
from trainer.evaluation.metrics import mean_distance, mean_distance_between
from trainer.evaluation.samples import Prompts, Samples

MIN_DRAWS = 4
"""Samples of a caption below which it is left out."""
REGRESSION_ROWS = 65_536
"""Training rows that the mean image of a caption is regressed on."""
SCAN_ROWS = 8192
RANDOM_ROWS, NEAREST_CAPTION, CAPTION_MEAN = "random rows", "nearest caption", "caption mean"


class EnergyScore(NamedTuple):
    """The score averaged over captions, and its halves."""

    score: float
    error: float
    """Standard error over captions."""
    distance: float
    """Mean distance of samples to held-out rows."""
    spread: float
    """Mean distance of two samples of a caption."""


def named_scores(in_coordinates: EnergyScore | None, in_features: EnergyScore | None) -> dict[str, float]:
    """Return metrics by name, of scores that there are."""
    names = ("energy_score", "energy_score_error", "energy_score_distance", "energy_score_spread")
    scores = {"": in_coordinates, "feature_": in_features}
    named = [
        (prefix + name, value)
        for prefix, score in scores.items()
        if score
        for name, value in zip(names, score, strict=True)
    ]
    return {name: value for name, value in named if not np.isnan(value)}


def energy_score(
    x: Float[np.ndarray, "P L"],
    group: Int[np.ndarray, "P"],
    real: Float[np.ndarray, "M L"],
    truth: Int[np.ndarray, "M"],
    captions: int,
    *,
    points: bool = False,
) -> EnergyScore | None:
    """Return the score of samples for the held-out rows of their captions, all captions weighted equally.

    `group` and `truth` number the captions, from 0 to `captions` - 1; others have negative numbers. With `points` the
    only sample of a caption is all that is predicted for it, without any spread. None if less than half of the
    captions have held-out rows and enough samples: scores of a few other captions could not be compared.
    """
    halves = []
    for number in range(captions):
        own, rows = x[group == number], real[truth == number]
        if len(rows) and (len(own) >= MIN_DRAWS or (points and len(own) == 1)):
            halves.append((mean_distance_between(own, rows), mean_distance(own) if len(own) > 1 else 0.0))
    return _average(halves, captions)


def energy_score_of_rows(x: Float[np.ndarray, "M L"], group: Int[np.ndarray, "M"], captions: int) -> EnergyScore | None:
    """Return the score of held-out rows themselves, each for the others of its caption: the least that is possible.

    None if less than half of the captions have two rows.
    """
    sets = [x[group == number] for number in range(captions)]
    distances = [mean_distance(rows) for rows in sets if len(rows) > 1]
    return _average([(distance, distance) for distance in distances], captions)


def _average(halves: Sequence[tuple[float, float]], captions: int) -> EnergyScore | None:
    if not halves or 2 * len(halves) < captions:
        return None
    distance, spread = np.array(halves).T
    scores = distance - spread / 2
    error = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else np.nan
    return EnergyScore(float(scores.mean()), float(error), float(distance.mean()), float(spread.mean()))


def number_captions(names: Sequence[str], captions: Iterable[str]) -> Int[np.ndarray, "M"]:
    """Return which of the names each caption is; -1 for none."""
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers.get(caption, -1) for caption in captions], np.int64)


def reference_points(table: Table, prompts: Prompts) -> Iterator[tuple[str, Samples]]:
    """Yield what a score is compared with: for the captions of the diversity set, points that need no network.

    random rows       as many training rows as there are samples of a caption, whatever their captions
    nearest caption   the training row whose text embedding is nearest to the caption's
    caption mean      a ridge regression of latents on text embeddings
    """
    names, geometry = prompts.group_captions, table.meta.geometry
    positions, rng = table.positions(TRAIN), np.random.default_rng([prompts.seed, 2])
    groups, each = prompts.diversity_group, np.arange(len(names))
    chosen = positions[rng.integers(len(positions), size=len(groups))]
    yield RANDOM_ROWS, _points(geometry.to_coordinates(table.take(chosen, "latent")), groups, names)
    first = prompts.count + np.unique(groups, return_index=True)[1]
    text = unit(table.take(prompts.positions[first], "text").astype(np.float32))
    nearest = positions[_nearest_texts(table, text)]
    yield NEAREST_CAPTION, _points(geometry.to_coordinates(table.take(nearest, "latent")), each, names)
    rows = sampled_rows(table, REGRESSION_ROWS, SCAN_ROWS)
    fitted = fit_centering((t, geometry.to_coordinates(latent)) for t, latent in rows)
    assert fitted.weight is not None
    yield CAPTION_MEAN, _points(np.asarray(text @ fitted.weight + fitted.bias, np.float32), each, names)


def _points(x: Float32[np.ndarray, "P L"], group: Int[np.ndarray, "P"], names: list[str]) -> Samples:
    return Samples(x[:0], [], x, group, names)


def _nearest_texts(table: Table, text: Float32[np.ndarray, "P T"]) -> Int[np.ndarray, "P"]:
    """Return the index of the training row with the nearest text embedding of each, in table order."""
    best, index, start = np.full(len(text), -np.inf), np.zeros(len(text), np.int64), 0
    for rows in table.column_batches("text", TRAIN, SCAN_ROWS):
        if not len(rows):
            continue
        cosine = text @ unit(rows.astype(np.float32)).T
        closest = cosine.argmax(1)
        value = cosine[np.arange(len(text)), closest]
        index, best = np.where(value > best, start + closest, index), np.maximum(value, best)
        start += len(rows)
    return index
