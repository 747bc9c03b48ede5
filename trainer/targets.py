"""Targets drawn ahead, for a training run: open them with their version of the table, refuse those that do not fit."""

from dataclasses import fields

from index.errors import OptionError
from index.ranges import option_of
from index.search.pairs import PairConfig
from index.table.storage import Storage
from index.table.table import Table, open_table, table_uri
from index.table.targets import Targets, TargetSettings, described, is_path, open_targets, targets_uri
from trainer.config import FitConfig, RuntimeConfig
from trainer.stream import searched_steps

SEARCHING = "none"
"""As --targets: search while training, though the run had targets before."""


def is_searching(config: FitConfig, runtime: RuntimeConfig) -> bool:
    """Return whether a run searches while it trains, and so needs an index."""
    return config.coupling == "nearest" and runtime.targets in (None, SEARCHING)


def kept_name(name: str) -> str:
    """Return a name or path of targets as a run keeps it: a name as it is, a path made absolute."""
    return table_uri(name) if is_path(name) else name


def open_run_targets(table: str, name: str | None, storage: Storage) -> Targets | None:
    """Open the targets of a table by name or path; None if the run is to search.

    Raises TableError if there are none.
    """
    if name is None or name == SEARCHING:
        return None
    return open_targets(targets_uri(table_uri(table), name), storage)


def open_targets_table(table: str, targets: Targets | None, storage: Storage, *, indexed: bool = True) -> Table:
    """Open the version of a table that targets were drawn from; without targets the last one, by default with an index.

    Raises TableError if the version is gone.
    """
    if targets is None:
        return open_table(table, indexed=indexed, storage=storage)
    return open_table(table, version=targets.settings.version, storage=storage)


def check_targets(targets: Targets, table: Table, config: FitConfig) -> None:
    """Raise OptionError if targets are of another table or of other options than a run, or are too few for it."""
    if config.coupling == "independent":
        raise OptionError("--coupling independent retrieves no pairs: leave out --targets")
    _check_table(targets, table)
    settings = targets.settings
    if config.batch_size > settings.batch_size:
        raise OptionError(
            f"{targets.uri} has {settings.batch_size} targets a step, fewer than --batch-size {config.batch_size}: use "
            f"at most {settings.batch_size}, or draw others with `{draw_command(targets, config)}`"
        )
    names = [field.name for field in fields(PairConfig) if field.name != "batch_size"]
    for name in [*names, "search"]:
        drawn, wanted = getattr(settings, name), getattr(config, name)
        if drawn != wanted:
            raise OptionError(
                f"{targets.uri} was drawn with {option_of(name)} {drawn}, not {wanted}: add {option_of(name)} {drawn}, "
                f"or draw others with `{draw_command(targets, config)}`"
            )
    needed = searched_steps(config.steps, config.reuse or 1)
    if needed > targets.steps:
        raise OptionError(
            f"{targets.uri} has {targets.steps:,} steps, but --images {config.images} at --batch-size "
            f"{config.batch_size} and --reuse {config.reuse or 1} needs {needed:,}: train on fewer --images, or add "
            f"steps with `{draw_command(targets, config, extend=True)}`"
        )


def _check_table(targets: Targets, table: Table) -> None:
    settings = targets.settings
    here = TargetSettings(**{**vars(settings), **described(table)})
    if difference := settings.difference(here):
        field, drawn, found = difference
        raise OptionError(
            f"{targets.uri} was drawn from {settings.table} with {field.replace('_', ' ')} {drawn}, but {table.uri} "
            f"has {found}: pass the table that it was drawn from, or draw targets of this one with "
            f"`pipeline draw-targets {table.uri}`"
        )


def draw_command(targets: Targets, config: FitConfig, *, extend: bool = False) -> str:
    """Return the command that draws what a run needs, as new targets or as more steps of these."""
    size = targets.settings.batch_size if extend else config.batch_size
    images = searched_steps(config.steps, config.reuse or 1) * size
    options = {"images": images, "batch_size": size, "seed": config.seed}
    optional = {name: getattr(config, name) for name in ("search", "num_neighbors", "temperature", "jitter")}
    defaults = FitConfig()
    options |= {name: value for name, value in optional.items() if value != getattr(defaults, name)}
    name = targets.uri.rpartition("/")[2].removesuffix(".lance") if extend else "OTHER"
    table = targets.settings.table
    return f"pipeline draw-targets {table} {' '.join(f'{option_of(n)} {v}' for n, v in options.items())} --name {name}"
