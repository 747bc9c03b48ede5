"""The effect of desc_scale on retrieval, from exact search among all training rows.

If desc_scale is too large, every caption retrieves its own row regardless of R. If it is too small, it retrieves rows
with other captions, and the retrieved caption becomes correlated with R. The useful range is about one octave wide, and
it moves with the number of rows: among five times as many rows a caption has five times as many neighbors. So all rows
are searched, in blocks, at all values of desc_scale in one pass.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float16, Float32, Int

from index.report.integrity import row_hashes
from index.search.blocks import VectorBlocks
from index.search.exact import ExactSearch
from index.search.memory import rows_at_once
from index.space.geometry import Geometry
from index.space.moments import unit
from index.space.queries import Purpose, draw_points
from index.table.schema import TRAIN
from index.table.table import Table, column_array

if TYPE_CHECKING:
    import torch

DESC_SCALES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
NUM_CAPTIONS, NUM_POINTS = 64, 1024
POINTS_AT_ONCE = 1024
FIRST_ROWS = 64
"""Rows of nearest texts that are compared first, so that most others need not be."""
COST_BYTES = 16 * POINTS_AT_ONCE
"""Costs of a row for the points at once, and copies of them."""
TEXTS_AT_ONCE = 4096
"""Retrieved texts that are read and compared at a time."""


@dataclass(frozen=True, kw_only=True)
class SweepSize:
    """What the metrics of a sweep are measured on: each caption with each noise point, against all training rows."""

    sweep_rows: int
    sweep_captions: int
    sweep_points: int


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """What retrieval is like at one desc_scale."""

    desc_scale: float
    self_retrieval_rate: float
    """Fraction of queries that retrieve the row whose text embedding they carry."""
    perplexity: float
    """exp(entropy of the target over random R), averaged over captions: the number of targets R chooses among. The
    entropy is Chao and Shen's estimate, which corrects for targets that no point has hit."""
    text_distance: float
    """Mean distance between the unit text embeddings of query and target."""
    prior_skew: float
    """|E[R given the retrieved text]| / |R|, root mean square over retrieved texts, corrected for few samples. Above
    0, a network conditioned on the retrieved text has not been trained on every R that it may be sampled with."""


@dataclass(frozen=True, eq=False, slots=True)
class RowBlock:
    """Some training rows, as queries are compared with them."""

    positions: 'Int[torch.Tensor, "n"]'
    text: 'Float[torch.Tensor, "n T"]'
    """Text parts at text length 1."""
    image: 'Float[torch.Tensor, "n L"]'
    """Image parts."""
    balance: 'Float[torch.Tensor, "n"]'
    """Balance coordinates."""


def stored_rows(geometry: Geometry, blocks: VectorBlocks) -> Iterator[RowBlock]:
    """Return the rows as the table's vectors of this geometry have them."""
    text_dim, end = geometry.text_width, geometry.text_width + geometry.image_width
    for block in blocks:
        text, image, balance = block.vectors[:, :text_dim], block.vectors[:, text_dim:end], block.vectors[:, end]
        yield RowBlock(block.positions, text / (geometry.desc_scale * geometry.kappa), image, balance)


def rows_in(table: Table, geometry: Geometry, memory: int) -> Iterator[RowBlock]:
    """Read the rows and compute what their vectors would be in another geometry, without balance."""
    import torch

    at_once = rows_at_once(memory, 32 * (geometry.text_dim + geometry.latent_dim) + COST_BYTES)
    start = 0
    for batch in table.scan(["text", "latent"], TRAIN, batch_size=min(at_once, 16_384), batch_readahead=1):
        text, latent = (column_array(batch[name]) for name in ("text", "latent"))
        unit_text = torch.from_numpy(geometry.text_part(text))
        image = torch.from_numpy(geometry.image_part(text, latent))
        yield RowBlock(torch.arange(start, start + len(text)), unit_text, image, torch.zeros(len(text)))
        start += len(text)


def measure_sweep(
    exact: ExactSearch,
    geometry: Geometry,
    scales: Sequence[float] = DESC_SCALES,
    *,
    num_captions: int = NUM_CAPTIONS,
    num_points: int = NUM_POINTS,
    seed: int = 0,
) -> tuple[SweepSize, list[SweepPoint]]:
    """Measure the retrieval of some captions, each with the same noise points, at each desc_scale."""

    def take_text(positions: Int[np.ndarray, "B"]) -> Float16[np.ndarray, "B T"]:
        return exact.take(positions, "text")

    own = draw_captions(len(exact.row_ids), num_captions, seed=seed, purpose=Purpose.SWEEP)
    text = unit(take_text(own).astype(np.float32))
    r = draw_points(geometry, num_points, seed=seed, step=0, purpose=Purpose.SWEEP)
    targets = find_targets(stored_rows(geometry, exact.blocks), geometry, text, r, scales)
    points = [
        _sweep_point(scale, target, own, text, r, take_text) for scale, target in zip(scales, targets, strict=True)
    ]
    return SweepSize(sweep_rows=len(exact.row_ids), sweep_captions=len(own), sweep_points=num_points), points


def draw_captions(rows: int, count: int, *, seed: int, purpose: Purpose) -> Int[np.ndarray, "A"]:
    """Sample the positions of at most `count` training rows without replacement, for their captions."""
    return np.random.default_rng([seed, rows, purpose]).choice(rows, min(count, rows), replace=False)


def find_targets(
    rows: Iterable[RowBlock],
    geometry: Geometry,
    text: Float32[np.ndarray, "A T"],
    r: Float32[np.ndarray, "P L"],
    scales: Sequence[float],
) -> Int[np.ndarray, "D A P"]:
    """Return the position of the row that each of A captions retrieves with each noise point at each of D scales.

    The cost of a row is that of its image part, which captions and scales share, plus that of its text part, which the
    points share. Rows whose text part alone costs more than any point has paid so far are left out.
    """
    import torch

    captions, same = np.unique(text, axis=0, return_inverse=True)
    captions, r = geometry.text_part(captions), geometry.query_image(r)
    search: _Targets | None = None
    for block in rows:
        if search is None:
            device = block.image.device
            weights = [float(scale * geometry.kappa) ** 2 for scale in scales]
            search = _Targets(torch.from_numpy(captions).to(device), torch.from_numpy(r).to(device), weights)
        search.update(block)
    assert search is not None, "no rows"
    return np.asarray(search.target.cpu())[:, same.reshape(-1)]


class _Targets:
    """The best rows so far of A captions, P noise points and D weights of the text part."""

    def __init__(self, captions: "torch.Tensor", points: "torch.Tensor", weights: Sequence[float]) -> None:
        import torch

        self._captions, self._weights, shape = captions, weights, (len(weights), len(captions), len(points))
        parts = torch.split(torch.arange(len(points), device=points.device), POINTS_AT_ONCE)
        self._points = [(which, points[which]) for which in parts]
        self._cost = torch.full(shape, torch.inf, device=points.device)
        self.target = torch.zeros(shape, dtype=torch.int64, device=points.device)

    def update(self, block: RowBlock) -> None:
        """Compare a block of rows with all queries."""
        import torch

        text_cost = torch.cdist(self._captions, block.text, compute_mode="donot_use_mm_for_euclid_dist").square()
        own_cost = block.image.square().sum(1) + block.balance.square()
        for which, points in self._points:
            image_cost = torch.addmm(own_cost, points, block.image.T, alpha=-2)  # P n
            least = image_cost.min(1).values
            for d, weight in enumerate(self._weights):
                for a, of_text in enumerate(weight * text_cost):
                    at = (d, a, which)
                    if bool(self._cost[at][0].isinf()):
                        some = of_text.topk(min(FIRST_ROWS, len(of_text)), largest=False).indices.sort().values
                        self._keep_best(at, block.positions[some], image_cost[:, some] + of_text[some])
                    near = (of_text <= (self._cost[at] - least).max()).nonzero()[:, 0]
                    if len(near):
                        self._keep_best(at, block.positions[near], image_cost[:, near] + of_text[near])

    def _keep_best(self, at: tuple[int, int, "torch.Tensor"], positions: "torch.Tensor", cost: "torch.Tensor") -> None:
        import torch

        least, column = cost.min(1)
        closer = least < self._cost[at]
        self._cost[at] = torch.where(closer, least, self._cost[at])
        self.target[at] = torch.where(closer, positions[column], self.target[at])


def _sweep_point(
    scale: float,
    target: Int[np.ndarray, "A P"],
    own: Int[np.ndarray, "A"],
    text: Float32[np.ndarray, "A T"],
    r: Float32[np.ndarray, "P L"],
    take_text: Callable[[Int[np.ndarray, "B"]], Float16[np.ndarray, "B T"]],
) -> SweepPoint:
    distinct, index = np.unique(target, return_inverse=True)
    index, hashes, square = index.reshape(target.shape), [], []
    for start in range(0, len(distinct), TEXTS_AT_ONCE):
        texts = take_text(distinct[start : start + TEXTS_AT_ONCE])
        hashes.append(row_hashes(texts))
        square.append(np.maximum(2 - 2 * text @ unit(texts.astype(np.float32)).T, 0))  # A n
    text_id = np.unique(np.concatenate(hashes), return_inverse=True)[1].reshape(-1)
    return SweepPoint(
        desc_scale=scale,
        self_retrieval_rate=float((target == own[:, None]).mean()),
        perplexity=mean_perplexity(target),
        text_distance=float(np.sqrt(np.take_along_axis(np.concatenate(square, 1), index, 1)).mean()),
        prior_skew=prior_skew(text_id[index], r),
    )


def mean_perplexity(target: Int[np.ndarray, "A P"]) -> float:
    """Return the perplexity of the targets over the points, averaged over captions."""
    return float(np.mean([np.exp(entropy(np.unique(each, return_counts=True)[1])) for each in target]))


def entropy(count: Int[np.ndarray, "K"]) -> float:
    """Estimate the entropy in nats of the distribution from which K different outcomes came so many times.

    A. Chao, T.-J. Shen, Nonparametric estimation of Shannon's index of diversity when there are unseen species in
    sample, Environmental and Ecological Statistics 10 (2003) 429: probabilities are scaled by the estimated coverage of
    the sample, and each is weighted by the inverse of its chance of being seen.
    """
    n, singletons = int(count.sum()), int((count == 1).sum())
    coverage = 1 - min(singletons, n - 1) / n
    p = coverage * count / n
    return float(-(p * np.log(p) / (1 - (1 - p) ** n)).sum()) + 0.0


def prior_skew(text_id: Int[np.ndarray, "A P"], r: Float32[np.ndarray, "P L"]) -> float:
    """Return how far the mean of R moves once the retrieved text is known; see `SweepPoint.prior_skew`.

    `text_id[a, p]` names the text that caption a retrieves with noise point r[p]. Over the n queries that retrieve one
    text, |sum R|^2 less the products of a point with itself is an unbiased estimate of n^2 |E R|^2.
    """
    key, count = np.unique(text_id * len(r) + np.arange(len(r)), return_counts=True)
    _, group = np.unique(key // len(r), return_inverse=True)
    point, count = r[key % len(r)].astype(np.float64), count.astype(np.float64)
    total = np.zeros((group.max() + 1, r.shape[1]))
    np.add.at(total, group, count[:, None] * point)
    queries, repeats = np.bincount(group, count), np.bincount(group, np.square(count))
    same_point = np.bincount(group, np.square(count) * np.square(point).sum(1))
    several = np.square(queries) > repeats
    if not several.any():
        return 0.0
    square = (np.square(total).sum(1) - same_point)[several] / (np.square(queries) - repeats)[several]
    mean = float(np.average(square, weights=queries[several]))
    return float(np.sqrt(max(mean, 0.0) / np.square(r).sum(1).mean()))
