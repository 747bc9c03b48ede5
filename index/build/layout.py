"""Lay a table out for search: choose its geometry and desc_scale, write its search vectors, balance its rows.

Only the vector column is rewritten, once, in one commit, and only if something changes. Options that are not set keep
what the table has.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32

from index.build.potentials import chi_square_of, extend_potentials, fit_potentials, rows_in_time
from index.errors import OptionError
from index.report.report import BalanceReport
from index.report.sweep import NUM_POINTS, draw_captions, find_targets, mean_perplexity, rows_in
from index.search.blocks import MAX_QUERIES, VectorBlocks
from index.search.kmeans import fastest_device
from index.space.centering import Centering, fit_centering
from index.space.geometry import Geometry
from index.space.moments import unit
from index.space.queries import Purpose, draw_points, draw_rows
from index.space.reduction import MIN_SEARCH_DIM, Reduction, fit_reduction
from index.table.schema import TRAIN
from index.table.table import Table, column_array, sampled_rows
from index.table.vectors import balance_coordinate, in_geometry, is_balanced, rewrite_vectors
from index.table.weights import store_weights
from index.terminal import Progress, print_status

MAX_CENTERING_SIZE = 2**24
MAX_REDUCTION_ROWS = 2**17
"""Rows whose covariances `--search-dim` computes; of larger tables an even sample."""
MIN_QUERIES = 1024
"""Queries per step of balancing, or a quarter of the rows if that is more."""
AUTO_CAPTIONS = 64
"""Captions whose perplexity is averaged for desc_scale `auto`."""
POINTS_PER_TARGET = 4
"""Noise points per target that perplexity is measured with: at fewer, even its corrected estimate falls short."""
MAX_TARGET_PERPLEXITY = 1024
MAX_FITTED_ROWS = 200_000
"""Rows whose potentials are fitted; in larger tables they are an even sample, from which the others are derived."""
TIMED_ROWS = 8192
"""Rows that are compared to learn how many can be fitted in the time limit."""
COMPARED_QUERIES = 8192
"""Queries by which the table is compared with and without the potentials that were derived."""
FRESH = 2**20
"""First step of these queries, which fitted nothing."""

VectorWriter = Callable[[Table, Geometry, Float32[np.ndarray, "N"] | None, Path | None], Table]
"""Writes the vectors of all rows in a geometry, with the balance coordinate of each row in table order or none, commits
them, and returns that version; the path is a progress log."""


def choose_geometry(
    table: Table,
    *,
    name: str | None,
    desc_scale: float | int | str | None,
    center: bool | None,
    search_dim: int | str | None = None,
    allow_small: bool,
    target_perplexity: float,
    memory: int,
    seed: int,
) -> Geometry:
    """Return the geometry that the user asks for; None keeps what the table has, as does a value that it has already.

    desc_scale `auto` finds the value that reaches `target_perplexity` in the full space, within `memory` bytes.
    search_dim `full` searches the full space. New weights of the geometry are written to the table's folder.
    """
    current = table.meta.geometry
    name = current.name if name is None else name
    center = (current.centering is not None) if center is None else center
    scale = current.desc_scale if desc_scale in (None, "auto") else float(desc_scale)
    had_dim = None if current.reduction is None else current.reduction.dim
    dim = had_dim if search_dim is None else None if search_dim == "full" else int(search_dim)
    _check_search_dim(dim, current, memory)
    as_before = name == current.name and center == (current.centering is not None) and dim == had_dim
    if as_before and scale == current.desc_scale and desc_scale != "auto":
        return current
    # A small desc_scale that the table already has was allowed when it was set.
    allowed = allow_small or scale == current.desc_scale

    def fit(centering: Centering | None) -> Geometry:
        return Geometry.fit(
            table.meta.moments,
            name=name,
            desc_scale=scale,
            allow_small_desc_scale=allowed,
            centering=centering,
        )

    geometry = fit(None)
    if center:
        reusable = current.centering if geometry.name == current.name else None
        geometry = fit(reusable or _fit_centering(table, geometry))
    if desc_scale == "auto":
        scale = _auto_desc_scale(table, geometry, target_perplexity, allow_small=allow_small, memory=memory, seed=seed)
        if as_before and scale == current.desc_scale:
            return current
        geometry = replace(geometry, desc_scale=scale)
    if dim is not None:
        geometry = replace(geometry, reduction=_fit_reduction(table, geometry, dim))
    return store_weights(geometry, table.uri, table.storage)


def _check_search_dim(dim: int | None, geometry: Geometry, memory: int) -> None:
    """Raise OptionError if the search space does not have so many dimensions, or if the fit does not fit in memory."""
    text, image = geometry.text_dim, geometry.latent_dim
    if dim is not None and not MIN_SEARCH_DIM <= dim <= text + image:
        raise OptionError(
            f"--search-dim {dim} is out of range: the full search space has {text + image} dimensions ({text} of text, "
            f"{image} of latents), use {MIN_SEARCH_DIM} to {text + image}, or full"
        )
    # The covariances, and LAPACK's copy and workspace of the larger.
    needed = 8 * (text**2 + image**2 + 3 * max(text, image) ** 2)
    had = geometry.reduction is not None and dim == geometry.reduction.dim
    if dim is not None and not had and needed > memory:
        raise OptionError(
            f"--search-dim computes covariances of {text} and {image} dimensions, which takes {needed / 2**30:.1f} GiB "
            f"and --max-memory-gb is {memory / 2**30:g}: raise it to {math.ceil(needed / 2**30)}, or use an "
            "autoencoder with smaller latents"
        )


def _fit_reduction(table: Table, geometry: Geometry, dim: int) -> Reduction:
    """Fit a projection to `dim` components to this geometry's parts, in one pass over the training rows."""
    with Progress("fit search space", total=None, unit="rows", log=table.log("index")) as bar:

        def parts() -> Iterator[tuple[Float32[np.ndarray, "_B T"], Float32[np.ndarray, "_B L"]]]:
            for text, latent in sampled_rows(table, MAX_REDUCTION_ROWS, 8192):
                yield geometry.text_part(text), geometry.image_part(text, latent)
                bar.advance(len(text))

        return fit_reduction(parts(), dim, geometry.desc_scale * geometry.kappa)


def _fit_centering(table: Table, geometry: Geometry) -> Centering:
    """Regress this geometry's coordinates on text embeddings, in one pass over the training rows."""
    size = geometry.text_dim * geometry.latent_dim
    if size > MAX_CENTERING_SIZE:
        raise OptionError(
            f"--center stores {geometry.text_dim} x {geometry.latent_dim} weights with the table, and "
            f"{MAX_CENTERING_SIZE:,} are allowed: use encoders with smaller latents or embeddings, or drop --center"
        )
    batches = table.scan(["text", "latent"], TRAIN, batch_size=8192)
    rows = ([column_array(batch[name]) for name in ("text", "latent")] for batch in batches)
    return fit_centering((text, geometry.to_coordinates(latent)) for text, latent in rows)


def _auto_desc_scale(
    table: Table, geometry: Geometry, target_perplexity: float, *, allow_small: bool, memory: int, seed: int
) -> float:
    """Find the desc_scale up to 64 that reaches the target perplexity, which falls as desc_scale grows.

    Two passes over all rows: at octaves, then at eighths of the octave in which the target is passed, between which it
    is interpolated. If no value reaches the target, the smallest is returned.
    """
    train = table.positions(TRAIN)
    own = draw_captions(len(train), AUTO_CAPTIONS, seed=seed, purpose=Purpose.DESC_SCALE)
    text = unit(table.take(train[own], "text").astype(np.float32))
    num_points = max(NUM_POINTS, int(POINTS_PER_TARGET * target_perplexity))
    r = draw_points(geometry, num_points, seed=seed, step=0, purpose=Purpose.DESC_SCALE)
    target = reachable_perplexity(target_perplexity, len(train))

    def find(exponents: Float[np.ndarray, "D"]) -> tuple[float, float, float]:
        """Return the neighbors in a grid of log2(desc_scale) between which perplexity passes the target, and where."""
        targets = find_targets(rows_in(table, geometry, memory), geometry, text, r, tuple(2.0**exponents))
        reached = np.array([mean_perplexity(each) for each in targets])
        last = int(np.argmax(reached <= target)) if (reached <= target).any() else len(reached) - 1
        ends = [max(last - 1, 0), last]
        between = np.interp(-np.log(target), -np.log(reached[ends]), exponents[ends])
        return float(exponents[ends[0]]), float(exponents[last]), float(between)

    low, high, between = find(np.arange(-4.0 if allow_small else 0.0, 7.0))
    if low < high:
        _, _, between = find(np.linspace(low, high, 9))
    scale = float(2.0**between)
    return round(scale if allow_small else max(scale, 1.01), 2)


def reachable_perplexity(target: float, rows: int) -> float:
    """Return the target perplexity, or a tenth of the rows (at least 2) if that is less."""
    return min(target, max(2.0, rows / 10))


def write_vectors(
    table: Table, geometry: Geometry, balance: Float32[np.ndarray, "N"] | None, log: Path | None
) -> Table:
    """Write and commit the vectors of all rows in this process, one fragment after the other."""
    with Progress("write vectors", total=table.dataset().count_rows(), unit="rows", log=log) as bar:
        for step in rewrite_vectors(table, geometry, balance):
            if isinstance(step, Table):
                return step
            bar.advance(step - bar.done)
    raise AssertionError("rewrite_vectors ends with a table")


def lay_out(
    table: Table,
    geometry: Geometry,
    *,
    balance: bool | None,
    memory: int,
    time_limit: float,
    seed: int,
    log: Path | None,
    write: VectorWriter = write_vectors,
    max_fitted_rows: int = MAX_FITTED_ROWS,
) -> tuple[Table, BalanceReport | None]:
    """Write the search vectors in a geometry, with or without balance (None keeps what the table has), if they change.

    Balancing holds at most `memory` bytes of vectors (larger tables are read again at each step) and ends after at
    most `time_limit` seconds; its report is None if it did not run.
    """
    changed = not geometry.same_as(table.meta.geometry)
    if not balance:
        if not changed and balance is False:
            table = table.at(table.version, replace(table.meta, balanced=is_balanced(table)))
            changed = bool(table.meta.balanced)
        return (write(table, geometry, None, log) if changed else table), None
    # Vectors of a new geometry are computed as they are read, and written with the balance that is fitted to them.
    laid_out = in_geometry(table, geometry) if changed else table
    coordinate, train = balance_coordinate(laid_out), table.positions(TRAIN)
    stored = coordinate[train]
    start = -np.square(stored) if stored.any() else None
    g, report = _fit_balance(
        laid_out, start, memory=memory, time_limit=time_limit, seed=seed, log=log, max_fitted_rows=max_fitted_rows
    )
    if not report.applied:
        print_status(
            f"warning: --balance was left out: fitted to {report.fitted_rows:,} of {len(train):,} rows it makes "
            f"hit counts less even, with a chi-square of {report.chi_square:.3g} instead of "
            f"{report.chi_square_before:.3g}: use a --balance-time-limit above {time_limit:g}, or a GPU"
        )
        return (write(table, geometry, coordinate if stored.any() else None, log) if changed else table), report
    coordinate[train] = np.sqrt(g.max() - g)
    return write(table, geometry, coordinate, log), report


def _fit_balance(
    table: Table,
    start: Float32[np.ndarray, "N"] | None,
    *,
    memory: int,
    time_limit: float,
    seed: int,
    log: Path | None,
    max_fitted_rows: int,
) -> tuple[Float32[np.ndarray, "N"], BalanceReport]:
    """Fit the potentials of an even sample of as many training rows as time allows; derive those of the others."""
    import torch

    device, began = fastest_device(), time.monotonic()
    geometry, train = table.meta.geometry, table.positions(TRAIN)
    batch_size = int(np.clip(min(len(train), max_fitted_rows) // 4, MIN_QUERIES, MAX_QUERIES))

    def queries(step: int) -> Float32[np.ndarray, "B S"]:
        rows = draw_rows(len(train), batch_size, seed=seed, step=step, purpose=Purpose.BALANCE)
        points = draw_points(geometry, batch_size, seed=seed, step=step, purpose=Purpose.BALANCE)
        return geometry.queries(table.take(train[rows], "text"), points)

    def blocks_of(stride: int, memory: int) -> VectorBlocks:
        return VectorBlocks(table, memory=memory, device=device, stride=stride, balance=False)

    if len(train) > max_fitted_rows:
        few = blocks_of(-(-len(train) // TIMED_ROWS), memory)
        max_fitted_rows = min(max_fitted_rows, max(TIMED_ROWS, rows_in_time(few, queries(0), time_limit)))
        del few
    stride = -(-len(train) // max_fitted_rows)
    sample = blocks_of(stride, memory // (1 if stride == 1 else 2))
    first = None if start is None else start[::stride]
    with Progress("balance", total=100, unit="% of the time limit", log=log) as bar:
        for potentials in fit_potentials(sample, queries, start=first, time_limit=time_limit):
            percent = min(100, round(100 * (time.monotonic() - began) / time_limit))
            bar.advance(max(0, percent - bar.done), steps=potentials.step, fit_chi_square=potentials.chi_square)
    g, compared = potentials.g, []
    if stride > 1:
        blocks = blocks_of(1, memory // 2)
        g = extend_potentials(sample, g, blocks, queries, memory=memory)
        fresh = range(FRESH, FRESH + -(-COMPARED_QUERIES // batch_size))
        compared = [
            chi_square_of(blocks, queries, None if each is None else torch.from_numpy(each).to(blocks.device), fresh)
            for each in (start, g)
        ]
    return g, BalanceReport(
        fit_chi_square=potentials.chi_square,
        steps=potentials.step,
        seconds=round(time.monotonic() - began, 1),
        stop_reason=str(potentials.stop_reason),
        fitted_rows=sample.count,
        resumed=start is not None,
        chi_square_before=compared[0] if compared else None,
        chi_square=compared[1] if compared else None,
    )
