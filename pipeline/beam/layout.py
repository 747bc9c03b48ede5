"""LayOutVectors: write the search vectors of a table's fragments, some fragments per worker at a time.

Vectors depend on statistics of all rows, so they are written after the other columns, to data files of their own. The
geometry that they need is not known when the graph is built: an earlier step of it, or the driver, writes a `Layout` to
a file, and the workers read it from there. What crosses Beam is names; what a worker has written is in a record, a file
per name, from which a later step or the driver commits it. A run that is repeated keeps the records that still hold.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam

from index.space.geometry import Geometry
from index.table.codec import from_json_dict, to_json_dict
from index.table.storage import Storage, unwritable
from index.table.weights import load_arrays
from pipeline.beam.gather import Spread

Fragment = dict[str, Any]
"""Metadata of a fragment, JSON-ready."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What workers compute search vectors from, besides the rows."""

    geometry: Geometry
    balance: float = 0.0
    """The balance coordinate of every row that has none of its own."""
    balance_digest: str = ""
    """Of the balance coordinates of single rows; empty if there are none."""

    @property
    def digest(self) -> str:
        """What tells this layout from others."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()[:32]

    def _content(self) -> dict[str, Any]:
        return {
            "geometry": to_json_dict(self.geometry),
            "balance": self.balance,
            "balance_digest": self.balance_digest,
        }

    def write(self, uri: str, storage: Storage) -> None:
        """Write the layout as JSON."""
        storage.write_json(uri, self._content())

    @classmethod
    def read(cls, uri: str, storage: Storage, table: str) -> "Layout":
        """Read a layout that `write` wrote, and the weights that its geometry has in the folder of `table`."""
        content = storage.read_json(uri)
        geometry = load_arrays(from_json_dict(Geometry, content["geometry"]), table, storage)
        return cls(geometry, content["balance"], content["balance_digest"])


class Fragments(ABC):
    """The fragments of a table, which workers find by names, and the records of their vectors. It is pickled."""

    @property
    @abstractmethod
    def uri(self) -> str:
        """URI of the table."""

    @property
    @abstractmethod
    def layout_uri(self) -> str:
        """File of a `Layout`, complete before the first name arrives."""

    @property
    @abstractmethod
    def storage(self) -> Storage:
        """How to reach an object store."""

    @abstractmethod
    def load(self, name: Any) -> list[Fragment]:
        """Return the fragments of a name, without the vectors to be written."""

    @abstractmethod
    def add_vectors(self, name: Any, fragment: Fragment, layout: Layout) -> Fragment:
        """Write the vectors of a fragment of `load`; return the fragment with their file."""

    @abstractmethod
    def record_uri(self, name: Any) -> str:
        """Return the file that says what was written for a name."""

    def read_record(self, name: Any, digest: str) -> list[Fragment] | None:
        """Return the fragments of a name with vectors of the layout with this digest; None if no record has them."""
        try:
            record = self.storage.read_json(self.record_uri(name))
        except ValueError:  # not written whole
            return None
        return record["fragments"] if isinstance(record, dict) and record.get("layout") == digest else None

    def write_record(self, name: Any, digest: str, fragments: list[Fragment]) -> None:
        """Write what `read_record` returns."""
        self.storage.write_json(self.record_uri(name), {"layout": digest, "fragments": fragments})

    def has_vectors(self, pending: list[Fragment], written: list[Fragment] | None) -> bool:
        """Return whether fragments of a record are those that have no vectors yet, and their vector files exist."""
        if written is None or [_rows_of(each) for each in written] != [_rows_of(each) for each in pending]:
            return False
        paths = [[file["path"] for file in each["files"]] for each in pending]
        return all(
            {file["path"] for file in each["files"][:-1]} <= set(before)
            and self.storage.exists(f"{self.uri}/data/{each['files'][-1]['path']}")
            for each, before in zip(written, paths, strict=True)
        )


class LayOutVectors(beam.PTransform):  # type: ignore[misc]
    """PCollection of distinct names -> the same names, once records of the vectors of their fragments are written."""

    def __init__(self, fragments: Fragments) -> None:
        super().__init__()
        self.fragments = fragments

    def expand(self, names: Any) -> Any:
        """Build the graph."""
        return (
            names
            | "Key" >> beam.Map(lambda name: (name, None))
            | "Spread" >> Spread()
            | "Add vectors" >> beam.ParDo(_AddVectors(self.fragments))
        )


class _AddVectors(beam.DoFn):  # type: ignore[misc]
    """(name, None) -> name, once the vectors of its fragments are written."""

    def __init__(self, fragments: Fragments) -> None:
        self.fragments = fragments
        self.layout: Layout | None = None
        self.digest = ""

    def process(self, element: tuple[Any, None]) -> Iterator[Any]:
        name, fragments = element[0], self.fragments
        if self.layout is None:
            self.layout = Layout.read(fragments.layout_uri, fragments.storage, fragments.uri)
            self.digest = self.layout.digest
        pending = fragments.load(name)
        if not fragments.has_vectors(pending, fragments.read_record(name, self.digest)):
            try:
                written = [fragments.add_vectors(name, each, self.layout) for each in pending]
            except OSError as error:
                raise unwritable(fragments.uri, error) from error
            fragments.write_record(name, self.digest, written)
        yield name


def _rows_of(fragment: Fragment) -> Fragment:
    """Return what a fragment says of its rows: all but its files."""
    return {name: value for name, value in fragment.items() if name != "files"}
