"""Compare the coalescer with its rivals on one table: equal latents, network, batches, captions and training time.

  rivals  every objective with its authors' coupling, and both flows also with retrieved pairs
  parts   the default coalescer with one setting changed at a time

First all objectives take training steps in turns, on pairs in memory. The median rates say how many images each may see
in the time that the default coalescer takes for `--images`. Then each is trained by `trainer fit`, once per seed, one
run after the other, and `trainer compare` evaluates all of them; its page and report are in WORK/report. Runs that
exist are not trained again. A rectified flow starts from the flow matching run of seed 0, whose time is not counted.

Every objective has its authors' settings, as in trainer/objectives; none was tuned here. Prints JSON.

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
from trainer.evaluation.protocol import EvaluationConfig
from trainer.objectives.registry import make_objective
from trainer.stream import NeighborStream, StreamConfig


class Variant(NamedTuple):
    """Settings of a run that differ between variants."""

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
        DEFAULT: Variant("coalescer"),
        "coalescer-paper": Variant("coalescer", preset="paper"),
        "endpoint": Variant("endpoint"),
        FLOW: Variant("flow_matching", "independent"),
        "flow_matching-nearest": Variant("flow_matching"),
        "rectified_flow": Variant("rectified_flow", "independent"),
        "mean_flow-independent": Variant("mean_flow", "independent"),
        "mean_flow-nearest": Variant("mean_flow"),
        "shortcut": Variant("shortcut", "independent"),
        "consistency": Variant("consistency", "independent"),
        "imle": Variant("imle", "independent"),
    },
    "parts": {
        DEFAULT: Variant("coalescer"),
        "no-consistency": Variant("coalescer", hyperparameters={"consistency": 0}),
        "early-consistency": Variant("coalescer", hyperparameters={"consistency": 10, "consistency_ramp": 0}),
        "softer": Variant("coalescer", hyperparameters=SOFTER),
        "far-consistency": Variant(
            "coalescer", hyperparameters={"consistency": 1, "consistency_ramp": 0, "consistency_gap": 1}
        ),
        "no-confidence": Variant("coalescer", hyperparameters={"confidence_weight": 0}),
        "no-segment": Variant("coalescer", hyperparameters={"segment": 0, "consistency": 0}),
        "time-conditioning": Variant("coalescer", hyperparameters={"time_conditioning": 1}),
        "even": Variant("coalescer", hyperparameters={"step_rule": "even"}),
        "overshooting": Variant("coalescer", hyperparameters=OVERSHOOTING),
        "self-segment": Variant("coalescer", hyperparameters={"segment": 0.7, "self_segment": 0.2}),
        "no-reuse": Variant("coalescer", reuse=1),
        "no-search": Variant("coalescer", "independent"),
    },
}
BATCH = 256
PRINTED = (
    "frechet",
    "feature_frechet",
    "two_sample_accuracy",
    "precision",
    "recall",
    "coverage",
    "diversity",
    "class_accuracy",
    "caption_top1",
)


def measure_rates(
    table: Table, variants: dict[str, Variant], size: str, rounds: int, seconds: float
) -> dict[str, float]:
    """Return the training steps per second of each objective, with pairs in memory, measured in turns."""
    stream = NeighborStream(table, open_search(table), StreamConfig(batch_size=BATCH))
    batches = [batch for _, batch in itertools.islice(stream, 8)]
    objectives = {
        name: make_objective(variant.objective, variant.preset, **variant.hyperparameters)
        for name, variant in variants.items()
    }
    trials = {name: Trial(table, size, "cpu", objective) for name, objective in objectives.items()}
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, trial in trials.items():
            rates[name].append(trial.rate(enumerate(itertools.cycle(batches)), seconds)[0])
    return {name: statistics.median(rates[name]) for name in variants}


def train(table: str, variant: Variant, out: Path, size: str, images: int, seed: int) -> None:
    """Train a run by the command line, unless it exists."""
    if (out / "result.json").exists():
        return
    call = [sys.executable, "-c", "from trainer.cli import main; main()", "fit", table, "--out", str(out)]
    call += ["--objective", variant.objective, "--preset", variant.preset, "--coupling", variant.coupling]
    call += ["--size", size, "--images", str(images), "--batch-size", str(BATCH), "--seed", str(seed)]
    call += ["--device", "cpu"]
    call += [part for name, value in variant.hyperparameters.items() for part in ("--set", f"{name}={value}")]
    call += [] if variant.reuse is None else ["--reuse", str(variant.reuse)]
    subprocess.run(call, check=True, stdout=sys.stderr)


def main_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics that are printed."""
    return {name: value for name, value in metrics.items() if name in PRINTED}


def summarize(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the main metrics of every group of runs, [mean, standard deviation] by steps, and of the references."""
    groups = [
        {
            "run": label,
            "runs": group["runs"],
            "training": group["training"],
            "metrics": {n: main_metrics(metrics) for n, metrics in group["metrics"].items()},
        }
        for label, group in report["groups"].items()
    ]
    references = {name: main_metrics(metrics) for name, metrics in report["references"].items()}
    return [*groups, {"references": references}]


def main() -> None:
    """Measure rates, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs and the report")
    parser.add_argument("--group", default="rivals", choices=SETS)
    parser.add_argument("--only", help="comma-separated names of some of its runs")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--images", type=int, default=400_000, help="training images of the default coalescer")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--num-inference-steps", default="1,2,4,8,32")
    parser.add_argument("--num-samples", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each objective in the measurement of rates")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    args = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # as `trainer fit` does
    table = open_table(args.table, indexed=True)
    variants = {name: SETS[args.group][name] for name in (args.only or ",".join(SETS[args.group])).split(",")}
    ready = {DEFAULT: Variant("coalescer")}
    ready |= {name: variant for name, variant in variants.items() if name != "rectified_flow"}
    rates = measure_rates(table, ready, args.size, args.rounds, args.seconds)
    runs = []
    for seed in range(args.seeds):
        for name, variant in variants.items():
            if variant.objective == "rectified_flow":
                variant = variant._replace(hyperparameters={"flow": str(args.work / f"{FLOW}-0")})
            if name not in rates:  # the flow that it starts from exists by now
                rates |= measure_rates(table, {name: variant}, args.size, args.rounds, args.seconds)
            images = int(args.images * rates[name] / rates[DEFAULT]) // BATCH * BATCH
            runs.append(args.work / f"{name}-{seed}")
            train(args.table, variant, runs[-1], args.size, images, seed)
    steps = [int(n) for n in args.num_inference_steps.split(",")]
    config = EvaluationConfig(num_inference_steps=steps, num_samples=args.num_samples, device="cpu")
    in_order = sorted(runs, key=lambda run: list(variants).index(run.name.rpartition("-")[0]))
    report = compare(in_order, config, args.work / "report")
    print(json.dumps({"machine": machine(), "steps_per_second": rates, "groups": summarize(report)}, indent=2))


if __name__ == "__main__":
    main()
