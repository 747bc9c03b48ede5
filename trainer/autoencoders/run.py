"""A training run of either autoencoder from its settings to its report, and its folder.

    DIR                                 what it trains, as save_pretrained of diffusers or transformers writes it
    DIR/report.json                     metrics; the last file that a run writes
    DIR/training/settings.json          what the run began with
    DIR/training/shards.json            the shards that its sources had
    DIR/training/checkpoints, log.jsonl, tensorboard    as those of `trainer fit`
    DIR/training/index.html             metrics and reconstructions of held-out samples

The model is moved into DIR file by file at the end, its config.json last: before that, DIR is not a model.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from index.errors import OptionError, RunError
from index.ranges import option_of
from index.report.html import page, table
from index.terminal import print_status
from pipeline.encoders.devices import default_dtype, resolve_device
from pipeline.sources.listing import list_shards
from pipeline.sources.sample import ReadOptions
from trainer.autoencoders.train import MEASURED, TRAINING, AutoencoderLoop, TrainConfig, TrainRuntime
from trainer.checkpoints import checkpoints
from trainer.config import AUTO
from trainer.process import open_accelerator
from trainer.run_folder import flush, flush_entry, write_whole
from trainer.tracking import RunLog

FORMAT = "coalescer-autoencoder-1"
SETTINGS, SHARDS, PAGE = "settings.json", "shards.json", "index.html"
REPORT, MODEL_CONFIG = "report.json", "config.json"


def fit_autoencoder(
    loop_class: type[AutoencoderLoop[Any]],
    sources: list[str],
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    runtime: TrainRuntime | None = None,
) -> dict[str, Any]:
    """Train an autoencoder, or resume its training; write `out`, and return the metrics in its report.json.

    Raises:
        RunError: `out` holds a model already, cannot be resumed with this config, or the loss is not finite.
        SourceError: there are no training samples.
    """
    runtime, folder = runtime or TrainRuntime(), out / TRAINING
    device = resolve_device(runtime.device)
    if resume:
        config = resumed_config(loop_class, out, {name: getattr(config, name) for name in names_of(type(config))})
        shards = json.loads((folder / SHARDS).read_text())["shards"]
    else:
        check_is_new(out)
        config = replace(config, dtype=default_dtype(device) if config.dtype == AUTO else config.dtype)
        shards = list_shards(sources, ReadOptions(storage=runtime.storage))
    with open_accelerator(runtime.device, config.dtype, folder, searches=False) as accelerator:
        if accelerator.num_processes > 1:
            raise OptionError("fit-autoencoder trains in one process: start it without `accelerate launch`")
        loop = loop_class(accelerator, shards, config, out, runtime)
        if resume:
            _continue_run(loop, runtime)
        else:
            _create_run(loop, sources, shards, runtime)
        with loop.open_log() as log:
            if not loop.is_trained:
                loop.train(log, loop.preview)
            report = _finish(loop, log, out)
    write_whole(out / REPORT, report)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of no use to a run that has ended
    return report


def check_is_new(out: Path) -> None:
    """Raise RunError if a folder holds an autoencoder, or the training of one, already."""
    if (out / TRAINING / SETTINGS).exists() and not (out / REPORT).exists():
        raise RunError(f"{out} holds an autoencoder in training: add --resume to go on with it, or use another --out")
    if (out / MODEL_CONFIG).exists() or (out / REPORT).exists():
        raise RunError(f"{out} holds a model already: use another --out")


def read_settings(out: Path) -> dict[str, Any]:
    """Return what a run began with; raise RunError if the folder is not a run of this version."""
    path = out / TRAINING / SETTINGS
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{out} is not an autoencoder in training ({path.name} cannot be read): train one with `trainer "
            f"fit-autoencoder image|text SOURCE --out {out}`"
        ) from error
    if settings.get("format") != FORMAT:
        raise RunError(
            f"{path} has format {settings.get('format')!r} instead of {FORMAT!r}, from another version: train a new one"
        )
    return settings


def resumed_config(loop_class: type[AutoencoderLoop[Any]], out: Path, typed: Mapping[str, Any]) -> Any:
    """Return the config of a run. Raises RunError if `typed`, options by field, contradict it, or if it has ended."""
    settings = read_settings(out)
    if (out / REPORT).exists():
        raise RunError(f"{out} is already trained for {settings['fit']['steps']:,} steps: use another --out")
    for name, value in {"kind": loop_class.kind, **typed}.items():
        before = settings["kind"] if name == "kind" else settings["fit"][name]
        if value != before and not (name == "dtype" and value == AUTO):
            option = name if name == "kind" else option_of(name)
            raise RunError(
                f"{out} is trained with {option} {before}, not {value}: leave the option out to resume it, or use "
                "another --out"
            )
    return loop_class.config_class(**settings["fit"])


def names_of(config_class: type) -> list[str]:
    """Return the fields of a config."""
    return [each.name for each in fields(config_class)]


def _create_run(loop: AutoencoderLoop[Any], sources: list[str], shards: list[str], runtime: TrainRuntime) -> None:
    """Create the folder of a new run, which is one once it has settings, and remove what no run has left."""
    loop.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(loop.out / "checkpoints", ignore_errors=True)
    write_whole(loop.out / SHARDS, {"sources": sources, "shards": shards})
    _write_settings(loop, runtime)


def _continue_run(loop: AutoencoderLoop[Any], runtime: TrainRuntime) -> None:
    """Restore a run's last checkpoint."""
    loop.resume()
    if not checkpoints(loop.out):
        print_status(f"{loop.out.parent} has no checkpoint yet: training it from the beginning")
    _write_settings(loop, runtime)


def _write_settings(loop: AutoencoderLoop[Any], runtime: TrainRuntime) -> None:
    kept = {name: getattr(runtime, name) for name in names_of(TrainRuntime) if name != "storage"}
    settings = {"format": FORMAT, "kind": loop.kind, "fit": asdict(loop.config), "runtime": kept}
    write_whole(loop.out / SETTINGS, settings)


def _finish(loop: AutoencoderLoop[Any], log: RunLog, out: Path) -> dict[str, Any]:
    """Measure the averaged model, write it and the page, and return the report."""
    _export(loop, out)
    measured = loop.measure(MEASURED)
    log.log_now(**measured)
    metrics = dict.fromkeys(loop.metrics) | measured | loop.describe()
    with loop.conveniences.attempt(PAGE):
        rows = table((name.replace("_", " "), value) for name, value in metrics.items())
        write_whole(loop.out / PAGE, page(f"{loop.kind} autoencoder", rows + loop.show(log)))
    return metrics | loop.result()


def _export(loop: AutoencoderLoop[Any], out: Path) -> None:
    """Move a whole copy of the model into its folder, config.json last."""
    temporary = loop.out / "model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    loop.save(temporary)
    flush(temporary)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == MODEL_CONFIG):
        path.replace(out / path.name)
    temporary.rmdir()
    flush_entry(out)
