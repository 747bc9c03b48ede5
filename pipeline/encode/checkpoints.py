"""Checkpoints of an unfinished encode run: a folder DB/NAME.encode/RUN_ID, deleted once the table holds its rows.

A finished shard leaves a checkpoint that names its fragments, which no commit refers to yet. Checkpoints are written
atomically, so a run that was stopped at any moment resumes with the shards that have none. They are all that the
processes of a run share, on any machine and any Beam runner. A checkpoint that cannot be parsed, whose shard has
changed since, or whose files are gone, counts as none. The plan is deleted first: a folder without one is a leftover.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from index.errors import TableError
from index.table.storage import Storage

PLAN = "plan.json"
"""The settings and shards of the run, and what its table held when it began."""
LAYOUT = "layout.json"
"""The table's metadata and the balance of new rows, from which search vectors are laid out."""
FRAGMENTS = "fragments.json"
"""All fragments of the run with their search vectors, ready to be committed."""
STOP = "stop.json"
"""Why no further shard is to be started, if one process found a reason."""
UNREAD, WAITING = "unread", "waiting"
"""Extensions of a shard's files that say why it could not be read, and what a worker waits for."""
LOADING_THREADS = 16


@dataclass(slots=True)
class ShardCheckpoint:
    """The outcome of one finished shard: fragments that no commit refers to yet, and statistics."""

    shard: str
    identity: str = ""
    """Of the shard's content, taken before it was read; empty if unknown."""
    samples: int = 0
    """Number of samples that were read, counted as they were read."""
    rows: int = 0
    already_present: int = 0
    """Samples of which the table has the row, or the rejects table the reject."""
    complete: bool = False
    """Whether the shard was read to its end: not cut short by --limit, not damaged."""
    unread: str = ""
    """Why nothing of the shard could be read; it has no samples then."""
    device: str = ""
    """That encoded it."""
    truncated_captions: int = 0
    """Rows whose caption has more tokens than the text encoder reads."""
    rejects_by_reason: dict[str, int] = field(default_factory=dict)
    reject_example: str = ""
    """Key, shard and detail of the first reject, for a message."""
    filtered_by_reason: dict[str, int] = field(default_factory=dict)
    uncounted: int = 0
    """Rejects that stand for the unknown number of samples in the rest of a shard, and count as one sample."""
    unused_captions: int = 0
    """Further captions of the images, which `--captions first` leaves out."""
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

    def check(self) -> None:
        """Assert that every sample that was read is accounted for."""
        accounted = self.rows + self.rejected + self.filtered + self.already_present
        assert accounted == self.samples, f"{self.shard}: {self.samples} samples read, {accounted} accounted for"


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoint folder of one run."""

    folder: str
    storage: Storage = field(default_factory=Storage)

    def load(self, shard: str) -> ShardCheckpoint | None:
        """Return the checkpoint of a shard, or None if the shard is not finished."""
        try:
            return ShardCheckpoint(**self.read(file_name(shard)))
        except TypeError:  # None, or of another version of the software
            return None

    def load_all(self, shards: Sequence[str]) -> Iterator[ShardCheckpoint]:
        """Yield the checkpoints of shards in their order, a few at a time; those that do not exist are left out."""
        with ThreadPoolExecutor(LOADING_THREADS) as pool:
            for start in range(0, len(shards), LOADING_THREADS):
                yield from filter(None, pool.map(self._outcome, shards[start : start + LOADING_THREADS]))

    def _outcome(self, shard: str) -> ShardCheckpoint | None:
        return self.load(shard) or self.load_unread(shard)

    def load_unread(self, shard: str) -> ShardCheckpoint | None:
        """Return the checkpoint of a shard that this attempt could not read, None if there was no such shard."""
        reason = self.read(file_name(shard, UNREAD))
        return ShardCheckpoint(shard, unread=reason) if isinstance(reason, str) else None

    def save_unread(self, shard: str, reason: str) -> None:
        """Note that this attempt could not read a shard."""
        self.write(file_name(shard, UNREAD), reason)

    def save_wait(self, shard: str, text: str | None) -> None:
        """Note what a worker waits for and until when, or that it waits no longer; failures are ignored."""
        with contextlib.suppress(Exception):
            self.write(file_name(shard, WAITING), text)

    def forget_attempt(self, shards: Sequence[str] | None = None) -> None:
        """Delete what an earlier attempt has noted of its end, and of shards (None: all) that it could not read."""
        notes = None if shards is None else {file_name(shard, each) for shard in shards for each in (UNREAD, WAITING)}
        for name in self.storage.names(self.folder):
            is_note = name.endswith((f".{UNREAD}", f".{WAITING}")) if notes is None else name in notes
            if is_note or name in (STOP, FRAGMENTS):
                self.storage.remove(self.uri(name))

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
            if file_name(shard, UNREAD) in names:
                finished[shard] = ShardCheckpoint(shard, unread="unread")
                continue
            if file_name(shard) in names:
                if (checkpoint := self.load(shard)) is not None:
                    checkpoint.fragments, checkpoint.reject_fragments, checkpoint.moments = [], [], None
                    finished[shard] = checkpoint
            elif file_name(shard, "progress") in names:
                unfinished += self.read(file_name(shard, "progress")) or 0
        return unfinished + sum(checkpoint.samples for checkpoint in finished.values())

    def waits(self) -> list[str]:
        """Return what workers wait for, as they tell it."""
        names = self.storage.names(self.folder)
        return [text for name in names if name.endswith(f".{WAITING}") if (text := self.read(name))]

    def read(self, name: str) -> Any:
        """Return the content of a JSON file of the run, or None if it does not exist or was not written whole."""
        try:
            return self.storage.read_json(self.uri(name))
        except ValueError:
            return None

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file of the run atomically."""
        self.storage.write_json(self.uri(name), content)

    def remove(self) -> None:
        """Delete all files of the run, the plan first, so that a run that is stopped meanwhile is not resumed."""
        self.storage.remove(self.uri(PLAN))
        self.storage.remove(self.folder)

    def uri(self, name: str) -> str:
        """Return the URI of a file of the run."""
        return f"{self.folder}/{name}"


def not_finished(uri: str, finished: int, shards: int) -> TableError:
    """Return the error for a run whose engine has ended before everything was done, without saying so."""
    return TableError(
        f"{uri} is not finished ({finished:,} of {shards:,} shards encoded): rerun the same command to resume"
    )


def file_name(shard: str, extension: str = "json") -> str:
    """Return the name of a shard's file in the checkpoint folder: a hash of the shard's name."""
    return f"{hashlib.sha256(shard.encode()).hexdigest()[:24]}.{extension}"


@dataclass(slots=True)
class SampleCounts:
    """Counts and times summed over the checkpoints of several shards."""

    shards: int = 0
    rows: int = 0
    already_present: int = 0
    truncated_captions: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    reject_example: str = ""
    filtered: Counter[str] = field(default_factory=Counter)
    uncounted: int = 0
    unused_captions: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    """Shards that could not be read, with the reasons."""
    devices: set[str] = field(default_factory=set)

    def add(self, checkpoint: ShardCheckpoint) -> None:
        """Add one shard."""
        self.shards += 1
        if checkpoint.unread:
            self.unread[checkpoint.shard] = checkpoint.unread
        self.devices |= {checkpoint.device} - {""}
        self.rows += checkpoint.rows
        self.already_present += checkpoint.already_present
        self.truncated_captions += checkpoint.truncated_captions
        self.rejects.update(checkpoint.rejects_by_reason)
        self.reject_example = self.reject_example or checkpoint.reject_example
        self.filtered.update(checkpoint.filtered_by_reason)
        self.uncounted += checkpoint.uncounted
        self.unused_captions += checkpoint.unused_captions
        for step, seconds in checkpoint.seconds_by_step.items():
            self.seconds[step] = self.seconds.get(step, 0.0) + seconds

    @property
    def samples(self) -> int:
        """Number of samples that were read."""
        return self.rows + self.rejects.total() + self.filtered.total() + self.already_present

    @property
    def reject_rate(self) -> float:
        """Rejected samples as a fraction of those that no filter excluded."""
        return self.rejects.total() / max(1, self.rows + self.rejects.total() + self.already_present)

    def __str__(self) -> str:
        """Return rejected and filtered samples with their reasons and an example, for a message."""
        reasons = _reasons(self.rejects, self.reject_example)
        text = f"{self.rejects.total():,} of {self.samples:,} samples were rejected{reasons}"
        if self.filtered:
            text += f", {self.filtered.total():,} filtered{_reasons(self.filtered)}"
        if self.already_present:
            text += f", {self.already_present:,} are in the table already"
        if self.uncounted:
            text += f", and an unknown number in the rest of {self.uncounted:,} shards"
        return text


def _reasons(counts: Counter[str], example: str = "") -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()))
    return f" ({reasons}{f'; for example {example}' if example else ''})" if counts else ""
