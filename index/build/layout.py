"""Settle how a table is laid out: its geometry, the weight of its descriptions, the balance of its rows.

Whatever changes, only the vector column is rewritten, in one commit. A table keeps what it was given before: nothing
is rewritten where nothing changes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from index.build.potentials import extend, fit_potentials
from index.errors import OptionError
from index.report.sweep import measure_ladder, sample_rows
from index.search.exact import MOST_QUERIES, VectorBlocks
from index.space.centering import Centering, fit_centering
from index.space.geometry import Geometry
from index.space.queries import draw_points, draw_rows
from index.table.commit import rewrite_vectors
from index.table.schema import TRAIN
from index.table.table import Table, column_array
from index.terminal import Progress

MAX_CENTERING = 2**24
LEAST_QUERIES = 1024
"""Queries per step of balancing; a quarter of the rows where that is more."""
MOST_FITTED = 200_000
"""Rows whose potentials are fitted; of larger tables an even sample, from which the others' are derived."""


def wanted_geometry(
    table: Table,
    *,
    kind: str | None,
    desc_scale: float | int | str | None,
    center: bool | None,
    allow_small: bool,
    perplexity: float,
    seed: int,
) -> Geometry:
    """The geometry that the user asks for; None keeps what the table has, desc_scale `auto` goes by perplexity."""
    now = table.meta.geometry
    center = (now.centering is not None) if center is None else center
    if kind is None and desc_scale is None and center == (now.centering is not None):
        return now
    scale = now.desc_scale if desc_scale in (None, "auto") else float(desc_scale)
    # What the table has been given before is not questioned again.
    allowed = allow_small or scale == now.desc_scale

    def fit(centering: Centering | None) -> Geometry:
        return Geometry.fit(
            table.meta.moments,
            name=kind or now.name,
            desc_scale=scale,
            allow_small_desc_scale=allowed,
            centering=centering,
        )

    wanted = fit(None)
    if center:
        wanted = fit(now.centering if wanted.name == now.name and now.centering else _centering(table, wanted))
    if desc_scale == "auto":
        scale = _auto_desc_scale(table, wanted, perplexity, allow_small=allow_small, seed=seed)
        return replace(wanted, desc_scale=scale)
    return wanted


def _centering(table: Table, geometry: Geometry) -> Centering:
    """What descriptions tell of this geometry's coordinates, from one pass over the training rows."""
    size = geometry.text_dim * geometry.latent_dim
    if size > MAX_CENTERING:
        raise OptionError(
            f"--center keeps {geometry.text_dim} x {geometry.latent_dim} numbers in the table's metadata, "
            f"{MAX_CENTERING:,} are the most: choose encoders with smaller latents or embeddings, or leave it out"
        )
    batches = table.scan(["text", "latent"], TRAIN, batch_size=8192)
    rows = ([column_array(batch[name]) for name in ("text", "latent")] for batch in batches)
    return fit_centering((text, geometry.to_coordinates(latent)) for text, latent in rows)


def _auto_desc_scale(table: Table, geometry: Geometry, perplexity: float, *, allow_small: bool, seed: int) -> float:
    """Bisect, on a logarithmic scale up to 64, for the wanted perplexity; larger scales leave R less choice."""
    rows = sample_rows(table, seed=seed)
    # Potentials that the table has belong to the scale that it has.
    rows = replace(rows, balance=np.zeros_like(rows.balance))
    wanted = min(perplexity, max(2.0, len(rows.text) / 10))
    low, high = (-4.0, 6.0) if allow_small else (0.0, 6.0)
    for _ in range(9):
        middle = (low + high) / 2
        rung = measure_ladder(geometry, rows, (2.0**middle,), seed=seed)[0]
        low, high = (middle, high) if rung.perplexity > wanted else (low, middle)
    scale: float = 2.0 ** ((low + high) / 2)
    return round(scale if allow_small else max(scale, 1.01), 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Balanced:
    """How far balancing came, for the report."""

    chi_square: float
    """Of fresh draws, over the rows that were fitted."""
    steps: int
    seconds: float
    stopped: str
    fitted_rows: int
    """Fewer than the training rows where the potentials of the others are derived from theirs."""
    continued: bool
    """Whether it began from the potentials of an earlier call."""


def settle_vectors(
    table: Table,
    geometry: Geometry,
    *,
    balance: bool | None,
    memory: int,
    seconds: float,
    seed: int,
    log: Path | None,
) -> tuple[Table, Balanced | None]:
    """Lay the table out in this geometry, with or without balance (None keeps it); how balancing went, where it did.

    Balancing holds at most `memory` bytes of vectors (larger tables are read again at each step) for at most `seconds`.
    """
    coordinate = _balance_coordinate(table)
    changed = not geometry.same_as(table.meta.geometry)
    if changed or (balance is False and coordinate.any()):
        table = _rewritten(rewrite_vectors(table, geometry), table, log)
        coordinate = np.zeros_like(coordinate)
    if not balance:
        return table, None
    trained = table.positions(TRAIN)
    before = coordinate[trained]
    g, balanced = _fit_balance(
        table, -np.square(before) if before.any() else None, memory=memory, seconds=seconds, seed=seed, log=log
    )
    coordinate[trained] = np.sqrt(g.max() - g)
    return _rewritten(rewrite_vectors(table, geometry, coordinate), table, log), balanced


def _balance_coordinate(table: Table) -> Float32[np.ndarray, "N"]:
    """The balance coordinate of every row, in the table's order."""
    batches = table.scan(["vector"], batch_readahead=1)
    parts = [table.meta.geometry.balance_of(column_array(batch["vector"])).astype(np.float32) for batch in batches]
    return np.concatenate([np.empty(0, np.float32), *parts])


def _fit_balance(
    table: Table,
    start: Float32[np.ndarray, "N"] | None,
    *,
    memory: int,
    seconds: float,
    seed: int,
    log: Path | None,
) -> tuple[Float32[np.ndarray, "N"], Balanced]:
    """Fit dual potentials of all training rows to the law that training draws from."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    geometry, offsets, began = table.meta.geometry, table.positions(TRAIN), time.monotonic()
    every = -(-len(offsets) // MOST_FITTED)
    sample = VectorBlocks(table, memory=memory // (1 if every == 1 else 2), device=device, every=every, balance=False)

    count = int(np.clip(sample.count // 4, LEAST_QUERIES, MOST_QUERIES))

    def queries(step: int) -> Float32[np.ndarray, "B S"]:
        rows = draw_rows(len(offsets), count, seed=seed, step=step)
        points = draw_points(geometry, count, seed=seed, step=step)
        return geometry.queries(table.take(offsets[rows], "text"), points)

    first = None if start is None else start[::every]
    with Progress("balance", total=100, unit="% of the time", log=log) as bar:
        for potentials in fit_potentials(sample, queries, start=first, seconds=seconds):
            share = min(100, round(100 * (time.monotonic() - began) / seconds))
            bar.advance(max(0, share - bar.done), steps=potentials.step, chi_square=potentials.chi_square)
    g = potentials.g
    if every > 1:
        g = extend(sample, g, VectorBlocks(table, memory=memory // 2, device=device, balance=False), queries)
    return g, Balanced(
        chi_square=potentials.chi_square,
        steps=potentials.step,
        seconds=round(time.monotonic() - began, 1),
        stopped=str(potentials.stopped),
        fitted_rows=sample.count,
        continued=start is not None,
    )


def _rewritten(steps: Iterator[int | Table], table: Table, log: Path | None) -> Table:
    with Progress("write vectors", total=table.dataset().count_rows(), unit="rows", log=log) as bar:
        for step in steps:
            if isinstance(step, Table):
                return step
            bar.advance(step - bar.done)
    raise AssertionError("rewrite_vectors ends with a table")
