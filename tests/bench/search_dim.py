"""What a reduced search space costs and saves, on real tables at several dimensions.

    python tests/bench/search_dim.py --data FOLDER --work FOLDER [--table mnist ...] > search_dim.json

A line for each table and --search-dim: Frechet distance and coverage of the pairs that held-out captions with random R
retrieve (the quality of a perfect network), agreement with the full space, queries per second of exact search, and
bytes of the vectors. The tables `*-pixels` have the pixels of the same images as latents, to be wide.
FOLDER/NAME.lance is used if it exists, and made by our commands if not.
"""

import argparse
import io
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import real_tables
from jaxtyping import Float
from machine import machine
from PIL import Image

from index.build.build_index import BuildConfig, build_index
from index.report.hubness import chi_square, num_hubness_queries
from index.search.exact import ExactSearch
from index.space.geometry import Geometry
from index.space.queries import Purpose, draw_points, draw_rows
from index.table.schema import HELDOUT, TRAIN
from index.table.table import Table, open_table
from pipeline.sources.listing import list_shards
from pipeline.sources.read import read_samples
from trainer.evaluation.metrics import frechet, prdc

sys.path.insert(0, str(Path(__file__).parents[1]))
from synthetic_tables import write_table

SEED, BATCH, ROUNDS, MAX_QUERIES = 1, 1024, 5, 2048
PIXELS = {"mnist": ("mnist/*.parquet", "L", 28), "emoji": ("noto-emoji", "RGB", 18)}
DIMS = {"": (8, 16, 32, 48, 64, "full"), "-pixels": (32, 64, 128, 256, 400, "full")}
REPORTED = (
    *("search_text_dim", "search_image_dim", "text_variance", "image_variance", "vector_dim"),
    *("perplexity", "chi_square", "anti_hub_rate", "full_space"),
)


def pixel_table(source: Table, uri: Path, files: list[str], mode: str, side: int) -> Table:
    """Make a table whose latents are the pixels of the images that another table was encoded from."""
    if not uri.exists():
        order = np.concatenate([source.positions(TRAIN), source.positions(HELDOUT)])
        found = {sample.key: sample.image for shard in list_shards(files) for sample in read_samples(shard)}
        images = (Image.open(io.BytesIO(found[key])).convert(mode) for key in source.take(order, "key"))
        pixels = np.stack([np.asarray(image.resize((side, side)), np.float32).ravel() / 127.5 - 1 for image in images])
        # A pixel that hardly varies would count as much as others once standardized.
        pixels += 0.05 * np.random.default_rng(0).standard_normal(pixels.shape, np.float32)
        write_table(uri, source.take(order, "text"), pixels, heldout=len(source.positions(HELDOUT)))
    return open_table(uri)


def measure(table: Table, work: Path, dims: tuple[int | str, ...]) -> list[dict[str, Any]]:
    """Build the table's index at each search_dim; return a line for each."""
    lines, copied = [], real_tables.copy(table, work / "search_dim.lance")
    heldout = table.positions(HELDOUT)
    for dim in dims:
        began = time.perf_counter()
        built = build_index(open_table(copied.uri), BuildConfig(search_dim=dim, index_type="none"))
        seconds, table = time.perf_counter() - began, built.table
        geometry, exact = table.meta.geometry, ExactSearch(table)
        rows = heldout[draw_rows(len(heldout), MAX_QUERIES, seed=SEED, step=0, purpose=Purpose.EXAMPLES)]
        r = draw_points(geometry, MAX_QUERIES, seed=SEED, step=0, purpose=Purpose.EXAMPLES)
        queries = geometry.queries(table.take(rows, "text"), r)
        positions = exact.nearest_positions(queries)[:, 0]
        real = geometry.to_coordinates(table.take(heldout, "latent"))
        fresh = np.random.default_rng(SEED).permutation(len(exact.row_ids))[:MAX_QUERIES]
        report = built.report
        lines.append(
            {"search_dim": dim}
            | {name: _plain(getattr(report, name)) for name in REPORTED}
            | _quality(geometry.to_coordinates(exact.take(positions, "latent")), real, "retrieved")
            | _quality(geometry.to_coordinates(exact.take(fresh, "latent")), real, "train_rows")
            | {"distinct": len(np.unique(positions)), "queries_per_second": _rate(exact, queries)}
            | _chi_squares(exact, geometry)
            | {"vector_bytes_per_row": 2 * geometry.vector_dim, "build_seconds": round(seconds, 1)}
        )
        print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    return lines


def _plain(value: Any) -> Any:
    return (
        {name: getattr(value, name) for name in value.__annotations__} if hasattr(value, "__annotations__") else value
    )


def _quality(samples: Float[np.ndarray, "M L"], real: Float[np.ndarray, "N L"], name: str) -> dict[str, float]:
    """Return the Frechet distance per dimension, and the coverage, of samples against held-out rows."""
    distance = frechet(samples, real) / samples.shape[1]
    return {f"{name}_frechet_per_dim": distance, f"{name}_coverage": prdc(real, samples).coverage}


def _chi_squares(exact: ExactSearch, geometry: Geometry) -> dict[str, float]:
    """Return the chi-square of hit counts with the entry |x - Q Q' x| of the rows' vectors, and without it."""
    reduction, count = geometry.reduction, len(exact.row_ids)
    if reduction is None:
        return {}
    vectors = exact.blocks.take(np.arange(count))
    entry = reduction.text_dim + reduction.image_dim
    without = np.delete(vectors, entry, axis=1)
    hits = {"chi_square_with_entry": np.zeros(count, int), "chi_square_without_entry": np.zeros(count, int)}
    for step in range(num_hubness_queries(count) // BATCH):
        stream: dict[str, Any] = {"seed": SEED, "step": step, "purpose": Purpose.HUBNESS}
        text = exact.take(draw_rows(count, BATCH, **stream), "text")
        queries = geometry.queries(text, draw_points(geometry, BATCH, **stream))
        for each, x, q in zip(
            hits.values(), (vectors, without), (queries, np.delete(queries, entry, axis=1)), strict=True
        ):
            nearest = (np.square(x).sum(1) - 2 * q @ x.T).argmin(1)
            each += np.bincount(nearest, minlength=count)
    return {name: round(chi_square(each, count), 3) for name, each in hits.items()}


def _rate(exact: ExactSearch, queries: Any) -> float:
    """Return the median queries per second of batches, after one to warm up."""
    rates = []
    for turn in range(ROUNDS + 1):
        part = queries[BATCH * (turn % 2) :][:BATCH]
        began = time.perf_counter()
        exact.blocks.nearest(part)
        rates.append(len(part) / (time.perf_counter() - began))
    return round(statistics.median(rates[1:]), 1)


def main() -> None:
    """Measure the tables and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist and noto-emoji")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--table", nargs="*", default=["mnist", "emoji", "mnist-pixels"])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"machine": machine()}
    for name in args.table:
        base, _, pixels = name.partition("-")
        table = getattr(real_tables, base)(args.data, args.work)
        if pixels:
            files, *shape = PIXELS[base]
            places = sorted(map(str, args.data.glob(files)))
            table = pixel_table(table, args.work / f"{name}.lance", places, *shape)
        sizes = {"rows": table.dataset().count_rows(), "text_dim": table.meta.text_dim}
        sizes["latent_dim"] = table.meta.geometry.latent_dim
        content[name] = sizes | {"lines": measure(table, args.work, DIMS["-" + pixels if pixels else ""])}
    json.dump(content, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
