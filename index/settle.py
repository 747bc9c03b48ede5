"""Settle how a table is laid out: its geometry, the weight of its descriptions, the balance of its rows.

Whatever changes, only the vector column is rewritten, in one commit. A table keeps what it was given before: nothing
is rewritten where nothing changes.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from index.balance import Potentials, fit_potentials
from index.console import Progress
from index.geometry import Geometry
from index.queries import draw_points, draw_rows
from index.report import measure_ladder
from index.schema import TRAIN
from index.search import ExactNeighbours
from index.table import Table, rewrite_vectors

BALANCE_STEPS = 400
BALANCE_QUERIES = 1024
"""Queries per step."""


def wanted_geometry(
    table: Table,
    *,
    kind: str | None,
    desc_scale: float | int | str | None,
    allow_small: bool,
    perplexity: float,
    seed: int,
) -> Geometry:
    """The geometry that the user asks for; None keeps what the table has, desc_scale `auto` goes by perplexity."""
    now = table.meta.geometry
    if kind is None and desc_scale is None:
        return now
    scale = now.desc_scale if desc_scale in (None, "auto") else float(desc_scale)
    # What the table has been given before is not questioned again.
    allowed = allow_small or scale == now.desc_scale
    wanted = Geometry.fit(table.meta.moments, kind=kind or now.kind, desc_scale=scale, allow_small_desc_scale=allowed)
    if desc_scale == "auto":
        scale = _auto_desc_scale(table, wanted, perplexity, allow_small=allow_small, seed=seed)
        return replace(wanted, desc_scale=scale)
    return wanted


def _auto_desc_scale(table: Table, geometry: Geometry, perplexity: float, *, allow_small: bool, seed: int) -> float:
    """Bisect, on a logarithmic scale up to 64, for the wanted perplexity; larger scales leave R less choice."""
    text, latent = table.column("text"), table.column("latent")
    wanted = min(perplexity, max(2.0, len(text) / 10))
    low, high = (-4.0, 6.0) if allow_small else (0.0, 6.0)
    for _ in range(9):
        middle = (low + high) / 2
        rung = measure_ladder(geometry, text, latent, (2.0**middle,), seed=seed)[0]
        low, high = (middle, high) if rung.perplexity > wanted else (low, middle)
    scale: float = 2.0 ** ((low + high) / 2)
    return round(scale if allow_small else max(scale, 1.01), 2)


def settle_vectors(
    table: Table, geometry: Geometry, *, balance: bool | None, seed: int, log: Path | None
) -> tuple[Table, Potentials | None]:
    """Lay the table out in this geometry, with or without balance (None keeps it); the potentials where fitted now."""
    balanced = bool(table.meta.geometry.balance_of(table.column("vector")).any())
    if (balanced and balance is not None) or not geometry.same_as(table.meta.geometry):
        table = _rewritten(rewrite_vectors(table, geometry), table, log)
    if not balance:
        return table, None
    potentials = _fit_balance(table, geometry, seed, log)
    coordinate = np.zeros(table.dataset().count_rows(), np.float32)
    coordinate[table.offsets(TRAIN)] = potentials.coordinate()
    return _rewritten(rewrite_vectors(table, geometry, coordinate), table, log), potentials


def _fit_balance(table: Table, geometry: Geometry, seed: int, log: Path | None) -> Potentials:
    """Fit dual potentials to the law that training draws from."""
    exact = ExactNeighbours(table)

    def queries(step: int) -> Float32[np.ndarray, "B S"]:
        rows = draw_rows(len(exact.row), BALANCE_QUERIES, seed=seed, step=step)
        return geometry.queries(exact.text[rows], draw_points(geometry, BALANCE_QUERIES, seed=seed, step=step))

    with Progress("balance", total=BALANCE_STEPS, unit="steps", log=log) as bar:
        for potentials in fit_potentials(exact, queries, steps=BALANCE_STEPS):
            bar.advance(potentials.step - bar.done, chi_square=potentials.chi_square)
    return potentials


def _rewritten(steps: Iterator[int | Table], table: Table, log: Path | None) -> Table:
    with Progress("write vectors", total=table.dataset().count_rows(), unit="rows", log=log) as bar:
        for step in steps:
            if isinstance(step, Table):
                return step
            bar.advance(step - bar.done)
    raise AssertionError("rewrite_vectors ends with a table")
