"""LayOutVectors: write the search vectors of a table's fragments, one fragment per worker at a time.

Vectors depend on statistics of all rows, so they are written after the other columns, to data files of their own. The
geometry that they need is not known when the graph is built: an earlier step of it writes a `Layout` to a file, and the
workers read it from there.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import pyarrow as pa

from index.table.commit import add_vectors
from index.table.schema import TableMeta
from index.table.storage import Storage, unwritable
from index.table.weights import load_weights
from pipeline.beam.gather import Spread
from pipeline.beam.write_lance import fragment_from_dict

PlacedFragment = tuple[int, str]
"""A fragment's position in the table, and its metadata as JSON."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What search vectors are computed from, besides the rows."""

    meta: TableMeta
    balance: float = 0.0
    """The balance coordinate of every row."""

    def write(self, uri: str, storage: Storage) -> None:
        """Write the layout as JSON."""
        storage.write_json(uri, {"meta": self.meta.to_json(), "balance": self.balance})

    @classmethod
    def read(cls, uri: str, storage: Storage, table: str) -> "Layout":
        """Read a layout that `write` wrote, and the weights that its geometry has in the folder of `table`."""
        content = storage.read_json(uri)
        return cls(load_weights(TableMeta.from_json(content["meta"]), table, storage), content["balance"])


class LayOutVectors(beam.PTransform):  # type: ignore[misc]
    """PCollection of (position, fragment as JSON) -> the same with the search vectors' data file in each fragment.

    Args:
        uri: the table.
        schema: columns of the fragments, without the search vector.
        layout_uri: file of a `Layout`, complete before the first element arrives.
        storage: how to reach an object store.
    """

    def __init__(self, uri: str, schema: pa.Schema, layout_uri: str, storage: Storage) -> None:
        super().__init__()
        self.step = _AddVectors(uri, schema, layout_uri, storage)

    def expand(self, fragments: Any) -> Any:
        """Build the graph."""
        return fragments | "Spread" >> Spread() | "Add vectors" >> beam.ParDo(self.step)


class _AddVectors(beam.DoFn):  # type: ignore[misc]
    """(position, fragment without vectors) -> (position, fragment with vectors)."""

    def __init__(self, uri: str, schema: pa.Schema, layout_uri: str, storage: Storage) -> None:
        self.uri, self.schema, self.layout_uri, self.storage = uri, schema, layout_uri, storage
        self.layout: Layout | None = None

    def process(self, element: PlacedFragment) -> Iterator[PlacedFragment]:
        position, text = element
        layout = self.layout = self.layout or Layout.read(self.layout_uri, self.storage, self.uri)
        fragment = fragment_from_dict(json.loads(text))
        try:
            fragment = add_vectors(self.uri, fragment, self.schema, layout.meta.geometry, layout.balance, self.storage)
        except OSError as error:
            raise unwritable(self.uri, error) from error
        yield position, json.dumps(fragment.to_json())
