"""How well the report's perplexity and self-retrieval rate are those of the whole table, by its number of rows.

Synthetic pairs, as in a table whose captions are alike: 6 text dimensions, 16 latent ones. `truth` searches all rows by
brute force with other captions and four times as much noise, so its entropy needs no correction. `sample` measures in
20,000 rows with the plain entropy of 512 points, as the report did before 0.2; `report` is what it does now. `entropy`
has the estimates of perplexity from 1,024 points where a number of targets is equally likely. Prints JSON.

    python tests/bench/bench_sweep.py [--rows 5000,20000,100000]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int
from machine import machine

from index.report.sweep import NUM_POINTS, entropy, find_targets, mean_perplexity, measure_sweep, rows_in
from index.search.exact import ExactSearch
from index.space.geometry import Geometry
from index.space.moments import Moments, unit
from index.space.queries import draw_points
from index.table.commit import publish
from index.table.schema import TRAIN, EncoderRef, TableMeta, encoded_schema
from index.table.storage import Storage
from index.table.table import Table, list_array
from index.table.vectors import add_vectors

TEXT_DIM, LATENT_DIM, SCALES = 6, 16, (2.0, 4.0)
SAMPLE_ROWS, SAMPLE_CAPTIONS, SAMPLE_POINTS = 20_000, 16, 512
TRUE_CAPTIONS, TRUE_POINTS = 64, 4096


def write(uri: Path, rows: int) -> Table:
    """Write a table of Gaussian text embeddings and latents."""
    import lance
    import pyarrow as pa

    rng = np.random.default_rng(rows)
    text, latent = rng.standard_normal((rows, TEXT_DIM)), rng.standard_normal((rows, LATENT_DIM))
    encoded, ids = encoded_schema(TEXT_DIM, LATENT_DIM, keep_images=False), [str(row) for row in range(rows)]
    values: dict[str, Any] = {"id": ids, "key": ids, "caption": ids, "split": [TRAIN] * rows}
    values |= {"text": list_array(text), "latent": list_array(latent)}
    values |= {name: pa.nulls(rows, encoded.field(name).type) for name in encoded.names if name not in values}
    data = pa.Table.from_pydict(values, schema=encoded)
    moments = Moments.of(text, latent)
    geometry, encoder = Geometry.fit(moments, desc_scale=4.0), EncoderRef(name="", class_name="none", digest="")
    meta = TableMeta(
        image_encoder=encoder,
        text_encoder=encoder,
        image_size=8,
        crop="center",
        latent_shape=(1, 4, 4),
        text_dim=TEXT_DIM,
        val_fraction=0.0,
        moments=moments,
        geometry=geometry,
    )
    fragments = lance.fragment.write_fragments(data, str(uri), schema=encoded, mode="overwrite")
    with_vectors = [add_vectors(str(uri), each, encoded, geometry) for each in fragments]
    return publish(str(uri), encoded, meta, with_vectors, "bench", Storage())


def brute_force(table: Table, own: Int[np.ndarray, "A"], r: Float32[np.ndarray, "P L"], rows: Any) -> dict[str, Any]:
    """Return the targets of captions among some rows at each scale, by the definition."""
    text, latent = table.column("text").astype(np.float32)[rows], table.column("latent")[rows]
    geometry = table.meta.geometry
    image, part = (torch.from_numpy(each) for each in (geometry.image_part(text, latent), unit(text)))
    cost = torch.addmm(image.square().sum(1), torch.from_numpy(r), image.T, alpha=-2)  # P N
    targets = {}
    for scale in SCALES:
        weight = (scale * geometry.kappa) ** 2
        best = [(cost + weight * (part - part[a]).square().sum(1)).argmin(1) for a in own]
        targets[str(scale)] = torch.stack(best).numpy()
    return targets


def compare(table: Table) -> dict[str, Any]:
    """Measure a table in each way, at each scale."""
    geometry, exact = table.meta.geometry, ExactSearch(table)
    n, rng = len(exact.row_ids), np.random.default_rng(5)
    own = rng.choice(n, TRUE_CAPTIONS, replace=False)
    true_r = draw_points(geometry, TRUE_POINTS, seed=99, step=0)
    text = unit(exact.take(own, "text").astype(np.float32))
    targets = find_targets(rows_in(table, geometry, 2**30), geometry, text, true_r, SCALES)
    true = dict(zip(map(str, SCALES), targets, strict=True))
    few = brute_force(table, own[:2], true_r[:256], np.arange(n))
    assert all((few[scale] == true[scale][:2, :256]).mean() > 0.99 for scale in few), "not the targets of brute force"
    rows = np.sort(rng.choice(n, min(n, SAMPLE_ROWS), replace=False))
    sampled_own = rng.choice(len(rows), SAMPLE_CAPTIONS, replace=False)
    sample = brute_force(table, sampled_own, draw_points(geometry, SAMPLE_POINTS, seed=0, step=0), rows)
    began = time.perf_counter()
    _, points = measure_sweep(exact, geometry, SCALES)
    seconds = time.perf_counter() - began
    lines: dict[str, Any] = {"sweep_seconds": round(seconds, 1)}
    for scale, point in zip(SCALES, points, strict=True):
        target = true[str(scale)]
        plain = [np.exp(_plain(each)) for each in sample[str(scale)]]
        lines[f"desc_scale {scale:g}"] = {
            "perplexity": {"truth": mean_perplexity(target), "sample": np.mean(plain), "report": point.perplexity},
            "self_retrieval_rate": {
                "truth": (target == own[:, None]).mean(),
                "sample": (sample[str(scale)] == sampled_own[:, None]).mean(),
                "report": point.self_retrieval_rate,
            },
        }
    return lines


def estimates(repeats: int = 50) -> dict[str, Any]:
    """Return the mean estimate of a perplexity from as many points as the report has."""
    rng, lines = np.random.default_rng(0), {}
    for perplexity in (10, 100, 300, 1000, 3000):
        draws = rng.integers(perplexity, size=(repeats, NUM_POINTS))
        corrected = [np.exp(entropy(np.unique(each, return_counts=True)[1])) for each in draws]
        plain = [np.exp(_plain(each)) for each in draws]
        lines[str(perplexity)] = {"plain": np.mean(plain), "report": np.mean(corrected)}
    return lines


def _plain(target: Int[np.ndarray, "P"]) -> float:
    frequency = np.unique(target, return_counts=True)[1] / len(target)
    return float(-(frequency * np.log(frequency)).sum())


def main() -> None:
    """Write a table for each number of rows, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="5000,20000,100000")
    sizes = [int(rows) for rows in parser.parse_args().rows.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        lines = {f"{rows:,}": compare(write(Path(folder) / f"{rows}.lance", rows)) for rows in sizes}
    content = {"machine": machine(), "rows": lines, "entropy": estimates()}
    print(json.dumps(content, indent=2, default=lambda value: round(float(value), 3)))


if __name__ == "__main__":
    main()
