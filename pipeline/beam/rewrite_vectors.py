"""Rewrite the search vectors of a whole table on Beam, one fragment at a time, and commit them together.

The balance coordinates of the rows are in one file, of which a worker reads the part of its fragment. Records of what
is written are in DB/NAME.vectors/ID until the commit; ID depends on the version and the layout, so a build that was
killed goes on with the fragments that are left if it comes to the same vectors again.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import apache_beam as beam
import numpy as np
from jaxtyping import Float32

from index.background import look_up
from index.build.layout import VectorWriter
from index.errors import TableError
from index.space.geometry import Geometry
from index.table.storage import Storage
from index.table.table import Table
from index.table.vectors import commit_vectors, encoded_columns, fragment_starts, replace_vectors, vectors_folder
from pipeline.beam.engine import check_engine
from pipeline.beam.layout import Fragment, Fragments, Layout, LayOutVectors
from pipeline.beam.progress import watch_files
from pipeline.beam.runner import run_beam
from pipeline.beam.write_lance import fragment_from_dict
from pipeline.config import RuntimeConfig

if TYPE_CHECKING:
    import lance


Name = tuple[int, int]
"""A fragment's id, and the position in table order of its first row."""


@dataclass(frozen=True)
class TableFragments(Fragments):
    """The fragments of one version of a table, and a folder for the layout, balance coordinates and records."""

    table: Table
    folder: str

    @property
    def uri(self) -> str:
        """Of the table."""
        return self.table.uri

    @property
    def storage(self) -> Storage:
        """How to reach it."""
        return self.table.storage

    @property
    def layout_uri(self) -> str:
        """File of the layout."""
        return f"{self.folder}/layout.json"

    @property
    def balance_uri(self) -> str:
        """File of the balance coordinates of all rows, float32 in table order."""
        return f"{self.folder}/balance.f32"

    def load(self, name: Name) -> list[Fragment]:
        """Return the fragment as the table has it."""
        return [self._fragment(name).metadata.to_json()]

    def add_vectors(self, name: Name, fragment: Fragment, layout: Layout) -> Fragment:
        """Write its vectors in the layout's geometry, with the balance of each row."""
        source, start = self._fragment(name), name[1]
        balance = self._balance(start, start + source.count_rows()) if layout.balance_digest else None
        return dict(replace_vectors(self.table, source, layout.geometry, balance).to_json())

    def record_uri(self, name: Name) -> str:
        """Return the file named by the fragment's id."""
        return f"{self.folder}/{name[0]}.json"

    def _fragment(self, name: Name) -> "lance.LanceFragment":
        fragment = self.table.dataset().get_fragment(name[0])
        assert fragment is not None, name
        return fragment

    def _balance(self, start: int, stop: int) -> Float32[np.ndarray, "n"]:
        size = np.dtype(np.float32).itemsize
        return np.frombuffer(self.storage.read_range(self.balance_uri, size * start, size * stop), np.float32)


def beam_vector_writer(runtime: RuntimeConfig) -> VectorWriter:
    """Return the function with which `build_index` writes vectors on Beam.

    Raises OptionError if the runner or its options are wrong.
    """
    check_engine(runtime)

    def write(table: Table, geometry: Geometry, balance: Float32[np.ndarray, "N"] | None, log: Path | None) -> Table:
        encoded_columns(table)
        names = _names(table, None if balance is None else len(balance))
        is_balanced = balance is not None and bool(balance.any())
        digest = hashlib.sha256(balance.tobytes()).hexdigest() if balance is not None and is_balanced else ""
        layout = Layout(geometry, balance_digest=digest)
        root = vectors_folder(table.uri)
        fragments = TableFragments(table, f"{root}/{_id(table, layout)}")
        _remove_others(table.storage, root, fragments.folder)
        if balance is not None and is_balanced:
            table.storage.write_bytes(fragments.balance_uri, balance.tobytes())
        layout.write(fragments.layout_uri, table.storage)
        run_beam(
            lambda pipeline: (
                pipeline | "Fragments" >> beam.Create(names) | "Lay out vectors" >> LayOutVectors(fragments)
            ),
            runtime,
            table.uri,
            monitor=watch_files(
                "write vectors",
                partial(_count_records, fragments),
                table.storage,
                total=len(names),
                unit="fragments",
                log=log,
            ),
            memory_advice="fewer --num-workers",
        )
        written = [fragment_from_dict(each) for each in _read_records(fragments, names, layout.digest)]
        return commit_vectors(table, geometry, written, balanced=is_balanced)

    return write


def _names(table: Table, balance_rows: int | None) -> list[Name]:
    """Return the names of all fragments. Raises TableError if there are not as many rows as balance coordinates."""
    starts = fragment_starts(table)
    if balance_rows not in (None, starts[-1]):
        raise TableError(f"{table.uri} changed meanwhile ({balance_rows} rows -> {starts[-1]}): rerun the same command")
    return [
        (int(each.fragment_id), int(start))
        for each, start in zip(table.dataset().get_fragments(), starts[:-1], strict=True)
    ]


def _id(table: Table, layout: Layout) -> str:
    return hashlib.sha256(json.dumps([table.version, layout.digest]).encode()).hexdigest()[:16]


def _remove_others(storage: Storage, root: str, folder: str) -> None:
    """Delete what builds have left that wrote other vectors."""
    for name in storage.names(root):
        if f"{root}/{name}" != folder:
            storage.remove(f"{root}/{name}")


def _read_records(fragments: TableFragments, names: list[Name], digest: str) -> list[Fragment]:
    """Return all fragments with vectors, in table order. Raises TableError if the engine has left some out."""
    records = list(look_up(lambda name: fragments.read_record(name, digest), names))
    left = sum(record is None for record in records)
    if left:
        raise TableError(
            f"the vectors of {fragments.uri} are not finished ({len(names) - left:,} of {len(names):,} fragments "
            "written): rerun the same command to resume"
        )
    return [each for record in records for each in record or []]


def _count_records(fragments: TableFragments, storage: Storage) -> int:
    return sum(name.removesuffix(".json").isdecimal() for name in storage.names(fragments.folder))
