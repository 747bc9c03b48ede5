"""Draw the targets of a training run ahead: plan ranges of steps, run them on Beam, commit them in order, read back."""

import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any

import numpy as np

from index.background import look_up
from index.errors import OptionError, TableError
from index.ranges import POSITIVE, TOTAL, check_choices, option_of
from index.search.pairs import PairConfig
from index.table.commit import commit_fragments
from index.table.lock import Lock, hold_lock
from index.table.storage import Storage
from index.table.table import Table, open_table, table_uri
from index.table.targets import (
    SETTINGS,
    TARGETS_SCHEMA,
    Targets,
    TargetSettings,
    draw_folder,
    find_targets,
    is_path,
    open_targets,
    settings_metadata,
    targets_uri,
)
from index.terminal import print_status
from pipeline.beam.progress import watch_files
from pipeline.beam.runner import run_beam
from pipeline.beam.workers import check_runtime
from pipeline.beam.write_lance import fragment_from_dict
from pipeline.config import RuntimeConfig
from pipeline.targets.job import DrawJob, DrawSteps, StepRange

SEARCHES = ("ann", "exact")
TARGETS_PER_RANGE, MAX_RANGES = 2**15, 4096
"""A range takes a worker seconds to a minute; of a long draw ranges are larger, so that no more than so many remain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawConfig(PairConfig):
    """Options of `draw-targets`."""

    images: Annotated[int, TOTAL]
    """Targets in all: the batch size times the number of steps."""
    search: str = "ann"
    """ann: the table's index. exact: every training row."""
    name: str | None = None
    """Of the targets; None: seed and the seed's number."""
    max_memory: Annotated[int, POSITIVE] = 4 * 2**30
    """Bytes of vectors that exact search may hold, over all local processes."""

    def __post_init__(self) -> None:
        """Raise OptionError for values that cannot be drawn with."""
        PairConfig.__post_init__(self)
        check_choices(self, search=SEARCHES)
        if self.images < self.batch_size:
            raise OptionError(
                f"--images {self.images} is less than one batch of --batch-size {self.batch_size}: use at least one "
                "batch"
            )

    @property
    def steps(self) -> int:
        """Return the number of steps."""
        return self.images // self.batch_size

    @property
    def pairs(self) -> PairConfig:
        """Return what the pairs depend on."""
        return PairConfig(**{field.name: getattr(self, field.name) for field in fields(PairConfig)})


def draw_targets(
    table: str, config: DrawConfig, runtime: RuntimeConfig, *, targets_per_range: int = TARGETS_PER_RANGE
) -> dict[str, Any]:
    """Draw targets into DB/NAME.targets/, or those that are missing of an earlier draw, and return the report.

    Raises OptionError if what is there was drawn with other options, TableError if the table or its version is gone, if
    it has no index, or if the run is not finished.
    """
    check_runtime(runtime)
    name = config.name or f"seed{config.seed}"
    if is_path(name):
        raise OptionError(f"--name {name} is a path: use a name; targets are kept next to their table")
    uri, storage, began = targets_uri(table_uri(table), name), runtime.storage, time.monotonic()
    # Refused before the lock is written; targets that are there may be of a version without an index by now.
    open_table(table, indexed=config.search == "ann" and not storage.names(uri.rpartition("/")[0]), storage=storage)
    with hold_lock(uri, storage, "draw-targets") as lock:
        opened, settings, first = _begin(table, uri, config, storage)
        if first < config.steps:
            ranges = plan_ranges(first, config.steps, config.batch_size, targets_per_range)
            job = _job(opened, uri, config, runtime)
            _run(job, ranges, runtime, opened)
            _commit(job, ranges, settings, lock)
        storage.remove(draw_folder(uri))
        targets = open_targets(uri, storage)
    report = _report(targets, config.steps - first, time.monotonic() - began)
    opened.write_report(f"targets-{name}", report)
    return report


def _begin(table: str, uri: str, config: DrawConfig, storage: Storage) -> tuple[Table, TargetSettings, int]:
    """Return the version of the table to draw from, the settings, and the first step that is missing."""
    done, place = find_targets(uri, storage), f"{draw_folder(uri)}/{SETTINGS}"
    content = storage.read_json(place)
    before = done.settings if done else TargetSettings.from_json(content) if content else None
    if before is None:
        opened = open_table(table, indexed=config.search == "ann", storage=storage)
    else:
        # Those of one dataset are drawn from one version, whatever the table has become since.
        opened = open_table(table, version=before.version, storage=storage)
    settings = settings_of(opened, config)
    if before is None:
        storage.write_json(place, asdict(settings))
    elif difference := before.difference(settings):
        field, old, new = difference
        raise OptionError(
            f"{uri} has {option_of(field)} {old}, not {new}: type that, or another --name to draw other targets"
        )
    else:
        print_status(f"pipeline draw-targets: going on with {uri}, drawn from version {before.version} of the table")
    return opened, settings, done.steps if done else 0


def settings_of(table: Table, config: DrawConfig) -> TargetSettings:
    """Return what the targets of a table depend on."""
    pairs = {field.name: getattr(config, field.name) for field in fields(PairConfig)}
    return TargetSettings.of(table, search=config.search, **pairs)


def plan_ranges(first: int, stop: int, batch_size: int, targets_per_range: int = TARGETS_PER_RANGE) -> list[StepRange]:
    """Cut steps into ranges, the same whatever the number of workers is."""
    most = max(targets_per_range, (stop - first) * batch_size // MAX_RANGES)
    size = max(1, most // batch_size)
    return [StepRange(begin, min(begin + size, stop)) for begin in range(first, stop, size)]


def _job(table: Table, uri: str, config: DrawConfig, runtime: RuntimeConfig) -> DrawJob:
    return DrawJob(
        table=table.uri,
        version=table.version,
        uri=uri,
        pairs=config.pairs,
        exact=config.search == "exact",
        memory=config.max_memory // runtime.num_workers,
        device=runtime.device,
        storage=runtime.storage,
    )


def _run(job: DrawJob, ranges: list[StepRange], runtime: RuntimeConfig, table: Table) -> None:
    """Draw the ranges that are not drawn yet."""
    import apache_beam as beam

    drawn = _drawn(job, ranges)
    missing = [(number, (each.first, each.stop)) for number, each in enumerate(ranges) if each not in drawn]
    if not missing:
        return
    run_beam(
        lambda pipeline: pipeline | "Ranges" >> beam.Create(missing) | "Draw steps" >> DrawSteps(job),
        runtime,
        job.uri,
        monitor=_monitor(job, ranges, table),
        memory_advice="fewer --num-workers or a smaller --max-memory-gb",
    )


def _drawn(job: DrawJob, ranges: list[StepRange]) -> dict[StepRange, list[dict[str, Any]]]:
    """Return the fragments of the ranges that are drawn; a checkpoint whose files are gone is deleted."""
    checkpoints, files = _checkpoints(job), set(job.storage.names(f"{job.uri}/data"))
    finished = [each for each in ranges if each.checkpoint in checkpoints]
    contents = look_up(lambda each: job.storage.read_json(job.checkpoint_of(each)), finished)
    parts = dict(zip(finished, contents, strict=True))
    for steps in finished:
        if not all(file["path"] in files for fragment in parts[steps] for file in fragment["files"]):
            job.storage.remove(job.checkpoint_of(steps))
            del parts[steps]
    return parts


def _monitor(job: DrawJob, ranges: list[StepRange], table: Table) -> AbstractContextManager[None]:
    """Return what shows progress by the checkpoints."""
    sizes = {each.checkpoint: (each.stop - each.first) * job.pairs.batch_size for each in ranges}

    def count(storage: Storage) -> int:
        checkpoints = _checkpoints(replace(job, storage=storage))
        return sum(sizes[checkpoint] for checkpoint in checkpoints if checkpoint in sizes)

    total = sum(sizes.values())
    return watch_files("draw targets", count, job.storage, total=total, unit="targets", log=table.log("targets"))


def _checkpoints(job: DrawJob) -> set[str]:
    return set(job.storage.names(draw_folder(job.uri)))


def _commit(job: DrawJob, ranges: list[StepRange], settings: TargetSettings, lock: Lock) -> None:
    """Commit the fragments of all ranges in order; raise TableError unless they, read back, hold every target."""
    drawn = _drawn(job, ranges)
    if len(drawn) < len(ranges):  # some engines drop elements without an error
        raise TableError(
            f"{job.uri} is not finished: {len(ranges) - len(drawn)} of {len(ranges)} ranges of steps were not drawn: "
            "rerun the same command to resume"
        )
    fragments = [fragment_from_dict(content) for each in ranges for content in drawn[each]]
    lock.check()
    commit_fragments(
        job.uri,
        TARGETS_SCHEMA.with_metadata(settings_metadata(settings)),
        fragments,
        run_id=f"steps {ranges[0].first}-{ranges[-1].stop}",
        mode="append" if ranges[0].first else "create",
        storage=job.storage,
    )
    _read_back(job, ranges)


def _read_back(job: DrawJob, ranges: list[StepRange]) -> None:
    """Raise TableError unless the targets hold all steps, and each range begins and ends where it should."""
    targets, size = open_targets(job.uri, job.storage), job.pairs.batch_size
    if targets.steps != ranges[-1].stop or targets.dataset.count_rows() != targets.steps * size:
        raise TableError(
            f"{job.uri} has {targets.dataset.count_rows():,} targets instead of {ranges[-1].stop * size:,}: delete it, "
            "and rerun the same command"
        )
    edges = np.array([position for each in ranges for position in (each.first * size, each.stop * size - 1)])
    rows = targets.dataset.take(edges.tolist(), columns=["step", "slot"])
    assert np.array_equal(rows["step"].to_numpy() * size + rows["slot"].to_numpy(), edges), "ranges are out of order"


def _report(targets: Targets, drawn: int, seconds: float) -> dict[str, Any]:
    settings, drawn = targets.settings, max(drawn, 0)
    return {
        "targets": targets.uri,
        "table": settings.table,
        "version": settings.version,
        "steps": targets.steps,
        "batch_size": settings.batch_size,
        "images": targets.steps * settings.batch_size,
        "drawn": drawn * settings.batch_size,
        "seconds": round(seconds, 2),
        "targets_per_second": round(drawn * settings.batch_size / max(seconds, 1e-9), 1),
        "search": settings.search,
        "index_type": settings.index_type,
        "seed": settings.seed,
        "num_neighbors": settings.num_neighbors,
        "temperature": settings.temperature,
        "jitter": settings.jitter,
    }
