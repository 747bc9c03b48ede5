"""Measure how much vector search slows training down: steps per second for each way to search, and without search.

For each table, network and batch size, in turns, medians over the rounds:
  memory  targets retrieved ahead, no search
  ann     the table's LanceDB index, searched ahead in background threads
  exact   brute force over all rows on the device
  reused  the index, each retrieved pair serving as many steps as `trainer fit` plans on a CPU
`waiting_fraction` is the fraction of the time that training waited for targets. One torch thread, as `trainer fit` uses
on two cores. Prints JSON.

    python tests/bench/bench_stream.py TABLE.lance ... [--sizes tiny,small,base] [--batches 256,1024]
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from machine import machine

from index.search.ann import open_search
from index.table.table import Table, open_table
from trainer.models.base import count_flops
from trainer.models.registry import make_network
from trainer.objectives.base import Objective, Training
from trainer.objectives.registry import make_objective
from trainer.optimizer import Optimizer
from trainer.stream import Batch, NeighborStream, StreamConfig, plan_reuse

SEARCHES = ("memory", "ann", "exact", "reused")


class Trial:
    """One network in training."""

    def __init__(self, table: Table, size: str, device: str, objective: Objective | None = None) -> None:
        """Initialize a network; the objective is the default coalescer if none is passed."""
        torch.manual_seed(0)
        self.network, self.device = make_network(table.meta, size=size).to(device), device
        self.alone = Training(0.0, self.network)
        self.objective = objective or make_objective("coalescer", "default")
        self.optimizer = Optimizer(self.network, steps=10**6, learning_rate=1e-3, ema_decay=0.998)

    def rate(self, source: Iterable[tuple[int, Batch]], seconds: float) -> tuple[float, float]:
        """Return steps per second after five warm-up steps, and the fraction of the time spent waiting for targets."""
        batches = iter(source)
        for _, batch in itertools.islice(batches, 5):
            self.step(batch)
        waited, began, steps = getattr(source, "waiting_seconds", 0.0), time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            self.step(next(batches)[1])
            steps += 1
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        return steps / took, (getattr(source, "waiting_seconds", 0.0) - waited) / took

    def step(self, batch: Batch) -> None:
        """Run one training step as `trainer fit` does."""
        self.optimizer.step(self.objective.loss(self.network, batch.to(self.device), self.alone).total)


def compare(table: Table, size: str, batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one network with every way to search."""
    trial = Trial(table, size, options.device)
    ann, exact = (open_search(table, exact=each, device=options.device) for each in (False, True))
    searches = {"ann": ann, "exact": exact, "reused": ann}
    planned = plan_reuse(table, count_flops(trial.network), exact=False)

    def stream(search: str, seed: int) -> NeighborStream:
        reuse = planned if search == "reused" else 1
        config = StreamConfig(batch_size=batch_size, seed=seed, reuse=reuse)
        return NeighborStream(table, searches[search], config)

    memory = [batch.to(options.device) for _, batch in itertools.islice(stream("exact", 0), 8)]
    rates: dict[str, list[float]] = {search: [] for search in SEARCHES}
    waiting: dict[str, list[float]] = {search: [] for search in SEARCHES}
    for seed, search in itertools.product(range(options.rounds), SEARCHES):
        source = enumerate(itertools.cycle(memory)) if search == "memory" else stream(search, seed)
        rate, waited = trial.rate(source, options.seconds)
        rates[search].append(rate)
        waiting[search].append(waited)
    median = {search: statistics.median(each) for search, each in rates.items()}
    return {
        "table": table.uri.rpartition("/")[2],
        "rows": len(table.positions("train")),
        "vector_dim": table.meta.geometry.vector_dim,
        "index": table.meta.index.index_type if table.meta.index else None,
        "size": size,
        "parameters": sum(each.numel() for each in trial.network.parameters()),
        "batch_size": batch_size,
        "reuse": planned,
        "steps_per_second": median,
        "fraction_of_memory": {search: median[search] / median["memory"] for search in SEARCHES[1:]},
        "waiting_fraction": {search: statistics.median(waiting[search]) for search in SEARCHES[1:]},
    }


def main() -> None:
    """Measure every combination of table, size and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--sizes", default="tiny,small,base")
    parser.add_argument("--batches", default="256,1024")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    lines = [
        compare(open_table(name, indexed=True), size, int(batch_size), options)
        for name in options.tables
        for size in options.sizes.split(",")
        for batch_size in options.batches.split(",")
    ]
    print(json.dumps({"machine": machine(f"device {options.device}"), "lines": lines}, indent=2))


if __name__ == "__main__":
    main()
