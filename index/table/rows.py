"""Read rows in coalesced reads: the distinct ones, in the order in which they are stored, all columns at once.

Training needs rows at random, and some of them often. Where the rows of many steps are read together, neighbors share a
read, and a row that several steps need is read once.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from index.table.table import Table, column_array

ROW_BITS = 32
"""Lance's `_rowid` is an address: the fragment, then the row in it, in so many bits."""


class RowReader:
    """The rows of one version of a table, by Lance's row ids."""

    def __init__(self, table: Table) -> None:
        """Look up where the rows of each fragment begin, and in fragments with deleted rows which ones are left."""
        self._table, dataset = table, table.dataset()
        assert not dataset.has_stable_row_ids, "row ids are not addresses"
        fragments = dataset.get_fragments()
        ids, rows = ([getattr(each, name) for each in fragments] for name in ("fragment_id", "metadata"))
        counts = np.array([each.num_rows for each in rows], np.int64)
        self._ids = np.array(ids, np.int64)
        self.starts = np.concatenate([[0], counts.cumsum()])
        """Position in table order of the first row of each fragment, and the number of rows at the end."""
        order = np.argsort(ids)
        self._fragments, self._starts = self._ids[order], self.starts[:-1][order]
        self._left = {each.fragment_id: _rows_left(each) for each in fragments if each.metadata.num_deletions}

    @classmethod
    def of(cls, table: Table) -> "RowReader":
        """Return the reader of a table, which is made once."""
        reader = table.__dict__.get("_rows") or cls(table)
        table.__dict__["_rows"] = reader
        return reader

    def positions(self, row_ids: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
        """Return the positions of rows: 0-based indices in table order."""
        fragment, row = row_ids >> ROW_BITS, row_ids & (2**ROW_BITS - 1)
        for number, left in self._left.items():
            inside = fragment == number
            row[inside] = np.searchsorted(left, row[inside])
        return np.asarray(self._starts[np.searchsorted(self._fragments, fragment)] + row)

    @property
    def has_deletions(self) -> bool:
        """Whether rows of the table's files were deleted."""
        return bool(self._left)

    def row_ids(self, positions: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
        """Return the row ids of the rows at some positions."""
        index = np.searchsorted(self.starts[:-1], positions, side="right") - 1
        row, fragment = positions - self.starts[index], self._ids[index]
        for number, left in self._left.items():
            inside = fragment == number
            row[inside] = left[row[inside]]
        return np.asarray((fragment << ROW_BITS) + row)

    def take(self, row_ids: Int[np.ndarray, "B"], columns: Sequence[str]) -> list[Any]:
        """Read columns of the rows with some row ids, in their order, with repeats; vectors are B x dim arrays."""
        return take_columns(self._table, self.positions(row_ids), columns)


def take_columns(table: Table, positions: Int[np.ndarray, "B"], columns: Sequence[str]) -> list[Any]:
    """Read columns of the rows at some positions, in their order, with repeats; vectors are B x dim arrays."""
    if all(map(table.holds, columns)):
        return [table.take(positions, name) for name in columns]
    distinct, inverse = np.unique(positions, return_inverse=True)
    rows = table.dataset().take(distinct.tolist(), columns=list(columns))
    return [column_array(rows[name])[inverse] for name in columns]


def _rows_left(fragment: Any) -> Int[np.ndarray, "N"]:
    addresses = fragment.to_table(columns=[], with_row_address=True)["_rowaddr"].to_numpy()
    return np.asarray(addresses & (2**ROW_BITS - 1), np.int64)
