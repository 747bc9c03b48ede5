"""Several runs on one table side by side: the same exam, captions and seeds for all of them, one table and one page.

Runs that differ in nothing but their seed are one line, with mean and standard deviation.
"""

import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index.errors import RunError
from index.table.storage import write_json, write_text
from trainer.evaluation.comparison_page import comparison_page
from trainer.evaluation.exam import ExamConfig, set_exam
from trainer.grid import draw_grid
from trainer.run_folder import read_config
from trainer.sampler import CoalescerPipeline

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN_STEPS = 2
COST = ("parameters", "images", "seconds")
"""Of training, in every run's result."""
QUIET = ("images", "reuse", "flow")
"""Settings that a run is named by only where nothing else tells it from another; what it cost stands in a table."""


def compare(runs: list[Path], config: ExamConfig, out: Path, *, captions: Sequence[str] = ()) -> dict[str, Any]:
    """Measure all runs; writes OUT/report.json and OUT/index.html, and returns the report."""
    configs = [read_config(run) for run in runs]
    _check_tables(runs, configs)
    began = time.perf_counter()
    opened = CoalescerPipeline.from_pretrained(runs[0], device=config.device)
    exam = set_exam(runs[0], opened, config, out)
    labels = name_runs(configs)
    shown = min(config.steps, key=lambda n: abs(n - SHOWN_STEPS))
    each: list[dict[str, Any]] = []
    answers, drawn = {}, {}
    for run, label in zip(runs, labels, strict=True):
        coalescer = CoalescerPipeline.from_pretrained(run, device=config.device)
        result = exam.take(coalescer, config.steps, out / "log.jsonl")
        each.append({"run": str(run), "label": label, "steps": result.figures, "training": _training(run)})
        if label not in answers:
            answers[label] = result.found[shown].x
            if captions:
                drawn[label] = coalescer(captions, num_inference_steps=shown, seed=config.seed).images
    report = {
        **exam.report(),
        "steps": config.steps,
        "shown_steps": shown,
        "runs": each,
        "lines": {label: summarize([one for one in each if one["label"] == label]) for label in dict.fromkeys(labels)},
        "captions": list(captions),
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(out / "report.json", report)
    write_text(out / "index.html", comparison_page(report, [exam.sheet(answers), *_asked(captions, drawn)]))
    return report


def name_runs(configs: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each run: its objective, and whatever else it does not share with all others, but for the seed."""
    settings = [_settings(config) for config in configs]
    whole = _names(settings)
    for left_out in (QUIET, *itertools.combinations(QUIET, len(QUIET) - 1)):
        names = _names(settings, without=left_out)
        if len(set(names)) == len(set(whole)):
            return names
    return whole


def _names(settings: Sequence[dict[str, Any]], *, without: Sequence[str] = ()) -> list[str]:
    names = [name for name in dict.fromkeys(name for each in settings for name in each) if name not in without]
    differing = [name for name in names if len({json.dumps(each.get(name)) for each in settings}) > 1]
    own = [
        [f"{name}={each[name]}" for name in differing if name not in ("objective", "preset") and name in each]
        for each in settings
    ]
    kinds = [each["objective"] + ("" if each["preset"] == "default" else f" {each['preset']}") for each in settings]
    return [", ".join([kind, *rest]) for kind, rest in zip(kinds, own, strict=True)]


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    fitted = {name: value for name, value in config["fit"].items() if name not in ("seed", "hyperparameters")}
    return {**fitted, **config["fit"]["hyperparameters"]}


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Runs that differ by seed alone as one: [mean, standard deviation] of each figure, 0 of a single run."""
    steps = {
        n: {name: _spread([run["steps"][n][name] for run in runs]) for name in figures}
        for n, figures in runs[0]["steps"].items()
    }
    training = {name: _spread([run["training"][name] for run in runs]) for name in runs[0]["training"]}
    return {"runs": len(runs), "steps": steps, "training": training}


def _spread(values: Sequence[float]) -> list[float]:
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def _training(run: Path) -> dict[str, float]:
    """What training cost."""
    result = json.loads((run / "result.json").read_text())
    return {name: float(result[name]) for name in COST}


def _asked(captions: Sequence[str], drawn: "dict[str, list[Image]]") -> "list[Image]":
    """A sheet of the captions that the user gave: a line for each, a column for each kind of run."""
    if not captions:
        return []
    images = [images[line] for line in range(len(captions)) for images in drawn.values()]
    words = [f"{label}: {caption}" for caption in captions for label in drawn]
    return [draw_grid(images, words, columns=len(drawn))]


def _check_tables(runs: Sequence[Path], configs: Sequence[dict[str, Any]]) -> None:
    if not runs:
        raise RunError("there is no run to compare: give at least one folder that `trainer fit` has made")
    tables = [(config["table"]["uri"], config["table"]["version"]) for config in configs]
    for run, (uri, version) in zip(runs, tables, strict=True):
        if (uri, version) != tables[0]:
            raise RunError(
                f"{run} was trained on version {version} of {uri}, {runs[0]} on version {tables[0][1]} of "
                f"{tables[0][0]}: compare runs of one table and version"
            )
        if not (run / "result.json").is_file():
            raise RunError(f"{run} is not trained to its end: go on with `trainer fit ... --resume`")
