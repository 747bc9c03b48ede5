"""Compare values of desc_scale: one table laid out at each of them, and a coalescer trained on each layout.

Each layout is balanced, trained on by `trainer fit` and measured by `trainer evaluate`. A line has the search metrics
at that desc_scale (`SweepPoint`), the metrics of the retrieved pairs, which a perfect network would generate, and those
of the run. Existing runs are not trained again. Prints JSON.

    python tests/bench/bench_desc_scale.py TABLE.lance --work WORK [--scales 0.5,1,2,4 --images 200000 --seeds 1]
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import real_tables
import torch
from bench_rivals import DEFAULT, SETS, main_metrics, train
from machine import machine

from index.build.build_index import BuildConfig, build_index
from index.table.table import Table, open_table
from trainer.evaluation.protocol import EvaluationConfig, evaluate

SEARCH = ("perplexity", "self_retrieval_rate", "text_distance", "prior_skew")


def laid_out(table: Table, scale: float, uri: Path) -> Table:
    """Lay a copy of the table out at one desc_scale, balanced."""
    if uri.exists():
        return open_table(str(uri), indexed=True)
    config = BuildConfig(desc_scale=scale, allow_small_desc_scale=True, balance=True)
    return build_index(real_tables.copy(table, uri), config).table


def main() -> None:
    """Lay out, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table")
    parser.add_argument("--work", type=Path, required=True, help="for the layouts, their runs and reports")
    parser.add_argument("--scales", default="0.5,0.7,1,1.4,2,4")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", default="1,2,4")
    given = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # as `trainer fit` does
    given.work.mkdir(parents=True, exist_ok=True)
    config = EvaluationConfig(num_inference_steps=[int(n) for n in given.steps.split(",")], device="cpu")
    lines: list[dict[str, Any]] = []
    for scale in given.scales.split(","):
        table = laid_out(open_table(given.table), float(scale), given.work / f"at-{scale}.lance")
        report = table.report("index")
        search = {name: report[name] for name in SEARCH} | {"balance_chi_square": report["balance"]["fit_chi_square"]}
        for seed in range(given.seeds):
            run = given.work / f"at-{scale}-{seed}"
            train(table.uri, SETS["rivals"][DEFAULT], run, given.size, given.images, seed)
            report = evaluate(run, config, run / "report")
            line = {"desc_scale": float(scale), "seed": seed} | search
            line |= {"retrieved": main_metrics(report["references"]["retrieved pairs"])}
            lines.append(line | {"steps": {n: main_metrics(metrics) for n, metrics in report["metrics"].items()}})
    print(json.dumps({"machine": machine(), "table": given.table, "images": given.images, "lines": lines}, indent=2))


if __name__ == "__main__":
    main()
