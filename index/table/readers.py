"""Which versions of a table training runs need: a note in DB/NAME.readers for each run that has not finished.

A run keeps the version that it began with, also when it resumes. Its note stays if it is stopped, so `pipeline prune`
keeps that version until the run has finished or its folder is deleted. A run that may not write next to the table
leaves no note.
"""

import contextlib
import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from index.errors import TableError
from index.table.storage import Storage, is_local
from index.table.table import Table


@contextlib.contextmanager
def needed_by(table: Table, run: Path) -> Iterator[None]:
    """Note that the run in a folder needs this version; the note is deleted once the block has ended well."""
    run = run.absolute()
    name = hashlib.sha256(f"{socket.gethostname()}:{run}".encode()).hexdigest()[:24]
    uri = f"{readers_of(table.uri)}/{name}.json"
    note = {"version": table.version, "run": str(run), "host": socket.gethostname()}
    with contextlib.suppress(TableError):
        table.storage.write_json(uri, note)
    yield
    with contextlib.suppress(OSError):
        table.storage.remove(uri)
        if is_local(uri):
            Path(readers_of(table.uri)).rmdir()


def needed_versions(uri: str, storage: Storage) -> dict[int, str]:
    """Return the versions that unfinished training runs need, with a run of each.

    The note of a run on this host whose folder was deleted is deleted too. What cannot be read counts for nothing.
    """
    versions: dict[int, str] = {}
    for name in storage.names(readers_of(uri)):
        place = f"{readers_of(uri)}/{name}"
        note: Any = None
        with contextlib.suppress(ValueError):
            note = storage.read_json(place)
        if not isinstance(note, dict) or not isinstance(note.get("version"), int):
            continue
        run, host = str(note.get("run")), note.get("host")
        if host == socket.gethostname() and not Path(run).exists():
            storage.remove(place)
            continue
        versions[note["version"]] = f"{run} on {host}"
    return versions


def readers_of(uri: str) -> str:
    """Return the folder of the notes: DB/NAME.readers."""
    return uri.removesuffix(".lance") + ".readers"
