"""Going on with a run: its options and its table, as RUN/config.json has them."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from index.errors import RunError
from index.ranges import option_of
from index.table.schema import TableMeta
from index.table.storage import Storage
from index.table.table import Table, open_table
from trainer.config import AUTO, FitConfig, RuntimeConfig
from trainer.objectives.registry import make_objective
from trainer.run_folder import EXPORT_FORMAT, NETWORK, RESULT, EncoderPlaces, read_config

NOT_STORED = ("encoders",)
"""Fields of RuntimeConfig that are no part of its own settings: where encoders are stands with their digests."""


def settings_of(table: Table, config: FitConfig, runtime: RuntimeConfig) -> dict[str, Any]:
    """Return what RUN/config.json holds."""
    return {
        "fit": asdict(config),
        "objective": asdict(make_objective(config.objective, config.preset, **config.hyperparameters)),
        "table": {"uri": table.uri, "version": table.version, "meta": table.meta.to_json()},
        "runtime": {name: value for name, value in asdict(runtime).items() if name not in NOT_STORED},
    }


def open_run_table(
    folder: Path, uri: str | None = None, storage: Storage | None = None, *, indexed: bool = True
) -> Table:
    """Open the version of the table that a run began with, where it was or where `uri` says that it is now.

    Its metadata has the encoders where the run has found them. Only training that searches needs an index.

    Raises:
        RunError: the table at `uri` is another one.
        TableError: there is no such table, or the version is gone.
    """
    saved = _read_run(folder)["table"]
    meta = TableMeta.from_json(saved["meta"])
    table = open_table(uri or saved["uri"], version=saved["version"], indexed=indexed, storage=storage)
    if _identity(table.meta) != _identity(meta):
        raise RunError(
            f"{table.uri} is not the table that {folder} is trained on: version {table.version} of it has other "
            f"metadata than version {saved['version']} of {saved['uri']}: pass a copy of that table, or none"
        )
    places = {name: getattr(meta, name) for name in ("image_encoder", "text_encoder")}
    return table.at(table.version, replace(table.meta, **places))


def resumed_config(folder: Path, typed: Mapping[str, Any]) -> FitConfig:
    """Return the options of a run, longer if `typed` has more images.

    `typed` are options that are given again, by field. Raises RunError if one of them contradicts the run.
    """
    saved = _read_run(folder)
    config, objective = FitConfig(**saved["fit"]), saved["objective"]
    for name, value in typed.items():
        before = getattr(config, name)
        allowed = value in (before, AUTO) or name == "hyperparameters" or (name == "images" and value > before)
        if not allowed:
            raise _contradiction(folder, f"{option_of(name)} {before}", str(value))
    hyperparameters = {**config.hyperparameters, **typed.get("hyperparameters", {})}
    _check_objective(folder, objective, asdict(make_objective(config.objective, config.preset, **hyperparameters)))
    return replace(config, images=typed.get("images", config.images))


def resumed_runtime(folder: Path, typed: Mapping[str, Any], encoders: EncoderPlaces) -> RuntimeConfig:
    """Return how a run was computed, with the options in `typed` instead of those it had."""
    saved = _read_run(folder)["runtime"]
    names = {field.name for field in fields(RuntimeConfig)}
    options = {name: value for name, value in {**saved, **typed}.items() if name in names}
    return RuntimeConfig(**options, encoders=encoders)


def check_resumed(folder: Path, config: FitConfig) -> FitConfig:
    """Return the config to go on with: `config`, with what the run itself has chosen.

    Raises:
        RunError: the run began with other options, or has been trained to its end.
    """
    saved = _read_run(folder)
    chosen = FitConfig(**saved["fit"])
    if config.reuse is None:
        config = replace(config, reuse=chosen.reuse)
    if config.dtype == AUTO:
        config = replace(config, dtype=chosen.dtype)
    resumed_config(folder, {name: value for name, value in asdict(config).items() if name != "hyperparameters"})
    objective = asdict(make_objective(config.objective, config.preset, **config.hyperparameters))
    _check_objective(folder, saved["objective"], objective)
    if config.images == chosen.images and (folder / RESULT).is_file() and (folder / NETWORK).is_dir():
        raise RunError(
            f"{folder} is already trained for {config.images:,} images: add a larger --images to train it on, or use "
            "another --out to start a new run"
        )
    return config


def _read_run(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    if config["format"] == EXPORT_FORMAT:
        raise RunError(
            f"{folder} was made by `trainer export` and has nothing to resume: train a new run from its weights with "
            f"`trainer fit TABLE --out RUN --init {folder}`"
        )
    return config


def _identity(meta: TableMeta) -> str:
    """Return metadata without the places of the encoders, which may move."""
    unplaced = {
        name: replace(getattr(meta, name), name="", revision=None) for name in ("image_encoder", "text_encoder")
    }
    return replace(meta, **unplaced).to_json()


def _check_objective(folder: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if value != saved.get(name):
            raise _contradiction(folder, f"--set {name}={saved.get(name)}", f"{name}={value}")


def _contradiction(folder: Path, before: str, now: str) -> RunError:
    return RunError(
        f"{folder} was trained with {before}, not {now}: leave the option out to resume it, or use another --out"
    )
