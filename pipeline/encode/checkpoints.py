"""Checkpoints of an unfinished encode run: a folder DB/NAME.encode/RUN_ID, deleted once the table holds its rows.

A finished shard leaves a checkpoint that names its fragments, which no commit refers to yet. Checkpoints are written
atomically, so a run that was stopped at any moment resumes with the shards that have none. They are all that the
processes of a run share, on any machine and any Beam runner. A checkpoint that cannot be parsed, whose shard has
changed since, or whose files are gone, counts as none. The plan is deleted first: a folder without one is a leftover.

A checkpoint is about a kilobyte. The moments of its rows, a hundred times as much for large latents, are in a file of
their own, which is written before it and read once, for the table's metadata.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from index.background import look_up
from index.errors import TableError
from index.table.storage import Storage

PLAN = "plan.json"
"""The settings and shards of the run, and what its table held when it began."""
LAYOUT = "layout.json"
"""The geometry and the balance of new rows, from which search vectors are laid out."""
META = "meta.json"
"""The table's metadata, ready to be committed, and the digest of the layout."""
STOP = "stop.json"
"""Why no further shard is to be started, if one process found a reason."""
VECTORS = "vectors.json"
"""Extension of a shard's file that names its fragments with their search vectors, ready to be committed."""
UNREAD, WAITING, PROGRESS = "unread", "waiting", "progress"
"""Extensions of a shard's files that say why it could not be read, what a worker waits for, and how many of its samples
are read so far."""
LOADED_AT_ONCE = 16
"""Checkpoints that are held at a time while all are loaded: with their moments they are large."""


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
    """Of the training rows, JSON-ready; None if there are none, or if they were not asked for."""
    has_moments: bool = False
    """Whether the moments are in a file of their own."""
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

    def load(self, shard: str, *, moments: bool = False) -> ShardCheckpoint | None:
        """Return the checkpoint of a shard, or None if the shard is not finished; on demand with its moments."""
        try:
            checkpoint = ShardCheckpoint(**self.read(file_name(shard)))
        except TypeError:  # None, or of another version of the software
            return None
        if moments and checkpoint.has_moments:
            checkpoint.moments = self.read(moments_name(shard))
            return checkpoint if checkpoint.moments is not None else None
        return checkpoint

    def load_all(self, shards: Sequence[str], *, moments: bool = True) -> Iterator[ShardCheckpoint]:
        """Yield the checkpoints of shards in their order, a few at a time; those that do not exist are left out."""
        outcomes = look_up(lambda shard: self._outcome(shard, moments), shards, at_once=LOADED_AT_ONCE)
        yield from filter(None, outcomes)

    def _outcome(self, shard: str, moments: bool) -> ShardCheckpoint | None:
        return self.load(shard, moments=moments) or self.load_unread(shard)

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
            if is_note or name in (STOP, META):
                self.storage.remove_file(self.uri(name))

    def save(self, checkpoint: ShardCheckpoint) -> None:
        """Write the checkpoint of a finished shard, its moments before it, and delete its progress."""
        shard, content = checkpoint.shard, asdict(checkpoint)
        if checkpoint.moments is not None:
            self.write(moments_name(shard), content.pop("moments"))
            content["has_moments"] = True
        self.write(file_name(shard), content)
        self.storage.remove_file(self.uri(file_name(shard, PROGRESS)))

    def save_progress(self, shard: str, samples: int) -> None:
        """Write how many samples of an unfinished shard were read; a failure to write it is ignored."""
        with contextlib.suppress(TableError):
            self.write(file_name(shard, PROGRESS), samples)

    def read(self, name: str) -> Any:
        """Return the content of a JSON file of the run, or None if it does not exist or was not written whole."""
        try:
            return self.storage.read_json(self.uri(name))
        except ValueError:
            return None

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file of the run atomically."""
        self.storage.write_text(self.uri(name), json.dumps(content, ensure_ascii=False, separators=(",", ":")))

    def read_many(self, names: Sequence[str]) -> Iterator[Any]:
        """Yield the contents of JSON files of the run, each as `read` returns it."""
        return look_up(self.read, names)

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


def moments_name(shard: str) -> str:
    """Return the name of the file of a shard's moments: in a folder of its own, which nobody lists."""
    return f"moments/{file_name(shard, 'txt')}"


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


class Watch:
    """Adds up the checkpoints of a run as they appear: each is read once, and a shard costs a few hundred bytes."""

    def __init__(self, shards: Sequence[str]) -> None:
        """Take the shards of the run; nothing is read before `look`."""
        self.counts = SampleCounts()
        """Of the finished shards."""
        self.samples = 0
        """Samples read so far, those of unfinished shards included."""
        self.waits: list[str] = []
        """What workers wait for, as they tell it."""
        self._unfinished = {file_name(shard, ""): shard for shard in shards}

    def look(self, checkpoints: Checkpoints) -> None:
        """List the folder once, and read what is new in it."""
        names = checkpoints.storage.names(checkpoints.folder)
        self.waits = [text for text in checkpoints.read_many(_ending(names, WAITING)) if text]
        for name in _ending(names, UNREAD):
            if (shard := self._unfinished.pop(name.removesuffix(UNREAD), None)) is not None:
                self.counts.add(ShardCheckpoint(shard, unread="unread"))
        new = [name for name in _ending(names, "json") if name.removesuffix("json") in self._unfinished]
        for name, content in zip(new, checkpoints.read_many(new), strict=True):
            with contextlib.suppress(TypeError):  # None, or of another version of the software
                self.counts.add(ShardCheckpoint(**content))
                del self._unfinished[name.removesuffix("json")]
        running = [name for name in _ending(names, PROGRESS) if name.removesuffix(PROGRESS) in self._unfinished]
        read = sum(samples or 0 for samples in checkpoints.read_many(running))
        self.samples = read + self.counts.samples


def _ending(names: Sequence[str], extension: str) -> list[str]:
    return [name for name in names if name.endswith(f".{extension}")]
