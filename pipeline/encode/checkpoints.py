"""What an encode run has finished, as files beside its table: DB/NAME.encode/, deleted once the table is published.

A shard that is finished leaves a mark with its fragments, which no commit refers to yet. The mark is written whole,
so a run that was stopped anywhere goes on with the shards that have none. Checkpoints are all that the processes of a run
have in common, whatever machine or Beam engine they are on.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from index.errors import TableError
from index.table.storage import Storage


@dataclass(slots=True)
class EncodedShard:
    """What one shard has become: fragments that no commit refers to yet, and a summary."""

    shard: str
    rows: int = 0
    rejected: int = 0
    filtered: int = 0
    fragments: list[dict[str, Any]] = field(default_factory=list)
    reject_fragments: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Samples that were read of it."""
        return self.rows + self.rejected + self.filtered


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The folder of one run's checkpoints."""

    folder: str
    storage: Storage = field(default_factory=Storage)

    def finished(self, shard: str) -> EncodedShard | None:
        """What a shard has become, if it is finished."""
        content = self.read(name_of(shard))
        return None if content is None else EncodedShard(**content)

    def finish(self, part: EncodedShard) -> None:
        """Say that a shard is finished."""
        self.write(name_of(part.shard), asdict(part))
        self.storage.remove(self._uri(name_of(part.shard, "begun")))

    def begin(self, shard: str, samples: int) -> None:
        """Say how many samples a shard that is being encoded has come to; a run does not fail for it."""
        with contextlib.suppress(TableError):
            self.write(name_of(shard, "begun"), samples)

    def look(self, shards: Sequence[str], known: dict[str, EncodedShard]) -> int:
        """Add to `known` what was finished since; the samples of all, with those that have begun."""
        there = set(self.storage.names(self.folder))
        begun = 0
        for shard in shards:
            if shard in known:
                continue
            if name_of(shard) in there:
                part = self.finished(shard)
                if part is not None:
                    part.fragments, part.reject_fragments = [], []
                    part.summary.pop("moments", None)
                    known[shard] = part
            elif name_of(shard, "begun") in there:
                begun += self.read(name_of(shard, "begun")) or 0
        return begun + sum(part.samples for part in known.values())

    def read(self, name: str) -> Any:
        """A file of the run; None where there is none."""
        return self.storage.read_json(self._uri(name))

    def write(self, name: str, content: Any) -> None:
        """Write a file of the run, whole."""
        self.storage.write_json(self._uri(name), content)

    def _uri(self, name: str) -> str:
        return f"{self.folder}/{name}"


def name_of(shard: str, kind: str = "json") -> str:
    """The name of a shard's file of some kind; `json` says that it is finished."""
    return f"{hashlib.sha256(shard.encode()).hexdigest()[:24]}.{kind}"
