"""Comparison of several runs on one table: the same prompts, noise and references, one report and one page.

Runs that differ only in their seed form a group, reported as mean and standard deviation.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index.errors import RunError
from index.table.storage import write_json, write_text
from trainer.evaluation.protocol import EvaluationConfig, open_protocol
from trainer.evaluation.report import comparison_page
from trainer.evaluation.run_evaluation import GRID_NOISES
from trainer.grid import draw_grid
from trainer.run_folder import find_run, read_config
from trainer.sampler import CoalescerPipeline

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN_STEPS = 2
"""Images are shown for the number of inference steps nearest to this."""
APART = ("objective", "preset", "seed", "hyperparameters")
"""Settings that labels show elsewhere or not at all."""
TRAINING = ("parameters", "images", "seconds")
"""Entries of a run's result.json that say what training cost."""


def compare(runs: list[Path], config: EvaluationConfig, out: Path, *, captions: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate all runs, write OUT/report.json and OUT/index.html, and return the report.

    The page shows images of `captions` from each group. Called again after it was stopped, or with more runs, it takes
    up what was measured. Raises RunError unless all runs are complete and of one table.
    """
    folders = [find_run(run) for run in runs]
    configs = [read_config(folder) for folder in folders]
    _check_runs(folders, configs)
    began = time.perf_counter()
    first = CoalescerPipeline.from_pretrained(folders[0], device=config.device, encoders=config.encoders)
    protocol = open_protocol(folders[0], first, config, out)
    labels, names = label_runs(configs), short_names(runs)
    steps = min(config.num_inference_steps, key=lambda n: abs(n - SHOWN_STEPS))
    evaluated: list[dict[str, Any]] = []
    shown, images = {}, {}
    for number, (run, folder, label) in enumerate(zip(runs, folders, labels, strict=True)):
        pipeline = CoalescerPipeline.from_pretrained(folder, device=config.device, encoders=config.encoders)
        title = f"{names[number]} ({number + 1}/{len(runs)})"
        result = protocol.evaluate(pipeline, config.num_inference_steps, out / "log.jsonl", title=title)
        settings = {"label": label, "seed": configs[number]["fit"]["seed"]}
        evaluated.append({"run": str(run), **settings, "metrics": result.metrics, "training": _training(folder)})
        if label not in shown:
            shown[label] = result.shown[steps]
            if captions:
                images[label] = pipeline(
                    captions, num_inference_steps=steps, num_images_per_prompt=GRID_NOISES, seed=config.seed
                ).images
    report = {
        **protocol.summary(),
        "num_inference_steps": config.num_inference_steps,
        "shown_num_inference_steps": steps,
        "runs": evaluated,
        "groups": {label: summarize([run for run in evaluated if run["label"] == label]) for label in shown},
        "captions": list(captions),
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(out / "report.json", report)
    grids = [protocol.image_grid(shown), *([_caption_grid(captions, images)] if captions else [])]
    write_text(out / "index.html", comparison_page(report, grids))
    return report


def label_runs(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return a label for each run: its objective, and the settings other than the seed in which runs differ.

    Hyperparameters are those of the objective, typed or not, and tell runs of one objective and preset apart.
    """
    names = [_objective_name(config) for config in configs]
    fits = [{name: value for name, value in config["fit"].items() if name not in APART} for config in configs]
    labels = []
    for name, fit, config in zip(names, fits, configs, strict=True):
        alike = [other["objective"] for other, other_name in zip(configs, names, strict=True) if other_name == name]
        labels.append(", ".join([name, *_differing(fit, fits), *_differing(config["objective"], alike)]))
    return labels


def short_names(runs: Sequence[Path]) -> list[str]:
    """Return the names of run folders, with as many folders before them as tell them apart."""
    parts = [run.parts for run in runs]
    deepest = max(map(len, parts))
    depth = next((n for n in range(1, deepest) if len({each[-n:] for each in parts}) == len(set(parts))), deepest)
    return [str(Path(*each[-depth:])) for each in parts]


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return [mean, standard deviation] of each metric of a group of runs; the deviation of a single run is 0.

    A metric that one of them lacks, because too few of its samples are finite, is left out.
    """
    metrics = {
        n: {
            name: _mean_and_deviation([run["metrics"][n][name] for run in runs])
            for name in row
            if all(name in run["metrics"][n] for run in runs)
        }
        for n, row in runs[0]["metrics"].items()
    }
    training = {name: _mean_and_deviation([run["training"][name] for run in runs]) for name in runs[0]["training"]}
    return {"runs": len(runs), "metrics": metrics, "training": training}


def _objective_name(config: dict[str, Any]) -> str:
    objective, preset = str(config["fit"]["objective"]), str(config["fit"]["preset"])
    return objective if preset == "default" else f"{objective} {preset}"


def _differing(settings: dict[str, Any], all_settings: Sequence[dict[str, Any]]) -> list[str]:
    """Return NAME=VALUE of the settings in which not all agree."""
    return [
        f"{name}={value}"
        for name, value in settings.items()
        if len({json.dumps(each.get(name)) for each in all_settings}) > 1
    ]


def _mean_and_deviation(values: Sequence[float]) -> list[float]:
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def _training(run: Path) -> dict[str, float]:
    result = json.loads((run / "result.json").read_text())
    return {name: float(result[name]) for name in TRAINING}


def _caption_grid(captions: Sequence[str], images: "dict[str, list[Image]]") -> "Image":
    """Draw a row for each noise of each caption and a column for each group."""
    rows = [caption for caption in captions for _ in range(GRID_NOISES)]
    tiles = [(group[row], f"{label}: {rows[row]}") for row in range(len(rows)) for label, group in images.items()]
    return draw_grid([image for image, _ in tiles], [text for _, text in tiles], columns=len(images))


def _check_runs(runs: Sequence[Path], configs: Sequence[dict[str, Any]]) -> None:
    if not runs:
        raise RunError("there is no run to compare: pass at least one folder written by `trainer fit`")
    tables = [(config["table"]["uri"], config["table"]["version"]) for config in configs]
    for run, (uri, version) in zip(runs, tables, strict=True):
        if (uri, version) != tables[0]:
            raise RunError(
                f"{run} was trained on version {version} of {uri}, {runs[0]} on version {tables[0][1]} of "
                f"{tables[0][0]}: compare runs of one table and version"
            )
        if not (run / "result.json").is_file():
            raise RunError(f"{run} has not finished training: resume it with `trainer fit ... --resume`")
