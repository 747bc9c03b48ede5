"""Checkpoints of an unfinished encode run: a folder DB/NAME.encode next to the table, deleted once it is published.

A finished shard leaves a checkpoint that names its fragments, which no commit refers to yet. Checkpoints are written
atomically, so a run that was stopped at any moment resumes with the shards that have none. They are all that the
processes of a run share, on any machine and any Beam runner.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from index.errors import TableError
from index.table.storage import Storage

PLAN = "plan.json"
"""The settings and shards of the run."""
LAYOUT = "layout.json"
"""The table's metadata and the balance of new rows, from which search vectors are laid out."""
REJECT_FRAGMENTS = "rejects.json"
"""The fragments of the rejects table."""
STOP = "stop.json"
"""Why no further shard is to be started, if one process found a reason."""


@dataclass(slots=True)
class ShardCheckpoint:
    """The outcome of one finished shard: fragments that no commit refers to yet, and statistics."""

    shard: str
    rows: int = 0
    truncated_captions: int = 0
    """Rows whose caption has more tokens than the text encoder reads."""
    rejects_by_reason: dict[str, int] = field(default_factory=dict)
    filtered_by_reason: dict[str, int] = field(default_factory=dict)
    seconds_by_step: dict[str, float] = field(default_factory=dict)
    moments: dict[str, Any] | None = None
    """Of the training rows, JSON-ready; None if there are none."""
    fragments: list[dict[str, Any]] = field(default_factory=list)
    reject_fragments: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rejected(self) -> int:
        """Number of samples in the rejects table."""
        return sum(self.rejects_by_reason.values())

    @property
    def filtered(self) -> int:
        """Number of samples that a filter excluded."""
        return sum(self.filtered_by_reason.values())

    @property
    def samples(self) -> int:
        """Number of samples that were read."""
        return self.rows + self.rejected + self.filtered


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoint folder of one run."""

    folder: str
    storage: Storage = field(default_factory=Storage)

    def load(self, shard: str) -> ShardCheckpoint | None:
        """Return the checkpoint of a shard, or None if the shard is not finished."""
        content = self.read(file_name(shard))
        return None if content is None else ShardCheckpoint(**content)

    def save(self, checkpoint: ShardCheckpoint) -> None:
        """Write the checkpoint of a finished shard and delete its progress."""
        self.write(file_name(checkpoint.shard), asdict(checkpoint))
        self.storage.remove(self.uri(file_name(checkpoint.shard, "progress")))

    def save_progress(self, shard: str, samples: int) -> None:
        """Write how many samples of an unfinished shard were read; a failure to write it is ignored."""
        with contextlib.suppress(TableError):
            self.write(file_name(shard, "progress"), samples)

    def poll(self, shards: Sequence[str], finished: dict[str, ShardCheckpoint]) -> int:
        """Add newly finished shards to `finished` and return the samples read so far, unfinished shards included.

        Fragments and moments are dropped from what is added, so that its size does not grow with the rows.
        """
        names = set(self.storage.names(self.folder))
        unfinished = 0
        for shard in shards:
            if shard in finished:
                continue
            if file_name(shard) in names:
                if (checkpoint := self.load(shard)) is not None:
                    checkpoint.fragments, checkpoint.reject_fragments, checkpoint.moments = [], [], None
                    finished[shard] = checkpoint
            elif file_name(shard, "progress") in names:
                unfinished += self.read(file_name(shard, "progress")) or 0
        return unfinished + sum(checkpoint.samples for checkpoint in finished.values())

    def read(self, name: str) -> Any:
        """Return the content of a JSON file of the run, or None if it does not exist."""
        return self.storage.read_json(self.uri(name))

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file of the run atomically."""
        self.storage.write_json(self.uri(name), content)

    def uri(self, name: str) -> str:
        """Return the URI of a file of the run."""
        return f"{self.folder}/{name}"


def file_name(shard: str, extension: str = "json") -> str:
    """Return the name of a shard's file in the checkpoint folder: a hash of the shard's name."""
    return f"{hashlib.sha256(shard.encode()).hexdigest()[:24]}.{extension}"


@dataclass(slots=True)
class SampleCounts:
    """Counts and times summed over the checkpoints of several shards."""

    shards: int = 0
    rows: int = 0
    truncated_captions: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, checkpoint: ShardCheckpoint) -> None:
        """Add one shard."""
        self.shards += 1
        self.rows += checkpoint.rows
        self.truncated_captions += checkpoint.truncated_captions
        self.rejects.update(checkpoint.rejects_by_reason)
        self.filtered.update(checkpoint.filtered_by_reason)
        for step, seconds in checkpoint.seconds_by_step.items():
            self.seconds[step] = self.seconds.get(step, 0.0) + seconds

    @property
    def samples(self) -> int:
        """Number of samples that were read."""
        return self.rows + self.rejects.total() + self.filtered.total()

    @property
    def reject_rate(self) -> float:
        """Rejected samples as a fraction of those that no filter excluded."""
        return self.rejects.total() / max(1, self.rows + self.rejects.total())

    def __str__(self) -> str:
        """Return rejected and filtered samples with their reasons, for a message."""
        text = f"{self.rejects.total():,} of {self.samples:,} samples were rejected{_reasons(self.rejects)}"
        if self.filtered:
            text += f", {self.filtered.total():,} filtered{_reasons(self.filtered)}"
        return text


def _reasons(counts: Counter[str]) -> str:
    return f" ({', '.join(f'{reason} {count:,}' for reason, count in sorted(counts.items()))})" if counts else ""
