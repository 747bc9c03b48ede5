"""The large arrays of a geometry, in files of the table's own folder: DB/NAME.lance/_weights/DIGEST.npz.

The metadata, which every command parses, holds the SHA-256 of such a file instead of its content. A file is never
changed, so all versions of a table can refer to it; `prune` removes those that no version refers to. It is part of the
table's folder, so whoever copies the folder copies it too.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from index.errors import TableError
from index.space.geometry import Geometry
from index.table.schema import TableMeta, check_table
from index.table.storage import Storage

if TYPE_CHECKING:
    import lance

PARTS = ("centering", "reduction")
"""Fields of a Geometry that may have arrays in files."""


def store_weights(geometry: Geometry, uri: str, storage: Storage) -> Geometry:
    """Write the arrays that have no file yet; return the geometry with their digests. Raises TableError if that fails.

    The arrays of tables that keep them in the metadata get a file too.
    """

    def store(part: Any) -> Any:
        if part.digest:
            return part
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **{name: getattr(part, name) for name in _stored(part)})
        content = buffer.getvalue()
        digest = hashlib.sha256(content).hexdigest()
        if not storage.exists(_file(uri, digest)):
            storage.write_bytes(_file(uri, digest), content)
        return replace(part, digest=digest)

    return _with_parts(geometry, store)


def load_weights(meta: TableMeta, uri: str, storage: Storage) -> TableMeta:
    """Return metadata with the arrays of its geometry, as `load_arrays` reads them."""
    return replace(meta, geometry=load_arrays(meta.geometry, uri, storage))


def load_arrays(geometry: Geometry, uri: str, storage: Storage) -> Geometry:
    """Read the arrays that are in files; those of a missing file stay None, and raise TableError where they are used.

    Raises TableError if a file does not have its digest.
    """

    def load(part: Any) -> Any:
        if not part.digest or all(getattr(part, name) is not None for name in _stored(part)):
            return part
        arrays = _read(uri, part.digest, storage)
        return part if arrays is None else replace(part, **arrays)

    return _with_parts(geometry, load)


def unneeded_weights(
    dataset: "lance.LanceDataset", uri: str, storage: Storage, versions: list[int]
) -> list[tuple[str, int]]:
    """Return the files, with their bytes, that none of these versions refers to."""
    import lance

    names = storage.names(_folder(uri))
    if not names:
        return []
    needed = set[str]()
    for version in versions:
        opened = lance.dataset(dataset.uri, version=version, storage_options=storage.lance)
        needed.update(f"{digest}.npz" for digest in _digests(check_table(opened.schema).geometry))
    files, _ = storage.files(uri)
    places = [f"{_folder(uri)}/{name}" for name in names if name not in needed]
    return [(place, int(files.size(storage.files(place)[1]))) for place in places]


def _digests(geometry: Geometry) -> list[str]:
    return [part.digest for name in PARTS if (part := getattr(geometry, name)) is not None and part.digest]


def _with_parts(geometry: Geometry, change: Callable[[Any], Any]) -> Geometry:
    parts = {name: part for name in PARTS if (part := getattr(geometry, name)) is not None}
    return replace(geometry, **{name: change(part) for name, part in parts.items()}) if parts else geometry


def _stored(part: Any) -> list[str]:
    return [each.name for each in fields(part) if each.metadata.get("stored")]


@lru_cache(maxsize=4)
def _read(uri: str, digest: str, storage: Storage) -> dict[str, Any] | None:
    content = storage.read_bytes(_file(uri, digest))
    if content is None:
        return None
    if hashlib.sha256(content).hexdigest() != digest:
        raise TableError(f"{_file(uri, digest)} is damaged, its SHA-256 is not its name: restore it")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def _folder(uri: str) -> str:
    return f"{uri}/_weights"


def _file(uri: str, digest: str) -> str:
    return f"{_folder(uri)}/{digest}.npz"
