"""The coalescer against its rivals on one table: the same latents, network, batches, captions and time to train.

  rivals  every objective, on its authors' pairs, and both flows also on the search's
  parts   the default coalescer with one thing changed at a time

Every objective first takes steps in turns on pairs that are in memory, medians over the rounds; that says how many
images each may see in the time that the default coalescer takes for `--images`. Then each is trained by `trainer fit`
for each seed, one run after the other, and all of them sit one exam, `trainer compare`, whose page and report are in
WORK/report. A run that is there already is not trained again. A rectified flow rests on the run of flow matching with
seed 0, which is not counted as its time.

Each objective has its authors' settings as they stand in trainer/objectives; none was tuned here. Prints JSON.

    python tests/bench/bench_rivals.py TABLE.lance --work WORK [--set rivals --size tiny --images 400000 --seeds 3]
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_stream import Trial
from machine import machine

from index.search.ann import open_search
from index.table.table import Table, open_table
from trainer.evaluation.compare import compare
from trainer.evaluation.exam import ExamConfig
from trainer.objectives.registry import make_objective
from trainer.stream import NeighborStream, StreamConfig


class Kind(NamedTuple):
    """What a run is asked for."""

    objective: str
    coupling: str = "nearest"
    preset: str = "default"
    hyperparameters: dict[str, Any] = {}  # noqa: RUF012
    reuse: int | None = None


DEFAULT, FLOW = "coalescer", "flow_matching-independent"
OVERSHOOTING = {
    "step_rule": "even",
    "consistency": 1,
    "consistency_ramp": 0,
    "consistency_gap": 1,
    "segment": 0.7,
}
SOFTER = {"consistency": 3, "consistency_ramp": 0, "consistency_gap": 0.3, "segment": 0.7}
SETS = {
    "rivals": {
        DEFAULT: Kind("coalescer"),
        "coalescer-paper": Kind("coalescer", preset="paper"),
        "endpoint": Kind("endpoint"),
        FLOW: Kind("flow_matching", "independent"),
        "flow_matching-nearest": Kind("flow_matching"),
        "rectified_flow": Kind("rectified_flow", "independent"),
        "mean_flow-independent": Kind("mean_flow", "independent"),
        "mean_flow-nearest": Kind("mean_flow"),
        "shortcut": Kind("shortcut", "independent"),
        "consistency": Kind("consistency", "independent"),
        "imle": Kind("imle", "independent"),
    },
    "parts": {
        DEFAULT: Kind("coalescer"),
        "no-consistency": Kind("coalescer", hyperparameters={"consistency": 0}),
        "early-consistency": Kind("coalescer", hyperparameters={"consistency": 10, "consistency_ramp": 0}),
        "softer": Kind("coalescer", hyperparameters=SOFTER),
        "far-consistency": Kind(
            "coalescer", hyperparameters={"consistency": 1, "consistency_ramp": 0, "consistency_gap": 1}
        ),
        "no-confidence": Kind("coalescer", hyperparameters={"confidence_weight": 0}),
        "no-segment": Kind("coalescer", hyperparameters={"segment": 0, "consistency": 0}),
        "time-conditioning": Kind("coalescer", hyperparameters={"time_conditioning": 1}),
        "even": Kind("coalescer", hyperparameters={"step_rule": "even"}),
        "overshooting": Kind("coalescer", hyperparameters=OVERSHOOTING),
        "self-segment": Kind("coalescer", hyperparameters={"segment": 0.7, "self_segment": 0.2}),
        "no-reuse": Kind("coalescer", reuse=1),
        "no-search": Kind("coalescer", "independent"),
    },
}
BATCH = 256
REPORTED = ("frechet", "feature_frechet", "two_sample_accuracy", "precision", "recall", "coverage", "diversity")
ADHERENCE = ("class_accuracy", "caption_first")


def rates(table: Table, kinds: dict[str, Kind], size: str, rounds: int, seconds: float) -> dict[str, float]:
    """Steps per second of each objective alone, targets in memory, taking turns."""
    stream = NeighborStream(table, open_search(table), StreamConfig(batch_size=BATCH))
    found = [batch for _, batch in itertools.islice(stream, 8)]
    objectives = {
        name: make_objective(kind.objective, kind.preset, **kind.hyperparameters) for name, kind in kinds.items()
    }
    trials = {name: Trial(table, size, "cpu", objective) for name, objective in objectives.items()}
    each: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, trial in trials.items():
            each[name].append(trial.rate(enumerate(itertools.cycle(found)), seconds)[0])
    return {name: statistics.median(each[name]) for name in kinds}


def train(table: str, kind: Kind, out: Path, size: str, images: int, seed: int) -> None:
    """One run, as a user starts it."""
    if (out / "result.json").exists():
        return
    call = [sys.executable, "-c", "from trainer.cli import main; main()", "fit", table, "--out", str(out)]
    call += ["--objective", kind.objective, "--preset", kind.preset, "--coupling", kind.coupling, "--size", size]
    call += ["--images", str(images), "--batch-size", str(BATCH), "--seed", str(seed), "--device", "cpu"]
    call += [part for dial, value in kind.hyperparameters.items() for part in ("--set", f"{dial}={value}")]
    call += [] if kind.reuse is None else ["--reuse", str(kind.reuse)]
    subprocess.run(call, check=True, stdout=sys.stderr)


def main_figures(row: dict[str, Any]) -> dict[str, Any]:
    """Those of a report's row that are printed."""
    return {name: figure for name, figure in row.items() if name in (*REPORTED, *ADHERENCE)}


def summary(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The main figures of every kind of run, [mean, standard deviation] by steps, and of the floors."""
    lines = [
        {
            "run": label,
            "runs": line["runs"],
            "training": line["training"],
            "steps": {n: main_figures(row) for n, row in line["steps"].items()},
        }
        for label, line in report["lines"].items()
    ]
    floors = {name: main_figures(row) for name, row in report["floors"].items()}
    return [*lines, {"floors": floors}]


def main() -> None:
    """Measure rates, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table")
    parser.add_argument("--work", type=Path, required=True, help="for the runs and the report")
    parser.add_argument("--set", default="rivals", choices=SETS)
    parser.add_argument("--only", help="some of its runs, with commas")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--images", type=int, default=400_000, help="of the default coalescer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", default="1,2,4,8,32")
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn")
    given = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # as `trainer fit` does
    table = open_table(given.table, indexed=True)
    kinds = {name: SETS[given.set][name] for name in (given.only or ",".join(SETS[given.set])).split(",")}
    ready = {DEFAULT: Kind("coalescer")} | {name: kind for name, kind in kinds.items() if name != "rectified_flow"}
    speed = rates(table, ready, given.size, given.rounds, given.seconds)
    runs = []
    for seed in range(given.seeds):
        for name, kind in kinds.items():
            if kind.objective == "rectified_flow":
                kind = kind._replace(hyperparameters={"flow": str(given.work / f"{FLOW}-0")})
            if name not in speed:  # the flow that it rests on is there by now
                speed |= rates(table, {name: kind}, given.size, given.rounds, given.seconds)
            images = int(given.images * speed[name] / speed[DEFAULT]) // BATCH * BATCH
            runs.append(given.work / f"{name}-{seed}")
            train(given.table, kind, runs[-1], given.size, images, seed)
    config = ExamConfig(steps=[int(n) for n in given.steps.split(",")], samples=given.samples, device="cpu")
    in_order = sorted(runs, key=lambda run: list(kinds).index(run.name.rpartition("-")[0]))
    report = compare(in_order, config, given.work / "report")
    print(json.dumps({"machine": machine(), "steps_per_second": speed, "lines": summary(report)}, indent=2))


if __name__ == "__main__":
    main()
