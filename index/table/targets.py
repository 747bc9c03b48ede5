"""Targets drawn ahead: the row id of the pair of each slot of each training step, in DB/NAME.targets/TARGETS.lance.

They hold for one version of the table. Rows are in the order of steps and slots, so reading them is sequential; the
schema carries what they were drawn with as JSON. Next to an unfinished draw there is a folder TARGETS.draw.
"""

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from index.errors import OptionError, TableError
from index.table.storage import Storage
from index.table.table import TABLE_NAME, Table, open_newest, table_uri

if TYPE_CHECKING:
    import lance

TARGETS_KEY = b"coalescer_targets"
TARGETS_SCHEMA = pa.schema([("step", pa.int64()), ("slot", pa.int32()), ("row_id", pa.int64())])
DRAW, SETTINGS = ".draw", "settings.json"
"""The folder of an unfinished draw, and the file in it of its settings."""


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """What targets depend on."""

    table: str
    """Where the table was."""
    version: int
    """Of the table."""
    rows: int
    """Of the table at that version."""
    run_ids: tuple[str, ...]
    """Encode runs whose rows the table has."""
    geometry: str
    desc_scale: float
    kappa: float
    index_type: str | None
    """Of the table's index; None without one."""
    index_uuid: str | None
    search: str
    """ann: that index. exact: every training row."""
    batch_size: int
    """Slots of a step. Slot i is the same in smaller batches."""
    seed: int
    num_neighbors: int
    temperature: float
    jitter: float

    @classmethod
    def of(cls, table: Table, **options: Any) -> "TargetSettings":
        """Return the settings of targets of a table."""
        return cls(**described(table), **options)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TargetSettings":
        """Read what `asdict` and JSON have made of settings; raise TableError for those of other software."""
        try:
            return cls(**{**content, "run_ids": tuple(content["run_ids"])})
        except (TypeError, KeyError) as error:
            raise TableError(
                f"settings of targets have other fields ({error}): another version of the software drew them; draw "
                "them again with `pipeline draw-targets`"
            ) from error

    def difference(self, other: "TargetSettings") -> tuple[str, Any, Any] | None:
        """Return the first field in which two settings differ, with both values; where the table is does not count."""
        for field in fields(self):
            here, there = getattr(self, field.name), getattr(other, field.name)
            if field.name != "table" and here != there:
                return field.name, here, there
        return None


def described(table: Table) -> dict[str, Any]:
    """Return those fields of settings that tell a version of a table from others."""
    meta = table.meta
    return {
        "table": table.uri,
        "version": table.version,
        "rows": table.dataset().count_rows(),
        "run_ids": meta.run_ids,
        "geometry": meta.geometry.name,
        "desc_scale": float(meta.geometry.desc_scale),
        "kappa": float(meta.geometry.kappa),
        "index_type": None if meta.index is None else meta.index.index_type,
        "index_uuid": None if meta.index is None else meta.index.uuid,
    }


@dataclass(frozen=True)
class Targets:
    """The targets of the steps 0 to `steps - 1`."""

    uri: str
    settings: TargetSettings
    dataset: "lance.LanceDataset"
    steps: int

    def read(self, first: int, count: int) -> Int[np.ndarray, "N B"]:
        """Return the row ids of all slots of `count` steps; raise TableError if what is stored is something else."""
        size = self.settings.batch_size
        rows = self.dataset.to_table(columns=TARGETS_SCHEMA.names, offset=first * size, limit=count * size)
        step, slot, row_id = (rows[name].to_numpy() for name in TARGETS_SCHEMA.names)
        expected = np.arange(first * size, (first + count) * size)
        if len(rows) != len(expected) or not np.array_equal(step * size + slot, expected):
            raise TableError(
                f"{self.uri} does not hold the slots 0 to {size - 1} of the steps {first} to {first + count - 1} in "
                "order: delete it, and draw it again with `pipeline draw-targets`"
            )
        return np.asarray(row_id.reshape(count, size))


def targets_folder(uri: str) -> str:
    """Return the folder of a table's targets: DB/NAME.targets."""
    return uri.removesuffix(".lance") + ".targets"


def targets_uri(uri: str, name: str) -> str:
    """Return where the targets of a table are: by their name, DB/NAME.targets/`name`.lance, or by their own path."""
    if is_path(name):
        return table_uri(name)
    if not TABLE_NAME.fullmatch(name):
        raise OptionError(
            f"{name!r} is not a name of targets: use letters, digits, `_`, `-` and `.`, for instance "
            f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name) or 'seed0'}"
        )
    return f"{targets_folder(uri)}/{name}.lance"


def is_path(name: str) -> bool:
    """Return whether targets are named by their path."""
    return "/" in name or name.endswith(".lance")


def draw_folder(uri: str) -> str:
    """Return the folder of an unfinished draw of targets: TARGETS.draw."""
    return uri.removesuffix(".lance") + DRAW


def find_targets(uri: str, storage: Storage) -> Targets | None:
    """Open targets; None if there are none. Raises TableError if something else is there."""
    dataset = open_newest(uri, storage)
    if dataset is None:
        return None
    settings = (dataset.schema.metadata or {}).get(TARGETS_KEY)
    if settings is None:
        raise TableError(f"{uri} holds no targets: pass the name or path of what `pipeline draw-targets` has written")
    targets = TargetSettings.from_json(json.loads(settings))
    return Targets(uri, targets, dataset, dataset.count_rows() // targets.batch_size)


def open_targets(uri: str, storage: Storage) -> Targets:
    """Open targets. Raises TableError if there are none."""
    targets = find_targets(uri, storage)
    if targets is not None:
        return targets
    folder = uri.rpartition("/")[0]
    names = [name.removesuffix(".lance") for name in storage.names(folder) if name.endswith(".lance")]
    there = f"others are {', '.join(names)}" if names else "there are no others"
    advice = "draw them with `pipeline draw-targets TABLE --images N`, or pass another name or path to --targets"
    if storage.exists(f"{draw_folder(uri)}/{SETTINGS}"):
        advice = "rerun the `pipeline draw-targets` that has not finished them"
    raise TableError(f"no targets at {uri} ({there} in this folder): {advice}")


def settings_metadata(settings: TargetSettings) -> dict[bytes, bytes]:
    """Return the schema metadata of targets."""
    return {TARGETS_KEY: json.dumps(asdict(settings)).encode()}


def versions_with_targets(uri: str, storage: Storage) -> dict[int, str]:
    """Return the versions of a table for which there are targets, finished or not, with the path of some of each."""
    versions: dict[int, str] = {}
    folder = targets_folder(uri)
    for name in storage.names(folder):
        place = f"{folder}/{name}"
        if name.endswith(".lance") and (targets := find_targets(place, storage)) is not None:
            versions[targets.settings.version] = place
        elif name.endswith(DRAW):
            settings = storage.read_json(f"{place}/{SETTINGS}")
            if settings is not None:
                versions[TargetSettings.from_json(settings).version] = place
    return versions
