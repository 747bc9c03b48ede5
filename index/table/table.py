"""A Lance table on disk: open one version of it, scan its columns, take rows.

A `Table` is pinned to a version, so a later commit changes nothing that a reader sees. Writing is in
`index.table.commit`.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int, UInt8

from index.errors import OutOfReachError, SourceError, TableError, one_line
from index.reach import describe
from index.table.held import REMOTE_BYTES, Shared, column_digest, value_bytes
from index.table.schema import TRAIN, IndexRef, TableMeta, check_table
from index.table.storage import Storage, is_local
from index.table.weights import load_weights

if TYPE_CHECKING:
    import lance
    import lancedb
    from lancedb import AsyncTable


LANCE_STORES = ("s3://", "gs://", "az://")
VECTOR_INDEX = "vector_idx"
"""Lance's name of the vector index."""
READ_COLUMNS = ("split", "caption", "text", "latent")
"""What training and evaluation read of rows, again and again."""
IO_BUFFER_BYTES = 32 * 2**20
"""What a scan reads ahead of the batches that it decodes; Lance's own default is 2 GiB."""
TABLE_NAME = re.compile(r"[A-Za-z0-9_.-]+")
"""LanceDB's rule."""
INDEXED = "index-v"
"""Prefix of the tags of versions with a complete index; the version's number follows."""


@dataclass(frozen=True)
class Table:
    """One version of a table: its address and its metadata."""

    uri: str
    version: int
    meta: TableMeta
    storage: Storage = field(default_factory=Storage)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without open handles and their caches."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def at(self, version: "int | lance.LanceDataset", meta: TableMeta | None = None) -> "Table":
        """Return another version of this table, by number or as an open dataset; `meta` is by default this one's."""
        number = version if isinstance(version, int) else version.version
        other = Table(self.uri, int(number), meta or self.meta, self.storage)
        # Versions share most of their files: what was read of one is not read again for the next.
        other.__dict__["_shared"] = self.shared()
        if not isinstance(version, int):
            other.__dict__["_handle"] = version
        return other

    def shared(self) -> Shared:
        """Return what the versions of this table share in this process."""
        if "_shared" not in self.__dict__:
            self.__dict__["_shared"] = Shared()
        shared: Shared = self.__dict__["_shared"]
        return shared

    def dataset(self) -> "lance.LanceDataset":
        """Return this version as a Lance dataset, opened once.

        A dataset through which something is committed moves to the new version; the next call then opens this version
        again.
        """
        import lance

        handle = self.__dict__.get("_handle")
        if handle is None or handle.version != self.version:
            handle = lance.dataset(
                self.uri, version=self.version, storage_options=self.storage.lance, session=self.shared().lance
            )
            self.__dict__["_handle"] = handle
        return handle

    def lancedb(self) -> "lancedb.table.Table":
        """Return this version as a table of LanceDB, opened once."""
        import lancedb

        if "_lancedb" not in self.__dict__:
            folder, name = self._lancedb_name()
            session = self.shared().lancedb()
            table = lancedb.connect(folder, storage_options=self.storage.lance, session=session).open_table(name)
            table.checkout(self.version)
            self.__dict__["_lancedb"] = table
        opened: lancedb.table.Table = self.__dict__["_lancedb"]
        return opened

    async def lancedb_async(self, cache_bytes: int | None = None) -> "AsyncTable":
        """Return this version in LanceDB's asynchronous interface, opened once.

        At most `cache_bytes` of indexes are kept; None is LanceDB's default, 6 GiB.
        """
        import lancedb

        opened: dict[int | None, AsyncTable] = self.__dict__.setdefault("_lancedb_async", {})
        if cache_bytes not in opened:
            folder, name = self._lancedb_name()
            session = self.shared().lancedb(cache_bytes)
            connection = await lancedb.connect_async(folder, storage_options=self.storage.lance, session=session)
            opened[cache_bytes] = await connection.open_table(name)
            await opened[cache_bytes].checkout(self.version)
        return opened[cache_bytes]

    def _lancedb_name(self) -> tuple[str, str]:
        """Return the database folder and the table name by which LanceDB knows the table."""
        folder, _, name = self.uri.rpartition("/")
        return folder, name.removesuffix(".lance")

    def scan(
        self,
        columns: Sequence[str],
        split: str | None = None,
        *,
        batch_size: int = 65_536,
        batch_readahead: int = 2,
    ) -> Iterator[pa.RecordBatch]:
        """Iterate over some columns in table order, of the rows of one split or of all."""
        batches: Iterator[pa.RecordBatch] = self.dataset().to_batches(
            columns=list(columns),
            filter=_of_split(split),
            batch_size=batch_size,
            batch_readahead=batch_readahead,
            io_buffer_size=IO_BUFFER_BYTES,
        )
        return batches

    def column(self, name: str, split: str | None = TRAIN) -> Any:
        """Read a whole column in table order, of the rows of one split or (None) of all."""
        return column_array(self.dataset().to_table(columns=[name], filter=_of_split(split))[name])

    def hold(self, columns: Sequence[str], memory: int) -> None:
        """Read columns of all rows in one scan and keep them in memory, if they fit into `memory` bytes together.

        `take`, `column_batches` and, of the column `split`, `positions` then read nothing, in other versions too.
        """
        missing, schema = [name for name in columns if not self.holds(name)], self.dataset().schema
        kinds, rows = {name: schema.field(name).type for name in columns}, self.dataset().count_rows()
        # Of `split` only a bit is kept for each row and value.
        if not missing or rows * sum(value_bytes(kinds[name]) for name in kinds if name != "split") > memory:
            return
        vectors = {
            name: np.empty((rows, kinds[name].list_size), np.float16)
            for name in missing
            if pa.types.is_fixed_size_list(kinds[name])
        }
        others, start = defaultdict[str, list[pa.Array]](list), 0
        for batch in self.scan(missing, batch_size=8192):
            for name in missing:
                if name in vectors:
                    vectors[name][start : start + len(batch)] = column_array(batch[name])
                else:
                    others[name].append(batch[name])
            start += len(batch)
        for name in missing:
            if name == "split":
                self._keep("split", _masks(others["split"]))
            elif name in vectors:
                self._keep(name, vectors[name])
            else:
                self._keep(name, pa.concat_arrays(others[name] or [pa.array([], kinds[name])]))

    def hold_remote(self, columns: Sequence[str]) -> None:
        """Hold columns of a table on an object store, where each read takes a while."""
        if not is_local(self.uri):
            self.hold(columns, REMOTE_BYTES)

    def holds(self, column: str) -> bool:
        """Return whether a column is in memory."""
        return self._held(column) is not None

    def _held(self, column: str) -> Any:
        return self.shared().column(column, self._digest(column))

    def _keep(self, column: str, content: Any) -> None:
        self.shared().keep(column, self._digest(column), content)

    def _digest(self, column: str) -> str:
        """Return what tells the content of a column from that in other versions."""
        digests: dict[str, str] = self.__dict__.setdefault("_digests", {})
        if column not in digests:
            digests[column] = column_digest(self.dataset(), column)
        return digests[column]

    @property
    def stores_images(self) -> bool:
        """Whether the original images are kept."""
        return "image" in self.dataset().schema.names

    def count(self, split: str) -> int:
        """Return the number of a split's rows; the column is read once."""
        _, masks = self._split_masks()
        return int(np.bitwise_count(masks[split]).sum()) if split in masks else 0

    def positions(self, split: str) -> Int[np.ndarray, "N"]:
        """Return the positions of a split's rows: 0-based indices in table order; the column is read once."""
        count, masks = self._split_masks()
        bits = masks.get(split)
        return np.empty(0, np.int64) if bits is None else np.flatnonzero(np.unpackbits(bits, count=count))

    def is_in_split(self, positions: Int[np.ndarray, "*B"], split: str) -> Bool[np.ndarray, "*B"]:
        """Return whether the rows at some positions are in a split; the column is read once."""
        _, masks = self._split_masks()
        bits = masks.get(split)
        if bits is None:
            return np.zeros(positions.shape, bool)
        return np.asarray(bits[positions >> 3] >> (7 - (positions & 7)) & 1, bool)

    def _split_masks(self) -> tuple[int, dict[str, UInt8[np.ndarray, "_M"]]]:
        """Return the number of rows, and for each split whether they are in it, eight rows a byte."""
        if not self.holds("split"):
            self._keep("split", _masks(batch["split"] for batch in self.scan(["split"])))
        count, masks = self._held("split")
        return count, masks

    def take(self, positions: Int[np.ndarray, "B"], column: str) -> Any:
        """Read one column of the rows at some positions, in their order, with repeats; vectors are a B x dim array."""
        held = self._held(column)
        if held is None:
            return column_array(self.dataset().take(pa.array(positions), columns=[column])[column])
        return held[positions] if isinstance(held, np.ndarray) else column_array(held.take(pa.array(positions)))

    def column_batches(self, column: str, split: str, batch_size: int) -> Iterator[Any]:
        """Iterate over one column of a split in table order, at most `batch_size` rows at a time."""
        if self.holds(column):
            positions = self.positions(split)
            for start in range(0, len(positions), batch_size):
                yield self.take(positions[start : start + batch_size], column)
            return
        for batch in self.scan([column], split, batch_size=batch_size, batch_readahead=1):
            yield column_array(batch[column])

    def report(self, name: str) -> Any:
        """Read the report DB/NAME.reports/`name`.json; None if there is none."""
        return self.storage.read_json(f"{reports_of(self.uri)}/{name}.json")

    def write_report(self, name: str, content: Any) -> None:
        """Write the report DB/NAME.reports/`name`.json."""
        self.storage.write_json(f"{reports_of(self.uri)}/{name}.json", content)

    def write_page(self, name: str, html: str) -> str:
        """Write the page DB/NAME.reports/`name`.html and return its URI."""
        uri = f"{reports_of(self.uri)}/{name}.html"
        self.storage.write_text(uri, html)
        return uri

    def log(self, name: str) -> Path | None:
        """Return the progress log of a command; see `log_of`."""
        return log_of(self.uri, name)


def open_table(
    path: str | Path, *, version: int | None = None, indexed: bool = False, storage: Storage | None = None
) -> Table:
    """Open and check a table at its newest version, or at `version`.

    With `indexed`, open a version with a complete index: if the index of this version is not the one that its metadata
    describes, because another one is being built or was left unfinished, the last version that is tagged as complete.
    Raises TableError if there is no such table, if it is not ours, or if it has no index.
    """
    import lance

    uri, storage = table_uri(path), Storage.of() if storage is None else storage
    if not is_table(uri, storage):
        raise TableError(f"no table at {path}: create it with `pipeline encode SOURCE --table {path} ...`")
    shared = Shared()
    try:
        dataset = lance.dataset(uri, version=version, storage_options=storage.lance, session=shared.lance)
    except (ValueError, OSError) as error:
        if version is not None and version not in (kept := _versions(uri, storage)):
            last = ", ".join(map(str, kept[-9:]))
            raise TableError(
                f"{path} has no version {version} any more, it was pruned (the last are {last}): "
                "use a run on a version that is kept, or train again"
            ) from error
        raise TableError(f"{path} cannot be opened as a Lance table: {one_line(error)}") from error
    table = Table(uri, dataset.version, load_weights(check_table(dataset.schema), uri, storage), storage)
    table.__dict__.update(_handle=dataset, _shared=shared)
    if not indexed or index_is_current(dataset, table.meta.index):
        return table
    for number in [] if version is not None else complete_versions(dataset):
        complete = open_table(uri, version=number, storage=storage)
        if index_is_current(complete.dataset(), complete.meta.index):
            return complete
    raise TableError(f"{path} has no index: run `pipeline build-index {path}`")


def index_uuid(dataset: "lance.LanceDataset") -> str | None:
    """Return the UUID of a version's vector index (those of its segments, joined by commas); None without an index."""
    indices = (index for index in dataset.describe_indices() if index.name == VECTOR_INDEX)
    return next((",".join(sorted(str(segment.uuid) for segment in index.segments)) for index in indices), None)


def index_is_current(dataset: "lance.LanceDataset", ref: IndexRef | None) -> bool:
    """Return whether a version has the index that its metadata describes; exact search needs none.

    Metadata of version 1 has no UUID: its index is the described one if the last complete version has it too.
    """
    if ref is None or ref.index_type == "none":
        return ref is not None
    expected = ref.uuid
    if expected is None:
        complete = [version for version in complete_versions(dataset) if version <= dataset.version]
        expected = index_uuid(dataset.checkout_version(complete[0])) if complete else None
    return expected is not None and expected == index_uuid(dataset)


def complete_versions(dataset: "lance.LanceDataset") -> list[int]:
    """Return the versions that are tagged as having a complete index, newest first."""
    tags = (tag for tag in dataset.tags.list() if tag.startswith(INDEXED))
    return sorted((int(tag.removeprefix(INDEXED)) for tag in tags), reverse=True)


def _versions(uri: str, storage: Storage) -> list[int]:
    """Return the numbers of all versions; none if the newest cannot be opened either."""
    import lance

    try:
        return [int(each["version"]) for each in lance.dataset(uri, storage_options=storage.lance).versions()]
    except (ValueError, OSError):
        return []


def table_uri(path: str | Path) -> str:
    """Return the URI of DB/NAME.lance, with local paths made absolute (LanceDB takes `db...` for its cloud).

    Raises TableError if it does not name a table, or names one in a store that Lance does not write to.
    """
    text = str(path).rstrip("/")
    if text.startswith("~"):
        text = os.path.expanduser(text)
    if is_local(text) and text.partition("/")[0].endswith(":"):
        raise TableError(f"{text!r} has lost a slash: pass the URI as a str, not as a pathlib.Path")
    if not is_local(text) and not text.startswith(LANCE_STORES):
        raise TableError(f"{text!r} has a scheme that Lance does not write to: use a path, {', '.join(LANCE_STORES)}")
    name = text.rpartition("/")[2]
    if not name.endswith(".lance") or name == ".lance":
        raise TableError(
            f"{text!r} is not the name of a table: use the form DB/NAME.lance, for instance data/pairs.lance"
        )
    if not TABLE_NAME.fullmatch(name):
        example = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
        raise TableError(
            f"{text!r} is not a table name that LanceDB takes: use letters, digits, `_`, `-` and `.`, for instance "
            f"{example}"
        )
    return str(Path(text).absolute()) if is_local(text) else text


def rejects_uri(uri: str) -> str:
    """Return the URI of a table's rejects: DB/NAME_rejects.lance."""
    return uri.removesuffix(".lance") + "_rejects.lance"


def runs_folder(uri: str) -> str:
    """Return the folder of a table's unfinished encode runs: DB/NAME.encode, with a folder RUN_ID for each."""
    return uri.removesuffix(".lance") + ".encode"


def reports_of(uri: str) -> str:
    """Return the folder of a table's reports: DB/NAME.reports."""
    return uri.removesuffix(".lance") + ".reports"


def log_of(uri: str, name: str) -> Path | None:
    """Return the progress log DB/NAME.reports/`name`.jsonl; None on object stores, which cannot append to a file."""
    return Path(reports_of(uri)) / f"{name}.jsonl" if is_local(uri) else None


def is_table(uri: str, storage: Storage) -> bool:
    """Return whether a version was committed there; an encode run that was stopped leaves data without one.

    Raises TableError if the store cannot be reached.
    """
    try:
        return bool(storage.names(f"{uri}/_versions"))
    except OutOfReachError:
        raise
    except SourceError as error:
        raise TableError(str(error)) from error
    except Exception as error:  # every object store has errors of its own
        raise TableError(
            f"{uri} cannot be reached ({describe(error)}): check the address, the credentials and --storage-option"
        ) from error


def open_newest(uri: str, storage: Storage) -> "lance.LanceDataset | None":
    """Open the newest version of any Lance dataset; None if there is none. Raises TableError as `is_table` does."""
    import lance

    return lance.dataset(uri, storage_options=storage.lance) if is_table(uri, storage) else None


def sampled_rows(table: Table, max_rows: int, batch_size: int) -> Iterator[tuple[Any, Any]]:
    """Read text embeddings and latents of the training rows, or of every k-th of them if there are more than asked."""
    stride, seen = -(-table.count(TRAIN) // max_rows), 0
    for batch in table.scan(["text", "latent"], TRAIN, batch_size=batch_size, batch_readahead=1):
        kept = slice((-seen) % stride, None, stride)
        seen += len(batch)
        if len(text := column_array(batch["text"])[kept]):
            yield text, column_array(batch["latent"])[kept]


def column_array(column: pa.ChunkedArray | pa.Array) -> Any:
    """Convert an Arrow column to numpy; a fixed_size_list column to an array of rows x dim."""
    if isinstance(column, pa.Array):
        column = pa.chunked_array([column])
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy()
    dim = column.type.list_size
    flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(flat or [np.empty(0, np.float16)]).reshape(-1, dim)


def list_array(rows: Float[np.ndarray, "B D"]) -> pa.FixedSizeListArray:
    """Convert rows to a fixed_size_list<float16> column."""
    flat = pa.array(np.ascontiguousarray(rows, dtype=np.float16).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])


def _masks(splits: Iterable[pa.Array]) -> tuple[int, dict[str, UInt8[np.ndarray, "_"]]]:
    """Return the number of rows, and for each split a bit for each row that is set if the row belongs to it."""
    parts, count = dict[str, list[Bool[np.ndarray, "n"]]](), 0
    for column in splits:
        for value in column.unique().drop_null().to_pylist():
            parts.setdefault(value, [np.zeros(count, bool)])
        for value, part in parts.items():
            part.append(pc.fill_null(pc.equal(column, value), False).to_numpy(zero_copy_only=False))
        count += len(column)
    return count, {value: np.packbits(np.concatenate(part)) for value, part in parts.items()}


def _of_split(split: str | None) -> str | None:
    return None if split is None else f"split = '{split}'"
