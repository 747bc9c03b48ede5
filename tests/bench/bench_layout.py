"""Measure how long the vectors of a table take to be rewritten: in one process, and on Beam with 1 and 2 workers.

A table of Gaussian rows in many fragments gets another desc_scale with a balance coordinate for each row, on a copy of
its own each time; ways take turns, and the median over rounds counts. The vectors of all ways must be equal.
Prints JSON.

    PYTHONPATH=.:tests python tests/bench/bench_layout.py --work WORK [--rows 200000 --fragments 100 --rounds 3]
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from machine import machine
from synthetic_tables import random_table

from index.build.layout import VectorWriter, write_vectors
from index.table.table import Table, column_array, open_table
from pipeline.beam.rewrite_vectors import beam_vector_writer
from pipeline.config import RuntimeConfig


def main() -> None:
    """Write the table, rewrite its vectors in each way, and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for the table and its copies")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--fragments", type=int, default=100)
    parser.add_argument("--text-dim", type=int, default=128)
    parser.add_argument("--latent-dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    source = args.work / "source.lance"
    shutil.rmtree(source, ignore_errors=True)
    dims = {"text_dim": args.text_dim, "latent_dim": args.latent_dim}
    table = random_table(source, args.rows, fragments=args.fragments, heldout=args.rows // 100, **dims)
    ways = {
        "this process": write_vectors,
        "1 worker": beam_vector_writer(RuntimeConfig(num_workers=1)),
        "2 workers": beam_vector_writer(RuntimeConfig(num_workers=2)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    digests = set()
    for _ in range(args.rounds):
        for name, write in ways.items():
            took, digest = rewrite(table, args.work / "copy.lance", write)
            seconds[name].append(took)
            digests.add(digest)
    medians = {name: round(statistics.median(times), 2) for name, times in seconds.items()}
    report = {
        "machine": machine(),
        "load_average": os.getloadavg(),
        "rows": args.rows,
        "fragments": len(table.dataset().get_fragments()),
        "vector_dim": table.meta.geometry.vector_dim,
        "seconds": medians,
        "all_seconds": {name: [round(each, 2) for each in times] for name, times in seconds.items()},
        "rows_per_second": {name: round(args.rows / median) for name, median in medians.items()},
        "same_vectors": len(digests) == 1,
    }
    print(json.dumps(report, indent=2))


def rewrite(table: Table, path: Path, write: VectorWriter) -> tuple[float, str]:
    """Rewrite the vectors of a copy; return the seconds and a digest of the vectors."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(table.uri, path)
    copy = open_table(path)
    balance = np.linspace(0, 1, copy.dataset().count_rows(), dtype=np.float32)
    geometry = replace(copy.meta.geometry, desc_scale=2.5)
    began = time.monotonic()
    written = write(copy, geometry, balance, None)
    took = time.monotonic() - began
    digest = hashlib.sha256()
    for batch in written.scan(["vector"]):
        digest.update(column_array(batch["vector"]).tobytes())
    assert written.version == copy.version + 1
    return took, digest.hexdigest()


if __name__ == "__main__":
    main()
