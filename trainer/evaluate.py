"""How well a run answers held-out captions, beside its floors, in the coordinates that it was trained in.

Samples for the captions of held-out rows are compared with the latents of those rows. The floors say what the figures
mean: training rows (as good as it gets), retrieved pairs (a perfect network), and a Gaussian (no knowledge).
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from index.console import Progress, write_json
from index.errors import OptionError, RunError, TableError
from index.queries import draw_points, draw_rows
from index.schema import HELDOUT, TRAIN
from index.search import open_neighbours
from index.table import Table, open_table
from trainer.checkpoint import read_config
from trainer.metrics import frechet, sliced_wasserstein
from trainer.sampler import Coalescer

MAX_ROWS = 2000


def evaluate(run: Path, *, steps: list[int], out: Path, seed: int = 0) -> dict[str, Any]:
    """Measure a run at several step counts; writes OUT/report.json and returns it."""
    if not steps or min(steps) < 1:
        raise OptionError(f"--steps {','.join(map(str, steps))} is not allowed: give numbers above 0, such as 1,2,4,8")
    config = read_config(run)
    coalescer = Coalescer.from_pretrained(run)
    table = _table_of(config, run)
    geometry = table.meta.geometry
    heldout = table.offsets(HELDOUT)[:MAX_ROWS]
    if len(heldout) < 2:
        raise TableError(f"{table.uri} holds {len(heldout)} held-out rows: encode it with a larger --heldout-share")
    text = table.take(heldout, "text").astype(np.float32)
    told = coalescer.describe(table.take(heldout, "caption").tolist())
    truth = geometry.to_coordinates(table.take(heldout, "latent"))
    report: dict[str, Any] = {
        "run": str(run),
        "objective": config["fit"]["objective"],
        "heldout_rows": len(heldout),
        "floors": _floors(table, text, truth, seed),
        "steps": {},
    }
    with Progress("evaluate", total=len(steps) * len(heldout), unit="samples", log=out / "log.jsonl") as bar:
        for n in steps:
            began = time.perf_counter()
            x, sure = coalescer.coordinates(told, range(len(told)), steps=n, seed=seed)
            seconds = time.perf_counter() - began
            report["steps"][str(n)] = {
                **_distances(x, truth),
                **({} if np.isnan(sure).all() else {"confidence": float(sure.mean())}),
                "evaluations": n,
                "ms_per_latent": seconds / len(told) * 1e3,
            }
            bar.advance(len(text))
    write_json(out / "report.json", report)
    return report


def _table_of(config: dict[str, Any], run: Path) -> Table:
    try:
        return open_table(config["table"]["uri"], version=config["table"]["version"])
    except TableError as error:
        raise RunError(f"{run} cannot be compared with its table: {error}") from error


def _distances(x: Float32[np.ndarray, "N L"], truth: Float32[np.ndarray, "M L"]) -> dict[str, float]:
    return {"sliced_wasserstein": sliced_wasserstein(x, truth), "frechet": frechet(x, truth)}


def _floors(
    table: Table, text: Float32[np.ndarray, "M T"], truth: Float32[np.ndarray, "M L"], seed: int
) -> dict[str, dict[str, float]]:
    geometry, train = table.meta.geometry, table.offsets(TRAIN)
    rows = train[draw_rows(len(train), len(truth), seed=seed, step=0)]
    r = draw_points(geometry, len(truth), seed=seed, step=0)
    found = open_neighbours(table).nearest(geometry.queries(text, r)).latent[:, 0]
    return {
        "train rows": _distances(geometry.to_coordinates(table.take(rows, "latent")), truth),
        "retrieved pairs": _distances(geometry.to_coordinates(found), truth),
        "gaussian": _distances(r, truth),
    }


def lines_of(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """A report as lines of a table: the run's steps, then the floors."""
    return {f"{n} steps": figures for n, figures in report["steps"].items()} | {
        f"floor: {name}": figures for name, figures in report["floors"].items()
    }
