"""Measure the peak memory of what build-index and the trainers do, at several limits and table sizes.

Each case runs in a process of its own, whose peak resident size (ru_maxrss) must stay within

    1.25 * limit + constant + rows * BYTES_PER_ROW + LANCE_BYTES

The constant is the peak of the same case on a table of 2,000 rows as wide: imports, and queries whose number does not
depend on rows. The others are in index/search/memory.py. Prints JSON, with the rows and queries that a case compared,
its seconds, and whether it kept the bound.

    python tests/bench/memory.py --work WORK [--tables 200000x256,1000000x256,120000x2056] [--limits 0.25,0.5,1]
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from index.search.memory import BYTES_PER_ROW, LANCE_BYTES

SMALL = 2000
TRUTH_QUERIES, BATCH = 2048, 1024
SEARCH_BATCHES = 2


def main() -> None:
    """Make the tables, then run every case at every limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for tables; about 3 GB for the default ones")
    parser.add_argument("--tables", default="200000x256,1000000x256,120000x2056", help="rows x dimensions of vectors")
    parser.add_argument("--limits", default="0.25,0.5,1", help="GiB")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--one", nargs=3, metavar=("CASE", "TABLE", "LIMIT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, uri, limit = args.one
        print(json.dumps(measure(name, uri, int(limit))))
        return
    tables = [[int(each) for each in name.split("x")] for name in args.tables.split(",")]
    results = []
    for rows, dim in tables:
        small, large = (make_table(args.work, count, dim) for count in (SMALL, rows))
        for case in args.cases.split(","):
            for gib in map(float, args.limits.split(",")):
                results.append(compare(case, small, large, int(gib * 2**30)) | {"rows": rows, "dim": dim})
                print(json.dumps(results[-1]), file=sys.stderr)
    constants = {"bytes_per_row": BYTES_PER_ROW, "lance_bytes": LANCE_BYTES}
    print(json.dumps({"machine": machine(), **constants, "cases": results}, indent=2))


def compare(case: str, small: Path, large: Path, limit: int) -> dict[str, Any]:
    """Return the peaks of a case on a small and a large table, and whether the bound holds."""
    constant, measured = (run(case, uri, limit) for uri in (small, large))
    allowed = 1.25 * limit + constant["peak"] + BYTES_PER_ROW * measured["table_rows"] + LANCE_BYTES
    mib = {"limit": limit, "constant": constant["peak"], "peak": measured["peak"], "allowed": allowed}
    return {
        "case": case,
        **{f"{name}_mib": round(value / 2**20) for name, value in mib.items()},
        "kept": measured["peak"] <= allowed,
        "seconds": measured["seconds"],
        "measured_on": measured["measured_on"],
    }


def run(case: str, uri: Path, limit: int) -> dict[str, Any]:
    """Run a case in a process of its own."""
    command = [sys.executable, __file__, "--work", ".", "--one", case, str(uri), str(limit)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: str, uri: str, limit: int) -> dict[str, Any]:
    """Run a case here; return its peak memory, seconds, and what it was measured on."""
    from index.table.table import open_table

    table = open_table(uri)
    began = time.monotonic()
    measured_on = CASES[case](table, limit)
    seconds = round(time.monotonic() - began, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak": peak, "seconds": seconds, "measured_on": measured_on, "table_rows": table.dataset().count_rows()}


def make_table(work: Path, rows: int, dim: int) -> Path:
    """Write a synthetic table whose vectors have `dim` dimensions, if there is none yet."""
    from search_speed import synthetic

    uri = work / f"rows-{rows}x{dim}.lance"
    if not (uri / "_versions").exists():
        text_dim = dim // 4 - 1
        synthetic(uri, rows, text_dim=text_dim, latent=(1, 1, dim - text_dim - 1))
    return uri


def truth(table: Any, limit: int) -> str:
    """Search queries exactly, for recall."""
    from index.report.recall import evaluation_queries, find_ground_truth
    from index.search.exact import ExactSearch

    found = find_ground_truth(ExactSearch(table, memory=limit), evaluation_queries(table, TRUTH_QUERIES))
    return f"{len(found.queries):,} queries against {len(found.exact.row_ids):,} rows"


def integrity(table: Any, limit: int) -> str:
    """Count bad and duplicate vectors."""
    from index.report.integrity import check_vectors

    counts = check_vectors(table, limit)
    return f"{counts.hashed_rows:,} rows hashed, {counts.distinct_texts:,} distinct texts"


def k_means(table: Any, limit: int) -> str:
    """Train the partitions of an index, and assign all rows to them."""
    from index.build.select import most_partitions
    from index.search.kmeans import partition_file, train_centroids

    partitions = most_partitions(len(table.positions("train")), table.meta.geometry.vector_dim, limit)
    centroids = train_centroids(table, partitions, memory=limit)
    with partition_file(table, centroids, memory=limit) as path:
        size = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
    return f"{len(centroids):,} partitions, {size:,} bytes of assignments"


def hit_counts(table: Any, limit: int) -> str:
    """Count hits and fit the linear probe, by approximate results: random rows, so that only counting is measured."""
    from index.report.hubness import measure_hubness
    from index.search.exact import ExactSearch
    from index.search.neighbors import NearestRows, RetrievedPairs

    exact = ExactSearch(table, memory=limit)

    class Random:
        def nearest(self, queries: Any, k: int = 1) -> RetrievedPairs:
            positions = np.random.default_rng(0).integers(len(exact.row_ids), size=(len(queries), k))
            columns = {name: exact.take(positions, name) for name in ("text", "latent")}
            return RetrievedPairs(exact.row_ids[positions], np.zeros(positions.shape, np.float32), **columns)

        def nearest_rows(self, queries: Any, k: int = 1) -> NearestRows:
            pairs = self.nearest(queries, k)
            return NearestRows(pairs.row_id, pairs.distance)

    hubness = measure_hubness(table.meta.geometry, Random(), exact)
    return f"{hubness.hubness_queries:,} queries, {hubness.linear_probe_queries:,} of them for the linear probe"


def sweep(table: Any, limit: int) -> str:
    """Measure the effect of desc_scale."""
    from index.report.sweep import measure_sweep
    from index.search.exact import ExactSearch

    size, _ = measure_sweep(ExactSearch(table, memory=limit), table.meta.geometry, (2.0, 4.0), num_captions=16)
    return f"{size.sweep_captions} captions x {size.sweep_points:,} points against {size.sweep_rows:,} rows"


def auto_desc_scale(table: Any, limit: int) -> str:
    """Compare rows as `--desc-scale auto` does, without stored vectors."""
    from index.report.sweep import find_targets, rows_in
    from index.space.moments import unit
    from index.space.queries import draw_points

    geometry = table.meta.geometry
    text = unit(table.take(np.arange(16), "text").astype(np.float32))
    points = draw_points(geometry, 1024, seed=0, step=0)
    targets = find_targets(rows_in(table, geometry, limit), geometry, text, points, (2.0, 4.0))
    return f"{targets.size:,} targets"


def balance(table: Any, limit: int) -> str:
    """Fit potentials of a sample of the rows and derive those of the others, in few steps."""
    from index.build.potentials import extend_potentials, fit_potentials
    from index.search.blocks import VectorBlocks
    from index.space.queries import draw_points, draw_rows

    geometry, train = table.meta.geometry, table.positions("train")
    stride = -(-len(train) // 50_000)
    sample = VectorBlocks(table, memory=limit // 2, stride=stride, balance=False)

    def queries(step: int) -> Any:
        rows = train[draw_rows(len(train), 4096, seed=0, step=step)]
        return geometry.queries(table.take(rows, "text"), draw_points(geometry, 4096, seed=0, step=step))

    *_, potentials = fit_potentials(sample, queries, steps=2, target=1e9)
    blocks = VectorBlocks(table, memory=limit // 2, balance=False)
    g = extend_potentials(sample, potentials.g, blocks, queries, num_queries=16_384, memory=limit)
    return f"{sample.count:,} rows fitted, {len(g):,} derived from them"


def examples(table: Any, limit: int) -> str:
    """Retrieve the examples of the index page by exact search."""
    from dataclasses import replace

    from index.report.page import retrieve_examples
    from index.table.schema import IndexRef
    from index.table.table import Table

    ref = IndexRef(index_type="none", num_partitions=None, nprobes=None, recall_at_1=1.0)
    table = Table(table.uri, table.version, replace(table.meta, index=ref), table.storage)
    return f"{len(retrieve_examples(table, memory=limit))} queries"


def exact_search(table: Any, limit: int) -> str:
    """Search batches of training by exact search."""
    from index.report.recall import evaluation_queries
    from index.search.exact import ExactSearch

    search = ExactSearch(table, memory=limit)
    for seed in range(SEARCH_BATCHES):
        search.nearest(evaluation_queries(table, BATCH, seed=seed))
    held = "held in memory" if search.blocks.in_memory else "read for each batch"
    return f"{SEARCH_BATCHES} batches of {BATCH:,} queries; vectors {held}"


def whole_build(table: Any, limit: int) -> str:
    """Run all of build-index on a copy of the table, without --balance, which is a case of its own.

    A table of any size gets an index, so that the constant has what Lance takes to write one.
    """
    from index.build.build_index import BuildConfig, build_index
    from index.table.table import open_table

    copy = Path(table.uri).with_suffix(".copy.lance")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(table.uri, copy)
    config = BuildConfig(max_memory=limit, target_recall=0.9, index_type="ivf_rq")
    report = build_index(open_table(copy), config).report
    shutil.rmtree(copy)
    return f"{report.index_choice}; recall of {report.recall_queries:,} queries"


CASES: dict[str, Callable[[Any, int], str]] = {
    "truth": truth,
    "integrity": integrity,
    "k-means": k_means,
    "hit-counts": hit_counts,
    "sweep": sweep,
    "auto-desc-scale": auto_desc_scale,
    "balance": balance,
    "examples": examples,
    "exact-search": exact_search,
    "build-index": whole_build,
}

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":
    main()
